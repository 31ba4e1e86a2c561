"""Files that appear whole or not at all, and names that cannot leave their folder."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

LONGEST = 150  # bytes of a name: file systems take 255, and a number and a suffix come on top
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])", re.I)
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/|?*\\]')  # on Windows; a workflow made here is opened there
HALF = re.compile("[\ud800-\udfff]")  # halves of characters, which no file system takes


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The path of an empty file beside it to write into; once the context ends well, that file takes the name.

    An earlier file of that name stays until then. Raises OSError when the folder cannot be written or the disk is full.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on old or empty bytes
        unfinished.chmod(0o644)  # temporary files are for their owner alone
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """The path of a name in a folder; slashes lead into subfolders. Raises ValueError for one that does not stay there.

    What the name stands for need not exist. A link on the way may not lead out either.
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
    """Whether a file or folder may have this name on every system."""
    return (
        bool(part)
        and not FORBIDDEN.search(part)
        and not HALF.search(part)
        and not DEVICE.fullmatch(part.partition(".")[0].rstrip())
        and part.strip(" ") == part.rstrip(".")
        and len(part.encode()) <= LONGEST + 50
    )


def portable(text: str) -> str:
    """A name for a file on every system, as much like the text as can be."""
    kept = FORBIDDEN.sub("_", HALF.sub("_", text))
    kept = kept.encode()[:LONGEST].decode(errors="ignore").strip(" ").rstrip(" .")
    return kept if is_portable(kept) else f"_{kept}"
