"""`python benchmarks/effects.py [--work DIR] [--few]`: what each control of dual guidance does to the picture.

On the demo model and images that it has never seen, through a real ComfyUI and the workflow files: it trains on the
images, draws every content image in every style, and scores each picture beside both images.

A stopped run continues: DIR keeps the LoRAs, by training workflow and demo model, and the pictures, by workflow and
LoRAs. A change in the pack's code is not detected: delete DIR after one. `--few` takes two combinations, and leaves its
results in DIR.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from datetime import date
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.common import set_up

    set_up()

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from benchmarks.common import (
    COLOURS,
    RESAMPLES,
    RESULTS,
    Estimate,
    chart_axes,
    comfyui_version,
    estimate,
    joined,
    table,
    template,
)
from benchmarks.fidelity.judges import Judge, load_judge
from benchmarks.picture_scores import style_distance
from consislora_core.metrics import content_score
from demo.run import IMAGES, Clock, nodes
from demo.server import PACK, ComfyServer
from demo.sheet import sheet

TRAIN = PACK / "workflows" / "api" / "train_and_stylise_demo.json"
STYLISE = PACK / "workflows" / "api" / "dual_guidance_demo.json"
WEIGHTS = PACK / "demo_model" / "weights" / "consislora_demo.safetensors"
DRAWN, SIDE = 256, 128  # pixels of a picture when it is drawn, and when it is scored
INTRODUCTION, SCALES_TEXT, STRENGTHS_TEXT, CHEAPER_TEXT, LOCK_TEXT = template("effects")

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
PLAIN = {"content_guidance": 0.0, "style_guidance": 0.0}
FULL = {"content_guidance": 1.0, "style_guidance": 1.0}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
CHEAPER = [
    *({"end_percent": end} for end in (0.3, 0.44, 0.6, 0.8)),
    *({"start_percent": start} for start in (0.2, 0.4)),
    *({"reuse_steps": steps} for steps in (2, 3, 5)),
]
DENOISE = (0.5, 0.65, 0.8, 1.0)
WAYS = ("noised", "locked")
SCORES = ("content", "style", "outlines", "style_distance")
TITLES = ("content score", "style score", "outlines", "style distance")


class Pair(NamedTuple):
    content: str
    style: str


TRAINED = [Pair("crown-flat", "umbrella-high-contrast"), Pair("owl-flat", "balloon-3d")]


class Bench(NamedTuple):
    """Where pictures come from. loras: the LoRAs' folder, by its name in models/loras."""

    server: ComfyServer
    cache: Path
    loras: str
    pairs: list[Pair]
    seeds: int = 3  # of each pair


class Scored(NamedTuple):
    """Pictures (n 3 h w) of all pairs, seed after seed, and their scores (n): by the judges, and by pixels."""

    pictures: Tensor
    content: Tensor
    style: Tensor
    outlines: Tensor
    style_distance: Tensor


def lora_name(loras: str, image: str) -> str:
    return f"{loras}/{image}_00001.safetensors"


def train_pairs(server: ComfyServer, loras: str) -> None:
    """Every pair whose LoRAs are not there yet."""
    for pair in TRAINED:
        if all((server.base / "models" / "loras" / lora_name(loras, image)).exists() for image in pair):
            continue
        print(f"Training on {pair.content} and {pair.style} ...", file=sys.stderr, flush=True)
        prompt = json.loads(TRAIN.read_text(encoding="utf-8"))
        for node, image in zip(nodes(prompt, "LoadImage"), pair, strict=True):
            prompt[node]["inputs"]["image"] = f"{image}.png"
        for node, image in zip(nodes(prompt, "ConsisLoRASave"), pair, strict=True):
            prompt[node]["inputs"]["filename"] = f"{loras}/{image}"
        server.run(prompt, timeout=4 * 3600, on_event=Clock(prompt))


def build_prompt(bench: Bench, pair: Pair, seeds: int, **inputs) -> dict:
    """The workflow for a pair, with other inputs of the sampler."""
    prompt = json.loads(STYLISE.read_text(encoding="utf-8"))
    (sampler,), (empty,) = nodes(prompt, "ConsisLoRASampler"), nodes(prompt, "EmptyLatentImage")
    for image, name in pair._asdict().items():
        prompt[prompt[sampler]["inputs"][image][0]]["inputs"]["lora_name"] = lora_name(bench.loras, name)
    prompt[empty]["inputs"]["batch_size"] = seeds
    prompt[sampler]["inputs"] |= {**FULL, **inputs}
    return prompt


