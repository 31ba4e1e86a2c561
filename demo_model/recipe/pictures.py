"""The pictures the demo model learns from: openly licensed emoji, each thing drawn in many styles.

Emoji sets come as npm packages (`@iconify-json/<set>`); `fetch_sets` asks the local npm for them.
"""

import json
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageFilter, ImageOps

TRAIN_SETS = ("twemoji", "noto", "noto-v1", "fluent-emoji-flat", "emojione", "fxemoji")
UNSEEN_SETS = (
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "openmoji",
)  # the new styles of the demo and the benchmarks
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion", "Travel & Places")

HELD_OUT = Path(__file__).with_name("held_out.txt").read_text().split()


def fetch_sets(folder: Path, names=TRAIN_SETS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name / "icons.json").exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{name}"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(folder / packed) as tar:
            for member in tar.getmembers():
                member.name = member.name.replace("package/", f"{name}/", 1)
            tar.extractall(folder, filter="data")
        (folder / packed).unlink()


class EmojiSet:
    """One set: `icon(thing)` finds its drawing, whichever way the set spells the name."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.data = json.loads((folder / name / "icons.json").read_text())
        self.by_plain_name = {key.replace("-", ""): key for key in self.data["icons"]}

    def icon(self, thing: str) -> dict | None:
        icons, aliases = self.data["icons"], self.data.get("aliases", {})
        key = (
            thing
            if thing in icons
            else aliases.get(thing, {}).get("parent") or self.by_plain_name.get(thing.replace("-", ""))
        )
        return icons.get(key)

    def render(self, thing: str, size: int) -> Image.Image | None:
        """The thing on white, `size` pixels square, with the small margin every set is given alike."""
        icon = self.icon(thing)
        if icon is None:
            return None
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        drawn = Image.open(
            BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size * 2, height=size * 2)))
        ).convert("RGBA")
        drawn = drawn.crop(drawn.getchannel("A").getbbox() or (0, 0, 1, 1))
        scale = 0.86 * size / max(drawn.size)
        drawn = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.LANCZOS)
        page = Image.new("RGBA", (size, size), "white")
        page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        return page.convert("RGB")


def things(folder: Path) -> list[str]:
    """Names every training set but fxemoji (the smallest) can draw, in the order of fluent-emoji-flat."""
    sets = [EmojiSet(folder, name) for name in TRAIN_SETS if name != "fxemoji"]
    categories = json.loads((folder / "fluent-emoji-flat" / "metadata.json").read_text())["categories"]
    names = [thing for category in CATEGORIES for thing in categories[category]]
    return [
        thing
        for thing in dict.fromkeys(names)
        if all(s.icon(thing) for s in sets)
        and not thing.endswith(("oclock", "-thirty", "-skin-tone", "-light", "-medium", "-dark"))
    ]


# Procedural styles: each repaints a drawing, so the space of styles grows without new pictures.


def _grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(ImageOps.grayscale(picture), np.float32) / 255  # h w


def _mix(amount: np.ndarray, dark, light) -> Image.Image:
    rgb = np.asarray(dark, np.float32) * (1 - amount[..., None]) + np.asarray(light, np.float32) * amount[..., None]
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def _edges(picture: Image.Image) -> np.ndarray:
    channels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    dy, dx = np.gradient(channels, axis=(0, 1))
    return (6 * np.sqrt((dx**2 + dy**2).max(-1))).clip(0, 1)


def duotone(picture):
    return _mix(_grey(picture), (38, 20, 84), (255, 214, 120))


def blueprint(picture):
    return _mix(_edges(picture), (22, 64, 140), (235, 244, 255))


def outline(picture):
    return _mix(1 - _edges(picture), (20, 20, 20), (255, 255, 255))


def neon(picture):
    glow = (
        np.asarray(
            Image.fromarray((_edges(picture) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)), np.float32
        )
        / 255
    )
    hue = np.asarray(picture.filter(ImageFilter.MaxFilter(5)).convert("HSV"))
    hue = np.asarray(
        Image.fromarray(
            np.dstack([hue[..., 0], np.full_like(hue[..., 1], 220), np.full_like(hue[..., 2], 255)]), "HSV"
        ).convert("RGB")
    )
    lit = (_edges(picture) + glow).clip(0, 1)[..., None]
    return Image.fromarray((hue * lit + np.array([14, 8, 30]) * (1 - lit)).clip(0, 255).astype(np.uint8))


def halftone(picture):
    y, x = np.mgrid[: picture.height, : picture.width]
    dots = 0.5 + 0.25 * (np.cos(np.pi * (x + y) / 4) + np.cos(np.pi * (x - y) / 4))
    return _mix((6 * (_grey(picture) - 0.96 * dots) + 0.5).clip(0, 1), (190, 30, 45), (255, 248, 230))


def mosaic(picture):
    side = picture.width // 16
    return picture.resize((16, 16), Image.BOX).resize(picture.size, Image.NEAREST) if side else picture


def hatching(picture):
    y, x = np.mgrid[: picture.height, : picture.width]
    grey, ink = _grey(picture), _edges(picture) > 0.5
    for level, phase in ((0.85, x + y), (0.6, x - y), (0.35, 2 * x)):
        ink |= (grey < level) & (phase % 6 < 2)
    return _mix(1 - ink.astype(np.float32), (50, 35, 25), (248, 240, 222))


def kuwahara(picture):
    """Oil paint: each pixel takes the mean of its calmest quadrant (Kuwahara et al. 1976)."""
    from scipy.ndimage import uniform_filter

    rgb, size = np.asarray(picture, np.float32), 7
    mean = uniform_filter(rgb, (size, size, 1))
    spread = (uniform_filter(rgb**2, (size, size, 1)) - mean**2).sum(-1)
    shifts = [(dy, dx) for dy in (-3, 3) for dx in (-3, 3)]
    calmest = np.argmin([np.roll(spread, s, (0, 1)) for s in shifts], 0)
    means = np.stack([np.roll(mean, s, (0, 1)) for s in shifts])  # quadrant h w c
    painted = np.take_along_axis(means, calmest[None, ..., None], 0)[0]
    return Image.fromarray((painted * 0.92 + np.array([255, 244, 214]) * 0.08).clip(0, 255).astype(np.uint8))


def silhouette(picture):
    return _mix((8 * (_grey(picture) - 0.93)).clip(0, 1), (12, 92, 88), (240, 248, 240))


def negative(picture):
    return ImageOps.invert(picture)


def chalk(picture):
    grain = np.random.default_rng(0).uniform(0.45, 1, (picture.height, picture.width))
    return _mix(_edges(picture) * grain, (38, 58, 48), (245, 245, 235))


PROCEDURAL = (duotone, blueprint, outline, neon, halftone, mosaic, hatching, kuwahara, silhouette, negative, chalk)


# Palettes: a drawing repainted in colours that its style's words name, so that colour is told by the style alone.

COLOURS = {
    "red": (214, 40, 48),
    "orange": (240, 130, 30),
    "yellow": (245, 200, 50),
    "green": (50, 150, 70),
    "teal": (20, 150, 150),
    "blue": (45, 95, 205),
    "violet": (125, 60, 170),
    "pink": (238, 110, 160),
    "brown": (130, 85, 50),
    "grey": (135, 140, 150),
    "black": (28, 28, 32),
}


def _lightness(picture: Image.Image) -> np.ndarray:
    """Grey, the drawing's middle tone at 0.4 and its page at 1: a dark thing and a light one give the same tones."""
    grey = _grey(picture)
    drawn = grey[grey < 0.97]
    if drawn.size == 0:
        return grey
    low, middle, high = np.percentile(drawn, (3, 50, 97))
    return np.where(grey < 0.97, (0.4 + 0.8 * (grey - middle) / max(high - low, 0.35)).clip(0, 0.8), 1)


