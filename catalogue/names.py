"""Names of files and folders that are valid on every system and cannot leave their folder."""

import re
from pathlib import Path, PurePosixPath

LONGEST = 150  # bytes of a name: file systems take 255, and a number and a suffix are appended
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])", re.I)
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/|?*\\]')  # on Windows; a workflow made here is opened there
HALF = re.compile("[\ud800-\udfff]")  # surrogates, which no file system takes


def inside(folder: Path, name: str) -> Path:
    """The path of a name in a folder, where slashes lead into subfolders. It need not exist.

    Raises ValueError for a name that leads out of the folder, also through a link, or is not valid on every system.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not all(map(is_portable, parts)):
        raise ValueError(
            f"{name!r} is not a name inside the folder {folder.name}. Use letters, digits and spaces, with / for "
            "subfolders; not .., a drive, a name that Windows keeps for devices, or a dot or space at an end."
        )
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{name!r} leads out of the folder {folder.name} through a link. Put the files themselves there."
        )
    return path


def is_portable(part: str) -> bool:
    """Whether a file or folder can have this name on every system."""
    return (
        bool(part)
        and not FORBIDDEN.search(part)
        and not HALF.search(part)
        and not DEVICE.fullmatch(part.partition(".")[0].rstrip())
        and part.strip(" ") == part.rstrip(".")
        and len(part.encode()) <= LONGEST + 50
    )


def portable(text: str) -> str:
    """A file name that is valid on every system, and as close to the text as possible."""
    kept = FORBIDDEN.sub("_", HALF.sub("_", text))
    kept = kept.encode()[:LONGEST].decode(errors="ignore").strip(" ").rstrip(" .")
    return kept if is_portable(kept) else f"_{kept}"
