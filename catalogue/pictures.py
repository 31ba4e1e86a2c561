"""Picture files: finds, pairs, opens and names them."""

import functools
import hashlib
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageCms, ImageOps

from . import escape_text, patiently
from .backgrounds import STYLE, WHITE, Colour, border_colour, on_background
from .names import as_spelled, by_number, inside, portable, result_name
from .repair import repaired

BYTES_A_VALUE = 4  # of an opened picture: fp32
MAX_PIXELS, MAX_PICTURE_BYTES = 80_000_000, 500_000_000
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow's readers of some others run programs
FORMATS = tuple(kind for kind in KINDS if kind in Image.registered_extensions().values())  # older ones have no AVIF
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
OF_THE_SYSTEM = {"thumbs.db", "desktop.ini", "icon\r"}  # what Windows and Macs put into folders, in lower case
BASE_MODES = {"CMYK": "CMYK", "LAB": "LAB", "1": "L", "L": "L", "LA": "L"}  # of others it is RGB
PROFILED = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # the mode that a kind of colour profile is for
NAME = "{content}__{style}"


class Pair(NamedTuple):
    """A content image and a style image. name: of the result."""

    name: str
    content: Path
    style: Path


class Pairs(Sequence):
    """Every content image with every style image: all pairs of the first content image, then of the second, and so on.

    names: of the results. A large catalogue has too many pairs to keep more of each.
    """

    def __init__(self, contents: list[Path], styles: list[Path], names: list[str]):
        self.contents, self.styles, self.names = contents, styles, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        content, style = divmod(range(len(self))[index], len(self.styles))
        return Pair(self.names[index], self.contents[content], self.styles[style])

    def __iter__(self) -> Iterator[Pair]:  # which by index would take several times as long
        pictures = product(self.contents, self.styles)
        return (Pair(name, *pair) for name, pair in zip(self.names, pictures, strict=True))


class Pictures(NamedTuple):
    """Picture files. problems: why a name cannot be used, by the name."""

    paths: list[Path]
    problems: dict[str, str]


def find_pictures(root: Path, names: str) -> Pictures:
    """The picture files in folders and files inside `root`, which `names` lists one a line.

    problems: also of every other file in those folders, dot files and the system's own excepted.
    """
    paths, problems, home = [], {}, root.resolve()
    for name in filter(None, map(str.strip, names.splitlines())):
        try:
            pictures, others = _found(root, name)
        except (OSError, ValueError) as error:  # the first for a folder that may not be read
            problems[escape_text(name)] = escape_text(str(error))
            continue
        for path in others:
            kind = path.suffix or "without a suffix"
            problems[name_inside(root, path)] = escape_text(
                f"files of the kind {kind} are not read. Save a picture as PNG or JPEG."
            )
        for path in pictures:
            if path.resolve().is_relative_to(home):
                paths.append(path)
            else:
                problems[name_inside(root, path)] = (
                    f"it is a link that leads out of the folder {root.name}. Put the file itself there."
                )
    return Pictures(list(dict.fromkeys(paths)), problems)


def _found(root: Path, name: str) -> tuple[list[Path], list[Path]]:
    """The file of that name, or from the folder of that name the pictures and the other files."""
    path = as_spelled(inside(root, name))
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise ValueError(f"there is no such folder or file in {root}. Make the folder and put pictures into it.")
    pictures, others = [], []
    for file in path.iterdir():
        if file.name.startswith(".") or file.name.lower() in OF_THE_SYSTEM or not file.is_file():
            continue
        (pictures if file.suffix.lower() in SUFFIXES else others).append(file)
    if not pictures:
        inner = min((entry.name for entry in path.iterdir() if entry.is_dir()), default=None)
        named = f", or name the folders in it, each on a line, as {name.rstrip('/')}/{inner}" if inner else ""
        raise ValueError(f"there are no pictures in {path}. Put PNG, JPEG or WebP files there{named}.")
    return sorted(pictures, key=lambda file: by_number(file.name)), others


