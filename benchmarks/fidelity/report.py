"""`python benchmarks/fidelity/report.py [--few] [--tune] [--scale S] [--seeds N] [--images N] [--only ...]`

Who keeps the content, and gets the style.

Every contender draws each content image in the style of each style image, on the same base model and seeds; networks
that have learned from real drawings only judge the pictures (judges.py), beside the ground truths (pairs.py).

A stopped run continues: `--work` keeps LoRAs and pictures, under all that determines them. `--few` takes six pairs, a
tenth of the paper's steps and one seed, and leaves its results there. `--tune` takes the pairs that settings were
chosen on, and the settings that were tried. `--images` takes fewer pairs, `--only` fewer contenders. On a GPU take
`--scale 1`, the paper's number of steps, whose results have a file of their own.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from benchmarks.common import (
    COLOURS,
    RESULTS,
    Estimate,
    bold,
    chart_axes,
    comfyui_version,
    crossed_estimate,
    estimate,
    joined,
    table,
    template,
)
from benchmarks.fidelity.judges import FOLDER, SIDE, TRUTHS, load_judge
from benchmarks.fidelity.pairs import ALIGNED_SETS, CONTENT_SET, PAIRS, Drawing, Pair
from benchmarks.fidelity.studio import CFG, SAMPLER, SCHEDULER, STEPS, Learned, Own, Studio
from benchmarks.picture_scores import perceptual_distance, ssim
from consislora_core import schedule
from consislora_core.metrics import leakage, structure_scores
from consislora_core.roles import ROLES
from consislora_core.schedule import ADAMW, MUON, MUON_RATE, NOISE, RECONSTRUCTION, Phase, Stage, with_preset
from demo.server import PACK

EARLY, LATE = 2e-3, 1e-3  # learning rates before and after the transition: ten times the paper's
CONTENT_PROMPT = "A [c]"
STYLE_PROMPT = "An image in the style of [v]"
INTRODUCTION, SCORES_TEXT, DIFFERENCES_TEXT, OWN_TEXT, CHOICE_TEXT, CURVE_TEXT, SHEET_TEXT = template("fidelity")


def guided(content: float, style: float) -> dict[str, float]:
    return {"content_guidance": content, "style_guidance": style}


def paper_towards_style(content: float, style: float, guidance: float) -> "Contender":
    """The paper's LoRAs at other strengths, the style guided alone."""
    label = f"c, strengths: content {content:g}, style {style:g}" + f"; style guidance {guidance:g}" * bool(guidance)
    strengths = {"content_strength": content, "style_strength": style}
    return Contender(label, PAPER, settings=strengths | guided(0.0, guidance))


SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)
TRUE_STYLE = "style of the ground truth"
EVERYWHERE = ("content", "outlines", "style", "leakage", "sum", TRUE_STYLE)  # for any pair
SCORES = (*EVERYWHERE, "SSIM", "perceptual distance")
OWN_SCORES = ("outlines", "SSIM", "outlines, content part alone")  # of a content image drawn again by its own LoRA


Phases = tuple[Phase, ...]  # steps are those in the paper's schedule


class Recipe(NamedTuple):
    """How a LoRA is trained: stage 1 and, for a style image, stage 2; without it the style part is stage 1's.

    everywhere: on all attention layers instead of two blocks. muon: in stage 1. recolourings: of each image, for stage
    1. patches: pictures without the style image's shapes, in its place for both stages. preset: of the training nodes,
    for both stages.
    """

    image: Phases
    style: Phases = ()
    everywhere: bool = False
    muon: bool = False
    recolourings: int = 0
    patches: int = 0
    preset: str = schedule.PAPER


# In phases of 500 steps where recipes begin with the same steps, so that they share them.
BEGIN = Phase(500, NOISE, EARLY)
RECONSTRUCT = Phase(1000, RECONSTRUCTION, LATE)
PAPER = Recipe((BEGIN, RECONSTRUCT), (RECONSTRUCT,))
B_LORA = Recipe((BEGIN,) * 2)
PLAIN = Recipe((Phase(1500, NOISE, EARLY),), everywhere=True)
NOISE_ONLY = Recipe((BEGIN,) * 3, (Phase(1000, NOISE, EARLY),))
ONE_STAGE = PAPER._replace(style=())
NO_TRANSITION = PAPER._replace(image=(Phase(1500, RECONSTRUCTION, LATE),))


