"""Scores that only the benchmarks use: distance in style, and likeness to the ground truth.

Pictures are tensors b 3 h w, 0 to 1; all scores are without a unit, one for each picture of the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from consislora_core.metrics import SCALES

PATCH, PROJECTIONS = 3, 64
WINDOW, SIGMA = 11, 1.5  # pixels; with the next line SSIM's constants, from its paper
STABLE = (0.01**2, 0.03**2)


def style_distance(picture: Tensor, style: Tensor) -> Tensor:
    """How far colours and strokes of pictures (b 3 h w, 0 to 1) are from those of a style image (1 3 h w).

    Sliced Wasserstein distance of their small patches, at any position (Rabin et al. 2011), averaged over scales.
    """
    return torch.stack([_patch_distance(picture, style, s) for s in SCALES]).mean(0)


def ssim(picture: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of pictures to the ground truth (1 or b 3 h w, of the same size): 1 is equal, -1 the least.

    Wang et al. 2004, with their gaussian window and constants, averaged over channels and over all positions at which
    the whole window fits.
    """
    axis = torch.arange(WINDOW, dtype=picture.dtype, device=picture.device) - WINDOW // 2
    weights = torch.softmax(-(axis**2) / (2 * SIGMA**2), 0)
    window = weights.outer(weights).expand(3, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    x, y = torch.broadcast_tensors(picture, truth)
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c_1, c_2 = STABLE
    similar = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2) / ((mu_x**2 + mu_y**2 + c_1) * (var_x + var_y + c_2))
    return similar.mean((1, 2, 3))


def perceptual_distance(maps: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Distance of pictures from the ground truth in a network's feature maps: 0 to 2 for maps without negative values.

    LPIPS (Zhang et al. 2018) without its learned weights: the squared distance between the directions of the feature
    vectors (maps b c h w, truth 1 or b c h w) at each position, averaged over positions, then over layers.
    """
    distances = [
        (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1).mean((1, 2))
        for ours, theirs in zip(maps, truth, strict=True)
    ]
    return torch.stack(distances).mean(0)


def _patch_distance(picture: Tensor, style: Tensor, scale: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(PROJECTIONS, 3 * PATCH**2, generator=generator), dim=1).to(picture)
    ours, theirs = (
        (directions @ F.unfold(F.avg_pool2d(image, scale), PATCH)).sort(-1).values for image in (picture, style)
    )
    if theirs.shape[-1] != ours.shape[-1]:
        theirs = F.interpolate(theirs, ours.shape[-1], mode="linear")
    return (ours - theirs).abs().mean((1, 2))
