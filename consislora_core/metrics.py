"""Scores a picture for content and for style, beside the picture each was taken from."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (1, 2, 4)  # pixels a step, so that both fine lines and whole shapes count
PATCH, PROJECTIONS = 3, 64


def content_score(picture: Tensor, content: Tensor) -> Tensor:
    """How well the outlines of pictures (b 3 h w, 0 to 1) lie on those of a content image (1 3 h w): 1 is exactly.

    Cosine of the strengths of their edges, which knows no colour, averaged over scales.
    """
    return torch.stack([F.cosine_similarity(_edges(picture, s), _edges(content, s)) for s in SCALES]).mean(0)


def style_distance(picture: Tensor, style: Tensor) -> Tensor:
    """How far the colours and strokes of pictures (b 3 h w, 0 to 1) are from those of a style image (1 3 h w).

    Sliced Wasserstein distance of their small patches, wherever they lie (Rabin et al. 2011), averaged over scales.
    """
    return torch.stack([_patch_distance(picture, style, s) for s in SCALES]).mean(0)


def _edges(picture: Tensor, scale: int) -> Tensor:
    """Edge strengths (b n), softened so that a near miss counts."""
    small = F.avg_pool2d(picture, scale)
    across, down = small.diff(dim=-1)[..., 1:, :], small.diff(dim=-2)[..., 1:]
    strength = (across**2 + down**2).sum(1, keepdim=True).sqrt()  # b 1 h w
    return F.avg_pool2d(strength, 3, 1, 1).flatten(1)


def _patch_distance(picture: Tensor, style: Tensor, scale: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(PROJECTIONS, 3 * PATCH**2, generator=generator), dim=1).to(picture)
    ours, theirs = (
        (directions @ F.unfold(F.avg_pool2d(image, scale), PATCH)).sort(-1).values for image in (picture, style)
    )
    if theirs.shape[-1] != ours.shape[-1]:
        theirs = F.interpolate(theirs, ours.shape[-1], mode="linear")
    return (ours - theirs).abs().mean((1, 2))