def build_img2img(bench: Bench, pair: Pair, way: str, denoise: float) -> dict:
    """The workflow for a pair, begun at the content image's latent: noised once a seed, or locked."""
    seeds = bench.seeds if way == "noised" else 1
    settings = {"denoise": denoise, "structure_lock": way == "locked"}
    prompt = build_prompt(bench, pair, seeds, latent_image=["start", 0], **settings)
    (base,) = nodes(prompt, "ConsisLoRADemoModel")
    size = {"upscale_method": "lanczos", "largest_size": DRAWN}
    start = {
        "image": ("LoadImage", {"image": f"{pair.content}.png"}),
        "sized": ("ImageScaleToMaxDimension", {"image": ["image", 0], **size}),
        "latent": ("VAEEncode", {"pixels": ["sized", 0], "vae": [base, 2]}),
        "start": ("RepeatLatentBatch", {"samples": ["latent", 0], "amount": seeds}),
    }
    return prompt | {node: {"class_type": name, "inputs": inputs} for node, (name, inputs) in start.items()}


def draw(bench: Bench, prompt: dict) -> list[Path]:
    """The pictures of a workflow, one a seed."""
    names = [prompt[node]["inputs"]["lora_name"] for node in nodes(prompt, "ConsisLoRALoad")]
    loras = [(bench.server.base / "models" / "loras" / name).read_bytes() for name in names]
    parts = [json.dumps(prompt, sort_keys=True).encode(), *loras]
    folder = bench.cache / hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    if not folder.exists():
        done, pair = len(list(bench.cache.glob("*"))), " and ".join(Path(name).stem for name in names)
        print(f"{done} workflows done, next one for {pair} ...", file=sys.stderr, flush=True)
        unfinished = folder.with_suffix(".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for seed, picture in enumerate(bench.server.images(bench.server.run(prompt))):
            shutil.copy(picture, unfinished / f"{seed}.png")
        unfinished.rename(folder)
    return sorted(folder.iterdir())


def load_pictures(*paths: Path) -> Tensor:
    """Picture files as b 3 h w, 0 to 1."""
    sized = [Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for path in paths]
    return rearrange([torch.tensor(np.asarray(picture)) for picture in sized], "b h w c -> b c h w") / 255


def draw_and_score(bench: Bench, prompts: list[dict]) -> Scored:
    """A workflow for each pair, drawn and scored."""
    pictures = [load_pictures(*draw(bench, prompt)) for prompt in prompts]
    images = [[load_pictures(IMAGES / f"{name}.png") for name in pair] for pair in bench.pairs]
    scores = [
        (
            judge_similarity("content", drawn, content),
            judge_similarity("style", drawn, style),
            content_score(drawn, content),
            style_distance(drawn, style),
        )
        for drawn, (content, style) in zip(pictures, images, strict=True)
    ]
    return Scored(*map(torch.cat, [pictures, *zip(*scores, strict=True)]))


@cache
def load_cached_judge(name: str) -> Judge:
    return load_judge(name)


def judge_similarity(name: str, pictures: Tensor, image: Tensor) -> Tensor:
    """Cosines (n) of a judge's features of pictures (n 3 h w) with those of an image (1 3 h w)."""
    return (load_cached_judge(name)(pictures).features * load_cached_judge(name)(image).features).sum(1)


def measure(bench: Bench, **inputs) -> Scored:
    return draw_and_score(bench, [build_prompt(bench, pair, bench.seeds, **inputs) for pair in bench.pairs])


def compare(ours: Scored, theirs: Scored) -> tuple[Estimate, Estimate]:
    """By how much outlines and style distance of the same pictures differ."""
    return estimate(ours.outlines - theirs.outlines), estimate(ours.style_distance - theirs.style_distance)


def save_small(page: Image.Image, file: Path) -> None:
    """Saves a page in a size for a repository."""
    small = page.resize((2 * page.width // 3, 2 * page.height // 3), Image.Resampling.LANCZOS)
    small.quantize(128).save(file, optimize=True)


def write_scales(bench: Bench, folder: Path) -> str:
    plain, tables = measure(bench, **PLAIN), []
    figure, axes = chart_axes(2)
    for name, colour in zip(PLAIN, COLOURS, strict=False):
        sweep, lines = [measure(bench, **{name: scale}) for scale in SCALES], []
        for label, found in [*zip(SCALES, sweep, strict=True), ("both 0", plain)]:
            line = [label]
            for score in SCORES:
                values = getattr(found, score)
                line += [f"{values.mean():.3f}", estimate(values - getattr(sweep[0], score))]
            lines.append(line)
        tables.append(table([name, *(cell for title in TITLES for cell in (title, "difference"))], lines))
        for i, axis in enumerate(axes):
            means, low, high = zip(*(line[2 + 2 * i] for line in lines[:-1]), strict=True)
            axis.plot(range(len(SCALES)), means, color=colour, label=name)
            axis.vlines(range(len(SCALES)), low, high, color=colour)
    for axis, title in zip(axes, TITLES, strict=False):
        axis.set(title=f"{title}, against guidance 0", xticks=range(len(SCALES)), xticklabels=SCALES)
        axis.legend()
    figure.savefig(folder / "effects_guidance.png")
    return SCALES_TEXT.format("\n".join(tables))


def write_strengths(bench: Bench, folder: Path) -> str:
    pair = bench.pairs[0]

    def cell(content, style):
        prompt = build_prompt(bench, pair, 1, content_strength=content, style_strength=style)
        return f"content {content:g}, style {style:g}", draw(bench, prompt)[0]

    images = [(f"{image} image", IMAGES / f"{name}.png") for image, name in pair._asdict().items()]
    rows = [[cell(content, style) for style in STRENGTHS] for content in STRENGTHS]
    save_small(sheet([images, *rows]), folder / "effects_strengths.png")
    return STRENGTHS_TEXT.format(pair)


def write_cheaper(bench: Bench) -> str:
    full, plain = measure(bench), measure(bench, **PLAIN)
    by_pair = [scores.view(-1, bench.seeds) for scores in (full.outlines, full.style_distance)]
    between = [(scores - scores.roll(1, 1)).abs().mean().item() for scores in by_pair]
    within, equal, lines = [], [], []
    for change in CHEAPER:
        found, name = measure(bench, **change), " ".join(f"{key} {value}" for key, value in change.items())
        differences = compare(found, full)
        lost = estimate(picture_distance(found, full) / picture_distance(plain, full))
        lines.append([name, count_guided_steps(**change), lost, *differences])
        if all(-bound < d.low and d.high < bound for d, bound in zip(differences, between, strict=True)):
            within.append(name)
        if all(d.low <= 0 <= d.high for d in differences):
            equal.append(name)
    lines.append(["no guidance", 0, 1, *compare(plain, full)])
    header = ["setting", "guidance computed in", "effect lost", "outlines", "style distance"]
    names = {"within": ", ".join(within) or "none", "equal": ", ".join(equal) or "none"}
    return CHEAPER_TEXT.format(table=table(header, lines), between=between, **names)


def picture_distance(ours: Scored, theirs: Scored) -> Tensor:
    """The norm of the difference (n) between pictures of the same pairs and seeds."""
    return (ours.pictures - theirs.pictures).flatten(1).norm(dim=1)


def count_guided_steps(start_percent: float = 0.0, end_percent: float = 1.0, reuse_steps: int = 1) -> str:
    """In how many steps guidance is computed, with SDXL's noise levels in the spacing of Karras et al. (2022)."""
    prompt = json.loads(STYLISE.read_text(encoding="utf-8"))
    steps = prompt[nodes(prompt, "ConsisLoRASampler")[0]]["inputs"]["steps"]
    alphas_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    sigmas = (1 / alphas_bar - 1).sqrt()  # by timestep
    levels = torch.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps) ** 7
    percents = 1 - torch.searchsorted(sigmas, 0.999 * levels) / 999
    inside = ((percents >= start_percent) & (percents <= end_percent)).sum().item()
    return f"{-(-inside // reuse_steps)} of {steps} steps"


def write_lock(bench: Bench, folder: Path) -> str:
    rows, curves = [], {}
    for way in WAYS:
        sweep = [draw_and_score(bench, [build_img2img(bench, pair, way, d) for pair in bench.pairs]) for d in DENOISE]
        rows += [
            [way, d, estimate(s.outlines), estimate(s.style_distance)] for d, s in zip(DENOISE, sweep, strict=True)
        ]
        stacked = torch.stack([torch.stack([s.style_distance, s.outlines]) for s in sweep], -1)
        curves[way] = stacked.view(2, len(bench.pairs), -1, len(DENOISE)).mean(2).numpy()  # 2 pairs denoise
    save_small(draw_lock_sheet(bench), folder / "effects_lock.png")
    ways = curves["locked"], curves["noised"]
    lead, reach = bootstrap_lead(*ways), shared_range(*(curve.mean(1) for curve in ways))
    verdict = "Locked is better" if lead.low > 0 else "Noised is better" if lead.high < 0 else "Neither is better"
    columns = ["way", "denoise", "outlines", "style distance"]
    return LOCK_TEXT.format(table=table(columns, rows), reach=reach, lead=lead, verdict=verdict)


def draw_lock_sheet(bench: Bench) -> Image.Image:
    """Both ways below each trained pair's images, a line for each denoise."""
    rows = [[(name, IMAGES / f"{name}.png") for pair in TRAINED for name in pair]]
    for denoise in DENOISE:
        prompts = [(way, build_img2img(bench, pair, way, denoise)) for pair in TRAINED for way in WAYS]
        rows.append([(f"{way}, denoise {denoise}", draw(bench, prompt)[0]) for way, prompt in prompts])
    return sheet(rows)


def bootstrap_lead(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """The `lead` of two ways' mean curves (2 pairs n). Resamples that share no place do not count."""
    pairs = ours.shape[1]
    resampled = np.random.default_rng(0).integers(pairs, size=(RESAMPLES, pairs))
    leads = [mean_lead(ours[:, chosen].mean(1), theirs[:, chosen].mean(1)) for chosen in resampled]
    return Estimate(mean_lead(ours.mean(1), theirs.mean(1)), *np.nanquantile(leads, [0.025, 0.975]))


def mean_lead(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How much higher one curve (2 n: place, height) is than another, on average where both are; NaN if nowhere."""
    low, high = shared_range(ours, theirs)
    places = np.linspace(low, high, 20) if low < high else np.nan
    heights = [np.interp(places, *curve[:, curve[0].argsort()]) for curve in (ours, theirs)]
    return (heights[0] - heights[1]).mean()


def shared_range(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The first and last place (the first of the two) that both curves reach."""
    return max(ours[0].min(), theirs[0].min()), min(ours[0].max(), theirs[0].max())


def write_introduction(bench: Bench) -> str:
    images = [[load_pictures(IMAGES / f"{name}.png") for name in pair] for pair in bench.pairs]
    return INTRODUCTION.format(
        date=date.today(),
        few=" --few" if bench.pairs == TRAINED else "",
        comfyui=comfyui_version(),
        torch=torch.__version__,
        pairs=len(bench.pairs),
        bench=bench,
        far=torch.cat([style_distance(content, style) for content, style in images]).mean(),
        other=torch.cat([content_score(style, content) for content, style in images]).mean(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what each control of dual guidance does to the picture.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--few", action="store_true", help="two combinations; the results stay in DIR")
    options = parser.parse_args()
    everything = [Pair(*names) for names in product(*zip(*TRAINED, strict=True))]
    pairs, results = (TRAINED, options.work) if options.few else (everything, RESULTS)
    loras = f"effects/{hashlib.sha256(TRAIN.read_bytes() + WEIGHTS.read_bytes()).hexdigest()[:8]}"
    with ComfyServer(options.work / "comfyui", Path(os.environ["COMFYUI_PATH"])) as server:
        for picture in IMAGES.glob("*.png"):
            server.upload(picture)
        train_pairs(server, loras)
        bench = Bench(server, options.work / "pictures", loras, pairs)
        sections = [write_introduction(bench), write_scales(bench, results), write_strengths(bench, results)]
        sections += [write_cheaper(bench), write_lock(bench, results)]
    text = joined(sections)
    (results / "effects.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
