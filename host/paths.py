"""Where ComfyUI keeps pictures and LoRA files, and where the store of trained LoRAs is."""

import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import args

from ..consislora_core import lora_file, peft_format
from ..consislora_core.adapter_config import ADAPTER_FILE
from ..consislora_core.files import escape_text, write_numbered
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.store import Store


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def temp_folder() -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


def new_picture_paths(prefix: str, width: int, height: int) -> Iterator[Path]:
    """Where Save Image would write the next picture, and the one after it, and so on.

    Raises ValueError for an empty prefix, with which Save Image writes hidden files, and for one that leads out of the
    output folder.
    """
    prefix = re.sub("[\0\ud800-\udfff]", "_", prefix).strip()  # halves of characters, which no file system takes
    if not prefix:
        raise ValueError("filename_prefix is empty. Give the beginning of a name, such as consislora.")
    root = os.path.abspath(output_folder())
    if not Path(os.path.abspath(os.path.join(root, prefix))).is_relative_to(root):
        raise ValueError(
            f"filename_prefix {prefix!r:.100} leads out of ComfyUI's output folder. Name a place inside, such as "
            "clients/cup."
        )
    folder, name, first, *_ = folder_paths.get_save_image_path(prefix, str(output_folder()), width, height)
    return (Path(folder, f"{name}_{number:05}_.png") for number in count(first))


def lora_names() -> list[str]:
    """The files in models/loras, with forward slashes on every system: a workflow made on one opens on another."""
    names = folder_paths.get_filename_list("loras")
    return [name.replace("\\", "/") for name in names if name.lower().endswith(".safetensors")]


def lora_path(name: str) -> Path:
    """The file of a name in models/loras. Raises ValueError if there is none, or if the name leads outside."""
    found = folder_paths.get_full_path("loras", str(name))  # which keeps names inside
    if found is None:
        raise ValueError(
            f"There is no LoRA file {name!r} in models/loras. Choose one from the list, or press R to refresh it."
        )
    return Path(found)


def save_lora(lora: ImageLora, name: str, dtype: torch.dtype, as_peft: bool = False) -> str:
    """Writes a LoRA as a file of ours, or as a folder of PEFT, with the next free number; its name for the loader.

    name: inside the first models/loras folder; a subfolder may be a link, as for ComfyUI when it reads. Raises
    ValueError when the disk or folder refuses, and for a PEFT folder where PEFT is not installed.
    """
    if args.disable_metadata:
        lora = ImageLora(lora.parts, {})
    wanted, suffix = loras_folder() / name, "" if as_peft else ".safetensors"
    numbered = (wanted.with_name(f"{wanted.name}_{number:05}{suffix}") for number in range(1, 100_000))
    writer = peft_format.write if as_peft else partial(lora_file.write, new=True)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        path = write_numbered(numbered, lambda path: writer(lora, path, dtype=dtype))
    except OSError as error:
        raise ValueError(
            f"The LoRA could not be saved to {escape_text(wanted.parent)}: {error.strerror or error}. Free some "
            "space or choose a folder that can be written, then queue again: the training itself is still cached."
        ) from error
    return (path / ADAPTER_FILE if as_peft else path).relative_to(loras_folder()).as_posix()
