"""Files that appear whole or not at all, and their names in messages."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def escape_text(text: str | os.PathLike) -> str:
    r"""Text that every log, message and file takes: halves of characters become escapes such as \udcff.

    Names have them where their bytes are not UTF-8. ComfyUI's log cannot write them, and its queue would end.
    """
    return os.fspath(text).encode(errors="backslashreplace").decode()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields the path of an empty temporary file, which takes the name `path` if the context ends without error.

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
