"""Draws a picture again in other colours, so that a LoRA can learn its structure and none of its colours."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .image_faults import LEAST, LUMA, noise_level

CHROMA = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0], [6.0]]) ** 0.5  # orthogonal to grey
LIGHTEST = 0.25, 0.85  # where the lightest tone of a recolouring may lie, clear of the page
SATURATION, TINT = 1.5, 0.25  # the largest factor of chroma; the spread of what is added to it
PAGE = 0.94, 0.99  # of the darkest channel: where white begins, and where it is complete
GRAIN = 1.5 / 255  # the noise level from which on a page no longer looks white pixel by pixel; drawings have less
NEIGHBOURS = 5  # pixels to a side, of whose median a noisy picture's whiteness is


def recolour(image: Tensor, count: int, generator: torch.Generator, white: Tensor | None = None) -> Tensor:
    """`count` recolourings of a picture (h w 3, 0 to 1): count h w 3. Edges stay where they are, and white stays white.

    white: how white each pixel is (h w 1), else as `page_whiteness` finds it.

    Luma l and chroma c of a pixel become, with a, g, s, R and t drawn once for each recolouring,

        l' = a l^g  or  a (1 - l^g)    tones, half of the times inverted
        c' = s R c + t                 hues turned by the rotation R, weaker or stronger, and tinted

    and the pixel is their sum, the grey l' and the chroma c'.
    """
    white = page_whiteness(image) if white is None else white
    return torch.stack([_recolour_once(image, generator, white) for _ in range(count)])


def _recolour_once(image: Tensor, generator: torch.Generator, white: Tensor) -> Tensor:
    a, g, s, turn, side = torch.rand(5, generator=generator).tolist()
    tint = TINT * torch.randn(2, generator=generator)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    tone = (image @ LUMA) ** 2 ** (2 * g - 1)
    tone = (LIGHTEST[0] + a * (LIGHTEST[1] - LIGHTEST[0])) * (tone if side < 0.5 else 1 - tone)
    chroma = SATURATION * s**0.5 * (image @ CHROMA.T) @ torch.tensor([[cos, sin], [-sin, cos]]) + tint
    return torch.lerp((tone.unsqueeze(-1) + chroma @ CHROMA).clamp(0, 1), image, white)


def whiteness(image: Tensor, dim: int = 1) -> Tensor:
    """How white each pixel is, from 0 to 1; its channels lie along `dim`, of which one is left."""
    return ((image.amin(dim, keepdim=True) - PAGE[0]) / (PAGE[1] - PAGE[0])).clamp(0, 1)


def page_whiteness(image: Tensor) -> Tensor:
    """How white each pixel of h w 3 is, from 0 to 1 (h w 1); in a noisy picture, how white its neighbourhood is.

    Of noise on a white page only the dark half is left. The median lies below white by less than the noise level.
    """
    if min(image.shape[:2]) >= LEAST and (level := noise_level(image @ LUMA)) > GRAIN:
        image = _median(image) + level
    return whiteness(image, dim=-1)


def _median(image: Tensor) -> Tensor:
    """The median of each channel (h w c) over the neighbours of each pixel."""
    padded = F.pad(rearrange(image, "h w c -> c h w"), 4 * (NEIGHBOURS // 2,), mode="reflect")
    windows = padded.unfold(1, NEIGHBOURS, 1).unfold(2, NEIGHBOURS, 1)
    strips = windows.split(64, dim=1)  # the view of all becomes 25 times the picture when it is flattened
    return rearrange(torch.cat([strip.flatten(-2).median(-1).values for strip in strips], 1), "c h w -> h w c")
