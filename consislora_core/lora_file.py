"""Reads and writes LoRA files, in every key spelling, as parts by role with metadata."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter_config import HEADER, AdapterConfig, read_config
from .files import escape_text, patiently, written_whole
from .roles import Target, diffusers_name, kohya_name, parse_module

# What the keys of a layer end in, by kind. LoRA (arXiv 2106.09685) as kohya, diffusers and PEFT spell it, PEFT with or
# without its adapter's name; what belongs to both matrices may stand at either's module, as in to_q.lora.alpha:
LORA = {
    "down": r"lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight|lora_A(?:\.[^.]+)?\.weight",
    "up": r"lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight|lora_B(?:\.[^.]+)?\.weight",
    "alpha": r"alpha",
}
# What a LoRA here cannot hold, as PEFT, LyCORIS and OneTrainer spell it; DoRA is arXiv 2402.09353, LoHa 2108.06098.
OTHER_KINDS = {
    "DoRA": r"dora_scale|lora_magnitude_vector(?:\..+)?",
    "AdaLoRA": r"lora_E(?:\..+)?",
    "LoHa": r"hada_.+",
    "LoKr": r"lokr_.+",
    "OFT": r"b?oft_.+",
    "GLoRA": r"[ab][12]\.weight",
    "IA3": r"on_input|ia3_l(?:\..+)?",
    "VeRA": r"vera_lambda_[bd](?:\..+)?",
    "LoRA with a third weight": r"lora_mid\.weight",
    "LoRA with a bias": r"(?:lora_up|lora\.up|lora_B(?:\.[^.]+)?)\.bias",
    "layer trained in full": r"diff(?:_b)?|set_weight",
}
ENDINGS = {
    kind: re.compile(rf"(.+?)[._](?:lora(?:_linear_layer)?[._])?(?:{ending})")
    for kind, ending in (LORA | OTHER_KINDS).items()
}

MAX_VALUES = 2**24  # of one tensor: rank 1024 in a layer of SDXL takes 2**21
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
LARGEST = torch.finfo(torch.float16).max  # of a weight or alpha, which files hold in fp16; trained weights are below 10

# Metadata that states facts of the file it was read from, which a file written anew has others of.
OF_THE_FILE = {HEADER, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}

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
    """What was learned from one image: its parts by role, and the file's metadata.

    left_out: the file's names of other modules that it adapts.
    """

    parts: dict[str, Part]
    metadata: dict[str, str]
    left_out: tuple[str, ...] = ()

    def part(self, role: str) -> Part:
        """The part of a role. Raises ValueError if there is none."""
        if role not in self.parts:
            raise ValueError(
                f"This LoRA has no {role} part, only {' and '.join(self.parts)}. Choose a file that was trained "
                f"with both, or leave the {role} input empty."
            )
        return self.parts[role]

    @cached_property
    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite, in fp16 as in files."""
        weights = (tensor for part in self.parts.values() for down, up, _ in part.values() for tensor in (down, up))
        return all(bool(tensor.to(torch.float16).isfinite().all()) for tensor in weights)

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
    """A LoRA from tensors in any known spelling; tensors of other modules than those of the two roles are left out.

    config: gives alpha to layers without an alpha tensor. Raises ValueError that names a layer which is damaged or of
    another kind than LoRA, and for a state without a LoRA of either role.
    """
    placed, left_out = _placed(state)
    parts: dict[str, Part] = {}
    for target, keys in placed.items():
        layer = _layer(target, {kind: state[key] for kind, key in keys.items()}, config or AdapterConfig())
        parts.setdefault(target.role, {})[target.layer] = layer
    return ImageLora(parts, metadata or {}, left_out)


def _placed(keys: Collection[str]) -> tuple[dict[Target, dict[str, str]], tuple[str, ...]]:
    """The keys of each layer by kind, and the modules that are left out. Raises ValueError as `from_state_dict`."""
    placed: dict[Target, dict[str, str]] = {}
    left_out: dict[str, str | None] = {}
    for key in keys:
        module, kind = _split(key)
        target = parse_module(module)
        if target is None or kind is None:
            left_out[module] = kind
        elif kind not in LORA:
            raise ValueError(
                f"It is {'an' if kind[0] in 'AIO' else 'a'} {kind} (in the {target.role} part, for example at "
                f"{target.layer}), which ConsisLoRA cannot hold. Save it as plain LoRA."
            )
        elif placed.setdefault(target, {}).setdefault(kind, key) != key:
            raise ValueError(
                f"It holds two LoRAs for the {target.role} part at {target.layer}: {placed[target][kind]} and {key}. "
                "Save each in a file of its own."
            )
    if not placed:
        kinds = " and ".join(sorted(set(left_out.values()) & OTHER_KINDS.keys()) or ["others"])
        found = f", but {kinds}, for example {', '.join(sorted(left_out)[:3])}" if left_out else ""
        raise ValueError(
            f"The file holds no LoRA weights of SDXL's content or style block{found}. It is for another architecture, "
            "or leaves these blocks as they are."
        )
    return placed, tuple(left_out)


