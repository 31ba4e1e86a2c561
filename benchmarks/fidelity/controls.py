"""`python benchmarks/fidelity/controls.py [--work DIR] [--only NAME ...]`: a style strength over the noise level.

On the pairs for tuning and the preset quality, style acts most at high noise (style_scale -1), in equal measure (0) or
most at low noise (1), with the same mean strength. The pack has no such input: the results say why.

LoRAs and pictures are kept as by report.py, so that `--only NAME ...` can draw some variants before, in several
processes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.pairs import PAIRS, Pair
from benchmarks.fidelity.report import TRIED, Bench, first_pairs
from benchmarks.fidelity.studio import Studio
from consislora_core.colours import to_oklab
from demo.server import PACK

QUALITY = TRIED["quality"]
CELLS = 32  # a side, whose mean colours are the palette
PATCH, PROJECTIONS = 5, 64  # pixels a side of the patches, of 256 a picture
DISTANCES = ("palette", "strokes")
SHOWN = (*DISTANCES, "style", "content", "outlines", "leakage")
IMAGES = 4  # content images, and style images
IN_FIGURE = (3, 4, 7, 8, 10, 11)  # pairs
WEIGHTING = ("style_scale", "steepness", "varied", "countered")  # among a picture's settings


class Variant(NamedTuple):
    """What is multiplied by the weight w, and what by 2 - w (`countered`). images: content images."""

    label: str
    varied: tuple[str, ...] = ("style_strength", "style_guidance")
    countered: tuple[str, ...] = ()
    steepness: float = 0.0
    scales: tuple[float, ...] = (-1.0, 1.0)
    images: int = 2


VARIANTS = {
    "linear": Variant("strength and guidance", scales=(-1.0, -0.5, 0.5, 1.0), images=IMAGES),
    "strength": Variant("strength alone", ("style_strength",)),
    "guidance": Variant("guidance alone", ("style_guidance",)),
    "steep": Variant("strength and guidance, steeper", steepness=4.0),
    "counter": Variant(
        "strength and guidance; content's times 2 - w", countered=("content_strength", "content_guidance")
    ),
}


def style_weight(sigma: Tensor, sigmas: Tensor, style_scale: float, steepness: float = 0.0) -> float:
    """How much a noise level weighs the style: w = 1 + style_scale u, u from -1 at the first step to 1 at the last.

    u is linear in the number of the step, and between two steps in sigma; above 0, steepness makes it tanh(steepness u)
    / tanh(steepness). Its mean over all steps is 0. sigmas: of all steps, descending, and of the end.
    """
    high, low = sigmas[:-2], sigmas[1:-1]
    u = 2 * ((high - sigma) / (high - low)).clamp(0, 1).mean() - 1
    if steepness:
        u = torch.tanh(steepness * u) / torch.tanh(torch.tensor(steepness))
    return 1 + style_scale * u.item()


class ScaledStudio(Studio):
    """Its pictures take WEIGHTING among their settings."""

    @contextmanager
    def _guider(self, model: Any, content: Any, style: Any, positive: list, settings: dict) -> Iterator[Any]:
        usual = {name: value for name, value in settings.items() if name not in WEIGHTING}
        with super()._guider(model, content, style, positive, usual) as guider:
            if "style_scale" in settings:
                guider.predict_noise = scaled(guider, **{name: settings[name] for name in WEIGHTING})
            yield guider


def scaled(
    guider: Any, style_scale: float, steepness: float, varied: tuple[str, ...], countered: tuple[str, ...]
) -> Callable:
    """The guider's `predict_noise`, with settings that depend on the noise level. Of guided passes only."""
    predict, settings = guider.predict_noise, guider.settings

    def predict_noise(x, timestep, model_options, seed=None):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        w = style_weight(timestep[0], sigmas, style_scale, steepness)
        weights = {**dict.fromkeys(varied, w), **dict.fromkeys(countered, 2 - w)}
        guider.settings = replace(settings, **{name: w * getattr(settings, name) for name, w in weights.items()})
        return predict(x, timestep, model_options, seed)

    return predict_noise


class Controls(Bench):
    def pairs_of(self, variant: Variant) -> list[Pair]:
        return first_pairs(self.pairs, variant.images, None)

    def drawn(self, variant: Variant, style_scale: float) -> Tensor:
        """A picture of each of the variant's pairs."""
        weighting = style_scale, variant.steepness, variant.varied, variant.countered
        settings = QUALITY.settings | dict(zip(WEIGHTING, weighting, strict=True))
        return self.pictures(QUALITY._replace(settings=settings), self.pairs_of(variant))

    def distances_and_scores(self, pictures: Tensor, pairs: list[Pair]) -> dict[str, Tensor]:
        """DISTANCES to the style images, and all scores: of a picture of each pair."""
        both = list(zip(pictures, self.studio.drawn(*(pair.style for pair in pairs)), strict=True))
        distances = torch.tensor([[palette_distance(*pair), stroke_distance(*pair)] for pair in both])
        return dict(zip(DISTANCES, distances.T, strict=True)) | self.scores(pictures, pairs)


