"""`python benchmarks/fidelity/report.py [--few] [--tune] [--scale S] [--seeds N]`: who keeps the thing, and the look.

Every contender draws each content image's thing in each style image's look, on the same base and seeds; networks that
have learned from real drawings only judge the pictures (judges.py), beside the right answers (pairs.py).

A stopped run goes on where it was: LoRAs and pictures are in `--work`, under all that determines them. `--few` takes
six pairs, a tenth of the paper's steps and one seed, and leaves its results there. `--tune` takes the pairs that
settings were chosen on, and what was tried there. On a GPU take `--scale 1`, the paper's number of steps.
"""

import argparse
import importlib.util
import json
import math
import os
import runpy
import sys
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.guidance import is_ready

    if not (is_ready() and importlib.util.find_spec("resvg_py")):
        for room in ("tests", "benchmarks"):  # ComfyUI in this process, and what renders emoji
            runpy.run_path(sys.path[0] + "/bootstrap.py")["enter"](room)

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from benchmarks.effects import RESAMPLES, Estimate, table
from benchmarks.fidelity.judges import FOLDER, TRUTHS, load_judge
from benchmarks.fidelity.pairs import ALIGNED_SETS, CONTENT_SET, PAIRS, SAME_LOOK, Drawing, Pair
from benchmarks.fidelity.studio import CFG, SAMPLER, SCHEDULER, STEPS, Own, Studio
from benchmarks.picture_scores import perceptual_distance, ssim
from consislora_core.metrics import leakage, structure_scores
from consislora_core.roles import ROLES
from consislora_core.schedule import NOISE, RECONSTRUCTION, Phase, Stage
from demo.server import PACK

EARLY, LATE = 1e-3, 5e-4  # learning rates before and after the transition, the demo workflow's
STYLE_PROMPT = "An image in the style of [v]"


def guided(content: float, style: float) -> dict[str, float]:
    return {"content_guidance": content, "style_guidance": style}


SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)
TRUE_LOOK = "look of the right answer"
EVERYWHERE = ("content", "outlines", "style", "leakage", "sum", TRUE_LOOK)  # for any pair
SCORES = (*EVERYWHERE, "SSIM", "perceptual distance")


Runs = tuple[Phase, ...]  # steps are those in the paper's schedule


class Recipe(NamedTuple):
    """How an image comes by its LoRA: stage 1 and, for a style image, stage 2; without it the style part is stage 1's.

    everywhere: on all attention layers, in place of two blocks. noises: a step.
    """

    image: Runs
    style: Runs = ()
    everywhere: bool = False
    noises: int = 1


# In runs of 500 steps where another recipe begins alike, so that both share them.
BEGIN = Phase(500, NOISE, EARLY)
RESTORE = Phase(1000, RECONSTRUCTION, LATE)
PAPER = Recipe((BEGIN, RESTORE), (RESTORE,))
B_LORA = Recipe((BEGIN,) * 2)
PLAIN = Recipe((Phase(1500, NOISE, EARLY),), everywhere=True)
NOISE_ONLY = Recipe((BEGIN,) * 3, (Phase(1000, NOISE, EARLY),))
ONE_STAGE = PAPER._replace(style=())
NO_TRANSITION = PAPER._replace(image=(Phase(1500, RECONSTRUCTION, LATE),))


def fading(recipe: Recipe) -> Recipe:
    """The last learning rate of each stage falls to 0."""
    image, style = ((*runs[:-1], runs[-1]._replace(fades=True)) for runs in (recipe.image, recipe.style))
    return recipe._replace(image=image, style=style)


def shorter(recipe: Recipe, image: int, style: int) -> Recipe:
    """One step for so many of stage 1, and for so many of stage 2, at as many times the learning rates."""

    def phases(runs: Runs, n: int) -> Runs:
        return tuple(run._replace(steps=math.ceil(run.steps / n), learning_rate=n * run.learning_rate) for run in runs)

    return recipe._replace(image=phases(recipe.image, image), style=phases(recipe.style, style))


QUALITY = fading(PAPER)._replace(noises=3)  # the presets of the training nodes
FAST = shorter(QUALITY, 3, 5)


class Contender(NamedTuple):
    """denoise: below 1 it begins at the content image, and has no LoRA for it. given: inputs of Dual Guidance.
    style_images: how many drawings in its look a style part is learned from.
    """

    label: str
    recipe: Recipe
    denoise: float = 1.0
    given: dict = {}
    style_images: int = 1


