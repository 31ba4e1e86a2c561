"""Where ComfyUI keeps pictures and LoRA files, and where the store of trained LoRAs is."""

import os
from pathlib import Path

import folder_paths
import torch

from ..consislora_core import lora_file, peft_format
from ..consislora_core.adapter_config import ADAPTER_FILE
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.store import Store


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def loras_folder() -> Path:
    """The first models/loras folder, where new files go."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def training_store() -> Store:
    """The store of trained LoRAs. Raises ValueError if its limit in the environment is not a number."""
    limit = os.environ.get("CONSISLORA_STORE_GB", "20")
    try:
        return Store(loras_folder() / "consislora" / "store", int(float(limit) * 1e9))
    except (ValueError, OverflowError):
        raise ValueError(f"CONSISLORA_STORE_GB is {limit!r}; it must be a number of gigabytes, such as 20.") from None


def new_picture_path(prefix: str, width: int, height: int) -> Path:
    """Where Save Image would write the next picture."""
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(output_folder()), width, height)
    return Path(folder, f"{name}_{number:05}_.png")


def lora_names() -> list[str]:
    """The files in models/loras, with forward slashes on every system: a workflow made on one opens on another."""
    names = folder_paths.get_filename_list("loras")
    return [name.replace("\\", "/") for name in names if name.endswith(".safetensors")]


def lora_path(name: str) -> Path:
    """The file of a name in models/loras. Raises ValueError if there is none, or if the name leads outside."""
    found = folder_paths.get_full_path("loras", str(name))  # which keeps names inside
    if found is None:
        raise ValueError(
            f"There is no LoRA file {name!r} in models/loras. Choose one from the list, or press R to refresh it."
        )
    return Path(found)


def new_lora_path(name: str, suffix: str = ".safetensors") -> Path:
    """Where a new LoRA of this name goes: in the first models/loras folder, numbered so that nothing is overwritten.

    suffix: of the file; empty for a folder. Raises ValueError for a name that leads outside.
    """
    folder = loras_folder()
    wanted = (folder / f"{name.removesuffix('.safetensors')}.safetensors").resolve()
    if not name.strip() or not wanted.is_relative_to(folder.resolve()) or wanted.stem.startswith("."):
        raise ValueError(
            f"filename is {name!r}; it must be a name inside models/loras, such as my_product or clients/my_product."
        )
    numbered = (wanted.with_name(f"{wanted.stem}_{i:05}{suffix}") for i in range(1, 100_000))
    return next(path for path in numbered if not path.exists())


def save_lora(lora: ImageLora, name: str, dtype: torch.dtype, as_peft: bool = False) -> str:
    """Writes a LoRA as a file of ours, or as a folder of PEFT; its name for the loader.

    Raises ValueError when the disk or folder refuses, and for a PEFT folder where PEFT is not installed.
    """
    path = new_lora_path(name, "" if as_peft else ".safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if as_peft:
            peft_format.write(lora, path, dtype)
            path = path / ADAPTER_FILE
        else:
            lora_file.write(lora, path, dtype)
    except OSError as error:
        raise ValueError(
            f"The LoRA could not be saved to {path.parent}: {error.strerror or error}. Free some space or "
            "choose a folder that can be written, then queue again: the training itself is still cached."
        ) from error
    return path.relative_to(loras_folder().resolve()).as_posix()
