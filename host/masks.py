"""Masks, 1 where a picture counts: brings them to a latent's size, and gives them a soft edge."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .model_inputs import check_finite

SHAPE_TOLERANCE = 0.1  # of a mask's proportions beside the latent's, which VAE Encode crops to multiples of 8 pixels
FROM_LOAD_IMAGE = "Load Image gives 1 where a picture is transparent: put Invert Mask behind it."


def latent_mask(mask: Tensor, samples: Tensor, name: str = "mask") -> Tensor | None:
    """A mask (b h w) brought to latents (b c h w) by the mean over each of their pixels: b 1 h w, fp32, on the CPU.

    One mask is for all latents; of several, each is for as many in a row, as Recolour gives them. A mask of one value
    everywhere is one of ones, and None is given for ones alone. Raises ValueError for a mask that is empty, of another
    shape than the picture, or one of too many or too few.
    """
    masks = whole_mask(mask, name).cpu()
    count, (height, width) = len(samples), samples.shape[-2:]
    if count % len(masks):
        raise ValueError(
            f"{name} holds {len(masks)} masks for {count} pictures. Connect one mask for all, or one for each picture."
        )
    lowest, highest = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    if not highest.all():
        raise ValueError(
            f"{name} is empty (0 everywhere), so that nothing would be learned. It has to be 1 where the picture "
            f"counts. {FROM_LOAD_IMAGE}"
        )
    constant = lowest == highest
    proportions = masks.shape[-1] / masks.shape[-2] / (width / height)
    if not constant.all() and not 1 / (1 + SHAPE_TOLERANCE) <= proportions <= 1 + SHAPE_TOLERANCE:
        raise ValueError(
            f"{name} is {masks.shape[-1]} x {masks.shape[-2]} pixels, and the picture in latent {8 * width} x "
            f"{8 * height}, which is another shape. Scale or crop the mask as you did the picture."
        )
    fitted = F.interpolate(masks.masked_fill(constant, 1), (height, width), mode="area")
    return acting(fitted.repeat_interleave(count // len(masks), 0))


def acting(mask: Tensor | None) -> Tensor | None:
    """The mask, or None for one of ones, with which everything counts as without a mask."""
    return None if mask is None or bool((mask == 1).all()) else mask


def whole_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """ComfyUI's MASK (b h w, or h w) as b 1 h w, fp32, within 0 and 1. Raises ValueError for what is no mask."""
    if not torch.is_tensor(mask) or mask.ndim < 2 or not mask.numel():
        shape = f"has shape {tuple(mask.shape)}" if torch.is_tensor(mask) else "is none"
        raise ValueError(f"{name} {shape}; masks are (batch, height, width).")
    check_finite(mask, name, "the node that made it failed")
    return mask.reshape(-1, 1, *mask.shape[-2:]).float().clamp(0, 1)
