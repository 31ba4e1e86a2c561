"""`python benchmarks/fidelity/shorter.py [--images 4] [--scale 0.2]`: can a preset train in a quarter of paper's time?

On the pairs for tuning: content LoRAs trained in fewer steps or on smaller pictures, drawn with the style LoRAs of the
preset quality; and style LoRAs so trained, with its content LoRAs. Without guidance, one seed a pair. Seconds are those
of a step of one LoRA, measured in the same run. LoRAs and pictures are kept as by report.py; the table is also in
benchmarks/results/fidelity_shorter.md.
"""

import argparse
import statistics
import sys
import time
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.judges import SIDE
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import (
    AS_QUALITY,
    CONTENT_PROMPT,
    LATE,
    PAPER,
    QUALITY,
    STYLE_PROMPT,
    TRIED,
    Bench,
    Recipe,
    first_pairs,
)
from benchmarks.fidelity.studio import Own, Studio
from consislora_core.schedule import MUON_RATE, RECONSTRUCTION, Phase, Stage
from consislora_core.trainer import Trainer
from demo.server import PACK

SHOWN = ("content", "outlines", "style", "sum")
TIMED = 12  # steps, of which the first two are left out


class Part(NamedTuple):
    """How the LoRAs of one role's images are trained, with the size of the pictures in each phase of either stage."""

    label: str
    recipe: Recipe
    sizes: tuple[tuple[float, ...], ...]


def twice(steps: int) -> Phase:
    """Steps with the reconstruction loss by Muon, at twice the rate of quality in 300 steps, which falls to 0."""
    return Phase(steps, RECONSTRUCTION, 2 * MUON_RATE * LATE, fades=True)


def content(label: str, *phases: tuple[Phase, float]) -> Part:
    image, sizes = zip(*phases, strict=True)
    return Part(f"content: {label}", AS_QUALITY._replace(image=image, style=()), (sizes,))


HALF_SIZE_STYLE = AS_QUALITY._replace(image=(twice(400),), style=(Phase(500, RECONSTRUCTION, 2 * LATE, True),))
PARTS = [  # steps are those in the paper's schedule
    content("1500 steps on pictures of 1/2 the side", *((phase, 0.5) for phase in AS_QUALITY.image)),
    content("375 steps, reconstruction loss alone", (twice(375), 1.0)),
    Part("style: 400 steps at 1/2, reconstruction loss alone, then 500 at 1/2", HALF_SIZE_STYLE, ((0.5,), (0.5,))),
]
WHOLE = ((1.0, 1.0), (1.0,))  # sizes of the paper's phases


