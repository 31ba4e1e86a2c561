"""`python benchmarks/colours.py [--work DIR] [--few]`: what keeping the content image's colours costs in style.

The pictures of `benchmarks/fidelity/report.py --tune --images 4 --scale 0.2 --seeds 1`, contender "quality", are given
the colours of their content images by four methods at rising strengths. The pack has the first; the others are here.

A stopped run continues, as the report does, in the same folder. `--few` takes two by two images, and leaves its results
in DIR.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.common import set_up

    set_up()

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.common import COLOURS, RESULTS, chart_axes, comfyui_version, joined, table, template
from benchmarks.fidelity.judges import SIDE
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import TRIED, Bench, bold, first_pairs
from benchmarks.fidelity.studio import PostCfg, Studio
from consislora_core.colours import keep_colours, to_oklab, to_srgb
from consislora_core.metrics import silhouette
from demo.server import PACK

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ADVISED = 0.75
CELLS = 32  # a side, in which colours are compared
SLICES = 20
WINDOW = 5  # cells a side, over which latents are smoothed
QUALITY = TRIED["quality"]
INTRODUCTION, CURVE_TEXT, STYLES_TEXT, SHEET_TEXT = template("colours")
SCORES = ("colour error", "lightness error", "style", "content")


def guided(pictures: Tensor, contents: Tensor, strength: float) -> Tensor:
    moved = keep_colours(*(rearrange(batch, "b c h w -> b h w c") for batch in (pictures, contents)), strength)
    return rearrange(moved, "b h w c -> b c h w")


def by_palette(pictures: Tensor, contents: Tensor, strength: float, transport: Callable) -> Tensor:
    """Hue and chroma (a, b) of each silhouette transported to those of the content image's."""
    result = []
    for picture, content in zip(pictures.split(1), contents.split(1), strict=True):
        ours, theirs = (inside(image) for image in (picture, content))
        lab, target = to_oklab(picture), to_oklab(content)[0, 1:, theirs]
        lab[0, 1:, ours] += strength * (transport(lab[0, 1:, ours], target) - lab[0, 1:, ours])
        result.append(to_srgb(lab))
    return torch.cat(result) if strength else pictures


def inside(image: Tensor) -> Tensor:
    return F.interpolate(silhouette(image).float(), image.shape[-2:])[0, 0] > 0


