"""`python benchmarks/fidelity/frames.py [--work DIR] [--only NAME ...]`: does a stylised film flicker?

Drawings of the pairs for tuning are moved by a known affine map, and every frame is drawn in a style, starting from the
frame itself. A picture warped by that map should be the next picture: the difference is the warp error.

LoRAs and clips are kept as by report.py, so that `--only NAME ...` can draw some ways before, in several processes.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
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
from torch import Tensor

from benchmarks.common import RESULTS, Estimate, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.judges import SIDE
from benchmarks.fidelity.pairs import PAIRS, Drawing, Pair
from benchmarks.fidelity.report import CONTENT_PROMPT, TRIED, Bench, first_pairs
from benchmarks.fidelity.studio import CFG, DEFAULTS, SAMPLER, SCHEDULER, Studio
from consislora_core.colours import match_palette
from consislora_core.files import written_whole
from consislora_core.lora_file import ImageLora
from consislora_core.metrics import structure_scores
from consislora_core.store import fingerprint
from demo.server import PACK

QUALITY = TRIED["quality"]
FRAMES = 6
LEARNED = (0, 2, 5)  # the frames that the content LoRA learns from
STEPS = 8  # of sampling
SETTINGS = DEFAULTS | QUALITY.settings | {"reuse_steps": 2}
IMAGES = 4  # content images and style images that are learned from
STYLES = ("openmoji", "streamline-emojis")  # those that are drawn: least like the content images
IN_FIGURE = (2, 4)  # films
REACH = 9  # pixels around the subject that count as the subject
SCORES = ("to the next frame", "to the first frame", "content", "outlines", "style")


def pan(t: float) -> list[list[float]]:
    return [[1, 0, -0.36 * t], [0, 1, -0.12 * t]]


def turn(t: float) -> list[list[float]]:
    cos, sin = math.cos(math.radians(25 * t)), math.sin(math.radians(25 * t))
    return [[cos, -sin, 0], [sin, cos, 0]]


def shrink(t: float) -> list[list[float]]:
    size = 0.7**t
    return [[1 / size, 0, 0], [0, 1 / size, 0]]


# From a place in frame t, 0 to 1, to that in the drawing; places are from -1 to 1.
MOTIONS: dict[str, Callable[[float], list[list[float]]]] = {"pan": pan, "turn": turn, "scale": shrink}


class Way(NamedTuple):
    """How the frames of a film are drawn. noise: another for each frame, the same, or each frame's own by inversion.

    anchored: self-attention also reads the first frame. palette: the frames first get the style image's palette.
    """

    noise: str
    denoise: float
    anchored: bool = False
    palette: bool = False


WAYS = {
    "own noise, anchor": Way("own", 1.0, anchored=True),
    "same noise": Way("same", 0.8),
    "own noise": Way("own", 1.0),
    "same noise, anchor": Way("same", 0.8, anchored=True),
    "another noise": Way("another", 0.8),
    "own noise, anchor, 0.8": Way("own", 0.8, anchored=True),
    "own noise, anchor, palette": Way("own", 1.0, anchored=True, palette=True),
    "own noise, anchor, palette, 0.8": Way("own", 0.8, anchored=True, palette=True),
}
DIFFERENCES = [(name, "same noise") for name in WAYS if name != "same noise"] + [
    ("own noise, anchor", "own noise"),
    ("own noise, anchor, palette", "own noise, anchor"),
    ("own noise, anchor, palette, 0.8", "own noise, anchor, 0.8"),
    ("own noise, anchor, palette, 0.8", "own noise, anchor"),
    ("own noise, anchor, palette, 0.8", "own noise, anchor, palette"),
]


def place(motion: str, t: int) -> Tensor:
    """Homogeneous 3 x 3: from a place in frame t to that in the drawing."""
    return torch.tensor([*MOTIONS[motion](t / (FRAMES - 1)), [0.0, 0.0, 1.0]])


def moved(picture: Tensor, matrix: Tensor) -> Tensor:
    """A picture (3 h w), with white around it, of which a place is read where `matrix` says."""
    grid = F.affine_grid(matrix[None, :2], [1, 3, *picture.shape[1:]], align_corners=False)
    return 1 - F.grid_sample(1 - picture[None], grid, "bicubic", align_corners=False)[0].clamp(0, 1)


def subject(frames: Tensor) -> Tensor:
    """t 1 h w: where the subject is in frames on white, and a little around it."""
    return F.max_pool2d((1 - frames).amax(1, keepdim=True), 2 * REACH + 1, 1, REACH) > 0.05


def warp_error(frames: Tensor, source: Tensor, motion: str, earlier: list[int]) -> Tensor:
    """How far each frame from the second on is from an earlier one moved to it, on the subject, of 100: t - 1."""
    errors, masks = [], subject(source)
    for t, s in zip(range(1, FRAMES), earlier, strict=True):
        matrix = torch.linalg.inv(place(motion, s)) @ place(motion, t)
        seen = moved(torch.zeros(3, *frames.shape[2:]), matrix)[:1] == 0  # outside the earlier frame it is white
        difference = (moved(frames[s], matrix) - frames[t]).abs().mean(0, keepdim=True)
        errors.append(100 * difference[masks[t] & seen].mean())
    return torch.stack(errors)


class FilmStudio(Studio):
    """Also learns from films: drawings with the name of a motion."""

    def drawn(self, *drawings: tuple[str, ...]) -> Tensor:
        return super().drawn(*(drawing[:2] for drawing in drawings))

    def film(self, emoji: str, subject: str, motion: str) -> Tensor:
        """t 3 h w; the first frame is the drawing."""
        return torch.stack([moved(self.drawn((emoji, subject))[0], place(motion, t)) for t in range(FRAMES)])

    @torch.inference_mode()
    def recoloured_latents(self, drawing: tuple[str, ...], count: int, size: float = 1.0) -> Tensor:
        if len(drawing) == 2:
            return super().recoloured_latents(drawing, count, size)
        frames = rearrange(self.film(*drawing)[list(LEARNED)], "t c h w -> t h w c")
        recolour = self.pack.nodes.recolour.Recolour.execute
        return torch.cat(
            [self.vae.encode(recolour(frame, count // len(LEARNED), 0).result[0]) for frame in frames.split(1)]
        )


class Films(Bench):
    @property
    def drawn_pairs(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.style[0] in STYLES]

    @cached_property
    def contents_and_styles(self) -> tuple[dict, dict]:
        """The LoRAs of films, by content image, and of style images."""
        stage_1, _ = self.stages(QUALITY.recipe)
        films = [(*content, self.motion_of(content)) for content in self.contents]
        owns = self.studio.learned(stage_1, CONTENT_PROMPT, films, recolourings=QUALITY.recipe.recolourings).owns
        return {film[:2]: own for film, own in owns.items()}, self.loras(QUALITY)

    def motion_of(self, content: Drawing) -> str:
        return list(MOTIONS)[self.contents.index(content) % len(MOTIONS)]

    def source(self, pair: Pair) -> Tensor:
        return self.studio.film(*pair.content, self.motion_of(pair.content))

    def in_palette(self, pair: Pair, together: bool = True) -> Tensor:
        """The frames in the style image's palette, t 3 h w, all recoloured by one map or each by its own."""
        frames, style = (rearrange(p, "t c h w -> t h w c") for p in (self.source(pair), self.studio.drawn(pair.style)))
        return rearrange(match_palette(frames, style, together=together), "t h w c -> t c h w")

    @torch.inference_mode()
    def latents(self, frames: Tensor) -> dict[str, Tensor]:
        return {"samples": self.studio.vae.encode(rearrange(frames, "t c h w -> t h w c"))}

    def clip(self, pair: Pair, way: Way) -> Tensor:
        """The frames of a film, drawn in a style: t 3 h w."""
        studio, seed, motion = self.studio, self.pairs.index(pair), self.motion_of(pair.content)
        content, style = (owns[drawing] for owns, drawing in zip(self.contents_and_styles, pair, strict=True))
        name = fingerprint(
            [studio.whole, content.name, style.name, seed, motion, FRAMES, STEPS, *way[:3], SETTINGS]
            + ["palette"] * way.palette
        )
        if not (file := studio.pictures / f"{name}.png").exists():
            begun = self.in_palette(pair) if way.palette else self.source(pair)
            frames = self.drawn(self.latents(begun), content.lora, style.lora, seed, way)
            with written_whole(file) as unfinished:
                pixels = (255 * rearrange(frames, "t c h w -> h (t w) c")).round().byte().cpu().numpy()
                Image.fromarray(pixels).save(unfinished, "png")
        with Image.open(file) as image:
            return rearrange(torch.tensor(np.asarray(image)), "h (t w) c -> t c h w", t=FRAMES) / 255

    @torch.inference_mode()
    def drawn(self, latent: dict, content: ImageLora, style: ImageLora, seed: int, way: Way) -> Tensor:
        studio, host = self.studio, self.studio.pack.host
        sigmas = host.sampling.ksampler_sigmas(studio.model, STEPS, SAMPLER, SCHEDULER, way.denoise)
        positive, negative = studio.text("a [c] in the style of [v]"), studio.text("")
        if way.noise == "own":
            inverting = host.guider.build_reconstruction_guider(studio.model, negative, content)
            latent = host.sampling.invert(inverting, latent, sigmas)
        if way.noise == "same":
            latent = {**latent, "batch_index": [0] * FRAMES}
        model = host.frames.with_anchor_attention(studio.model) if way.anchored else studio.model
        settings = host.guider.GuidanceSettings(**SETTINGS)
        guider = host.guider.build_dual_guider(model, positive, negative, content, style, settings)
        return studio.decoded(
            host.sampling.sample(guider, latent, seed, SAMPLER, sigmas, noise=float(way.noise != "own"))
        )

    def clip_scores(self, frames: Tensor, pair: Pair) -> dict[str, float]:
        source, motion = self.source(pair), self.motion_of(pair.content)
        small, small_source, style = (
            F.adaptive_avg_pool2d(pictures, SIDE) for pictures in (frames, source, self.studio.drawn(pair.style))
        )
        ours, theirs = (self.judges["content"](pictures).features for pictures in (small, small_source))
        our_style, its_style = (self.judges["style"](pictures).features for pictures in (small, style))
        both = zip(small.split(1), small_source.split(1), strict=True)
        scores = (
            warp_error(frames, source, motion, list(range(FRAMES - 1))),
            warp_error(frames, source, motion, [0] * (FRAMES - 1)),
            (ours * theirs).sum(1),
            torch.cat([structure_scores(*images)["edges"] for images in both]),
            (our_style * its_style).sum(1),
        )
        return {name: score.mean().item() for name, score in zip(SCORES, scores, strict=True)}

    def scores_of(self, clips: Iterable[Tensor]) -> dict[str, Tensor]:
        """Of a clip of each pair."""
        found = [self.clip_scores(clip, pair) for clip, pair in zip(clips, self.drawn_pairs, strict=True)]
        return {name: torch.tensor([scores[name] for scores in found]) for name in SCORES}


