"""`python benchmarks/fidelity/references.py [--images 4] [--styles 3] [--scale 0.2]`: what a poor style image costs.

On the pairs for tuning: the preset fast learns each style image as it is and damaged in eight ways; the content LoRAs
are those of the clean content images. Scores are against the clean style image. Without guidance, one seed a pair.
LoRAs and pictures are kept as by report.py, so that `--only KIND ...` can do some kinds before, in several processes.
The table is also in benchmarks/results/references.md.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.faults import Damage, coarse, compressed, noisy
from benchmarks.fidelity.judges import DRAWN
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import CONTENT_PROMPT, FAST, STYLE_PROMPT, Bench, first_pairs
from benchmarks.fidelity.studio import Own, Studio
from consislora_core.image_faults import find_faults
from demo.server import PACK

SHOWN = ("content", "style", "leakage")
CLEAN = "clean"
DARK, MARK = (28, 30, 38), (128, 128, 128, 110)


def cropped(picture: Image.Image) -> Image.Image:
    """The lower right corner, with 60 % of the sides."""
    corner = picture.crop((*(round(0.4 * side) for side in picture.size), *picture.size))
    return corner.resize(picture.size, Image.Resampling.BICUBIC)


def tilted(picture: Image.Image) -> Image.Image:
    return picture.rotate(15, Image.Resampling.BICUBIC, fillcolor=picture.getpixel((0, 0)))


def watermarked(picture: Image.Image) -> Image.Image:
    """With grey words in three places, through which it can be seen."""
    layer = Image.new("RGBA", picture.size)
    draw, font = ImageDraw.Draw(layer), ImageFont.load_default(picture.height // 8)
    for part in (1, 2, 3):
        draw.text((picture.width // 2, part * picture.height // 4), "© SAMPLE", MARK, font, anchor="mm")
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def on_dark_page(picture: Image.Image) -> Image.Image:
    page = picture.copy()
    ImageDraw.floodfill(page, (0, 0), DARK, thresh=40)
    return page


KINDS: dict[str, Damage] = {
    CLEAN: lambda picture: picture,
    "blurred, sigma 3": lambda picture: picture.filter(ImageFilter.GaussianBlur(3)),
    "JPEG, quality 20": lambda picture: compressed(picture, 20),
    "noise, 25 of 255": lambda picture: noisy(picture, 25),
    "a quarter of the resolution": coarse,
    "watermark": watermarked,
    "dark page": on_dark_page,
    "cropped to a corner": cropped,
    "tilted by 15 degrees": tilted,
}


class PoorStudio(Studio):
    """Also has each drawing damaged, under the name of its damage behind its own."""

    def drawn(self, *drawings: tuple[str, ...]) -> Tensor:
        return torch.cat([self._damaged(drawing) for drawing in drawings])

    def _damaged(self, drawing: tuple[str, ...]) -> Tensor:
        picture = Image.fromarray(self.drawings.pictures[self.place[drawing[:2]]].numpy())
        for kind in drawing[2:]:
            picture = KINDS[kind](picture)
        return rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w").float() / 255


class References(Bench):
    def contents_learned(self) -> dict[Drawing, Own]:
        stage_1, _ = self.stages(FAST)
        return self.studio.learned(stage_1, CONTENT_PROMPT, self.contents, recolourings=FAST.recolourings).owns

    def styles_learned(self, kind: str) -> dict[Drawing, Own]:
        """The LoRAs of the style images so damaged, by the clean ones."""
        stages, poor = self.stages(FAST), [poorer(style, kind) for style in self.styles]
        whole = self.studio.learned(stages[0], "A [v]", poor, recolourings=FAST.recolourings)
        owns = self.studio.learned(stages[1], STYLE_PROMPT, poor, whole).owns
        return {style: owns[poor] for style, poor in zip(self.styles, poor, strict=True)}

    def pictures_of(self, kind: str) -> Tensor:
        contents, styles = self.contents_learned(), self.styles_learned(kind)
        return torch.cat(
            [
                self.studio.picture(contents[pair.content], styles[pair.style], seed)
                for seed, pair in enumerate(self.pairs)
            ]
        )

    def faulty(self, kind: str) -> int:
        """In how many of the style images so damaged the check before a training finds a fault."""
        pictures = (self.studio.drawn(poorer(style, kind))[0] for style in self.styles)
        return sum(bool(find_faults(rearrange(picture, "c h w -> h w c"), DRAWN)) for picture in pictures)


def poorer(drawing: Drawing, kind: str) -> tuple[str, ...]:
    return drawing if kind == CLEAN else (*drawing, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a poor style image costs.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--scale", type=float, default=0.2, help="training steps, as a part of the paper's")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images")
    parser.add_argument("--styles", type=int, metavar="N", default=3, help="style images")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, metavar="KIND", help="draw these kinds, and write no report"
    )
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["tune"], options.images, options.styles)
    bench = References(PoorStudio(options.work), pairs, options.scale, 1)
    drawn = {kind: bench.pictures_of(kind) for kind in options.only or KINDS}
    if options.only:
        return
    scores = {kind: bench.scores(pictures, pairs) for kind, pictures in drawn.items()}
    rows = []
    for kind, found in scores.items():
        differences = [bold(bench.estimate(found[name] - scores[CLEAN][name])) for name in SHOWN]
        means = (f"{found[name].mean():.3f}" for name in SHOWN)
        rows.append([kind, *means, *(differences if kind != CLEAN else [""] * len(SHOWN)), bench.faulty(kind)])
    header = ["style image", *SHOWN, *(f"{name}, less clean's" for name in SHOWN), "the check finds it"]
    report = joined(template("references")).format(
        date=date.today(), images=options.images, styles=options.styles, scale=options.scale, pairs=len(pairs),
        comfyui=comfyui_version(), torch=torch.__version__, table=table(header, rows),
    )  # fmt: skip
    (RESULTS / "references.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