def name_inside(root: Path, path: Path) -> str:
    """What a picture file inside `root` is called in sheets and reports."""
    return escape_text(path.relative_to(root).as_posix())


def pair_up(contents: list[Path], styles: list[Path], pattern: str) -> Pairs:
    """Every content image with every style image; the names differ on every system, also in more than case.

    pattern: of the names, with {content} and {style} for the names of the two files; empty: NAME.
    """
    template = _template(pattern)
    content_words, style_words = ([portable(path.stem) for path in paths] for paths in (contents, styles))
    names = [result_name(template % {"content": c, "style": s}) for c in content_words for s in style_words]
    pairs = Pairs(contents, styles, names)
    for digits in (6, 16):  # of many equal names, 6 digits leave some equal
        count = Counter(map(str.casefold, pairs.names))
        if len(count) == len(names):
            break
        pairs.names = [
            f"{name}_{_pair_hash(pair)[:digits]}" if count[pair.name.casefold()] > 1 else pair.name
            for name, pair in zip(names, pairs, strict=True)
        ]
    return pairs


def filled_name(pattern: str, content: str, style: str) -> str:
    """The pattern with the names of a content and a style image put in for {content} and {style}; empty: NAME."""
    return result_name(_template(pattern) % {"content": portable(content), "style": portable(style)})


def _template(pattern: str) -> str:
    """The pattern for the % operator."""
    return re.sub("{(content|style)}", r"%(\1)s", (pattern.strip() or NAME).replace("%", "%%"))


def _pair_hash(pair: Pair) -> str:
    return hashlib.sha256(f"{pair.content}\0{pair.style}".encode(errors="backslashreplace")).hexdigest()


def open_picture(path: Path) -> Image.Image:
    """Opens a picture file as `open_cut_out` does, and lays it on white: RGB."""
    return on_background(open_cut_out(path), WHITE)


def open_cut_out(path: Path) -> Image.Image:
    """Opens a picture file as a viewer shows it: in sRGB, upright, 16 bits as 8, the first frame.

    RGBA where a part of it is transparent, with the colours that the file has there, else RGB.
    Raises ValueError for a file that is not a picture, is damaged or is too large, before its pixels take memory.
    """
    name = escape_text(path.name)
    try:
        file = patiently(path.open, "rb")
    except (OSError, ValueError) as error:  # the second for a name that no file can have
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise ValueError(f"{name} cannot be read: {reason}.") from error
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about size and damage: both raise below
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise ValueError(f"{name} is empty (0 bytes). Copy it again.")
        if size > MAX_PICTURE_BYTES:
            raise ValueError(f"{name} is larger than {MAX_PICTURE_BYTES // 10**6} MB. Save it smaller.")
        try:
            return _decoded(file)
        except Image.DecompressionBombError:
            limit = f"{MAX_PIXELS // 10**6} million pixels"
            raise ValueError(f"{name} has more than {limit}. Save it smaller.") from None
        except Image.UnidentifiedImageError:
            raise ValueError(f"{name} is no picture of a known kind. Save it as PNG or JPEG.") from None
        except Exception as error:  # readers raise whatever they run into in a damaged file
            raise ValueError(f"{name} is damaged ({escape_text(str(error))}). Copy or save it again.") from error


def _decoded(file: BinaryIO) -> Image.Image:
    try:
        return _in_rgb(file)
    except (OSError, ValueError) as error:
        damage = error.with_traceback(None)  # which would keep the picture's memory
    file.seek(0)
    data = repaired(file.read())
    if data is None:
        raise damage
    return _in_rgb(io.BytesIO(data))


