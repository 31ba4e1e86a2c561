"""Which blocks carry content and style, by architecture, in each key spelling."""

import re
from collections.abc import Iterable
from typing import NamedTuple

ROLES = ("content", "style")

# The blocks B-LoRA (arXiv 2403.14572, section 4.1) found, as ConsisLoRA uses them.
BLOCKS = {
    "sdxl": {
        "content": {"diffusers": "up_blocks.0.attentions.0", "comfyui": "output_blocks.0.1"},
        "style": {"diffusers": "up_blocks.0.attentions.1", "comfyui": "output_blocks.1.1"},
    }
}

# Attention layers a LoRA sits on, self- and cross-attention alike (ConsisLoRA section 5, implementation details).
LAYER = re.compile(r"transformer_blocks[._](\d+)[._](attn[12])[._]to_(q|k|v|out[._]0)")

# How LoRA files spell a UNet and such a layer: kohya lora_unet_, LyCORIS lycoris_, ComfyUI diffusion_model., PEFT
# base_model.model., OneTrainer lora_unet. and unet.; older diffusers ...attn1.processor.to_out for ...attn1.to_out.0.
# torch.compile adds _orig_mod. and DistributedDataParallel module. where a script has not taken them off.
PREFIX = re.compile(r"((lora|lycoris|unet|model|base_model|diffusion_model|_orig_mod|module)_)*")
SPELLED_LAYER = re.compile(r"transformer_blocks_(\d+)_(attn[12])_(?:processor_)?to_(q|k|v|out)(?:(?<=out)_0)?")

COMPILED = "_orig_mod."  # in the names of what torch.compile has wrapped


class Target(NamedTuple):
    """One attention layer of a role block; `layer` is its path inside the block, dotted."""

    role: str
    layer: str


def targets(module_names: Iterable[str], architecture: str = "sdxl") -> dict[str, Target]:
    """The UNet modules that carry LoRA, by name, in either host's spelling.

    Raises ValueError for a UNet without both role blocks.
    """
    blocks = {block + ".": role for role, spellings in BLOCKS[architecture].items() for block in spellings.values()}
    found = {}
    for name in module_names:
        for block, role in blocks.items():
            layer = name.removeprefix(block)
            if layer != name and LAYER.fullmatch(layer):
                found[name] = Target(role, layer)
    missing = [role for role in ROLES if role not in {target.role for target in found.values()}]
    if missing and any(COMPILED in name for name in module_names):
        raise ValueError(
            "A node before this one has compiled the model with torch.compile in a way that hides its layers. Connect "
            "the model from before that node; ComfyUI's own TorchCompileModel is no problem."
        )
    if missing:
        wanted = ", ".join(f"{role} in {BLOCKS[architecture][role]['comfyui']}" for role in missing)
        raise ValueError(
            "model is no SDXL model, and ConsisLoRA works on those alone: choose an SDXL checkpoint. SD 1.5, SD 2, the "
            f"SDXL refiner and newer families keep content and style elsewhere (no attention layers for {wanted})."
        )
    return found


def parse_module(name: str, architecture: str = "sdxl") -> Target | None:
    """The target of a module name in a LoRA file, in any spelling; None if it is no attention layer of a role block."""
    role, layer = block_of(name, architecture)
    if match := SPELLED_LAYER.fullmatch(layer):
        depth, attention, projection = match.groups()
        return Target(role, f"transformer_blocks.{depth}.{attention}.to_{projection}{'.0' * (projection == 'out')}")
    return None


def block_of(name: str, architecture: str = "sdxl") -> tuple[str | None, str]:
    """The role in whose block a module of a LoRA file lies, and its path inside with underscores; None and its name."""
    flat = name.replace(".", "_")
    for role, spellings in BLOCKS[architecture].items():
        for block in spellings.values():
            prefix, _, layer = flat.partition(block.replace(".", "_") + "_")
            if layer and PREFIX.fullmatch(prefix):
                return role, layer
    return None, flat


def kohya_name(target: Target, architecture: str = "sdxl") -> str:
    """The module name our files use: kohya's, with diffusers block names (read by ComfyUI, diffusers and A1111)."""
    return "lora_unet_" + diffusers_name(target, architecture).replace(".", "_")


def diffusers_name(target: Target, architecture: str = "sdxl") -> str:
    """The dotted name of a target's module in a diffusers UNet."""
    return f"{BLOCKS[architecture][target.role]['diffusers']}.{target.layer}"
