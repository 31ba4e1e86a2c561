"""`python benchmarks/fidelity/references.py [--images 4] [--styles 4] [--scale 0.2] [--mended]`

What a poor style image costs, on the pairs for tuning: the preset quality, in half of its steps at twice the rates,
learns each as it is, and damaged in eight ways, beside clean content images. `--mended`: what wins it back, and what a
poor content image costs. Scores are against the clean images. Without guidance, one seed a pair. LoRAs and pictures are
kept as by report.py, so that a stopped run continues. The tables are also in benchmarks/results/references.md and
references_mended.md.
"""

import argparse
import sys
from datetime import date
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.faults import Damage, blurred, coarse, compressed, noisy
from benchmarks.fidelity.judges import DRAWN, SIDE
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import CONTENT_PROMPT, STYLE_PROMPT, Bench, first_pairs, muon_at
from benchmarks.fidelity.studio import Own, Studio, resized
from consislora_core.image_faults import LUMA, edge_blur, find_faults, sharpening
from consislora_core.recolour import recolour, whiteness
from demo.server import PACK

RECIPE = muon_at(6, fewer=2)
DARK, MARK = (28, 30, 38), (128, 128, 128, 110)
SHOWN = ("content", "outlines", "style", "leakage")
LESS_CLEAN = [f"{name}, less clean's" for name in SHOWN]
CLEAN = ()

STRENGTHS, WIDTHS = (0.5, 1, 1.5, 2), (1, 1.5)  # of sharpening, times what is advised

# What is done to a picture before it is learned, by its names in DAMAGES and MENDS.
Changes = tuple[str, ...]


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


def sharpened(picture: Image.Image, stronger: float = 1, wider: float = 1) -> Image.Image:
    """By ComfyUI's node Image Sharpen, as the check of pictures advises, or so many times stronger and wider."""
    from comfy_extras.nodes_post_processing import Sharpen

    radius, sigma, alpha = sharpening(wider * edge_blur(pixels_of(picture) @ LUMA))
    return picture_of(Sharpen.execute(pixels_of(picture)[None], radius, sigma, stronger * alpha).args[0][0])


def smoothed(picture: Image.Image) -> Image.Image:
    """By ComfyUI's node Image Blur, at its smallest radius."""
    from comfy_extras.nodes_post_processing import Blur

    return picture_of(Blur.execute(pixels_of(picture)[None], 1, 1.0).args[0][0])


BLURRED, JPEG, NOISY, COARSE = "blurred, sigma 3", "JPEG, quality 20", "noise, 25 of 255", "a quarter of the resolution"
DAMAGES: dict[str, Damage] = {
    BLURRED: blurred,
    JPEG: lambda picture: compressed(picture, 20),
    NOISY: lambda picture: noisy(picture, 25),
    COARSE: coarse,
    "watermark": watermarked,
    "dark page": on_dark_page,
    "cropped to a corner": cropped,
    "tilted by 15 degrees": tilted,
}
SHARPENED, SMOOTHED = "sharpened", "Image Blur"
HALF_SIZE, PAGE_FOUND = "trained at half the side", "page found"  # these change the training, not the picture
MENDS: dict[str, Damage] = {
    SHARPENED: sharpened,
    SMOOTHED: smoothed,
    HALF_SIZE: lambda picture: picture,
    PAGE_FOUND: lambda picture: picture,
}
CHANGES = DAMAGES | MENDS
STYLES_MENDED = [
    (BLURRED,),
    (BLURRED, SHARPENED),
    (BLURRED, HALF_SIZE),
    (COARSE,),
    (COARSE, SHARPENED),
]
CONTENTS_MENDED = [(BLURRED,), (JPEG,), (COARSE,), (NOISY,), (NOISY, SMOOTHED), (NOISY, PAGE_FOUND)]


def pixels_of(picture: Image.Image) -> Tensor:
    """h w 3, 0 to 1."""
    return torch.from_numpy(np.array(picture)).float() / 255


def picture_of(pixels: Tensor) -> Image.Image:
    return Image.fromarray((255 * pixels).round().byte().cpu().numpy())