def monge_kantorovich(x: Tensor, y: Tensor) -> Tensor:
    """Points x (2 n) with the mean and covariance of y (2 m): F. Pitie and A. Kokaram, The linear Monge-Kantorovitch
    linear colour mapping for example-based colour transfer, 2007."""
    (mean, u), (target, v) = ((p.mean(1, keepdim=True), torch.cov(p) + 1e-6 * torch.eye(2)) for p in (x, y))
    root = square_root(u)
    return target + root.inverse() @ square_root(root @ v @ root) @ root.inverse() @ (x - mean)


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def sliced(x: Tensor, y: Tensor) -> Tensor:
    """Points x (2 n) moved to y (2 m) along random directions: J. Rabin et al., Wasserstein barycenter, 2012."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(SLICES):
        axes = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q
        ours, theirs = axes @ x, (axes @ y).sort(1).values
        theirs = F.interpolate(theirs[None], ours.shape[1], mode="linear")[0]
        x = x + axes.T @ (torch.empty_like(ours).scatter_(1, ours.argsort(1), theirs) - ours)
    return x


def while_sampling(bench: Bench, strength: float) -> Tensor:
    """The pairs' pictures drawn again: after classifier-free guidance, latents inside the content image's silhouette
    move to those of the content image, smoothed, along the two directions that hold hue and chroma."""
    if not strength:
        return bench.pictures(QUALITY, bench.pairs)
    studio, owns, to_ab = bench.studio, bench.loras(QUALITY), hue_and_chroma(bench)
    along = torch.linalg.pinv(to_ab) @ to_ab  # 4 4
    pictures = []
    for seed, pair in enumerate(bench.pairs):
        z_content = cells_of(studio, pair.content)
        weight = F.adaptive_avg_pool2d(silhouette(studio.drawn(pair.content)).float(), CELLS)

        def steered(args: dict, z_content: Tensor = z_content, weight: Tensor = weight) -> Tensor:
            z_0_hat = args["denoised"]
            missing = F.avg_pool2d(z_content - z_0_hat, WINDOW, 1, WINDOW // 2, count_include_pad=False)
            return z_0_hat + strength * weight * torch.einsum("ij,bjhw->bihw", along, missing)

        facts = ["colours", pair.content, strength, WINDOW]
        post_cfg = PostCfg(steered, facts)
        pictures.append(
            studio.picture(owns[pair.content], owns[pair.style], seed, post_cfg=post_cfg, **QUALITY.settings)
        )
    return torch.cat(pictures)


def hue_and_chroma(bench: Bench) -> Tensor:
    """(2 4): a and b of OKLab by latent, the least squares over all cells of all content and style images."""
    drawings = [*bench.contents, *bench.styles]
    z = rearrange(torch.cat([cells_of(bench.studio, drawing) for drawing in drawings]), "n c h w -> (n h w) c")
    ab = rearrange(to_oklab(means(bench.studio.drawn(*drawings)))[:, 1:], "n c h w -> (n h w) c")
    return torch.linalg.lstsq(F.pad(z, (0, 1), value=1.0), ab).solution[:-1].T


def cells_of(studio: Studio, drawing: Drawing) -> Tensor:
    """The latent of a drawing (1 4 CELLS CELLS) as the model sees it."""
    return studio.model.model.process_latent_in(studio.latents(drawing)["samples"])


METHODS = {
    "chroma within outlines": guided,
    "palette, Monge-Kantorovich": lambda *inputs: by_palette(*inputs, monge_kantorovich),
    "palette, sliced transport": lambda *inputs: by_palette(*inputs, sliced),
}
WHILE_SAMPLING = "latents, while sampling"


def colour_errors(pictures: Tensor, contents: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (b) of hue and chroma, and of lightness: in OKLab, means over cells inside the content's silhouette."""
    weight = F.adaptive_avg_pool2d(silhouette(contents).float(), CELLS)
    difference, area = to_oklab(means(pictures)) - to_oklab(means(contents)), weight.sum((1, 2, 3))
    return tuple(
        (part.norm(dim=1, keepdim=True) * weight).sum((1, 2, 3)) / area
        for part in (difference[:, 1:], difference[:, :1])
    )


def means(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, CELLS)


def measure(bench: Bench, pictures: Tensor, contents: Tensor) -> dict[str, Tensor]:
    scores = bench.scores(pictures, bench.pairs)
    return dict(zip(SCORES, (*colour_errors(pictures, contents), scores["style"], scores["content"]), strict=True))


def curve_section(bench: Bench, found: dict[str, list[dict[str, Tensor]]], truths: dict, file: Path) -> str:
    rows, none = [["the ground truth", "", *(bench.estimate(truths[name]) for name in SCORES), ""]], None
    for method, curve in found.items():
        for strength, scores in zip(STRENGTHS, curve, strict=True):
            if none and not strength:
                continue
            none = none or scores
            moved = bold(bench.estimate(scores["style"] - none["style"])) if strength else ""
            rows.append(
                [method if strength else "none", f"{strength:g}", *(bench.estimate(scores[n]) for n in SCORES), moved]
            )
    plot(found, file)
    advised = found["chroma within outlines"][STRENGTHS.index(ADVISED)]
    return CURVE_TEXT.format(
        table=table(["", "strength", *SCORES, "style, less that of none"], rows),
        file=file.name,
        cells=CELLS,
        verdict=verdict(bench, none, advised),
    )


def verdict(bench: Bench, none: dict[str, Tensor], advised: dict[str, Tensor]) -> str:
    """How much of the colour error is left, and whether the style score is as without."""
    left = (advised["colour error"].mean() / none["colour error"].mean()).item()
    style, usual = bench.estimate(advised["style"]), bench.estimate(none["style"])
    place = "inside" if usual.low <= style.mean <= usual.high else "outside"
    return f"{left:.0%} of the colour error are left; its style score is {place} the interval of none."


