"""The drawings the demo model learns from: openly licensed emoji, each subject by several hands, and icons for shapes.

They come as npm packages (`@iconify-json/<set>`); `fetch_sets` asks the local npm for them.
"""

import json
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from PIL import Image

TRAIN_SETS = ("twemoji", "noto", "noto-v1", "fluent-emoji-flat", "emojione", "fxemoji")
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion", "Travel & Places")

# Of each icon set: which names are filled shapes, which are lines. The first group is the name of the subject.
ICON_SETS = {
    "ph": (r"(.+)-(?:fill|duotone)", r"(.+)(?<!-fill|-thin|-bold)(?<!-light)(?<!-duotone)"),
    "tabler": (r"(.+)-filled", r"(.+)(?<!-filled)"),
    "material-symbols": (r"(.+)(?<!-outline|-rounded)(?<!-sharp)", r"(.+)-outline"),
    "fluent": (r"(.+)-24-filled", r"(.+)-24-regular"),
}
SIGNS = re.compile(r"brand|logo|letter|number|text|format|align|\d")  # no subjects to be seen in these

HELD_OUT = Path(__file__).with_name("held_out.txt").read_text(encoding="utf-8").split()
# Words of the held-out names that mostly name other subjects: no icon is left out for these.
COMMON = """
    3rd a and at back black blowing button crescent face fruit full glowing green growing hot in
    increasing kick last left love neutral no of on out place purple quarter red right round sign sleeping
    speed symbol thought top up waning water white with
"""
HELD_OUT_WORDS = {word.rstrip("s") for name in HELD_OUT for word in name.split("-")} - set(COMMON.split())


def fetch_sets(folder: Path, names=TRAIN_SETS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name / "icons.json").exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{name}"],
            cwd=folder,
            check=True,
            capture_output=True,
            encoding="utf-8",
        ).stdout.split()[-1]
        with tarfile.open(folder / packed) as tar:
            for member in tar.getmembers():
                member.name = member.name.replace("package/", f"{name}/", 1)
            tar.extractall(folder, filter="data")
        (folder / packed).unlink()


class EmojiSet:
    """One set: `icon(subject)` finds its drawing, whichever way the set spells the name."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.data = json.loads((folder / name / "icons.json").read_text(encoding="utf-8"))
        self.by_plain_name = {key.replace("-", ""): key for key in self.data["icons"]}

    def icon(self, subject: str) -> dict | None:
        icons, aliases = self.data["icons"], self.data.get("aliases", {})
        key = (
            subject
            if subject in icons
            else aliases.get(subject, {}).get("parent") or self.by_plain_name.get(subject.replace("-", ""))
        )
        return icons.get(key)

    def cut_out(self, subject: str, size: int) -> Image.Image | None:
        """RGBA, `size` pixels square, with the small margin every set is given alike."""
        icon = self.icon(subject)
        if icon is None:
            return None
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        left, top = icon.get("left", self.data.get("left", 0)), icon.get("top", self.data.get("top", 0))
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
        page = Image.new("RGBA", (size, size), (255, 255, 255, 0))
        page.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        return page

    def render(self, subject: str, size: int) -> Image.Image | None:
        """The subject on white."""
        if (cut_out := self.cut_out(subject, size)) is None:
            return None
        page = Image.new("RGBA", (size, size), "white")
        page.alpha_composite(cut_out)
        return page.convert("RGB")


def subjects(folder: Path) -> list[str]:
    """Names every training set but fxemoji (the smallest) can draw, in the order of fluent-emoji-flat."""
    sets = [EmojiSet(folder, name) for name in TRAIN_SETS if name != "fxemoji"]
    categories = json.loads((folder / "fluent-emoji-flat" / "metadata.json").read_text(encoding="utf-8"))["categories"]
    names = [subject for category in CATEGORIES for subject in categories[category]]
    return [
        subject
        for subject in dict.fromkeys(names)
        if all(s.icon(subject) for s in sets)
        and not subject.endswith(("oclock", "-thirty", "-skin-tone", "-light", "-medium", "-dark"))
    ]


class Drawing(NamedTuple):
    """kind: "emoji", "filled" or "lines"; key: the name in its set."""

    set: str
    key: str
    subject: str
    kind: str


def emoji_drawings(folder: Path, most: int, held_out: bool = False) -> list[Drawing]:
    """Up to `most` subjects in every training set that has them; the held-out subjects instead where asked."""
    chosen = [subject for subject in subjects(folder) if (subject in HELD_OUT) == held_out][:most]
    sets = [EmojiSet(folder, name) for name in TRAIN_SETS]
    return [Drawing(s.name, subject, subject, "emoji") for s in sets for subject in chosen if s.icon(subject)]


def icon_drawings(folder: Path, each: int) -> list[Drawing]:
    """Up to `each` icons of every set, drawn by lot, none of a held-out subject."""
    found = []
    for name, patterns in ICON_SETS.items():
        icons = EmojiSet(folder, name).data["icons"]
        drawings = []
        for kind, pattern in zip(("filled", "lines"), patterns, strict=True):
            matches = [match for key in icons if (match := re.fullmatch(pattern, key))]
            drawings += [Drawing(name, match[0], match[1], kind) for match in matches if is_allowed(match[1])]
        random.Random(name).shuffle(drawings)
        found += drawings[:each]
    return found


def is_allowed(subject: str) -> bool:
    return not SIGNS.search(subject) and not HELD_OUT_WORDS & {word.rstrip("s") for word in subject.split("-")}


# ---- rendering on all cores


class Renderer:
    """Draws one drawing: `rgba` 4 h w uint8, and the tones of the drawn part."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.sets = folder, size, {}

    def __call__(self, drawing: Drawing) -> tuple[np.ndarray, np.ndarray]:
        if drawing.set not in self.sets:
            self.sets[drawing.set] = EmojiSet(self.folder, drawing.set)
        rgba = np.asarray(self.sets[drawing.set].cut_out(drawing.key, self.size))
        grey = rgba[..., :3] @ np.float32([0.299, 0.587, 0.114]) / 255
        drawn = grey[rgba[..., 3] > 128]
        tones = np.percentile(drawn, (3, 50, 97)) if drawn.size else np.zeros(3)
        return np.moveaxis(rgba, -1, 0), tones.astype(np.float32)


def render_all(folder: Path, drawings: list[Drawing], size: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """(n 4 size size uint8, n 3 tones: dark, middle, light of the drawn part, 0 to 1)."""
    found = on_all_cores(partial(Renderer, folder, size), drawings, processes)
    rgba, tones = zip(*found, strict=True)
    return np.stack(rgba), np.stack(tones)


def on_all_cores(make_worker: Callable, items: Sequence, processes: int) -> list:
    """What a worker answers for each item. Each process makes one worker, and keeps it."""
    with get_context("fork").Pool(processes, _make_worker, (make_worker,)) as pool:
        return list(pool.imap(_ask_worker, items, chunksize=64))


def _make_worker(make: Callable) -> None:
    global _worker
    _worker = make()


def _ask_worker(item):
    return _worker(item)
