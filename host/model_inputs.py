"""Checks latents, text and pictures against the model they are for, before anything is loaded or computed."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..consislora_core.adapters import check_fit
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.roles import targets

Conditioning = list  # ComfyUI's: pairs of a tensor and a dict
TEXT_OVERFLOW = "the text encoder may have overflowed in fp16: start ComfyUI with --fp32-text-enc"
SIZE_FEATURES = 6 * 256  # of SDXL's vector `y`: six sizes, each embedded; the rest is the pooled text


def check_roles(model: ModelPatcher) -> None:
    """Raises ValueError for a model without the content and style blocks of SDXL."""
    targets(dict(model.model.diffusion_model.named_modules()) if hasattr(model.model, "diffusion_model") else {})


def check_loras(model: ModelPatcher, content: ImageLora | None, style: ImageLora | None) -> None:
    """Raises ValueError as `check_lora` does, for each of the two that is connected."""
    for name, lora in {"content": content, "style": style}.items():
        if lora is not None:
            check_lora(model, lora, name)


def check_lora(model: ModelPatcher, lora: ImageLora, name: str) -> None:
    """Raises ValueError for a LoRA that was trained on a model with other layers, or whose training failed."""
    check_weights(lora, name)
    try:
        check_fit(model.model.diffusion_model, lora.parts)
    except ValueError as error:
        raise ValueError(f"{name} does not fit the model. {error}") from error


def check_weights(lora: ImageLora, name: str) -> None:
    """Raises ValueError for a LoRA with weights that are not finite, which draws nothing and which no file can hold."""
    if not lora.is_finite:
        raise ValueError(
            f"{name} holds weights that are not numbers (NaN or infinity), or too large for a file: its training "
            "failed. Train it again with a lower learning rate, or in precision bf16 or fp32."
        )


def check_latent(model: ModelPatcher, latent: dict, name: str) -> None:
    """Raises ValueError for a latent that the model cannot take, with values that are not finite, or a bad mask.

    An empty latent may have the channels of another base model: sampling makes them fit, as ComfyUI's KSampler does.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not torch.is_tensor(samples):
        raise ValueError(f"{name} is not a picture's latent. Connect VAE Encode or Empty Latent Image.")
    channels = model.model.latent_format.latent_channels
    fits = samples.ndim == 4 and samples.numel() and (samples.shape[1] == channels or not samples.any())
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(samples.shape)}; "
            f"this model takes (batch of at least 1, {channels} channels, height, width). "
            "Connect VAE Encode, with the VAE of this checkpoint."
        )
    if min(samples.shape[2:]) < 2:
        height, width = (8 * side for side in samples.shape[2:])
        raise ValueError(f"{name} is a picture of {width} x {height} pixels; at least 16 x 16 are needed.")
    check_finite(samples, name, "the VAE may have overflowed in fp16: start ComfyUI with --fp32-vae")
    mask, numbers = latent.get("noise_mask"), latent.get("batch_index")
    if mask is not None and not (torch.is_tensor(mask) and mask.numel() and mask.isfinite().all()):
        raise ValueError(
            f"{name} has a noise mask that is empty or holds values that are not numbers (NaN or infinity). "
            "Look at the mask of Set Latent Noise Mask."
        )
    if numbers is not None and len(numbers) != len(samples):
        raise ValueError(
            f"{name} holds {len(samples)} latents, but its batch_index numbers {len(numbers)}. Connect it from before "
            "the node that changed its batch."
        )


def check_picture_in(latent: dict, name: str, purpose: str) -> None:
    """Raises ValueError for a latent that is all zeros, or a batch with one, as Empty Latent Image makes them."""
    if not latent["samples"].flatten(1).any(1).all():
        raise ValueError(f"{purpose} needs a picture, and {name} is empty. Connect VAE Encode with the picture.")