def fading(recipe: Recipe) -> Recipe:
    """The last learning rate of each stage falls to 0."""
    image, style = ((*phases[:-1], phases[-1]._replace(fades=True)) for phases in (recipe.image, recipe.style))
    return recipe._replace(image=image, style=style)


def faster(phases: Phases, rate: float, fewer: int = 1) -> Phases:
    """The learning rates times `rate`, the steps divided by `fewer`."""
    return tuple(
        phase._replace(steps=math.ceil(phase.steps / fewer), learning_rate=rate * phase.learning_rate)
        for phase in phases
    )


# The presets of the training nodes, and what they learn from.
QUALITY, FAST, DRAFT = (
    PAPER._replace(recolourings=24, preset=preset) for preset in (schedule.QUALITY, schedule.FAST, schedule.DRAFT)
)
# The preset quality as it is in 300 steps, for recipes with other steps or rates.
FADING = fading(PAPER)
MUON_ALONE = FADING._replace(image=faster(FADING.image, MUON_RATE), muon=True)
AS_QUALITY = MUON_ALONE._replace(recolourings=24)


def muon_at(rate: float, fewer: int = 1) -> Recipe:
    """Quality in a part of the steps, stage 1 at `rate` times AdamW's rates, stage 2 as in the presets."""
    stage_2 = faster(FADING.style, schedule.FASTER if fewer > 1 else 1, fewer)
    return AS_QUALITY._replace(image=faster(AS_QUALITY.image, rate / MUON_RATE, fewer), style=stage_2)


class Contender(NamedTuple):
    """A way to draw all pairs. denoise: below 1 it begins at the content image, without a LoRA of it. settings: of Dual
    Guidance. lock: with structure_lock it begins at the content image, in its "own" colours or in the style image's
    "palette". variation: of structure_lock. style: how LoRAs of style images are trained, if not as those of content.
    """

    label: str
    recipe: Recipe
    denoise: float = 1.0
    settings: dict = {}
    lock: str = ""
    variation: float = 0.0
    style: Recipe | None = None

    @property
    def is_img2img(self) -> bool:
        return self.denoise < 1 and not self.lock


HALF = guided(0.5, 0.5)
CONTENDERS = {
    "a": Contender("plain LoRA", PLAIN),
    "b": Contender("B-LoRA", B_LORA),
    "c": Contender("ConsisLoRA", PAPER),
    "d": Contender("c, noise loss only", NOISE_ONLY),
    "e": Contender("c, one stage", ONE_STAGE),
    "f": Contender("c, no transition", NO_TRANSITION),
    "g": Contender("c, guidance 1", PAPER, settings=guided(1.0, 1.0)),
    "h": Contender("img2img, style LoRA", PAPER, denoise=0.6),
    "i": Contender("c, guidance 0.5", PAPER, settings=HALF),
    "j": paper_towards_style(0.7, 1.5, 0.5),
    "quality": Contender("Muon, rates fade; recolourings; guidance 0.5", QUALITY, settings=HALF),
    "fast": Contender("quality in a fifth of the steps", FAST, settings=HALF),
    "draft": Contender("quality in a sixteenth of the steps", DRAFT, settings=HALF),
    "both": Contender("content by quality, style by fast", QUALITY, settings=HALF, style=FAST),
    "locked": Contender("quality, structure lock in the style's palette", QUALITY, settings=HALF, lock="palette"),
    "fast locked": Contender("fast, structure lock in the style's palette", FAST, settings=HALF, lock="palette"),
    "draft locked": Contender("draft, structure lock in the style's palette", DRAFT, settings=HALF, lock="palette"),
    "both locked": Contender(
        "both, structure lock in the style's palette", QUALITY, settings=HALF, lock="palette", style=FAST
    ),
    "c locked": Contender("c, structure lock in the style's palette", PAPER, lock="palette"),
}
# With the structure lock, what do guidance and denoise add?
CONTENDERS |= {
    f"{name} {i}": CONTENDERS[name]._replace(label=f"{name}, {label}", settings=settings, denoise=denoise)
    for name in ("fast locked", "both locked")
    for i, (label, settings, denoise) in enumerate(
        [
            ("without guidance", {}, 1.0),
            ("content guidance 0.5 alone", guided(0.5, 0.0), 1.0),
            ("without guidance, denoise 0.7", {}, 0.7),
        ]
    )
}
DIFFERENCES = ("c-b", "b-a", "c-a", "c-d", "c-e", "c-f", "g-c", "h-c", "i-c", "j-c", "j-b", "quality-c", "quality-i",
               "quality-j", "quality-b", "quality-a", "fast-c", "quality-fast", "draft-c", "both-c", "both-fast",
               "locked-c", "locked-quality", "locked-b", "locked-a", "locked-c locked", "fast locked-c",
               "fast locked-c locked", "draft locked-c", "both locked-c", "both locked-c locked", "fast locked 0-c",
               "fast locked 0-fast locked", "fast locked 0-c locked", "fast locked 1-c", "fast locked 1-fast locked",
               "both locked 0-c", "both locked 0-both locked", "both locked 0-c locked", "both locked 1-c",
               "both locked 1-both locked", "fast locked 2-c", "fast locked 2-fast locked 0", "fast locked 2-c locked",
               "both locked 2-c", "both locked 2-both locked 0", "both locked 2-c locked")  # fmt: skip
