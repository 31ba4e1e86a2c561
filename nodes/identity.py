"""What names a training: a hash of all that decides what it gives, and the store of LoRAs under such names."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..consislora_core.lora_file import Part
from ..consislora_core.schedule import Stage
from ..consislora_core.store import CODE, Nameless, Store, fingerprint


def store() -> Store:
    """The LoRAs and checkpoints of all trainings, in the first models/loras folder."""
    folder = Path(folder_paths.get_folder_paths("loras")[0], "consislora", "store")
    limit = os.environ.get("CONSISLORA_STORE_GB", "20")
    try:
        return Store(folder, int(float(limit) * 1e9))
    except (ValueError, OverflowError):
        raise ValueError(f"CONSISLORA_STORE_GB is {limit!r}; it must be a number of gigabytes, such as 20.") from None


def training_key(
    model: ModelPatcher,
    base: str,
    latent: dict,
    positive: list,
    stage: Stage,
    frozen: Mapping[str, Part],
    dtype: torch.dtype,
) -> str | None:
    """A hash of all that decides what a training gives; None for a model or text changed by other nodes' code.

    base: the model's `base_fingerprint`.
    """
    try:
        return fingerprint(
            {
                "code": CODE,
                "base": base,
                "changes": _changes(model),
                "latent": latent["samples"],
                "positive": positive,
                "stage": asdict(stage),
                "frozen": frozen,
                "dtype": str(dtype),
            }
        )
    except Nameless as error:
        logging.info("ConsisLoRA: not looked up in the store of trained LoRAs and not kept there: %s.", error)
        return None


def base_fingerprint(model: ModelPatcher) -> str:
    """A short name for a base model: SHA-256 of samples of every weight, as stored and without patches."""
    weights = {key: _sample(entries[0][0]) for key, entries in model.get_key_patches("diffusion_model.").items()}
    return fingerprint([str(model.model.model_config.unet_config), weights])[:16]


def _sample(tensor: Tensor) -> Tensor:
    """All of a small tensor; 16 runs of 64 values of a large one: what changes a model changes whole layers.

    Runs, because a weight may still be on the disk, where single values would take as many pages.
    """
    flat = tensor.detach().reshape(-1)
    return flat if len(flat) <= 1024 else flat[: len(flat) // 16 * 16].view(16, -1)[:, :64].cpu()


def _changes(model: ModelPatcher) -> list:
    """All that nodes have laid over the base model, as far as training sees it, in a form for `fingerprint`."""
    sampling = model.get_model_object("model_sampling")
    numbers = {name: value for name, value in vars(sampling).items() if isinstance(value, (int, float, str))}
    return [
        [kind.__qualname__ for kind in (*type(model.model).__mro__, *type(sampling).__mro__)],
        type(model.model.latent_format).__qualname__,
        numbers,
        dict(sampling.named_buffers()),
        {key: _patch(patches) for key, patches in model.patches.items() if key.startswith("diffusion_model.")},
        {key: value for key, value in model.object_patches.items() if key != "model_sampling"},
        [model.wrappers, model.callbacks, model.injections, model.model_options.get("transformer_options", {})],
    ]


def _patch(value: Any) -> Any:
    """Weight patches as plain values: they are nested lists of strengths, tensors, adapters and plain functions."""
    if isinstance(value, (list, tuple)):
        return [_patch(one) for one in value]
    if isinstance(value, WeightAdapterBase):
        return [type(value).__qualname__, _patch(value.weights)]
    if isinstance(value, FunctionType) and not value.__closure__:
        return f"{value.__module__}.{value.__qualname__}"
    return _sample(value) if torch.is_tensor(value) else value


def tensor_fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]
