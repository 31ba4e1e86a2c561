"""`python benchmarks/fidelity/faults.py [--photos DIR]`: how often `find_faults` is right about a picture.

On every drawing of all sets as it is, on every tenth damaged, and on the photographs in a folder both ways. The table
is also in benchmarks/results/reference_faults.md.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.common import RESULTS, joined, table, template
from benchmarks.fidelity.judges import render_everything
from consislora_core.image_faults import find_faults
from demo.server import PACK

Damage = Callable[[Image.Image], Image.Image]

TENTH = 10
FAULTS = {"small": "pixels and is", "blurred": "is blurred", "JPEG": "JPEG", "noisy": "is noisy", "empty": "empty page"}


def blurred(picture: Image.Image, sigma: float = 3) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def noisy(picture: Image.Image, deviation: float) -> Image.Image:
    """With noise of this standard deviation, of 255, in each channel."""
    noise = np.random.default_rng(0).normal(0, deviation, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def coarse(picture: Image.Image, part: int = 4) -> Image.Image:
    """At a part of its resolution, scaled up again."""
    small = picture.resize((picture.width // part, picture.height // part), Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def on_large_page(picture: Image.Image) -> Image.Image:
    """As a tenth of a page of the same size, in the colour of its corner."""
    page = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    small = picture.resize([round(side * 0.1**0.5) for side in picture.size], Image.Resampling.BICUBIC)
    page.paste(small, (page.width // 5, page.height // 3))
    return page


DAMAGE: dict[str, Damage] = {
    "Gaussian blur, sigma 3": blurred,
    "a quarter of the resolution": coarse,
    "JPEG, quality 20": lambda picture: compressed(picture, 20),
    "JPEG, quality 75": lambda picture: compressed(picture, 75),
    "JPEG, quality 90": lambda picture: compressed(picture, 90),
    "noise, 25 of 255": lambda picture: noisy(picture, 25),
    "noise, 10 of 255": lambda picture: noisy(picture, 10),
    "a tenth of a page": on_large_page,
}


def row(kind: str, pictures: Iterable[Image.Image], damage: Damage = lambda picture: picture) -> list[str]:
    """How many of the pictures have each fault; they are looked at as if trained in their own size."""
    found, count = Counter(), 0
    for picture in map(damage, pictures):
        pixels = torch.from_numpy(np.array(picture)).float() / 255
        faults = find_faults(pixels, (picture.width * picture.height) ** 0.5)
        found.update(name for name, words in FAULTS.items() if any(words in fault for fault in faults))
        count += 1
    return [kind, str(count), *(str(found[name]) for name in FAULTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description="How often find_faults is right about a picture.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="of drawings")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="clean photographs, 24 bits")
    options = parser.parse_args()
    drawings = render_everything(options.work).pictures
    photos = [Image.open(file).convert("RGB") for file in sorted(options.photos.iterdir())] if options.photos else []
    rows = [row("drawings, as they are", (Image.fromarray(drawing.numpy()) for drawing in drawings))]
    some = [Image.fromarray(drawing.numpy()) for drawing in drawings[::TENTH]]
    rows += [row(f"drawings, {kind}", some, damage) for kind, damage in DAMAGE.items()]
    if photos:
        rows.append(row("photographs, as they are", photos))
        rows += [row(f"photographs, {kind}", photos, damage) for kind, damage in DAMAGE.items()]
    report = joined(template("reference_faults")).format(
        date=date.today(), torch=torch.__version__, drawings=len(drawings), photos=len(photos),
        table=table(["pictures", "how many", *FAULTS], rows),
    )  # fmt: skip
    (RESULTS / "reference_faults.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