class PoorStudio(Studio):
    """Also has each drawing changed, under the names of `CHANGES` behind its own."""

    def drawn(self, *drawings: tuple[str, ...]) -> Tensor:
        return torch.cat([self._changed(drawing) for drawing in drawings])

    def _changed(self, drawing: tuple[str, ...]) -> Tensor:
        picture = Image.fromarray(self.drawings.pictures[self.place[drawing[:2]]].numpy())
        for change in drawing[2:]:
            picture = CHANGES[change](picture)
        return rearrange(pixels_of(picture), "h w c -> 1 c h w")

    @torch.inference_mode()
    def recoloured_latents(self, drawing: tuple[str, ...], count: int, size: float = 1.0) -> Tensor:
        """As the nodes Recolour and VAE Encode give them; without `PAGE_FOUND` a page is white where its pixels are."""
        return self.vae.encode(resized(self.recolourings(drawing, count), size))

    def recolourings(self, drawing: tuple[str, ...], count: int) -> Tensor:
        """The picture and its recolourings: b h w 3."""
        (picture,) = rearrange(self.drawn(drawing), "b c h w -> b h w c")
        white = None if PAGE_FOUND in drawing else whiteness(picture, dim=-1)
        return torch.cat([picture[None], recolour(picture, count, torch.Generator().manual_seed(0), white)])


class References(Bench):
    def contents_learned(self, changes: Changes = CLEAN) -> dict[Drawing, Own]:
        """The LoRAs of the content images so changed, by the clean ones."""
        stage_1, _ = self.stages(RECIPE)
        changed = [(*content, *changes) for content in self.contents]
        owns = self.studio.learned(stage_1, CONTENT_PROMPT, changed, recolourings=RECIPE.recolourings).owns
        return dict(zip(self.contents, owns.values(), strict=True))

    def styles_learned(self, changes: Changes = CLEAN) -> dict[Drawing, Own]:
        """The LoRAs of the style images so changed, by the clean ones."""
        stages, changed = self.stages(RECIPE), [(*style, *changes) for style in self.styles]
        sizes = [(0.5,) * len(stage.phases) if HALF_SIZE in changes else () for stage in stages]
        whole = self.studio.learned(stages[0], "A [v]", changed, recolourings=RECIPE.recolourings, sizes=sizes[0])
        owns = self.studio.learned(stages[1], STYLE_PROMPT, changed, whole, sizes=sizes[1]).owns
        return dict(zip(self.styles, owns.values(), strict=True))

    def scores_with(self, of_content: Changes = CLEAN, of_style: Changes = CLEAN) -> dict[str, Tensor]:
        contents, styles = self.contents_learned(of_content), self.styles_learned(of_style)
        pictures = [
            self.studio.picture(contents[pair.content], styles[pair.style], seed)
            for seed, pair in enumerate(self.pairs)
        ]
        return self.scores(torch.cat(pictures), self.pairs)

    def faulty(self, changes: Changes) -> int:
        """In how many of the style images so changed the check before a training finds a fault."""
        pictures = (self.studio.drawn((*style, *changes))[0] for style in self.styles)
        return sum(bool(find_faults(rearrange(picture, "c h w -> h w c"), DRAWN)) for picture in pictures)

    def differences(self, scores: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
        return [bold(self.estimate(scores[name] - others[name])) for name in SHOWN]

    def sheet(self, damage: str, mend: str) -> Image.Image:
        """Of each style image clean, damaged and mended: the image, and a picture with what was learned from it."""
        ways, rows = (CLEAN, (damage,), (damage, mend)), []
        for seed, (content, style) in list(enumerate(self.pairs))[: len(self.styles)]:
            learned = [self.studio.drawn((*style, *changes)) for changes in ways]
            drawn = [
                self.studio.picture(self.contents_learned()[content], self.styles_learned(changes)[style], seed)
                for changes in ways
            ]
            rows.append(torch.cat([F.adaptive_avg_pool2d(picture, SIDE) for picture in learned + drawn], 3))
        pixels = (255 * rearrange(torch.cat(rows, 2), "1 c h w -> h w c")).byte().numpy()
        return Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)

    def noise_sheet(self) -> Image.Image:
        """Of each content image, noisy: the image, its recolourings without and with `PAGE_FOUND`, what is drawn."""
        ways, rows = ((NOISY,), (NOISY, PAGE_FOUND)), []
        pairs = [(seed, pair) for seed, pair in enumerate(self.pairs) if seed % (len(self.styles) + 1) == 0]
        for seed, (content, style) in pairs:
            learned = [self.studio.recolourings((*content, *changes), 2) for changes in ways]
            drawn = [
                self.studio.picture(self.contents_learned(changes)[content], self.styles_learned()[style], seed)
                for changes in (CLEAN, *ways)
            ]
            shown = rearrange(torch.cat([learned[0], learned[1][1:]]), "b h w c -> b c h w")
            rows.append(torch.cat([*F.adaptive_avg_pool2d(torch.cat([shown, *drawn]), SIDE)], 2))
        pixels = (255 * rearrange(torch.cat(rows, 1), "c h w -> h w c")).byte().numpy()
        return Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)