def _shade(lightness: np.ndarray, colour: np.ndarray, page) -> np.ndarray:
    """0: a third of the colour; 0.4: the colour; 0.8: half way to white; 1: the page."""
    steps = np.stack([colour * 0.35, colour, colour * 0.5 + 127.5])
    which = (lightness / 0.4).clip(0, 2)
    lower = np.minimum(which.astype(int), 1)
    if colour.ndim == 1:
        low, high = steps[lower], steps[lower + 1]
    else:
        low = np.take_along_axis(steps, lower[None, ..., None], 0)[0]
        high = np.take_along_axis(steps, lower[None, ..., None] + 1, 0)[0]
    tone = (which - lower)[..., None]
    return np.where(lightness[..., None] >= 0.97, np.asarray(page, np.float32), low * (1 - tone) + high * tone)


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def shades(picture, colour, page=(255, 255, 255)):
    return _image(_shade(_lightness(picture), np.asarray(colour, np.float32), page))


def two_tones(picture, top, bottom):
    fade = np.linspace(0, 1, picture.height, dtype=np.float32)[:, None, None]
    colours = np.asarray(top, np.float32) * (1 - fade) + np.asarray(bottom, np.float32) * fade
    colours = np.broadcast_to(colours, (picture.height, picture.width, 3))
    return _image(_shade(_lightness(picture), colours, (255, 255, 255)))


def cut(picture, colour, page=(255, 255, 255)):
    """Cut from coloured paper: one flat fill, the inner edges left white."""
    paper = np.minimum(_edges(picture) * 1.2, 1)
    drawn = (_grey(picture) < 0.97).astype(np.float32)
    return _mix(np.maximum(paper * drawn, 1 - drawn), colour, page)


def lines(picture, colour, page=(255, 255, 255)):
    return _mix(1 - _edges(picture), colour, page)


def pale(colour) -> tuple:
    return tuple(0.3 * c + 0.7 * 255 for c in colour)


def repaint(picture: Image.Image, rng) -> tuple[Image.Image, str]:
    """The drawing in one or two colours drawn by lot, and the words for that look."""
    (first, colour), (second, other) = rng.sample(sorted(COLOURS.items()), 2)
    kinds = [
        (8, lambda: (shades(picture, colour), f"{first} shades")),
        (6, lambda: (cut(picture, colour), f"{first} cut")),
        (4, lambda: (lines(picture, colour), f"{first} lines")),
        (3, lambda: (shades(picture, colour, pale(other)), f"{first} shades on {second}")),
        (2, lambda: (cut(picture, colour, pale(other)), f"{first} cut on {second}")),
        (3, lambda: (two_tones(picture, colour, other), f"{first} to {second}")),
    ]
    return rng.choices([paint for _, paint in kinds], [weight for weight, _ in kinds])[0]()