def check_text(model: ModelPatcher, conditioning: Conditioning, name: str) -> None:
    """Raises ValueError for conditioning that was not encoded with the CLIP of a model like this one."""
    if not isinstance(conditioning, list) or not conditioning or not all(map(_is_text, conditioning)):
        raise ValueError(f"{name} holds no text. Connect CLIP Text Encode with the CLIP of this checkpoint.")
    config = model.model.model_config.unet_config
    for text, extras in conditioning:
        if text.shape[-1] != config["context_dim"]:
            raise ValueError(
                f"{name} has text features of width {text.shape[-1]}, this model takes {config['context_dim']}: "
                "it was encoded with the CLIP of another base model. Connect the CLIP of this checkpoint."
            )
        check_finite(text, name, TEXT_OVERFLOW)
        if "unclip_conditioning" in extras:  # a picture's features, from which the model makes the vector itself
            continue
        pooled = extras.get("pooled_output")
        if not _is_filled(pooled, 2):
            raise ValueError(
                f"{name} has no pooled text vector, which SDXL needs. "
                "Connect CLIP Text Encode with the CLIP of this checkpoint."
            )
        if pooled.shape[-1] + SIZE_FEATURES != config["adm_in_channels"]:
            raise ValueError(
                f"{name} has a pooled vector of width {pooled.shape[-1]}, which does not fit this "
                "model: it was encoded with the CLIP of another base model. Connect the CLIP of this checkpoint."
            )
        check_finite(pooled, name, TEXT_OVERFLOW)


def check_areas(prompts: Mapping[str, list[dict]], latent: Tensor) -> None:
    """Raises ValueError for a prompt whose area (height, width, top, left) begins outside of a latent (b c h w).

    prompts: by name, as guiders keep conditioning.
    """
    height, width = latent.shape[-2:]
    for name, conds in prompts.items():
        for first, *_, top, left in (cond["area"] for cond in conds if "area" in cond):
            if first == "percentage":  # the others are shares of the latent
                top, left = round(top * height), round(left * width)
            if top >= height or left >= width:
                raise ValueError(
                    f"{name} has an area that begins at {8 * left} x {8 * top} pixels, outside of latent_image, which "
                    f"is {8 * width} x {8 * height}. Move the area, or make latent_image larger."
                )


def check_cache(model: ModelPatcher, start_percent: float) -> None:
    """Raises ValueError for a model with ComfyUI's EasyCache and guidance that begins later than sampling.

    EasyCache fails at a row of which it has no earlier pass when it skips a step.
    """
    cache = model.model_options.get("transformer_options", {}).get("easycache")
    if start_percent > 0 and getattr(cache, "name", "") == "EasyCache":
        raise ValueError(
            f"start_percent is {start_percent:g}, and the model has EasyCache, which cannot skip steps before guidance "
            "has begun. Set start_percent to 0, or use LazyCache instead."
        )


def _is_text(entry: Any) -> bool:
    """Whether it is a pair of text features (batch, tokens, width) and what belongs to them."""
    return (
        isinstance(entry, (list, tuple)) and len(entry) == 2 and _is_filled(entry[0], 3) and isinstance(entry[1], dict)
    )


def _is_filled(tensor: Any, axes: int) -> bool:
    return torch.is_tensor(tensor) and tensor.ndim == axes and tensor.numel() > 0


def check_vae(model: ModelPatcher, vae: Any) -> None:
    """Raises ValueError for a VAE whose latents have other channels than the model's."""
    channels = model.model.latent_format.latent_channels
    if getattr(vae, "latent_channels", channels) != channels:
        raise ValueError(
            f"vae decodes latents of {vae.latent_channels} channels, this model makes {channels}: it is of another "
            "base model. Connect the VAE of this checkpoint."
        )


def check_pictures(images: Tensor, name: str, least_side: int = 1) -> None:
    """Raises ValueError for what is no batch of pictures (b h w, 1, 3 or 4 channels), and for values not finite.

    least_side: in pixels, of the smallest pictures that are taken.
    """
    if not torch.is_tensor(images) or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        shape = f"has shape {tuple(images.shape)}" if torch.is_tensor(images) else "is no picture"
        raise ValueError(f"{name} {shape}; pictures are (batch, height, width, 1, 3 or 4 channels).")
    if not images.numel():
        raise ValueError(
            f"{name} holds no picture: its shape is {tuple(images.shape)}. Connect a node that gives some."
        )
    if min(images.shape[1:3]) < least_side:
        height, width = images.shape[1:3]
        raise ValueError(f"{name} is {width} x {height} pixels; at least {least_side} x {least_side} are needed.")
    check_finite(images, name, "the VAE or the model may have overflowed in fp16")


def check_finite(tensor: Tensor, name: str, reason: str) -> None:
    """Raises ValueError for a tensor with NaN or infinity in it. reason: the usual one."""
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not numbers (NaN or infinity); {reason}.")