HALF = guided(0.5, 0.5)
TOLD = guided(0.25, 0.0) | {"style_strength": 1.4}  # what the nodes advise beside these presets
CONTENDERS = {
    "a": Contender("plain LoRA", PLAIN),
    "b": Contender("B-LoRA", B_LORA),
    "c": Contender("ConsisLoRA", PAPER),
    "d": Contender("c, noise loss only", NOISE_ONLY),
    "e": Contender("c, one stage", ONE_STAGE),
    "f": Contender("c, no transition", NO_TRANSITION),
    "g": Contender("c, guidance 1", PAPER, given=guided(1.0, 1.0)),
    "h": Contender("img2img, style LoRA", PAPER, denoise=0.6),
    "i": Contender("c, guidance 0.5", PAPER, given=HALF),
    "quality": Contender("3 noises, rates fade; content guidance 0.25, style strength 1.4", QUALITY, given=TOLD),
    "fast": Contender("quality in a third of the steps, stage 2 in a fifth; rates x 3, x 5", FAST, given=TOLD),
}
DIFFERENCES = ("c-b", "b-a", "c-a", "c-d", "c-e", "c-f", "g-c", "h-c", "i-c", "quality-c", "fast-c", "quality-fast")
TRADED, COLOURS = ("content", "style"), ("#3f789e", "#c0562b")

# For the base model asked by name: things and drawings that it has learned.
SEEN = ("cat-face", "rocket", "red-apple", "house", "guitar", "automobile", "key", "bell")
SEEN_LOOKS = (("twemoji", "pizza"), ("noto", "pizza"), ("emojione", "pizza"))

# What was tried on the pairs for tuning, with these inputs of Dual Guidance.
WAYS = {
    "": {},
    "1": {"style_strength": 1.25},
    "2": guided(0.25, 0.0) | {"style_strength": 1.25},
    "3": TOLD,
    "4": guided(0.5, 0.25),
    "5": guided(0.5, 0.0) | {"style_strength": 1.25},
    "6": guided(0.5, 0.25) | {"style_strength": 1.25},
    "7": guided(0.5, 0.5) | {"style_strength": 1.25},
    "8": guided(0.5, 0.25) | {"style_strength": 1.5},
    "9": guided(1.0, 0.0) | {"style_strength": 1.5},
    "10": guided(1.0, 0.5) | {"style_strength": 1.25},
    "11": guided(1.0, 0.0) | {"style_strength": 1.5, "end_percent": 0.5},
}


def tried(name: str, recipe: Recipe, ways: str) -> dict[str, Contender]:
    def label(given: dict) -> str:
        return ", ".join([name, *(f"{what.replace('_', ' ')} {value:g}" for what, value in given.items() if value)])

    return {f"{name}{way}": Contender(label(WAYS[way]), recipe, given=WAYS[way]) for way in ("", *ways.split())}


TRIED = {
    "c": CONTENDERS["c"],
    **tried("quality", QUALITY, "1 2 3 4 5 6 7 8"),
    **tried("fast", FAST, "3 5 6 9 10 11"),
    **{
        f"fast3 ({n}, {m})": Contender(f"fast3, one step for {n}, for {m}", shorter(QUALITY, n, m), given=TOLD)
        for n, m in ((3, 3), (3, 4), (3, 6), (4, 4), (5, 5))
    },
    **tried("fading", fading(PAPER), "5 6"),
}


# ---- pictures