TRADED = ("content", "style")

# For the base model prompted by name: subjects and drawings that it has learned.
SEEN = ("cat-face", "rocket", "red-apple", "house", "guitar", "automobile", "key", "bell")
SEEN_STYLES = (("twemoji", "pizza"), ("noto", "pizza"), ("emojione", "pizza"))

# Content strength, style strength, style guidance.
TOWARDS_STYLE = ((0.6, 1.0, 0.0), (0.8, 1.0, 0.0), (1.0, 1.5, 0.0), (0.7, 1.3, 0.0), (0.8, 1.5, 0.0), (0.7, 1.5, 0.0),
                 (0.6, 1.5, 0.0), (0.8, 2.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (0.8, 1.5, 0.5), (0.7, 1.5, 0.5),
                 (0.6, 1.5, 0.5), (0.7, 1.5, 1.0))  # fmt: skip

# What is tried on the pairs for tuning.
TRIED = {
    "c": CONTENDERS["c"],
    **{f"c {i}": paper_towards_style(*settings) for i, settings in enumerate(TOWARDS_STYLE, 1)},
    "fading": Contender("c, rates fade", FADING),
    "muon": Contender("Muon, rates fade", MUON_ALONE),
    "recoloured": Contender("rates fade; recolourings", FADING._replace(recolourings=24)),
    "quality": CONTENDERS["quality"],
    "quality 2": Contender("quality without guidance", QUALITY),
    "quality 3": Contender("quality, content guidance 0.5 alone", QUALITY, settings=guided(0.5, 0.0)),
    "quality 4": Contender("quality, content guidance 1, style guidance 0.5", QUALITY, settings=guided(1.0, 0.5)),
    "quality 5": Contender("quality, guidance 1", QUALITY, settings=guided(1.0, 1.0)),
    "quality 6": Contender("quality, content guidance 2, style guidance 0.5", QUALITY, settings=guided(2.0, 0.5)),
    **{
        f"lock {denoise:g}": Contender(
            f"quality, structure lock at denoise {denoise:g}", QUALITY, denoise, HALF, lock="own"
        )
        for denoise in (0.65, 0.8, 1.0)
    },
    "locked": CONTENDERS["locked"],
    "locked 1": Contender("locked, style guidance 1", QUALITY, settings=guided(0.5, 1.0), lock="palette"),
    **{
        f"locked v{part:g}": CONTENDERS["locked"]._replace(label=f"locked, variation {part:g}", variation=part)
        for part in (0.1, 0.2, 0.3, 0.5)
    },
    "c locked": CONTENDERS["c locked"],
    "fast": CONTENDERS["fast"],
    "fast locked": CONTENDERS["fast locked"],
    "draft": CONTENDERS["draft"],
    "draft locked": CONTENDERS["draft locked"],
    # At the full number of steps quality has 3 / √5 = 1.34 times AdamW's rates in stage 1, and fast 3 times.
    **{
        f"rate {rate:.3g}": Contender(
            f"content in all steps at {rate:.3g} times AdamW's rates, style by fast",
            muon_at(rate),
            settings=HALF,
            style=FAST,
        )
        for rate in (3, 1.3416, 1)
    },
    "long style": Contender("content and style in all steps at 1.34 times", muon_at(1.3416), settings=HALF),
    "style rate 6": Contender(
        "content at 1.34 times, style as fast at 6 times", muon_at(1.3416), settings=HALF, style=muon_at(6, 5)
    ),
    "fast rate 6": Contender("fast at 6 times AdamW's rates", muon_at(6, 5), settings=HALF),
    "patches": Contender("quality, style patches", QUALITY._replace(patches=24)),
    "patches 1": Contender("quality, style patches, one stage", QUALITY._replace(patches=24, style=())),
}


class Bench:
    """Draws and scores pairs. scale: of the paper's steps. seeds: pictures a pair."""

    def __init__(self, studio: Studio, pairs: list[Pair], scale: float, seeds: int):
        self.studio, self.pairs, self.scale, self.seeds = studio, pairs, scale, seeds
        self.contents = list(dict.fromkeys(pair.content for pair in pairs))
        self.styles = list(dict.fromkeys(pair.style for pair in pairs))

    def stages(self, recipe: Recipe) -> tuple[Stage, Stage | None]:
        def scaled(phases: Phases) -> Phases:
            return tuple(phase._replace(steps=round(self.scale * phase.steps)) for phase in phases)

        optimizer = MUON if recipe.muon else ADAMW
        image = with_preset(Stage("image", ROLES, scaled(recipe.image), optimizer=optimizer), recipe.preset)
        if not recipe.style:
            return image, None
        style = Stage("style", ROLES[1:], scaled(recipe.style), noise_offset=0.03)
        return image, with_preset(style, recipe.preset)

    def loras(self, contender: Contender) -> dict[Drawing, Own]:
        """The LoRAs of all content and style images."""
        return self.content_loras(contender.recipe) | self.style_loras(contender.style or contender.recipe)

    def content_loras(self, recipe: Recipe) -> dict[Drawing, Own]:
        recolourings = {"recolourings": recipe.recolourings} if recipe.recolourings else {}
        return self._train(recipe)(self.stages(recipe)[0], CONTENT_PROMPT, self.contents, **recolourings).owns

    def style_loras(self, recipe: Recipe) -> dict[Drawing, Own]:
        stage_1, stage_2 = self.stages(recipe)
        recolourings = {"recolourings": recipe.recolourings} if recipe.recolourings else {}
        patches = {"patches": recipe.patches} if recipe.patches else {}
        styles = self._train(recipe)(stage_1, "A [v]", self.styles, **(patches or recolourings))
        if stage_2:
            styles = self.studio.learned(stage_2, STYLE_PROMPT, self.styles, styles, **patches)
        return styles.owns

    def _train(self, recipe: Recipe) -> Callable[..., Learned]:
        return self.studio.learned_everywhere if recipe.everywhere else self.studio.learned

    def pictures(self, contender: Contender, pairs: list[Pair], take: int = 0) -> Tensor:
        """A picture of each pair (n 3 h w); each pair has a seed of its own, the same for every contender."""
        print(f"Drawing {len(pairs)} pictures, {contender.label} ...", file=sys.stderr, flush=True)
        owns, begins_at_content = self.loras(contender), contender.lock or contender.is_img2img
        return torch.cat(
            [
                self.studio.picture(
                    None if contender.is_img2img else owns[pair.content],
                    owns[pair.style],
                    seed=self.pairs.index(pair) + take * len(self.pairs),
                    start=pair.content if begins_at_content else None,
                    denoise=contender.denoise,
                    locked=bool(contender.lock),
                    palette=pair.style if contender.lock == "palette" else None,
                    variation=contender.variation,
                    **contender.settings,
                )
                for pair in pairs
            ]
        )

    @cached_property
    def judges(self) -> dict:
        return {name: load_judge(name) for name in ("content", "style")}

    def scores(self, pictures: Tensor, pairs: list[Pair]) -> dict[str, Tensor]:
        """Scores (n) of a picture of each pair; NaN where a score needs a ground truth with equal outlines."""
        content, style, truth = (
            self.studio.drawn(*drawings)
            for drawings in zip(*((pair.content, pair.style, pair.truth) for pair in pairs), strict=True)
        )
        pictures, content, style, truth = (
            F.adaptive_avg_pool2d(images, SIDE) for images in (pictures, content, style, truth)
        )
        contents, styles = (
            [self.judges[name](images) for images in (pictures, content, style, truth)] for name in ("content", "style")
        )
        ours, of_content, of_style, of_truth = (judgement.features for judgement in contents)
        our_style, _, its_style, true_style = (judgement.features for judgement in styles)
        leaks = torch.cat([leakage(ours[[i]], of_style[[i]], of_truth[[i]]) for i in range(len(pairs))])
        outlines = torch.cat(
            [structure_scores(*images)["edges"] for images in zip(pictures.split(1), content.split(1), strict=True)]
        )
        content_scores, style_scores = (ours * of_content).sum(1), (our_style * its_style).sum(1)
        aligned = torch.tensor([pair.style[0] in ALIGNED_SETS for pair in pairs])
        scores = (
            content_scores,
            outlines,
            style_scores,
            leaks,
            content_scores + outlines + style_scores - leaks,
            (our_style * true_style).sum(1),
            ssim(pictures, truth).where(aligned, torch.nan),
            perceptual_distance(styles[0].maps, styles[3].maps).where(aligned, torch.nan),
        )
        return dict(zip(SCORES, scores, strict=True))

    def measured(self, contender: Contender, pairs: list[Pair] | None = None) -> dict[str, Tensor]:
        """Scores of each pair, the mean over its seeds."""
        pairs = pairs or self.pairs
        takes = [self.scores(self.pictures(contender, pairs, take), pairs) for take in range(self.seeds)]
        return {name: torch.stack([scores[name] for scores in takes]).mean(0) for name in SCORES}

    def own_measured(self, contender: Contender) -> dict[str, Tensor]:
        """OWN_SCORES of each content image, the mean over its seeds, with the prompt and the cfg of its training.

        NaN for the content part of a LoRA that has no parts.
        """
        print(f"Drawing {len(self.contents)} content images again, {contender.label} ...", file=sys.stderr, flush=True)
        owns = self.loras(contender)
        has_parts = not contender.recipe.everywhere

        def drawn(take: int, with_style: bool) -> Tensor:
            seeds = range(take * len(self.contents), (take + 1) * len(self.contents))
            loras = [(owns[content], owns[content] if with_style else None) for content in self.contents]
            return torch.cat(
                [
                    self.studio.picture(*lora, seed, CONTENT_PROMPT, cfg=1.0)
                    for lora, seed in zip(loras, seeds, strict=True)
                ]
            )

        takes = []
        for take in range(self.seeds):
            scores = self.likeness(drawn(take, with_style=has_parts))
            alone = self.likeness(drawn(take, False))[0] if has_parts else torch.full_like(scores[0], torch.nan)
            takes.append(torch.stack([*scores, alone]))
        return dict(zip(OWN_SCORES, torch.stack(takes).mean(0), strict=True))

    def likeness(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Outlines and SSIM (n) of a picture of each content image, to that image."""
        pictures, contents = (
            F.adaptive_avg_pool2d(images, SIDE) for images in (pictures, self.studio.drawn(*self.contents))
        )
        pairs = zip(pictures.split(1), contents.split(1), strict=True)
        return torch.cat([structure_scores(*images)["edges"] for images in pairs]), ssim(pictures, contents)

    def estimate(self, values: Tensor, pairs: list[Pair] | None = None) -> Estimate:
        """The mean, and its bootstrap interval over content images and style images, which pairs share."""
        grid = np.full((len(self.contents), len(self.styles)), np.nan)
        for pair, value in zip(pairs or self.pairs, values.tolist(), strict=True):
            grid[self.contents.index(pair.content), self.styles.index(pair.style)] = value
        return crossed_estimate(grid)


def references(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """Scores of pictures that no contender made, by what they are."""
    truths, contents, styles = ([getattr(pair, name) for pair in bench.pairs] for name in ("truth", "content", "style"))
    studio = bench.studio
    return {
        "the ground truth": bench.scores(studio.drawn(*truths), bench.pairs),
        "the ground truth through the VAE": bench.scores(
            torch.cat([studio.decoded(studio.latents(truth)) for truth in truths]), bench.pairs
        ),
        "the content image": bench.scores(studio.drawn(*contents), bench.pairs),
        "the content image in the style image's palette": bench.scores(
            torch.cat([studio.in_palette(pair.content, pair.style) for pair in bench.pairs]), bench.pairs
        ),
        "the style image": bench.scores(studio.drawn(*styles), bench.pairs),
    }


def prompted_by_name(studio: Studio) -> list[list]:
    """Rows of scores, for subjects and styles that the base model has learned: without LoRA, and the sets' drawings."""
    bench = Bench(studio, [Pair((CONTENT_SET, subject), style) for subject in SEEN for style in SEEN_STYLES], 1.0, 1)
    prompts = [f"a {pair.content[1].replace('-', ' ')} in the style of {pair.style[0]}" for pair in bench.pairs]
    pictures = {
        "the base model, prompted by name": torch.cat(
            [studio.picture(None, None, seed, prompt) for seed, prompt in enumerate(prompts)]
        ),
        "the drawings of those names": studio.drawn(*(pair.truth for pair in bench.pairs)),
    }
    scores = {name: bench.scores(images, bench.pairs) for name, images in pictures.items()}
    return [[name, *(bench.estimate(found[score]) for score in EVERYWHERE), "", ""] for name, found in scores.items()]


def introduction(bench: Bench, options: str) -> str:
    accuracy = {}
    for name in ("content", "style"):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            accuracy |= json.loads(file.metadata()["accuracy"])
    return INTRODUCTION.format(
        date=date.today(),
        options=options,
        comfyui=comfyui_version(),
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
        subjects=len({subject for _, subject in TRUTHS}),
        right_set=accuracy["among the benchmark's sets"],
    )


def steps_of(bench: Bench, contender: Contender) -> str:
    content, _ = bench.stages(contender.recipe)
    image, style = bench.stages(contender.style or contender.recipe)
    return f"{content.steps}, {image.steps}" + (f" + {style.steps}" if style else "")


def scores_section(bench: Bench, measured: dict[str, dict[str, Tensor]], contenders: dict[str, Contender]) -> str:
    rows = [
        [name, contenders[name].label, steps_of(bench, contenders[name]), *map(bench.estimate, scores.values())]
        for name, scores in measured.items()
    ]
    others = [[name, *map(bench.estimate, scores.values())] for name, scores in references(bench).items()]
    others += prompted_by_name(bench.studio)
    return SCORES_TEXT.format(
        contenders=table(["", "contender", "steps: content, style", *SCORES], rows),
        references=table(["picture", *SCORES], others),
        seen=len(SEEN),
        styles=len(SEEN_STYLES),
    )


def differences_section(bench: Bench, measured: dict[str, dict[str, Tensor]], wanted: list[str]) -> str:
    rows = []
    for pair in wanted:
        one, other = (measured[name] for name in pair.split("-"))
        rows.append([pair, *(bold(bench.estimate(one[name] - other[name])) for name in SCORES)])
    return DIFFERENCES_TEXT.format(table(["", *SCORES], rows))


def own_section(bench: Bench, contenders: dict[str, Contender]) -> str:
    through_vae = torch.cat([bench.studio.decoded(bench.studio.latents(content)) for content in bench.contents])
    rows = [["", "the VAE alone", *map(estimate, bench.likeness(through_vae)), ""]]
    learned = {contender.recipe: name for name, contender in reversed(contenders.items()) if not contender.is_img2img}
    for name, contender in contenders.items():
        if name in learned.values():
            scores = bench.own_measured(contender).values()
            rows.append([name, contender.label, *("" if score.isnan().any() else estimate(score) for score in scores)])
    return OWN_TEXT.format(table(["", "contender", *OWN_SCORES], rows))


def curve_section(bench: Bench, folder: Path) -> str:
    bench = Bench(bench.studio, bench.pairs, bench.scale, seeds=1)
    pairs = [pair for i, pair in enumerate(bench.pairs) if (i // len(bench.styles) + i) % 4 == 0]
    rows, curves = [], {}
    for role in ("content", "style"):
        sweep = [
            Contender(f"{role} guidance {g:g}", PAPER, settings=guided(1.0, 1.0) | {f"{role}_guidance": g})
            for g in SCALES
        ]
        measured = [bench.measured(contender, pairs) for contender in sweep]
        for contender, scores in zip(sweep, measured, strict=True):
            found = {name: bench.estimate(scores[name], pairs) for name in EVERYWHERE}
            moved = [bench.estimate(scores[name] - measured[0][name], pairs) for name in TRADED]
            rows.append([contender.label, *found.values(), *moved])
        curves[f"{role} guidance"] = [tuple(scores[name].mean().item() for name in TRADED) for scores in measured]
    plot(curves, folder / "fidelity_curve.png")
    header = ["", *EVERYWHERE, *(f"{name}, less that at 0" for name in TRADED)]
    return CURVE_TEXT.format(pairs=len(pairs), table=table(header, rows))


def plot(curves: dict[str, list[tuple[float, float]]], file: Path) -> None:
    """Style over content, a curve through SCALES for each guidance."""
    figure, (axis,) = chart_axes(1)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        axis.plot(*zip(*curve, strict=True), color=colour, label=name, marker=".")
        for scale, point in zip(SCALES, curve, strict=True):
            axis.annotate(f" {scale:g}", point, color=colour)
    axis.set(xlabel="content", ylabel="style")
    axis.legend()
    figure.savefig(file)


def sheet_section(bench: Bench, contenders: dict[str, Contender], file: Path) -> str:
    n = len(bench.styles)
    pairs = [pair for i, pair in enumerate(bench.pairs) if (i // n * 3 + i) % n == 0]
    contents, styles, truths = (
        bench.studio.drawn(*drawings)
        for drawings in zip(*((pair.content, pair.style, pair.truth) for pair in pairs), strict=True)
    )
    drawn = {name: bench.pictures(contender, pairs) for name, contender in contenders.items()}
    columns = {"content": contents, "style": styles, **drawn, "ground truth": truths}
    page = Image.new("RGB", (136 * len(columns), 24 + 136 * len(pairs)), "white")
    for i, (name, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(page).text((136 * i + 68, 2), name, "black", font_size=18, anchor="mt")
        for j, picture in enumerate(F.adaptive_avg_pool2d(pictures, SIDE)):
            pixels = (255 * rearrange(picture, "c h w -> h w c")).byte().numpy()
            page.paste(Image.fromarray(pixels), (136 * i + 4, 24 + 136 * j))
    page.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    key = ", ".join(f"{name}: {contender.label}" for name, contender in contenders.items())
    return SHEET_TEXT.format(key=key, file=file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Who keeps the content, and gets the style: scores of all contenders.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--few", action="store_true", help="six pairs; the results stay in DIR")
    parser.add_argument("--tune", action="store_true", help="the pairs that settings were chosen on")
    parser.add_argument("--scale", type=float, default=0.4, help="training steps, as a part of the paper's")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a pair")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, beside c")
    parser.add_argument("--name", help="of the results, where they are not to take the place of the last")
    parser.add_argument("--images", type=int, metavar="N", help="pairs of the first N content and N style images")
    options = parser.parse_args()
    split, contenders = ("tune", TRIED) if options.tune else ("report", CONTENDERS)
    if options.only:
        contenders = {name: contenders[name] for name in dict.fromkeys(["c", *options.only])}
    is_whole = not (options.tune or options.only)
    results = options.work if options.few else RESULTS
    pairs = first_pairs(PAIRS[split], *((2, 3) if options.few else (options.images, options.images)))
    scale, seeds = (0.1, 1) if options.few else (options.scale, options.seeds)
    bench = Bench(Studio(options.work), pairs, scale, seeds)
    measured = {name: bench.measured(contender) for name, contender in contenders.items()}
    against_c = [f"{name}-c" for name in contenders if name != "c"]
    wanted = [pair for pair in DIFFERENCES if contenders.keys() >= set(pair.split("-"))]
    name = options.name or f"fidelity{'_tuning' * options.tune}{'_full_length' * (scale == 1)}"
    sections = [
        introduction(bench, shlex.join(["", *sys.argv[1:]]).removeprefix("''")),
        scores_section(bench, measured, contenders),
        differences_section(bench, measured, against_c if options.tune else wanted),
        own_section(bench, contenders),
    ]
    if is_whole:
        sections += [CHOICE_TEXT, curve_section(bench, results)]
    sections.append(sheet_section(bench, contenders, results / f"{name}_sheet.png"))
    text = joined(sections)
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def first_pairs(pairs: list[Pair], contents: int | None, styles: int | None) -> list[Pair]:
    """The pairs of the first content images with the first style images."""
    kept = [list(dict.fromkeys(drawings)) for drawings in zip(*pairs, strict=True)]
    return [pair for pair in pairs if pair.content in kept[0][:contents] and pair.style in kept[1][:styles]]


if __name__ == "__main__":
    main()
