"""Files that appear whole or not at all, and their names in messages."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HELD = 5.0 if sys.platform == "win32" else 0.0  # seconds for which a virus scanner may hold a new file there


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
        patiently(os.replace, unfinished, path)
    finally:
        patiently(unfinished.unlink, missing_ok=True)


def patiently(action: Callable, *arguments, **settings) -> Any:
    """What the action on a file returns; on Windows it is tried again while another program holds the file."""
    deadline = time.monotonic() + HELD
    while True:
        try:
            return action(*arguments, **settings)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


@contextmanager
def locked(path: Path, waiting: Callable[[], None], reason: str) -> Iterator[None]:
    """Holds a lock file against other processes. The lock of a process that is killed is released.

    waiting: called several times a second while another process holds it; may raise to give up. reason: logged then.
    Raises OSError, and NotImplementedError on network folders without locks.
    """
    lock, logged = FileLock(path), False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not logged:
                logging.info("ConsisLoRA: %s; waiting for it.", escape_text(reason))
            logged = True
            waiting()
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.release()
