"""Files that appear whole or not at all, and their names in messages."""

import errno
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HELD = 5.0 if sys.platform == "win32" else 0.0  # seconds for which a virus scanner may hold a new file there


def escape_text(text: str | os.PathLike) -> str:
    r"""Text that every log, message and file takes: halves of characters become escapes such as \udcff.

    Names have them where their bytes are not UTF-8. ComfyUI's log cannot write them, and its queue would end.
    """
    return os.fspath(text).encode(errors="backslashreplace").decode()


def write_numbered(paths: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """Writes under the first of the paths that is free, and returns it.

    write: raises FileExistsError, and leaves what is there, if another process took the path meanwhile.
    """
    for path in paths:
        if not path.exists():
            with suppress(FileExistsError):
                write(path)
                return path
    raise FileExistsError(errno.EEXIST, "every number is taken")


@contextmanager
def written_whole(path: Path, new: bool = False) -> Iterator[Path]:
    """Yields a path for a temporary file, which takes the name `path` if the context ends without error.

    An earlier file of that name stays until then; with `new` it stays for good, and FileExistsError is raised. Raises
    OSError when the folder cannot be written or the disk is full.
    """
    # Not by tempfile, which on Windows may try for ever in a folder that cannot be written.
    unfinished = path.with_name(f"{path.name}{secrets.token_hex(4)}.tmp")
    try:
        yield unfinished
        with patiently(unfinished.open, "r+b") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on old or empty bytes
        patiently(unfinished.chmod, 0o644)  # safetensors writes files for their owner alone
        with _taken(path) if new else nullcontext():
            patiently(os.replace, unfinished, path)
    finally:
        patiently(unfinished.unlink, missing_ok=True)


def write_file(path: Path, data: bytes, new: bool = False) -> None:
    """Writes a file, and its folder, whole or not at all. new, raises: as `written_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, new) as unfinished:
        patiently(unfinished.write_bytes, data)


@contextmanager
def _taken(path: Path) -> Iterator[None]:
    """Takes a name with an empty file, as one process alone can, for what replaces it in the context."""
    path.touch(exist_ok=False)
    try:
        yield
    except BaseException:
        patiently(path.unlink, missing_ok=True)
        raise


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Holds a lock file if no process does, and yields whether it was free; True on network folders without locks."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
    except NotImplementedError:
        yield True
    else:
        try:
            yield True
        finally:
            lock.release()


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
    Raises OSError, also on network folders without locks.
    """
    lock, logged = FileLock(path), False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not logged:
                patiently(path.touch)  # OSError in a folder that cannot be written, which on Windows looks like a lock
                logging.info("ConsisLoRA: %s; waiting for it.", escape_text(reason))
            logged = True
            waiting()
            time.sleep(0.1)
        except NotImplementedError:  # from older versions of filelock
            raise OSError(errno.ENOLCK, "This network folder has no locks; choose another", str(path)) from None
    try:
        yield
    finally:
        lock.release()