def _split(key: str) -> tuple[str, str | None]:
    """The module that a key is about, and the kind; the key itself and None where no kind is known."""
    for kind, ending in ENDINGS.items():
        if match := ending.fullmatch(key):
            return match[1], kind
    return key, None


def _layer(target: Target, tensors: dict[str, Tensor], config: AdapterConfig) -> LoraLayer:
    down, up, alpha = map(tensors.get, LORA)
    at, again = f"The {target.role} part is damaged at {target.layer}:", "Train or download it again."
    if not (_is_matrix(down) and _is_matrix(up) and len(down) == up.shape[1] and (alpha is None or alpha.numel() == 1)):
        shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        raise ValueError(f"{at} a down (rank x in) and an up (out x rank) were expected, found {shapes}.")
    if len(down) == 0:
        raise ValueError(f"{at} it has rank 0, so it holds nothing. {again}")
    for kind, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not (kind == "alpha" and tensor.dtype in (torch.int32, torch.int64)):
            raise ValueError(f"{at} its {kind} is {tensor.dtype}. Save it in fp16 or fp32.")
    down, up = down.flatten(1), up.flatten(1)
    alpha = config.alpha(diffusers_name(target), len(down)) if alpha is None else float(alpha)
    for kind, values in {"down": down, "up": up, "alpha": torch.tensor(alpha)}.items():
        values = values.float()  # torch has no comparisons in fp8
        if not values.isfinite().all():
            raise ValueError(f"{at} its {kind} holds values that are not finite (NaN or infinity). {again}")
        if (values.abs() > LARGEST).any():
            raise ValueError(
                f"{at} its {kind} holds {values.abs().max():g}, where trained values are below {LARGEST:g}. {again}"
            )
    return LoraLayer(down, up, alpha)


def _is_matrix(tensor: Tensor | None) -> bool:
    """Whether it is the weight of a linear layer, or of a convolution of 1 x 1, which is the same."""
    return tensor is not None and tensor.ndim >= 2 and tensor.shape[2:].numel() == 1


def read(path: str | os.PathLike) -> ImageLora:
    """Reads a LoRA file to the CPU. Alpha is in tensors, in the file's header or in an adapter_config.json beside it.

    Raises ValueError for a file that is damaged, foreign or incomplete, or of a kind that a LoRA here cannot hold.
    """
    name, written = escape_text(Path(path).name), escape_text(path)
    if written != os.fspath(path):  # which safetensors does not take
        raise ValueError(f"{name} cannot be opened: its path, {written}, is not UTF-8. Rename the file or folder.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            placed, left_out = _placed(shapes)  # both checks come before a tensor takes memory
            keys = [key for layer in placed.values() for key in layer.values()]
            _check_size({key: shapes[key] for key in keys})
            metadata = file.metadata() or {}
            config = read_config(Path(path), metadata)
            kept = {entry: text for entry, text in metadata.items() if entry not in OF_THE_FILE}
            # Copies: Windows neither removes nor replaces a file while a tensor is mapped to it.
            lora = from_state_dict({key: file.get_tensor(key).clone() for key in keys}, kept, config)
            return replace(lora, left_out=left_out)
    except SafetensorError as error:
        raise ValueError(
            f"{name} is not a whole safetensors file ({error}). It may be cut off or of another kind; "
            "download or save it again."
        ) from error
    except ValueError as error:
        # Without the first error, which may have what the log cannot write from a config in JSON.
        raise ValueError(escape_text(f"{name}: {error}")) from None


def _check_size(shapes: dict[str, list[int]]) -> None:
    largest = max(shapes, key=lambda key: math.prod(shapes[key]))
    if math.prod(shapes[largest]) > MAX_VALUES:
        raise ValueError(
            f"{largest} has shape {tuple(shapes[largest])}, which is more than any LoRA of SDXL needs. The file is "
            "damaged or of another kind."
        )


def write(lora: ImageLora, path: str | os.PathLike, dtype: torch.dtype = torch.float16, new: bool = False) -> None:
    """Writes a LoRA file, whole or not at all: an earlier file of that name stays until the new one is complete.

    Raises FileExistsError for an earlier file if the file must be `new`, and OSError when the folder cannot be written
    or the disk is full.
    """
    path = Path(path)
    state = {key: tensor.to("cpu", dtype) for key, tensor in to_state_dict(lora).items()}
    write_tensors(state, path, {"format": "pt", **MODEL_SPEC, "modelspec.title": path.stem, **lora.metadata}, new)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], new: bool = False) -> None:
    """Writes a safetensors file, whole or not at all; the same content gives the same bytes.

    Raises FileExistsError for an earlier file if the file must be `new`, and OSError when the folder cannot be written
    or the disk is full.
    """
    try:
        with written_whole(path, new) as unfinished:
            save_file(tensors, unfinished, {name: escape_text(text) for name, text in metadata.items()})
            with patiently(unfinished.open, "r+b") as file:
                _sort_metadata(file)
    except SafetensorError as error:
        raise OSError(f"{escape_text(path)} could not be written: {error}") from error


def _sort_metadata(file: BinaryIO) -> None:
    """Sorts a file's metadata, which safetensors writes in random order. The header is JSON, padded with spaces."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= length
    file.seek(8)
    file.write(text.ljust(length))
