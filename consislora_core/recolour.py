"""Draws a picture again in other colours, so that a LoRA can learn its structure and none of its colours."""

import math

import torch
from torch import Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])
CHROMA = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0], [6.0]]) ** 0.5  # orthogonal to grey
LIGHTEST = 0.25, 0.85  # where the lightest tone of a recolouring may lie, clear of the page
SATURATION, TINT = 1.5, 0.25  # the largest factor of chroma; the spread of what is added to it
PAGE = 0.94, 0.99  # of the darkest channel: where white begins, and where it is complete


def recolour(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` recolourings of a picture (h w 3, 0 to 1): count h w 3. Edges stay where they are, and white stays white.

    Luma l and chroma c of a pixel become, with a, g, s, R and t drawn once for each recolouring,

        l' = a l^g  or  a (1 - l^g)    tones, half of the times inverted
        c' = s R c + t                 hues turned by the rotation R, weaker or stronger, and tinted
    """
    return torch.stack([_recolour_once(image, generator) for _ in range(count)])


def _recolour_once(image: Tensor, generator: torch.Generator) -> Tensor:
    a, g, s, turn, side = torch.rand(5, generator=generator).tolist()
    tint = TINT * torch.randn(2, generator=generator)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    tone = (image @ LUMA) ** 2 ** (2 * g - 1)
    tone = (LIGHTEST[0] + a * (LIGHTEST[1] - LIGHTEST[0])) * (tone if side < 0.5 else 1 - tone)
    chroma = SATURATION * s**0.5 * (image @ CHROMA.T) @ torch.tensor([[cos, sin], [-sin, cos]]) + tint
    return torch.lerp((tone.unsqueeze(-1) + chroma @ CHROMA).clamp(0, 1), image, whiteness(image, dim=-1))


def whiteness(image: Tensor, dim: int = 1) -> Tensor:
    """How white each pixel is, from 0 to 1; its channels lie along `dim`, of which one is left."""
    return ((image.amin(dim, keepdim=True) - PAGE[0]) / (PAGE[1] - PAGE[0])).clamp(0, 1)