class Shorter(Bench):
    def parts(self, part: Part) -> dict[Drawing, Own]:
        """The LoRAs of the content images, or of the style images."""
        stage_1, stage_2 = self.stages(part.recipe)
        settings = dict(recolourings=part.recipe.recolourings, sizes=part.sizes[0])
        if stage_2 is None:
            return self.studio.learned(stage_1, CONTENT_PROMPT, self.contents, **settings).owns
        whole = self.studio.learned(stage_1, "A [v]", self.styles, **settings)
        return self.studio.learned(stage_2, STYLE_PROMPT, self.styles, whole, sizes=part.sizes[1]).owns

    def scores_of(self, owns: dict[Drawing, Own], locked: bool = False, **settings: float) -> dict[str, Tensor]:
        """locked: with the structure lock in the style image's palette. settings: of Dual Guidance."""
        pictures = []
        for seed, pair in enumerate(self.pairs):
            start = dict(start=pair.content, locked=True, palette=pair.style) if locked else {}
            pictures.append(self.studio.picture(owns[pair.content], owns[pair.style], seed, **start, **settings))
        return self.scores(torch.cat(pictures), self.pairs)

    def seconds(self, recipe: Recipe, sizes: tuple[tuple[float, ...], ...]) -> float:
        """Of the trainings of one image."""
        stages = [stage for stage in self.stages(recipe) if stage]
        return sum(
            phase.steps * self._step_seconds(stage.learns, stage.optimizer, size)
            for stage, of_stage in zip(stages, sizes, strict=True)
            for phase, size in zip(stage.phases, of_stage, strict=True)
        )

    @cache  # noqa: B019
    def _step_seconds(self, learns: tuple[str, ...], optimizer: str, size: float) -> float:
        studio, host = self.studio, self.studio.pack.host.training_model
        latents = studio.latents(self.contents[0], size=size)
        stage = Stage("image", learns, (Phase(TIMED, RECONSTRUCTION, LATE),), optimizer=optimizer)
        with host.open_for_training(studio.model, latents["samples"].shape, torch.float32) as denoiser:
            z_0 = host.clean_latents(studio.model, latents)
            cond = host.encoded_conditioning(studio.model, studio.text(CONTENT_PROMPT), z_0)
            with Trainer(denoiser, z_0, cond, stage) as trainer:
                ends = [time.perf_counter() for _ in trainer]
        return statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))

    def sheet(self, quality: dict[Drawing, Own], small: dict[Drawing, Own], size: float) -> Image.Image:
        """Pairs as drawn by quality, and by content LoRAs of smaller pictures: in full, and at their own size."""
        rows = []
        for seed, pair in list(enumerate(self.pairs))[:: len(self.styles) + 1]:
            style, content = quality[pair.style], small[pair.content]
            pictures = [
                self.studio.drawn(pair.content),
                self.studio.drawn(pair.style),
                self.studio.picture(quality[pair.content], style, seed),
                self.studio.picture(content, style, seed),
                self.studio.picture(content, style, seed, size=size),
            ]
            rows.append(torch.cat([F.adaptive_avg_pool2d(picture.float(), SIDE) for picture in pictures], 3))
        pixels = (255 * rearrange(torch.cat(rows, 2), "1 c h w -> h w c")).byte().numpy()
        return Image.fromarray(pixels).quantize(128, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fewer steps and smaller pictures, for content and for style.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--scale", type=float, default=0.2, help="training steps, as a part of the paper's")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images, and style images")
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["tune"], options.images, options.images)
    bench = Shorter(Studio(options.work), pairs, options.scale, 1)
    quality = bench.loras(TRIED["quality"])
    paper = bench.scores_of(bench.loras(TRIED["c"]))
    whole = bench.seconds(QUALITY, WHOLE) / bench.seconds(PAPER, WHOLE)
    owns = {"the preset quality": (whole, quality)}
    for part in PARTS:
        its_paper = PAPER if part.recipe.style else PAPER._replace(style=())
        share = bench.seconds(*part[1:]) / bench.seconds(its_paper, WHOLE[: len(part.sizes)])
        owns[part.label] = share, quality | bench.parts(part)
    rows = [["the paper's recipe", "1.00", *(bench.estimate(paper[name]) for name in SHOWN), *[""] * len(SHOWN)]]
    for label, (share, loras) in owns.items():
        scores = bench.scores_of(loras)
        differences = (bold(bench.estimate(scores[name] - paper[name])) for name in SHOWN)
        rows.append([label, f"{share:.2f}", *(bench.estimate(scores[name]) for name in SHOWN), *differences])
    header = ["", "its seconds, of the paper's", *SHOWN, *(f"{name}, less paper's" for name in SHOWN)]
    small = owns[PARTS[0].label][1]
    sheet = RESULTS / "fidelity_shorter.png"
    bench.sheet(quality, small, PARTS[0].sizes[0][0]).save(sheet, optimize=True)
    report = joined(template("fidelity_shorter")).format(
        date=date.today(), images=options.images, scale=options.scale, pairs=len(pairs), comfyui=comfyui_version(),
        torch=torch.__version__, threads=torch.get_num_threads(), table=table(header, rows), sheet=sheet.name,
    )  # fmt: skip
    (RESULTS / "fidelity_shorter.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
