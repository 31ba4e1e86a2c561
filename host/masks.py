"""Masks, 1 where a picture counts: on a latent for training, and to join a result with its original."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .model_inputs import check_finite, check_pictures

SHAPE_TOLERANCE = 0.1  # of proportions: sizes are rounded to multiples of 8 pixels, or to those that SDXL likes


def latent_mask(mask: Tensor, samples: Tensor) -> Tensor | None:
    """A mask (b h w) brought to latents (b c h w) by its mean over each of their pixels: b 1 h w, fp32, on the CPU.

    One mask is for all latents; each of several is for as many in a row, as Recolour gives them. One value everywhere
    is as good as 1, and for a mask of ones alone the answer is None. Raises ValueError for a mask that is empty or of
    another shape than the picture, and for too many or too few.
    """
    masks = _checked(mask, "nothing would be learned").cpu()
    count, (height, width) = len(samples), samples.shape[-2:]
    if count % len(masks):
        raise ValueError(
            f"mask holds {len(masks)} masks for {count} pictures. Connect one for all of them, or one for each."
        )
    lowest, highest = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    even = lowest == highest
    if not even.all():
        _check_shape("mask", masks.shape[-2:], "the picture in latent", (8 * height, 8 * width))
    fitted = F.interpolate(masks.masked_fill(even, 1), (height, width), mode="area")
    return acting(fitted.repeat_interleave(count // len(masks), 0))


def acting(mask: Tensor) -> Tensor | None:
    """The mask, or None for one of ones, with which all is as without a mask."""
    return None if (mask == 1).all() else mask


def keep_outside(images: Tensor, original: Tensor, mask: Tensor, feather: int = 0, transparent: bool = False) -> Tensor:
    """Pictures where a mask is 1, and where it is 0 their original, or nothing: b h w 3, or with alpha b h w 4.

    The pictures get the original's size, and its pixels outside of the mask stay as they are. original (b h w c) and
    mask (b h w): one for all pictures, or one for each. feather: see `feathered`. It is computed on the CPU, which has
    all operators. Raises ValueError for inputs that do not fit together.
    """
    check_pictures(images, "images")
    check_pictures(original, "original")
    images, original = (
        pixels[..., :3].expand(-1, -1, -1, 3).movedim(-1, 1).float().cpu() for pixels in (images, original)
    )
    size = original.shape[-2:]
    _check_count("original", len(original), len(images))
    _check_shape("images", images.shape[-2:], "original", size)
    masks = picture_masks(mask, len(images), "original", size, "nothing of the result would show").cpu()
    masks = feathered(_resized(masks, size), feather).expand(len(images), -1, -1, -1)
    images = _resized(images, size)
    joined = torch.cat([images, masks], 1) if transparent else torch.lerp(original, images, masks)
    return joined.movedim(1, -1)


def picture_masks(mask: Tensor, count: int, other: str, size: tuple[int, int], if_empty: str) -> Tensor:
    """A mask for `count` pictures, one for all or one for each: b 1 h w, fp32, within 0 and 1.

    Raises ValueError for one that is empty, for too many or too few, and for another shape than `other` has, of this
    size (height, width). if_empty: what would follow from an empty one.
    """
    masks = _checked(mask, if_empty)
    _check_count("mask", len(masks), count)
    if masks.amin() < masks.amax():
        _check_shape("mask", masks.shape[-2:], other, size)
    return masks


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask (b 1 h w) that rises from 0 at its edge to 1 so many pixels inside; at the edge of the picture it stays.

    It is the mean of the mask made smaller by 1, 2, ... pixels, so that thin parts become faint and do not vanish.
    """
    smaller, total = mask, torch.zeros_like(mask)
    for _ in range(pixels):
        smaller = -F.max_pool2d(-smaller, 3, stride=1, padding=1)
        total += smaller
    return total / pixels if pixels else mask


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)


def _checked(mask: Tensor, if_empty: str) -> Tensor:
    """ComfyUI's MASK (b h w, or h w) as b 1 h w, fp32, within 0 and 1.

    Raises ValueError for what is no mask, and for one that is 0 everywhere. if_empty: what would follow from it.
    """
    if not torch.is_tensor(mask) or mask.ndim < 2 or not mask.numel():
        shape = f"has shape {tuple(mask.shape)}" if torch.is_tensor(mask) else "is no mask"
        raise ValueError(f"mask {shape}; masks are (batch, height, width).")
    check_finite(mask, "mask", "the node that made it failed")
    masks = mask.reshape(-1, 1, *mask.shape[-2:]).float().clamp(0, 1)
    if not masks.flatten(1).any(1).all():
        raise ValueError(
            f"mask is empty (0 everywhere), so that {if_empty}. It has to be 1 on the subject. Load Image gives 1 "
            "where a picture is transparent: put Invert Mask behind it."
        )
    return masks


def _check_count(name: str, found: int, count: int) -> None:
    if found not in (1, count):
        raise ValueError(
            f"{name} holds {found} for {count} pictures in images. Connect one for all of them, or one for each."
        )


def _check_shape(name: str, size: tuple[int, int], other: str, expected: tuple[int, int]) -> None:
    """Raises ValueError for a size (height, width) that scaling does not bring to the expected one."""
    (height, width), (tall, wide) = size, expected
    if abs(width * tall / (height * wide) - 1) > SHAPE_TOLERANCE:
        raise ValueError(
            f"{name} is {width} x {height} pixels, and {other} {wide} x {tall}, which is another shape. "
            "Scale or crop both in the same way."
        )
