"""A folder of trained LoRAs and checkpoints, each under a hash of all that determines it. Processes may share it.

To empty it, delete the folder.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import METHOD_VERSION, lora_file
from .files import escape_text, locked, locked_if_free, patiently
from .lora_file import ImageLora
from .trainer import Trainer

# The first two are safetensors files. With that suffix ComfyUI would list them in every node that loads a LoRA, where
# a name of 64 digits means nothing and may be removed at any time.
LORA, CHECKPOINT, LOCK = ".lora", ".checkpoint", ".lock"
OURS = re.compile(r"[0-9a-f]{64}\..+")  # no other file in the folder is ever touched
RECORD = "store"  # the metadata entry of both that holds our record, as JSON

# What a training's key holds of the method's code. Before there was a version it was a hash of the sources: version 1
# keeps that hash, so that LoRAs in users' stores are still found.
METHOD = {1: "409b59147a1989079b1d6d7e2fa67cbacc8e40a2ae9aebcf506023965a4c6cd6"}.get(METHOD_VERSION, METHOD_VERSION)


class Unhashable(TypeError):
    """A value without a hash that is the same after a restart, such as a function."""


def fingerprint(value: object) -> str:
    """SHA-256 of tensors, text, bytes, numbers, None, and of mappings and sequences of them, as 64 hex digits.

    It hashes kinds and the parts' own hashes, so that no two different values have the same input. Raises Unhashable.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        kind = f"{value.dtype} {tuple(value.shape)}"
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        kind = "mapping"
        content = "".join(sorted(fingerprint(key) + fingerprint(item) for key, item in value.items())).encode()
    elif isinstance(value, list | tuple):
        kind = "sequence"
        content = "".join(map(fingerprint, value)).encode()
    elif isinstance(value, str | bytes | int | float | None):
        content = repr(value).encode()
    else:
        raise Unhashable(f"{value!r:.100} has no lasting name")
    digest = hashlib.sha256(f"{kind}\0".encode())
    digest.update(content)
    return digest.hexdigest()


class Store:
    """LoRAs and checkpoints in a folder. limit: bytes of all files but those of trainings that go on; above it, the
    least recently used are removed.

    Errors of disk or folder are logged once, and training goes on without the store.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.warned = folder, limit, False

    @contextmanager
    def locked(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Locks a key against other processes. The lock of a process that is killed is released.

        waiting: called several times a second while another process holds the lock; may raise to give up.
        """
        with ExitStack() as stack:
            with self._tolerant():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._path(key, LOCK), waiting, "another process is at the same training"))
                for unfinished in self.folder.glob(f"{key}.*.tmp"):
                    patiently(unfinished.unlink)  # its writer was killed
            yield

    def has(self, key: str) -> bool:
        """Whether there is a LoRA under the key; it may still be damaged."""
        return self._path(key, LORA).exists()

    def find(self, key: str) -> tuple[ImageLora, list[float]] | None:
        """The LoRA that was kept under the key, bit for bit, and its losses; None without one."""
        path = self._path(key, LORA)
        with self._tolerant(path), suppress(FileNotFoundError):
            kept = lora_file.read(path)
            record = _record(kept.metadata, key, _is_number)
            with suppress(OSError):  # a folder that is read-only still gives what it has
                os.utime(path)  # marks it as used
                # It is left if the process was killed at the end of `keep`.
                self._path(key, CHECKPOINT).unlink(missing_ok=True)
            return ImageLora(kept.parts, record["metadata"]), record["losses"]
        return None

    def keep(self, key: str, lora: ImageLora, losses: list[float]) -> None:
        """Writes a trained LoRA in fp32 and its losses, and removes its checkpoint."""
        record = json.dumps({"key": key, "metadata": lora.metadata, "losses": losses})
        with self._tolerant():
            self.folder.mkdir(parents=True, exist_ok=True)
            lora_file.write(ImageLora(lora.parts, {RECORD: record}), self._path(key, LORA), torch.float32)
            patiently(self._path(key, CHECKPOINT).unlink, missing_ok=True)
            self._make_room(key)

    def save_checkpoint(self, key: str, trainer: Trainer, losses: list[tuple[float, ...]]) -> None:
        """Writes the trainer's state. losses: of every step so far, a tuple of all its LoRAs'."""
        record = json.dumps({"key": key, "losses": losses})
        with self._tolerant():
            self.folder.mkdir(parents=True, exist_ok=True)
            lora_file.write_tensors(trainer.state_dict(), self._path(key, CHECKPOINT), {RECORD: record})
            self._make_room(key)

    def drop_checkpoint(self, key: str) -> None:
        """Removes a checkpoint, if there is one."""
        with self._tolerant():
            patiently(self._path(key, CHECKPOINT).unlink, missing_ok=True)

    def resume(self, key: str, trainer: Trainer) -> list[tuple[float, ...]]:
        """Sets a new trainer to the last checkpoint; the losses until there, none without a checkpoint."""
        path = self._path(key, CHECKPOINT)
        with self._tolerant(path), suppress(FileNotFoundError), safe_open(path, framework="pt") as file:
            record = _record(file.metadata(), key, _are_numbers)
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
        """Goes on after an error of the disk or, while `reading` a file, if that file is damaged."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                logging.warning(
                    "ConsisLoRA: the store of trained LoRAs, %s, cannot be used (%s). Training goes on, but may not "
                    "be remembered or resumed. Free some space, or make the folder writable.",
                    escape_text(self.folder),
                    escape_text(str(error)),
                )
            self.warned = True
        except (SafetensorError, ValueError) as error:
            if reading is None:
                raise
            logging.warning(
                "ConsisLoRA: %s cannot be used (%s). It is set aside as .damaged; the training starts afresh.",
                escape_text(reading),
                escape_text(str(error)),
            )
            with self._tolerant():
                os.replace(reading, f"{reading}.damaged")

    def _make_room(self, key: str) -> None:
        """Removes the least recently used files, but never those of `key`, which have just been written.

        Files of trainings that go on, in any process, neither go nor count, nor does a checkpoint just written: that of
        a large batch could otherwise empty the store.
        """
        sizes, used = Counter(), Counter()
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process may remove files as well
                if OURS.fullmatch(path.name) and path.suffix != LOCK and path != self._path(key, CHECKPOINT):
                    name, stat = path.name.partition(".")[0], path.stat()
                    sizes[name] += stat.st_size
                    used[name] = max(used[name], stat.st_mtime)
        if sizes.total() <= self.limit:
            return
        idle = [name for name in sizes if self._is_idle(name)]
        excess = sum(sizes[name] for name in idle) - self.limit
        for name in sorted(idle, key=used.get):
            if excess <= 0:
                return
            if name != key:
                excess -= sizes[name]
                self._remove(name)

    def _is_idle(self, name: str) -> bool:
        with locked_if_free(self._path(name, LOCK)) as idle:
            return idle

    def _remove(self, name: str) -> None:
        """Removes the files of a training, but not of one that goes on, and not the lock, which others may wait for."""
        with locked_if_free(self._path(name, LOCK)) as idle:
            for path in self.folder.glob(f"{name}.*") if idle else ():
                with suppress(OSError):  # on Windows a file that is being read cannot go
                    if path.suffix != LOCK:
                        path.unlink()


def _is_number(loss: object) -> bool:
    return isinstance(loss, float)


def _are_numbers(losses: object) -> bool:
    return isinstance(losses, list) and all(map(_is_number, losses))


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