class Bench:
    """seeds: how many pictures a pair."""

    def __init__(self, studio: Studio, pairs: list[Pair], scale: float, seeds: int):
        self.studio, self.pairs, self.scale, self.seeds = studio, pairs, scale, seeds
        self.contents = list(dict.fromkeys(pair.content for pair in pairs))
        self.styles = list(dict.fromkeys(pair.style for pair in pairs))

    def stages(self, recipe: Recipe) -> tuple[Stage, Stage | None]:
        def phases(runs: Runs) -> Runs:
            return tuple(run._replace(steps=round(self.scale * run.steps)) for run in runs)

        image = Stage("image", ROLES, phases(recipe.image), noises=recipe.noises)
        if not recipe.style:
            return image, None
        return image, Stage("style", ROLES[1:], phases(recipe.style), noise_offset=0.03, noises=recipe.noises)

    def loras(self, contender: Contender) -> dict[Drawing, Own]:
        """Of all content and style images; from several drawings of those in `SAME_LOOK`."""
        studio, recipe = self.studio, contender.recipe
        stage_1, stage_2 = self.stages(recipe)
        train = studio.learned_everywhere if recipe.everywhere else studio.learned
        contents = train(stage_1, "A [c]", self.contents).owns
        if contender.style_images > 1:
            groups = {style: group[: contender.style_images] for style, group in SAME_LOOK.items()}
            return contents | {style: self.style_of_all(recipe, group) for style, group in groups.items()}
        styles = train(stage_1, "A [v]", self.styles)
        if stage_2:
            styles = studio.learned(stage_2, STYLE_PROMPT, self.styles, styles)
        return contents | styles.owns

    def style_of_all(self, recipe: Recipe, drawings: list[Drawing]) -> Own:
        stage_1, stage_2 = self.stages(recipe)
        whole = self.studio.learned(stage_1, "A [v]", drawings, together=True)
        return self.studio.learned(stage_2, STYLE_PROMPT, drawings, whole, together=True).owns[drawings[0]]

    def pictures(self, contender: Contender, pairs: list[Pair], take: int = 0) -> Tensor:
        """A picture a pair (n 3 h w), each from a seed of its own, from which every contender draws it."""
        print(f"Drawing {len(pairs)} pictures, {contender.label} ...", file=sys.stderr, flush=True)
        owns, from_content = self.loras(contender), contender.denoise < 1
        return torch.cat(
            [
                self.studio.picture(
                    None if from_content else owns[pair.content],
                    owns[pair.style],
                    seed=self.pairs.index(pair) + take * len(self.pairs),
                    start=pair.content if from_content else None,
                    denoise=contender.denoise,
                    **contender.given,
                )
                for pair in pairs
            ]
        )

    # ---- scores

    @cached_property
    def judges(self) -> dict:
        return {name: load_judge(name) for name in ("content", "style")}

    def scores(self, pictures: Tensor, pairs: list[Pair]) -> dict[str, Tensor]:
        """Of a picture a pair, n each; where the truth does not lie on the content image's outlines, some are NaN."""
        content, style, truth = (
            self.studio.drawn(*drawings)
            for drawings in zip(*((pair.content, pair.style, pair.truth) for pair in pairs), strict=True)
        )
        things, looks = (
            [self.judges[name](images) for images in (pictures, content, style, truth)] for name in ("content", "style")
        )
        thing, content_thing, style_thing, true_thing = (judgement.features for judgement in things)
        look, _, style_look, true_look = (judgement.features for judgement in looks)
        leaks = torch.cat(
            [leakage(*(rows[[i]] for rows in (thing, style_thing, true_thing))) for i in range(len(pairs))]
        )
        outlines = torch.cat(
            [structure_scores(*images)["edges"] for images in zip(pictures.split(1), content.split(1), strict=True)]
        )
        same_thing, same_look = (thing * content_thing).sum(1), (look * style_look).sum(1)
        aligned = torch.tensor([pair.style[0] in ALIGNED_SETS for pair in pairs])
        scores = (
            same_thing,
            outlines,
            same_look,
            leaks,
            same_thing + outlines + same_look - leaks,
            (look * true_look).sum(1),
            ssim(pictures, truth).where(aligned, torch.nan),
            perceptual_distance(looks[0].maps, looks[3].maps).where(aligned, torch.nan),
        )
        return dict(zip(SCORES, scores, strict=True))

    def measured(self, contender: Contender, pairs: list[Pair] | None = None) -> dict[str, Tensor]:
        """Scores of a pair, each the mean over its pictures."""
        pairs = pairs or self.pairs
        takes = [self.scores(self.pictures(contender, pairs, take), pairs) for take in range(self.seeds)]
        return {name: torch.stack([scores[name] for scores in takes]).mean(0) for name in SCORES}

    def estimate(self, values: Tensor, pairs: list[Pair] | None = None) -> Estimate:
        """The mean, and its interval if other content images and other style images had been taken: they are shared."""
        grid = np.full((len(self.contents), len(self.styles)), np.nan)
        for pair, value in zip(pairs or self.pairs, values.tolist(), strict=True):
            grid[self.contents.index(pair.content), self.styles.index(pair.style)] = value
        rng = np.random.default_rng(0)
        rows, columns = (rng.integers(n, size=(RESAMPLES, n)) for n in grid.shape)
        cells = grid[rows[:, :, None], columns[:, None]]
        counts = np.isfinite(cells).sum((1, 2))
        means = np.nansum(cells, (1, 2))[counts > 0] / counts[counts > 0]
        return Estimate(np.nanmean(grid), *np.quantile(means, [0.025, 0.975]))