def _in_rgb(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode == "F":
        raise ValueError("its values are floating point; save it with 8 or 16 bits")
    if picture.mode == "La":  # grey times alpha, as some TIFFs have it
        picture = picture.convert("LA")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    picture = _in_srgb(picture)
    if alpha and alpha.getextrema() != (255, 255):
        picture.putalpha(alpha)
    return picture


def _in_srgb(picture: Image.Image) -> Image.Image:
    """RGB from any mode, without alpha. Colours are converted from the picture's profile; without one they are sRGB."""
    mode = BASE_MODES.get(picture.mode, "RGB")
    try:
        if mode == "LAB":
            profile = ImageCms.createProfile("LAB")
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            if PROFILED.get(profile.profile.xcolor_space) != mode:
                return picture.convert("RGB")
        return ImageCms.profileToProfile(
            picture.convert(mode), profile, ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (KeyError, OSError, ImageCms.PyCMSError):  # no profile, or one that is damaged
        return picture.convert("RGB")


def picture_key(*paths: Path) -> str:
    """16 hex digits that name some files by their bytes."""
    return digests_key(map(picture_digest, paths))


def digests_key(digests: Iterable[bytes]) -> str:
    """The `picture_key` of files with these digests."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def picture_digest(path: Path) -> bytes:
    """SHA-256 of a file's bytes, read again only when its times or size have changed. Raises OSError."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size)


@functools.lru_cache(10_000)
def _digest(path: Path, mtime_ns: int, ctime_ns: int, size: int) -> bytes:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.digest()


class PictureCache:
    """Opens each picture file once. decode: turns a picture (RGB) and its alpha, if it has any, into what is kept.

    background: of transparent pictures, a colour, or STYLE for the border colour of the style image of a pair, where a
    transparent style image has white. limit: bytes of all pictures. problems: why a file cannot be used, by
    `name_of(path)`; opening adds to it. left_over: pairs that had no room.
    sizes: width and height of what was opened.
    """

    def __init__(
        self,
        decode: Callable[[Image.Image, Image.Image | None], Any],
        name_of: Callable[[Path], str],
        problems: dict[str, str],
        background: Colour | str = WHITE,
        limit: float = math.inf,
    ):
        self.decode, self.name_of, self.problems = decode, name_of, problems
        self.background, self.limit = background, limit
        self.opened: dict[tuple[Path, Path | None], Any] = {}  # with the style image whose colour it lies on, if any
        self.borders: dict[Path, Colour] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}
        self.opaque: set[Path] = set()  # and what cannot be used
        self.bytes = self.left_over = 0

    def has_room(self, pair: Pair) -> bool:
        """Whether the pair's pictures are open, or memory is left for more; counts those pairs that have no room."""
        keys = (pair.style, None), (pair.content, self._lies_on(pair))
        has_room = self.bytes < self.limit or all(key in self.opened for key in keys)
        self.left_over += not has_room
        return has_room

    def open_pair(self, pair: Pair) -> tuple[Any, Any] | None:
        """The content and the style image, decoded; None for a pair with a file that cannot be used."""
        own = WHITE if self.background == STYLE else self.background
        style = self._open(pair.style, None, own)
        if style is None:
            return None
        lies_on = self._lies_on(pair)
        content = self._open(pair.content, lies_on, self.borders[pair.style] if lies_on else own)
        return None if content is None else (content, style)

    def _lies_on(self, pair: Pair) -> Path | None:
        """The style image whose colour the pair's content image lies on."""
        return pair.style if self.background == STYLE and pair.content not in self.opaque else None

    def _open(self, path: Path, lies_on: Path | None, colour: Colour) -> Any:
        if (path, lies_on) in self.opened:
            return self.opened[path, lies_on]
        try:
            picture = open_cut_out(path)
        except ValueError as error:
            self.problems[self.name_of(path)] = str(error)
            self.opaque.add(path)
            self.opened[path, None] = None
            return None
        self.sizes[path] = picture.size
        alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
        if alpha is None:
            self.opaque.add(path)
            lies_on = None
        shown = on_background(picture, colour)
        if self.background == STYLE and lies_on is None:
            self.borders[path] = border_colour(shown)
        self.bytes += BYTES_A_VALUE * len(picture.getbands()) * picture.width * picture.height
        self.opened[path, lies_on] = self.decode(shown, alpha)
        return self.opened[path, lies_on]