def plot(found: dict[str, list[dict[str, Tensor]]], file: Path) -> None:
    figure, (axis,) = chart_axes(1)
    for (method, curve), colour in zip(found.items(), COLOURS, strict=True):
        points = [(scores["colour error"].mean().item(), scores["style"].mean().item()) for scores in curve]
        axis.plot(*zip(*points, strict=True), color=colour, label=method, marker=".")
    axis.set(xlabel="colour error", ylabel="style score")
    axis.legend()
    figure.savefig(file)


def styles_section(bench: Bench, found: dict[str, list[dict[str, Tensor]]]) -> str:
    """The shipped method, by set of the style image."""
    curve, rows = found["chroma within outlines"], []
    for emoji in dict.fromkeys(emoji for emoji, _ in bench.styles):
        chosen = [i for i, pair in enumerate(bench.pairs) if pair.style[0] == emoji]
        cells = [f"{s['colour error'][chosen].mean():.3f}, {s['style'][chosen].mean():.3f}" for s in curve]
        rows.append([emoji, *cells])
    return STYLES_TEXT.format(styles=table(["style image of", *(f"{strength:g}" for strength in STRENGTHS)], rows))


def sheet_section(bench: Bench, pictures: Tensor, contents: Tensor, steered: Tensor, file: Path) -> str:
    pairs = range(len(bench.pairs))[: 3 * len(bench.styles)]  # of three content images
    styles = bench.studio.drawn(*(pair.style for pair in bench.pairs))
    columns = {"content": contents, "style": styles, "0": pictures}
    columns |= {f"{strength:g}": guided(pictures, contents, strength) for strength in STRENGTHS[1:]}
    columns |= {
        name: method(pictures, contents, 1.0) for name, method in zip("MS", [*METHODS.values()][1:], strict=True)
    }
    columns["W"] = steered
    page = Image.new("RGB", (136 * len(columns), 24 + 136 * len(pairs)), "white")
    for i, (name, batch) in enumerate(columns.items()):
        ImageDraw.Draw(page).text((136 * i + 68, 2), name, "black", font_size=18, anchor="mt")
        for j in pairs:
            pixels = (255 * rearrange(F.adaptive_avg_pool2d(batch[j], SIDE), "c h w -> h w c")).round().byte().numpy()
            page.paste(Image.fromarray(pixels), (136 * i + 4, 24 + 136 * j))
    page.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    return SHEET_TEXT.format(sheet=file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="What keeping the content image's colours costs in style.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--few", action="store_true", help="four pairs; the results stay in DIR")
    options = parser.parse_args()
    images, results = (2, options.work) if options.few else (4, RESULTS)
    bench = Bench(Studio(options.work), first_pairs(PAIRS["tune"], images, images), 0.2, 1)
    pictures = bench.pictures(QUALITY, bench.pairs)
    contents, truths = (
        bench.studio.drawn(*drawings) for drawings in zip(*((p.content, p.truth) for p in bench.pairs), strict=True)
    )
    found = {
        name: [measure(bench, method(pictures, contents, strength), contents) for strength in STRENGTHS]
        for name, method in METHODS.items()
    }
    steered = {strength: while_sampling(bench, strength) for strength in STRENGTHS}
    found[WHILE_SAMPLING] = [measure(bench, drawn, contents) for drawn in steered.values()]
    text = joined(
        [
            INTRODUCTION.format(
                date=date.today(),
                few=" --few" * options.few,
                comfyui=comfyui_version(),
                torch=torch.__version__,
                pairs=len(bench.pairs),
            ),
            curve_section(bench, found, measure(bench, truths, contents), results / "colours_curve.png"),
            styles_section(bench, found),
            sheet_section(bench, pictures, contents, steered[1.0], results / "colours_sheet.png"),
        ]
    )
    (results / "colours.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
