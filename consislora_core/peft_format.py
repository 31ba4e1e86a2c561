"""Reads and writes adapters as PEFT keeps them: a folder with `adapter_model.safetensors` and `adapter_config.json`."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from . import lora_file
from .adapter_config import ADAPTER_FILE
from .lora_file import ImageLora, LoraLayer, write_tensors
from .roles import Target, diffusers_name


def read(path: str | os.PathLike) -> ImageLora:
    """Reads an adapter's folder, or a LoRA file of any program, to the CPU. Raises ValueError as `lora_file.read`."""
    return lora_file.read(Path(path, ADAPTER_FILE) if Path(path).is_dir() else path)


def write(lora: ImageLora, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a LoRA as a folder that `PeftModel.from_pretrained` loads onto a diffusers UNet.

    Raises ValueError if PEFT is not installed, FileExistsError for a folder that is there already, and OSError when it
    cannot be written or the disk is full; then nothing of it is left.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError(
            "peft is missing. In ComfyUI's Python, in this pack's folder: pip install \".[peft]\". Then restart."
        ) from None
    layers = {
        diffusers_name(Target(role, path)): layer for role, part in lora.parts.items() for path, layer in part.items()
    }
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        alpha_pattern={name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        target_modules=list(layers),
    )
    folder.mkdir(parents=True)
    try:
        config.save_pretrained(folder)
        write_tensors(_peft_state_dict(layers, dtype), folder / ADAPTER_FILE, {"format": "pt", **lora.metadata})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _peft_state_dict(layers: dict[str, LoraLayer], dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for name, layer in layers.items():
        for key, tensor in (("lora_A", layer.down), ("lora_B", layer.up)):
            state[f"base_model.model.{name}.{key}.weight"] = tensor.to("cpu", dtype).contiguous()
    return state