def palette_distance(picture: Tensor, style: Tensor) -> float:
    """How far the colours of a picture's large areas are from a style image's (3 h w), at any position, times 100."""
    return 100 * sliced_distance(
        *(to_oklab(F.adaptive_avg_pool2d(x[None], CELLS))[0].flatten(1) for x in (picture, style))
    )


def stroke_distance(picture: Tensor, style: Tensor) -> float:
    """How far the finest patches of a picture, less their mean colour, are from a style image's (3 h w), times 100."""

    def patches(x: Tensor) -> Tensor:
        found = rearrange(F.unfold(x[None], PATCH)[0], "(c p) n -> c p n", c=3)
        return rearrange(found - found.mean(1, keepdim=True), "c p n -> (c p) n")

    return 100 * sliced_distance(patches(picture), patches(style))


def sliced_distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein distance of two sets of as many points (d n): Rabin et al. 2011."""
    directions = F.normalize(torch.randn(PROJECTIONS, len(x), generator=torch.Generator().manual_seed(0)), dim=1)
    ours, theirs = ((directions @ points).sort(-1).values for points in (x, y))
    return (ours - theirs).abs().mean().item()


def figure(columns: dict[str, Tensor], rows: tuple[int, ...], file: Path) -> None:
    side = 192
    page = Image.new("RGB", ((side + 8) * len(columns), 24 + (side + 8) * len(rows)), "white")
    for i, (name, batch) in enumerate(columns.items()):
        ImageDraw.Draw(page).text(((side + 8) * i + side // 2, 2), name, "black", font_size=18, anchor="mt")
        for j, picture in enumerate(F.interpolate(batch[list(rows)], side, mode="area")):
            pixels = (255 * rearrange(picture, "c h w -> h w c")).round().byte().numpy()
            page.paste(Image.fromarray(pixels), ((side + 8) * i + 4, 24 + (side + 8) * j))
    page.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A style strength over the noise level.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="draw these, and write no report")
    options = parser.parse_args()
    bench = Controls(ScaledStudio(options.work), first_pairs(PAIRS["tune"], IMAGES, IMAGES), 0.2, 1)
    drawn = {
        (name, scale): bench.drawn(VARIANTS[name], scale)
        for name in options.only or VARIANTS
        for scale in VARIANTS[name].scales
    }
    if options.only:
        return
    contents, styles, truths = (
        bench.studio.drawn(*drawings)
        for drawings in zip(*((pair.content, pair.style, pair.truth) for pair in bench.pairs), strict=True)
    )
    linear = {scale: drawn["linear", scale] for scale in VARIANTS["linear"].scales}
    linear = dict(sorted({**linear, 0.0: bench.pictures(QUALITY, bench.pairs)}.items()))
    columns = {f"{scale:g}": pictures for scale, pictures in linear.items()}
    rows = []
    for label, pictures in {"the ground truth": truths, "the content image": contents, **columns}.items():
        found = bench.distances_and_scores(pictures, bench.pairs)
        rows.append([label, *(bench.estimate(found[name]) for name in SHOWN)])
    usual, moves = bench.distances_and_scores(linear[0.0], bench.pairs), []
    for (name, scale), pictures in drawn.items():
        pairs = bench.pairs_of(VARIANTS[name])
        found = bench.distances_and_scores(pictures, pairs)
        moved = (bold(bench.estimate(found[name] - usual[name][: len(pairs)], pairs)) for name in SHOWN)
        moves.append([VARIANTS[name].label, f"{scale:g}", len(pairs), *moved])
    ends = [bench.distances_and_scores(linear[scale], bench.pairs) for scale in (-1.0, 1.0)]
    moved = (bold(bench.estimate(ends[1][name] - ends[0][name])) for name in SHOWN)
    moves.insert(0, [VARIANTS["linear"].label, "1, less -1", len(bench.pairs), *moved])
    file = RESULTS / "controls.png"
    figure({"content": contents, "style": styles} | columns, IN_FIGURE, file)
    report = joined(template("controls")).format(
        date=date.today(), comfyui=comfyui_version(), torch=torch.__version__, pairs=len(bench.pairs), file=file.name,
        cells=CELLS, patch=PATCH, scores=table(["style_scale", *SHOWN], rows),
        moves=table(["varied", "style_scale", "pairs", *SHOWN], moves),
    )  # fmt: skip
    (RESULTS / "controls.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