def strip(rows: dict[str, list[Tensor]], file: Path) -> None:
    """Clips (t 3 h w) of each row one beside the other, its name above."""
    side, label = 96, 22
    width = side * FRAMES * len(next(iter(rows.values()))) + 8 * (len(next(iter(rows.values()))) - 1)
    page = Image.new("RGB", (width, (side + label) * len(rows)), "white")
    for j, (name, clips) in enumerate(rows.items()):
        ImageDraw.Draw(page).text((2, (side + label) * j + 2), name, "black", font_size=16)
        for i, clip in enumerate(clips):
            pixels = (255 * rearrange(F.interpolate(clip, side, mode="area"), "t c h w -> h (t w) c")).round().byte()
            page.paste(Image.fromarray(pixels.numpy()), (i * (side * FRAMES + 8), (side + label) * j + label))
    page.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a film that is drawn in a style flicker?")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="NAME", help="draw these, and write no report")
    options = parser.parse_args()
    bench = Films(FilmStudio(options.work), first_pairs(PAIRS["tune"], IMAGES, IMAGES), 0.2, 1)
    drawn = {}
    for name in options.only or WAYS:
        print(f"Drawing {len(bench.drawn_pairs)} films, {name} ...", file=sys.stderr, flush=True)
        drawn[name] = [bench.clip(pair, WAYS[name]) for pair in bench.drawn_pairs]
    if options.only:
        return
    sources = [bench.source(pair) for pair in bench.drawn_pairs]
    through_vae = [bench.studio.decoded(bench.latents(frames)) for frames in sources]
    recoloured = {
        "the frames, each by its own palette": [bench.in_palette(pair, together=False) for pair in bench.drawn_pairs],
        "the frames, all by one palette": [bench.in_palette(pair) for pair in bench.drawn_pairs],
    }
    clips = {"the frames themselves": sources, "the frames through the VAE": through_vae, **recoloured, **drawn}
    measured = {name: bench.scores_of(one) for name, one in clips.items()}

    def estimates(values: dict[str, Tensor]) -> list[Estimate]:
        return [bench.estimate(values[name], bench.drawn_pairs) for name in SCORES]

    rows = [[name, *estimates(scores)] for name, scores in measured.items()]
    moved = []
    for one, other in DIFFERENCES:
        difference = {name: measured[one][name] - measured[other][name] for name in SCORES}
        moved.append([f"{one}, less {other}", *map(bold, estimates(difference))])
    low, high, usual = (measured[name] for name in ("own noise, anchor, 0.8", "own noise, anchor", "same noise"))
    share = ((usual["style"] - low["style"]).mean() / (high["style"] - low["style"]).mean()).item()
    between = {name: low[name].lerp(high[name], share) - usual[name] for name in SCORES}
    moved.append(["own noise, anchor, at an equal style score, less same noise", *map(bold, estimates(between))])
    ways = [
        [name, way.noise, f"{way.denoise:g}", *("yes" if is_so else "" for is_so in (way.anchored, way.palette))]
        for name, way in WAYS.items()
    ]
    file = RESULTS / "frames.png"
    shown = {name: [films[i] for i in IN_FIGURE] for name, films in {"frames": sources, **drawn}.items()}
    strip(shown, file)
    report = joined(template("frames")).format(
        date=date.today(), comfyui=comfyui_version(), torch=torch.__version__, clips=len(bench.drawn_pairs),
        frames=FRAMES, contents=IMAGES, styles=len(STYLES), learned=len(LEARNED), steps=STEPS, cfg=CFG,
        sampler=SAMPLER, scheduler=SCHEDULER, file=file.name,
        ways=table(["", "noise", "denoise", "anchor", "palette"], ways),
        scores=table(["", *SCORES], rows), moves=table(["", *SCORES], moved),
    )  # fmt: skip
    (RESULTS / "frames.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
