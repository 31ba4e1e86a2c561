"""A folder of trained LoRAs and of checkpoints, each under a hash of all that determines it. Processes may share it.

To empty it, delete the folder.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import lora_file
from .lora_file import ImageLora
from .trainer import Trainer

# Both are safetensors files. Under that name ComfyUI would offer them in every node that loads a LoRA, where a name
# of 64 digits tells nobody anything, and may be gone tomorrow.
LORA, CHECKPOINT = ".lora", ".checkpoint"
OURS = re.compile(r"[0-9a-f]{64}\..+")  # nothing else in the folder is ever touched
RECORD = "store"  # the metadata entry of both that holds ours, as JSON
METHOD = ("__init__", "adapters", "losses", "recording", "roles", "schedule", "trainer")  # the version, and what trains


class Nameless(TypeError):
    """A value that cannot be told from another one after a restart, such as a function."""


def fingerprint(value: object) -> str:
    """SHA-256 of tensors, text, bytes, numbers, None, and of mappings and sequences of them. Raises Nameless.

    A hash of kinds and of the parts' own hashes, so that no two values can run into one another.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        kind = f"{value.dtype} {tuple(value.shape)}"
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        kind = "mapping"
        content = "".join(sorted(fingerprint(key) + fingerprint(one) for key, one in value.items())).encode()
    elif isinstance(value, list | tuple):
        kind = "sequence"
        content = "".join(map(fingerprint, value)).encode()
    elif isinstance(value, str | bytes | int | float | None):
        content = repr(value).encode()
    else:
        raise Nameless(f"{value!r:.100} has no name that lasts")
    digest = hashlib.sha256(f"{kind}\0".encode())
    digest.update(content)
    return digest.hexdigest()


# As they are on import: that is the code which trains, also when an update has come in since.
CODE = fingerprint([Path(__file__).with_name(f"{name}.py").read_bytes() for name in METHOD])


class Store:
    """limit: bytes of all files together; above it, the least recently used go.

    What disk or folder refuses is logged once, and training goes on without the store.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.warned = folder, limit, False

    @contextmanager
    def locked(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Within the context no other process finds, keeps or resumes this key. One that was killed lets go of it.

        waiting: called several times a second while another process is at it; may raise to give up.
        """
        with ExitStack() as stack:
            with self._tolerant():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_acquired(FileLock(self.folder / f"{key}.lock"), waiting))
                for unfinished in self.folder.glob(f"{key}.*.tmp"):
                    unfinished.unlink()  # its writer was killed
            yield

    def has(self, key: str) -> bool:
        return self._path(key, LORA).exists()

    def find(self, key: str) -> tuple[ImageLora, list[float]] | None:
        """What was kept under the key, bit for bit: the LoRA and its losses."""
        path = self._path(key, LORA)
        with self._tolerant(path), suppress(FileNotFoundError):
            kept = lora_file.read(path)
            record = _record(kept.metadata, key, _is_number)
            with suppress(OSError):  # a folder that is read-only still gives what it has
                os.utime(path)  # it was used
                self._path(key, CHECKPOINT).unlink(missing_ok=True)  # left if `keep` was killed at its end
            return ImageLora(kept.parts, record["metadata"]), record["losses"]
        return None

    def keep(self, key: str, lora: ImageLora, losses: list[float]) -> None:
        """Keeps what a training gave, in fp32, and removes its checkpoint."""
        record = json.dumps({"key": key, "metadata": lora.metadata, "losses": losses})
        with self._tolerant():
            self.folder.mkdir(parents=True, exist_ok=True)
            lora_file.write(ImageLora(lora.parts, {RECORD: record}), self._path(key, LORA), torch.float32)
            self._path(key, CHECKPOINT).unlink(missing_ok=True)
            self._make_room(key)

    def save_checkpoint(self, key: str, trainer: Trainer, losses: list[tuple[float, ...]]) -> None:
        """losses: of every step so far, of each LoRA."""
        record = json.dumps({"key": key, "losses": losses})
        with self._tolerant():
            self.folder.mkdir(parents=True, exist_ok=True)
            lora_file.write_tensors(trainer.state_dict(), self._path(key, CHECKPOINT), {RECORD: record})
            self._make_room(key)

    def drop_checkpoint(self, key: str) -> None:
        with self._tolerant():
            self._path(key, CHECKPOINT).unlink(missing_ok=True)

    def resume(self, key: str, trainer: Trainer) -> list[tuple[float, ...]]:
        """Puts a new trainer where the last checkpoint left it; the losses until there, none without a checkpoint."""
        path = self._path(key, CHECKPOINT)
        with self._tolerant(path), suppress(FileNotFoundError), safe_open(path, framework="pt") as file:
            record = _record(file.metadata(), key, partial(_are_numbers, trainer.rows))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != trainer.state_shapes():  # before a tensor takes memory
                raise ValueError("its tensors are those of another training")
            trainer.load_state_dict({name: file.get_tensor(name) for name in shapes})
            return [tuple(losses) for losses in record["losses"]]
        return []

    def _path(self, key: str, kind: str) -> Path:
        return self.folder / f"{key}{kind}"

    @contextmanager
    def _tolerant(self, reading: Path | None = None) -> Iterator[None]:
        """Training is worth more than the store: goes on after what the disk refuses, or a file that is damaged."""
        try:
            yield
        except (OSError, NotImplementedError) as error:  # the second where a network folder has no locks
            if not self.warned:
                logging.warning(
                    "ConsisLoRA: the store of trained LoRAs, %s, cannot be used (%s). Training goes on, but may not "
                    "be remembered or resumed. Free some space, or make the folder writable.",
                    self.folder,
                    error,
                )
            self.warned = True
        except (SafetensorError, ValueError) as error:
            if reading is None:
                raise
            logging.warning(
                "ConsisLoRA: %s cannot be used (%s). It is set aside as .damaged; the training starts afresh.",
                reading,
                error,
            )
            with self._tolerant():
                os.replace(reading, f"{reading}.damaged")

    def _make_room(self, key: str) -> None:
        """Removes what was used least recently, but never what has just been written."""
        sizes, used = Counter(), Counter()
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process makes room as well
                if OURS.fullmatch(path.name):
                    name, stat = path.name.partition(".")[0], path.stat()
                    sizes[name] += stat.st_size
                    used[name] = max(used[name], stat.st_mtime)
        excess = sizes.total() - self.limit
        for name in sorted(sizes.keys() - {key}, key=used.get):
            if excess <= 0:
                return
            excess -= sizes[name]
            for path in self.folder.glob(f"{name}.*"):
                with suppress(OSError):  # on Windows a file that is being read cannot go
                    path.unlink()


@contextmanager
def _acquired(lock: FileLock, waiting: Callable[[], None]) -> Iterator[None]:
    told = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not told:
                logging.info("ConsisLoRA: another process is at the same training; waiting for its result.")
            told = True
            waiting()
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def _is_number(loss: object) -> bool:
    return isinstance(loss, float)


def _are_numbers(count: int, losses: object) -> bool:
    return isinstance(losses, list) and len(losses) == count and all(map(_is_number, losses))


def _record(metadata: dict[str, str] | None, key: str, is_loss: Callable[[object], bool]) -> dict:
    try:
        record = json.loads((metadata or {}).get(RECORD, "null"))
        ours = record["key"] == key and all(map(is_loss, record["losses"]))
        texts = record.get("metadata", {})
        if ours and all(isinstance(text, str) for text in texts.values()):
            return {"losses": record["losses"], "metadata": texts}
    except (KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("it belongs to another training")
