"""Names of files and folders that are valid on every system and cannot leave their folder."""

import ctypes
import functools
import hashlib
import os
import re
import sys
import unicodedata
from pathlib import Path, PurePosixPath

LONGEST = 150  # bytes of a picture's name in that of a result
LONGEST_RESULT = 180  # bytes of a result's name: a number and a suffix are appended
LONGEST_PART = 200  # bytes of a file's or folder's name: file systems take 255
LONGEST_PATH = 900  # bytes of a file's path: macOS takes 1,024, and an unfinished file has a longer name
LONGEST_OF_WINDOWS = 247  # characters of the same, where long paths are off: it takes 259
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])", re.I)
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/|?*\\]')  # on Windows; a workflow made here is opened there
HALF = re.compile("[\ud800-\udfff]")  # surrogates, which no file system takes


def inside(folder: Path, name: str) -> Path:
    """The path of a name in a folder, where slashes lead into subfolders. It need not exist.

    Raises ValueError for a name that leads out of the folder, also through a link, or is not valid on every system.
    """
    if len(os.fsencode(folder)) + len(name.encode(errors="replace")) > LONGEST_PATH:
        raise ValueError(
            f"{name[:60]!r}... is too long a name: with its folders it has more than {LONGEST_PATH} bytes. Shorten it."
        )
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not all(map(is_portable, parts)):
        raise ValueError(
            f"{name!r} is not a name inside the folder {folder.name}. Use letters, digits and spaces, with / for "
            "subfolders; not .., a drive, a name that Windows keeps for devices, or a dot or space at an end."
        )
    if not has_long_paths() and len(os.path.abspath(folder)) + 1 + len(name) > LONGEST_OF_WINDOWS:
        raise ValueError(
            f"{name[:60]!r}... is too long a name: with its folders it has more than {LONGEST_OF_WINDOWS} characters. "
            "Shorten it, or turn on long paths in Windows (LongPathsEnabled)."
        )
    path = folder.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{name!r} leads out of the folder {folder.name} through a link. Put the files themselves there."
        )
    return path


@functools.cache
def has_long_paths() -> bool:
    """Whether a path may have more than 259 characters, for which Windows has a setting since 2016."""
    if sys.platform != "win32":
        return True
    is_on = getattr(ctypes.WinDLL("ntdll"), "RtlAreLongPathsEnabled", None)
    if is_on is None:
        return False
    is_on.restype = ctypes.c_ubyte
    return bool(is_on())


def is_portable(part: str) -> bool:
    """Whether a file or folder can have this name on every system."""
    return (
        bool(part)
        and not FORBIDDEN.search(part)
        and not HALF.search(part)
        and not DEVICE.fullmatch(part.partition(".")[0].rstrip())
        and part.strip(" ") == part.rstrip(".")
        and len(part.encode()) <= LONGEST_PART
    )


def portable(text: str) -> str:
    """A file name that is valid on every system, and as close to the text as possible."""
    kept = FORBIDDEN.sub("_", HALF.sub("_", text))
    kept = _shortened(kept, LONGEST).strip(" ").rstrip(" .")
    return kept if is_portable(kept) else f"_{kept}"


def result_name(text: str) -> str:
    """The name of a result in the one spelling that file systems and sheets of results give back unchanged.

    Unicode is composed, parts between slashes have no spaces at their ends and a bounded length, and there is no ";",
    which separates files in the sheet. What is not valid stays: `inside` refuses it.
    """
    if _is_settled(text):
        return text
    parts = PurePosixPath(composed(text).replace(";", "_").replace("\\", "/")).parts
    return "/".join(_shortened(part.strip(), LONGEST_RESULT) for part in parts)


# The usual name, so that the names of a large catalogue take no time.
_is_settled = re.compile(rf"\w[\w.~ ()-]{{0,{LONGEST_RESULT - 2}}}\w", re.ASCII).fullmatch


def _shortened(text: str, longest: int) -> str:
    """The text, or its beginning with a mark of the whole: `longest` bytes at most."""
    data = text.encode(errors="surrogatepass")
    if len(data) <= longest:
        return text
    mark = f"~{hashlib.sha256(data).hexdigest()[:6]}"
    return data[: longest - len(mark)].decode(errors="ignore") + mark


def by_number(name: str) -> tuple[list[str | int], str]:
    """Key that sorts names as people do: 2 before 10, and case does not count."""
    parts = re.split(r"(\d+)", name.casefold())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def as_spelled(path: Path) -> Path:
    """The file or folder of this path, or the one whose name differs only in composed and decomposed Unicode."""
    if os.path.exists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(found).parts:
        if not os.path.exists(found / part) and os.path.isdir(found):
            part = next((name for name in os.listdir(found) if composed(name) == composed(part)), part)
        found /= part
    return found


def composed(name: str) -> str:
    """A name with its accents as most systems write them; Macs write them as characters of their own."""
    return unicodedata.normalize("NFC", name)
