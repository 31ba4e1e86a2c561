"""Picture files: finds, pairs, opens, names and writes them."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, PngImagePlugin

from . import written_whole
from .names import inside, portable

MAX_PIXELS, MAX_PICTURE_BYTES = 80_000_000, 500_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's readers of some others run programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NAME = "{content}__{style}"


class Pair(NamedTuple):
    """A content image and a style image. name: of the result."""

    name: str
    content: Path
    style: Path


class Pictures(NamedTuple):
    """Picture files. problems: why a name cannot be used, by the name."""

    paths: list[Path]
    problems: dict[str, str]


def find_pictures(root: Path, names: str) -> Pictures:
    """The picture files in folders and files inside `root`, which `names` lists one a line."""
    paths, problems = [], {}
    for name in filter(None, map(str.strip, names.splitlines())):
        try:
            found = list(_found(root, name))
        except ValueError as error:
            problems[name] = str(error)
            continue
        for path in found:
            if path.resolve().is_relative_to(root.resolve()):
                paths.append(path)
            else:
                problems[path.name] = (
                    f"it is a link that leads out of the folder {root.name}. Put the file itself there."
                )
    return Pictures(list(dict.fromkeys(paths)), problems)


def _found(root: Path, name: str) -> Iterator[Path]:
    path = inside(root, name)
    if path.is_file():
        yield path
    elif path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise ValueError(f"there are no pictures in {path}. Put {', '.join(SUFFIXES)} files there.")
        yield from sorted(files, key=lambda file: (file.name.casefold(), file.name))
    else:
        raise ValueError(f"there is no such folder or file in {root}.")


def pair_up(contents: list[Path], styles: list[Path], pattern: str) -> list[Pair]:
    """Every content image with every style image; the names differ on every system, also in more than case.

    pattern: of the names, with {content} and {style} for the names of the two files.
    """
    pairs = [
        Pair(filled_name(pattern, content.stem, style.stem), content, style) for content in contents for style in styles
    ]
    count = Counter(pair.name.casefold() for pair in pairs)
    return [
        pair._replace(name=f"{pair.name}_{_pair_hash(pair)}") if count[pair.name.casefold()] > 1 else pair
        for pair in pairs
    ]


def filled_name(pattern: str, content: str, style: str) -> str:
    """The pattern with the names of a content and a style image put in for {content} and {style}."""
    words = {"{content}": portable(content), "{style}": portable(style)}
    return re.sub("{content}|{style}", lambda match: words[match[0]], pattern)


def _pair_hash(pair: Pair) -> str:
    return hashlib.sha256(f"{pair.content}\0{pair.style}".encode(errors="backslashreplace")).hexdigest()[:6]


def open_picture(path: Path) -> Image.Image:
    """Opens a picture file as RGB, as a viewer shows it: upright, 16 bits as 8, alpha on white, the first frame.

    Raises ValueError for a file that is not a picture, is damaged or is too large, before its pixels take memory.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes). Copy it again.")
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_PICTURE_BYTES // 10**6} MB. Save it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about size and damage: both raise below
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return _rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} has more than {MAX_PIXELS // 10**6} million pixels. Save it smaller.") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path.name} is no picture of a known kind. Save it as PNG or JPEG.") from None
    except Exception as error:  # readers raise whatever they run into in a damaged file
        raise ValueError(f"{path.name} is damaged ({error}). Copy or save it again.") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode == "F":
        raise ValueError("its values are floating point; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def write_picture(picture: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """Writes a PNG with text chunks, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=text_chunks(texts), compress_level=4)


def text_chunks(texts: dict[str, str]) -> PngImagePlugin.PngInfo:
    """Texts by name, for Pillow to write into a PNG."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return info


def picture_key(*paths: Path) -> str:
    """16 hex digits that name some files by their bytes."""
    digests = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        digests.update(digest.digest())
    return digests.hexdigest()[:16]


class PictureCache:
    """Opens each picture file once. decode: turns a picture into what is kept.

    problems: why a file cannot be used, by `name_of(path)`; opening adds to it.
    """

    def __init__(self, decode: Callable[[Image.Image], Any], name_of: Callable[[Path], str], problems: dict[str, str]):
        self.decode, self.name_of, self.problems = decode, name_of, problems
        self.opened: dict[Path, Any] = {}

    def open(self, path: Path) -> Any:
        """The decoded picture; None for a file that cannot be used."""
        if path not in self.opened:
            try:
                self.opened[path] = self.decode(open_picture(path))
            except ValueError as error:
                self.opened[path] = None
                self.problems[self.name_of(path)] = str(error)
        return self.opened[path]