# ---- what a score can be


def references(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """Scores of pictures that no contender made."""
    truths, contents, styles = ([getattr(pair, name) for pair in bench.pairs] for name in ("truth", "content", "style"))
    studio = bench.studio
    return {
        "the right answer": bench.scores(studio.drawn(*truths), bench.pairs),
        "the right answer through the VAE": bench.scores(
            torch.cat([studio.decoded(studio.latents(truth)) for truth in truths]), bench.pairs
        ),
        "the content image": bench.scores(studio.drawn(*contents), bench.pairs),
        "the style image": bench.scores(studio.drawn(*styles), bench.pairs),
    }


def asked_by_name(studio: Studio) -> list[Estimate]:
    """Scores of the base model without LoRA, for things and looks that it has learned."""
    bench = Bench(studio, [Pair((CONTENT_SET, thing), style) for thing in SEEN for style in SEEN_LOOKS], 1.0, 1)
    prompts = [f"a {pair.content[1].replace('-', ' ')} in the style of {pair.style[0]}" for pair in bench.pairs]
    pictures = [studio.picture(None, None, seed, prompt) for seed, prompt in enumerate(prompts)]
    scores = bench.scores(torch.cat(pictures), bench.pairs)
    return [bench.estimate(scores[name]) for name in EVERYWHERE]


# ---- the report

INTRODUCTION = """\
# Who keeps the thing, and gets the look

{date}, `python benchmarks/fidelity/report.py{options}`, ComfyUI {comfyui}, torch {torch}.

{pairs} pairs: {contents} content images, each in the look of {styles} style images of {sets} emoji sets, all things and
sets new to the demo model. Seeds a pair: {seeds}, the same for all. Training: the paper's schedule times {scale:g},
rank 64, learning rates of the demo workflow ({early:g} before the transition, {late:g} after it and in stage 2).
Sampling: {sampler} {scheduler}, {steps} steps, cfg {cfg:g}.

- **content**: is it the same thing? Cosine of the content judge's features to the content image's.
- **outlines**: how well edges lie on the content image's, 1 is exactly.
- **style**: is it the same look? Cosine of the style judge's features to the style image's.
- **leakage**: how much of the style image's thing is in it, 0 as much as in the right answer, 1 it is the style image.
- **sum**: content + outlines + style - leakage. A content image left as it is gets as much as the right answer: the sum
  is for contenders of like style.
- **look of the right answer**: the style judge's cosine to that.
- **SSIM** and **perceptual distance** to the right answer, in the {aligned} sets that draw on the content images'
  outlines; the distance in the style judge's feature maps, 0 is equal.

The judges are networks that learned from real drawings only, and from none of the right answers. On those the content
judge finds the content image's features nearest in {nearest:.0%} (of {things} things); the style judge tells drawings
it has not seen apart among the benchmark's five sets in {apart:.0%}. In brackets: bootstrap 95 % intervals over content
images and style images.
"""

SCORES_TEXT = """\
## Scores

{contenders}
What these scores can be:

{references}
The last row is the base model, asked by name to draw {seen} things in {looks} looks that it has learned, against the
drawings of those sets; its judges have seen these.
"""

DIFFERENCES_TEXT = """\
## Differences

Pair by pair. In bold, those whose interval excludes 0.

{}"""

CHOICE_TEXT = """\
quality and fast were chosen on other pairs (fidelity_tuning.md): of the trainings that with the largest sum, and one
set of inputs for both with which the mean style stayed that of c; then for fast, when these pairs had been drawn with
a stage 2 of a third, the shortest stage 2 with no smaller sum there.
"""

CURVE_TEXT = """\
## Guidance

ConsisLoRA on {pairs} of the pairs, one seed each, one guidance as given, the other at 1.

{table}
![content against style](fidelity_curve.png)
"""

SEVERAL_TEXT = """\
## Several style images

ConsisLoRA with style parts from one, two and four drawings of a set, on {pairs} of the pairs: every content image in
the look of each set. Both stages take one of the drawings a step; stage 2 holds the content part that stage 1 learned
from all of them. Style and leakage are those of the first drawing, the only one of the first row.

{table}"""

SHEET_TEXT = """\
## Pictures

{key}.

![contact sheet](fidelity_sheet.png)
"""


def introduction(bench: Bench, options: str) -> str:
    accuracy = {}
    for name in ("content", "style"):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            accuracy |= json.loads(file.metadata()["accuracy"])
    return INTRODUCTION.format(
        date=date.today(),
        options=options,
        comfyui=runpy.run_path(os.environ["COMFYUI_PATH"] + "/comfyui_version.py")["__version__"],
        torch=torch.__version__,
        pairs=len(bench.pairs),
        contents=len(bench.contents),
        styles=len(bench.styles),
        sets=len({emoji for emoji, _ in bench.styles}),
        scale=bench.scale,
        seeds=bench.seeds,
        early=EARLY,
        late=LATE,
        sampler=SAMPLER,
        scheduler=SCHEDULER,
        steps=STEPS,
        cfg=CFG,
        aligned=len(ALIGNED_SETS),
        nearest=accuracy["truths nearest to their content image"],
        things=len({thing for _, thing in TRUTHS}),
        apart=accuracy["among the benchmark's sets"],
    )


def steps_of(bench: Bench, contender: Contender) -> str:
    image, style = bench.stages(contender.recipe)
    return f"{image.steps}, {image.steps} + {style.steps}" if style else f"{image.steps}, {image.steps}"


def scores_section(bench: Bench, measured: dict[str, dict[str, Tensor]], contenders: dict[str, Contender]) -> str:
    rows = [
        [name, contenders[name].label, steps_of(bench, contenders[name]), *map(bench.estimate, scores.values())]
        for name, scores in measured.items()
    ]
    others = [[name, *map(bench.estimate, scores.values())] for name, scores in references(bench).items()]
    others.append(["the base model, asked by name", *asked_by_name(bench.studio), "", ""])
    return SCORES_TEXT.format(
        contenders=table(["", "contender", "steps: content, style", *SCORES], rows),
        references=table(["picture", *SCORES], others),
        seen=len(SEEN),
        looks=len(SEEN_LOOKS),
    )


def bold(found: Estimate) -> str:
    """In bold if its interval excludes 0."""
    return f"**{found}**" if found.low > 0 or found.high < 0 else f"{found}"


def differences_section(bench: Bench, measured: dict[str, dict[str, Tensor]], wanted: list[str]) -> str:
    rows = []
    for pair in wanted:
        one, other = (measured[name] for name in pair.split("-"))
        rows.append([pair, *(bold(bench.estimate(one[name] - other[name])) for name in SCORES)])
    return DIFFERENCES_TEXT.format(table(["", *SCORES], rows))


def curve_section(bench: Bench, folder: Path) -> str:
    bench = Bench(bench.studio, bench.pairs, bench.scale, seeds=1)
    some = [pair for i, pair in enumerate(bench.pairs) if (i // len(bench.styles) + i) % 4 == 0]
    rows, curves = [], {}
    for role in ("content", "style"):
        sweep = [
            Contender(f"{role} guidance {g:g}", PAPER, given=guided(1.0, 1.0) | {f"{role}_guidance": g}) for g in SCALES
        ]
        measured = [bench.measured(contender, some) for contender in sweep]
        for contender, scores in zip(sweep, measured, strict=True):
            found = {name: bench.estimate(scores[name], some) for name in EVERYWHERE}
            moved = [bench.estimate(scores[name] - measured[0][name], some) for name in TRADED]
            rows.append([contender.label, *found.values(), *moved])
        curves[f"{role} guidance"] = [tuple(scores[name].mean().item() for name in TRADED) for scores in measured]
    keep_small(plane(curves), folder / "fidelity_curve.png")
    header = ["", *EVERYWHERE, *(f"{name}, less that at 0" for name in TRADED)]
    return CURVE_TEXT.format(pairs=len(some), table=table(header, rows))


def several_section(bench: Bench) -> str:
    some = [pair for pair in bench.pairs if pair.style in SAME_LOOK]
    contenders = [Contender(f"{count}", PAPER, style_images=count) for count in (1, 2, 4)]
    measured = [bench.measured(contender, some) for contender in contenders]
    rows = [
        [contender.label, *(bench.estimate(scores[name], some) for name in EVERYWHERE)]
        for contender, scores in zip(contenders, measured, strict=True)
    ]
    for contender, scores in zip(contenders[1:], measured[1:], strict=True):
        moved = [bold(bench.estimate(scores[name] - measured[0][name], some)) for name in EVERYWHERE]
        rows.append([f"{contender.label}, less those of 1", *moved])
    return SEVERAL_TEXT.format(pairs=len(some), table=table(["style images", *EVERYWHERE], rows))


def plane(curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Style over content, a curve through SCALES for each guidance."""
    page = Image.new("RGB", (1100, 900), "white")
    pen = ImageDraw.Draw(page)
    spans = [
        (min(values), max(values)) for values in zip(*(p for curve in curves.values() for p in curve), strict=True)
    ]

    def at(point):
        parts = zip((130, 820), (880, -720), point, spans, strict=True)
        return tuple(start + size * (value - low) / (high - low) for start, size, value, (low, high) in parts)

    for axis, (low, high) in enumerate(spans):
        step = float(f"{(high - low) / 5:.0e}")  # one digit
        for tick in np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step:
            ends = [(tick, edge) if axis == 0 else (edge, tick) for edge in spans[1 - axis]]
            pen.line([at(end) for end in ends], "lightgray", width=2)
            pen.text(at(ends[0]), f" {tick:.3g} ", "black", font_size=24, anchor=("mt", "rm")[axis])
    pen.text((1050, 860), "content", "black", font_size=28, anchor="rt")
    pen.text((20, 20), "style", "black", font_size=28)
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS, strict=True)):
        pen.text((260 + 320 * i, 20), name, colour, font_size=28)
        pen.line([at(point) for point in curve], colour, width=4)
        for scale, point in zip(SCALES, curve, strict=True):
            pen.text(at(point), f" {scale:g}", colour, font_size=26, anchor="lb")
    return page


def sheet_section(bench: Bench, contenders: dict[str, Contender], folder: Path) -> str:
    some = [pair for i, pair in enumerate(bench.pairs) if (i // len(bench.styles) * 3 + i) % len(bench.styles) == 0]
    contents, styles, truths = (
        bench.studio.drawn(*drawings)
        for drawings in zip(*((pair.content, pair.style, pair.truth) for pair in some), strict=True)
    )
    drawn = {name: bench.pictures(contender, some) for name, contender in contenders.items()}
    columns = {"content": contents, "style": styles, **drawn, "right answer": truths}
    page = Image.new("RGB", (136 * len(columns), 24 + 136 * len(some)), "white")
    for i, (name, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(page).text((136 * i + 68, 2), name, "black", font_size=18, anchor="mt")
        for j, picture in enumerate(pictures):
            page.paste(Image.fromarray((255 * picture.movedim(0, -1)).byte().numpy()), (136 * i + 4, 24 + 136 * j))
    keep_small(page, folder / "fidelity_sheet.png")
    return SHEET_TEXT.format(key=", ".join(f"{name}: {contender.label}" for name, contender in contenders.items()))


def keep_small(page: Image.Image, file: Path) -> None:
    page.quantize(48).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Who keeps the thing, and gets the look: scores of all contenders.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--few", action="store_true", help="six pairs; the results stay in DIR")
    parser.add_argument("--tune", action="store_true", help="the pairs that settings were chosen on")
    parser.add_argument("--scale", type=float, default=0.4, help="training steps, as a part of the paper's")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a pair")
    options = parser.parse_args()
    split, contenders = ("tune", TRIED) if options.tune else ("report", CONTENDERS)
    results = options.work if options.few else PACK / "benchmarks" / "results"
    pairs = first_six(PAIRS[split]) if options.few else PAIRS[split]
    scale, seeds = (0.1, 1) if options.few else (options.scale, options.seeds)
    bench = Bench(Studio(options.work), pairs, scale, seeds)
    measured = {name: bench.measured(contender) for name, contender in contenders.items()}
    against_c = [f"{name}-c" for name in contenders if name != "c"]
    sections = [
        introduction(bench, " --few" * options.few + " --tune" * options.tune),
        scores_section(bench, measured, contenders),
        differences_section(bench, measured, against_c if options.tune else DIFFERENCES),
    ]
    if not options.tune:
        sections += [CHOICE_TEXT, curve_section(bench, results), sheet_section(bench, contenders, results)]
        if not options.few:
            sections.insert(-1, several_section(bench))
    text = "\n".join(sections)
    (results / f"fidelity{'_tuning' * options.tune}.md").write_text(text, encoding="utf-8")
    print(text)


def first_six(pairs: list[Pair]) -> list[Pair]:
    """Two content images in the looks of three sets."""
    contents, styles = (list(dict.fromkeys(drawings)) for drawings in zip(*pairs, strict=True))
    return [Pair(content, style) for content in contents[:2] for style in styles[:3]]


if __name__ == "__main__":
    main()