def strengths_table(bench: References) -> str:
    """How near the style judge finds all style images for tuning, damaged and sharpened, to the clean ones."""
    styles = list(dict.fromkeys(pair.style for pair in PAIRS["tune"]))
    pictures = [picture_of(rearrange(bench.studio.drawn(style)[0], "c h w -> h w c")) for style in styles]

    def features(pictures: list[Image.Image]) -> Tensor:
        pixels = rearrange(torch.stack([pixels_of(picture) for picture in pictures]), "b h w c -> b c h w")
        return bench.judges["style"](F.adaptive_avg_pool2d(pixels, SIDE)).features

    clean = features(pictures)

    def likeness(pictures: list[Image.Image]) -> str:
        return f"{(features(pictures) * clean).sum(1).mean():.3f}"

    poor = {damage: [DAMAGES[damage](picture) for picture in pictures] for damage in (BLURRED, COARSE)}
    rows = [["not sharpened", "", *map(likeness, poor.values())]]
    for stronger, wider in product(STRENGTHS, WIDTHS):
        mended = ([sharpened(picture, stronger, wider) for picture in damaged] for damaged in poor.values())
        rows.append([stronger, wider, *map(likeness, mended)])
    return table(["alpha, times", "radius, times", *poor], rows)


def costs_report(bench: References) -> dict[str, str]:
    """What each damage of the style images costs."""
    scores = {changes: bench.scores_with(of_style=changes) for changes in (CLEAN, *((damage,) for damage in DAMAGES))}
    rows = []
    for changes, found in scores.items():
        differences = bench.differences(found, scores[CLEAN]) if changes else [""] * len(SHOWN)
        rows.append([*(changes or ["clean"]), *means(found), *differences, bench.faulty(changes)])
    return {"table": table(["style image", *SHOWN, *LESS_CLEAN, "the check finds it"], rows)}


def mended_report(bench: References) -> dict[str, str]:
    """What mending the images wins back, and what a poor content image costs."""
    styles = {changes: bench.scores_with(of_style=changes) for changes in (CLEAN, *STYLES_MENDED)}
    contents = {changes: bench.scores_with(of_content=changes) for changes in (CLEAN, *CONTENTS_MENDED)}
    sheet, noise_sheet = RESULTS / "references_mended.png", RESULTS / "references_noise.png"
    bench.sheet(BLURRED, SHARPENED).save(sheet, optimize=True)
    bench.noise_sheet().save(noise_sheet, optimize=True)
    return {
        "style_table": difference_table(bench, ["style image", "mended"], styles),
        "style_won": won_table(bench, "style image", styles),
        "content_table": difference_table(bench, ["content image", "mended"], contents),
        "content_won": won_table(bench, "content image", contents),
        "strength_table": strengths_table(bench),
        "sheet": sheet.name,
        "noise_sheet": noise_sheet.name,
    }


def won_table(bench: References, image: str, scores: dict[Changes, dict[str, Tensor]]) -> str:
    """What each mend changes, less the same image unmended."""
    rows = [
        [*changes, *bench.differences(found, scores[changes[:1]])] for changes, found in scores.items() if changes[1:]
    ]
    return table([image, "mended", *(f"{name}, less unmended's" for name in SHOWN)], rows)


def difference_table(bench: References, header: list[str], scores: dict[Changes, dict[str, Tensor]]) -> str:
    """The scores, and their differences from the clean images'; header: of the columns that say what was changed."""
    rows = []
    for changes, found in scores.items():
        labels = [*(changes or ["clean"]), ""][: len(header)]
        differences = bench.differences(found, scores[CLEAN]) if changes else [""] * len(SHOWN)
        rows.append([*labels, *means(found), *differences])
    return table([*header, *SHOWN, *LESS_CLEAN], rows)


def means(scores: dict[str, Tensor]) -> list[str]:
    return [f"{scores[name].mean():.3f}" for name in SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a poor style image costs, and what wins it back.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--scale", type=float, default=0.2, help="training steps, as a part of the paper's")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images")
    parser.add_argument("--styles", type=int, metavar="N", default=4, help="style images")
    parser.add_argument("--mended", action="store_true", help="mend what is poor, and damage content images too")
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["tune"], options.images, options.styles)
    bench = References(PoorStudio(options.work), pairs, options.scale, 1)
    name = "references_mended" if options.mended else "references"
    report = joined(template(name)).format(
        date=date.today(), images=options.images, styles=options.styles, scale=options.scale, pairs=len(pairs),
        comfyui=comfyui_version(), torch=torch.__version__,
        **(mended_report(bench) if options.mended else costs_report(bench)),
    )  # fmt: skip
    (RESULTS / f"{name}.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
