"""Reads and writes LoRA files, in every key spelling, as parts by role with metadata."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter_config import AdapterConfig, read_config
from .files import written_whole
from .roles import ROLES, Target, diffusers_name, kohya_name, parse_module

# What each spelling appends to a module's name: kohya, diffusers, PEFT (with or without its adapter name).
SUFFIX = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_down|lora\.down|lora_A(?:\.default)?)|(?P<up>lora_up|lora\.up|lora_B(?:\.default)?))\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
MAGNITUDE = re.compile(r".+\.(lora_magnitude_vector.*|dora_scale)")  # what a DoRA (arXiv 2402.09353) has besides

MAX_VALUES = 2**24  # of one tensor: rank 1024 in a layer of SDXL takes 2**21

# ModelSpec, by which model managers sort files.
MODEL_SPEC = {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


class LoraLayer(NamedTuple):
    """W' = W + strength * (alpha / rank) * up @ down. down: rank x in; up: out x rank."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


Part = dict[str, LoraLayer]  # by the layer's dotted path inside its role block


class Source(NamedTuple):
    """Names a part: its role, and the role of the image it was learned from."""

    role: str
    image: str


@dataclass(frozen=True, eq=False)
class ImageLora:
    """What was learned from one image: its parts by role, and the file's metadata."""

    parts: dict[str, Part]
    metadata: dict[str, str]

    def part(self, role: str) -> Part:
        """The part of a role. Raises ValueError if there is none."""
        if role not in self.parts:
            raise ValueError(
                f"This LoRA has no {role} part, only {' and '.join(self.parts)}. Choose a file that was trained "
                f"with both, or leave the {role} input empty."
            )
        return self.parts[role]

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights in fp16: a LoRA and all files saved from it, in fp16 or fp32, have the same."""
        digest = hashlib.sha256()
        for key, tensor in sorted(to_state_dict(self).items()):
            digest.update(key.encode())
            digest.update(tensor.detach().to("cpu", torch.float16).numpy().tobytes())
        return digest.hexdigest()


def to_state_dict(lora: ImageLora) -> dict[str, Tensor]:
    """The tensors of a LoRA under the keys of our files: kohya's spelling with diffusers block names."""
    state = {}
    for role, part in lora.parts.items():
        for path, layer in part.items():
            name = kohya_name(Target(role, path))
            state[f"{name}.lora_down.weight"] = layer.down.contiguous()
            state[f"{name}.lora_up.weight"] = layer.up.contiguous()
            state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


def from_state_dict(
    state: Mapping[str, Tensor], metadata: dict[str, str] | None = None, config: AdapterConfig | None = None
) -> ImageLora:
    """A LoRA from tensors in any known spelling. Raises ValueError that names foreign keys or a damaged layer.

    config: gives alpha to layers without an alpha tensor.
    """
    found: dict[Target, dict[str, Tensor]] = {}
    for key, (target, kind) in _placed(state).items():
        found.setdefault(target, {})[kind] = state[key]
    parts: dict[str, Part] = {}
    for target, tensors in found.items():
        parts.setdefault(target.role, {})[target.layer] = _layer(target, tensors, config or AdapterConfig())
    return ImageLora({role: parts[role] for role in ROLES if role in parts}, metadata or {})


def _placed(keys: Collection[str]) -> dict[str, tuple[Target, str]]:
    """For each key its layer, and "down", "up" or "alpha". Raises ValueError that names foreign keys."""
    if any(map(MAGNITUDE.fullmatch, keys)):
        raise ValueError("It is a DoRA, which ConsisLoRA cannot hold. Save it as plain LoRA.")
    placed, foreign = {}, []
    for key in keys:
        match = SUFFIX.fullmatch(key)
        target = match and parse_module(match["module"] or match["scaled"])
        if target is None:
            foreign.append(key)
        else:
            placed[key] = target, "down" if match["down"] else "up" if match["up"] else "alpha"
    if foreign:
        raise ValueError(
            f"{len(foreign)} of {len(keys)} keys are not LoRA weights of SDXL's content or style block, for example "
            f"{', '.join(sorted(foreign)[:3])}. The file is for another architecture, or adapts the whole model."
        )
    if not placed:
        raise ValueError("The file holds no LoRA weights.")
    return placed


def _layer(target: Target, tensors: dict[str, Tensor], config: AdapterConfig) -> LoraLayer:
    down, up = tensors.get("down"), tensors.get("up")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        raise ValueError(
            f"The {target.role} part is damaged at {target.layer}: a down (rank x in) and an up (out x rank) "
            f"were expected, found {shapes}."
        )
    if "alpha" in tensors:
        return LoraLayer(down, up, float(tensors["alpha"]))
    return LoraLayer(down, up, config.alpha(diffusers_name(target), down.shape[0]))


def read(path: str | os.PathLike) -> ImageLora:
    """Reads a LoRA file to the CPU. Alpha is in tensors, in the file's header or in an adapter_config.json beside it.

    Raises ValueError for a file that is damaged, foreign or incomplete, or of a kind that a LoRA here cannot hold.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            _placed(shapes)  # both checks come before a tensor takes memory
            _check_size(shapes)
            metadata = file.metadata() or {}
            config = read_config(Path(path), metadata)
            return from_state_dict({key: file.get_tensor(key) for key in shapes}, metadata, config)
    except SafetensorError as error:
        raise ValueError(
            f"{Path(path).name} is not a whole safetensors file ({error}). It may be cut off or of another kind; "
            "download or save it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def _check_size(shapes: dict[str, list[int]]) -> None:
    largest = max(shapes, key=lambda key: math.prod(shapes[key]))
    if math.prod(shapes[largest]) > MAX_VALUES:
        raise ValueError(
            f"{largest} has shape {tuple(shapes[largest])}, which is more than any LoRA of SDXL needs. The file is "
            "damaged or of another kind."
        )


def write(lora: ImageLora, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Writes a LoRA file, whole or not at all: an earlier file of that name stays until the new one is complete.

    Raises OSError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    state = {key: tensor.to("cpu", dtype) for key, tensor in to_state_dict(lora).items()}
    write_tensors(state, path, {"format": "pt", **MODEL_SPEC, "modelspec.title": path.stem, **lora.metadata})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all; the same content gives the same bytes.

    Raises OSError when the folder cannot be written or the disk is full.
    """
    try:
        with written_whole(path) as unfinished:
            save_file(tensors, unfinished, metadata)
            with unfinished.open("r+b") as file:
                _sort_metadata(file)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _sort_metadata(file: BinaryIO) -> None:
    """Sorts a file's metadata, which safetensors writes in random order. The header is JSON, padded with spaces."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= length
    file.seek(8)
    file.write(text.ljust(length))
