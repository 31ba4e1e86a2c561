"""Finds what is wrong with a picture to learn from: too small, blurred, JPEG blocks, noise, a mostly empty page.

The bounds lie between clean pictures and the same damaged: `benchmarks/fidelity/faults.py`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])
ENLARGED = 2  # times, from which on a picture is too small
SOFT = 1.1  # pixels: the blur of the sharpest edges
NOISY, UNCORRELATED = 7, 0.5  # of 255; how much of what varies in quiet parts varies from pixel to pixel
ON_GRID, FAINT, STEPS = 0.5, 16 / 255, 100  # share and size of small steps, and how many it takes to judge
EMPTY, PAGE_BORDER = 0.85, 0.9  # share of cells that are page; of border pixels that are of one colour
CELLS, ALIKE = 16, 16 / 255  # cells to a side; how much colours may differ that count as one
LEAST = 32  # pixels to a side, below which there is too little to measure
LOOKED_AT = 1024  # pixels to a side of the middle in which JPEG blocks are searched


def find_faults(picture: Tensor, side: float, masked: bool = False) -> list[str]:
    """What is wrong with a picture (h w 3, 0 to 1) and what to do, in words that follow its name.

    side: of a square with the area at which it is learned, in pixels. masked: only a part of it is learned.
    """
    height, width = picture.shape[:2]
    scale = side / math.sqrt(height * width)
    faults = []
    if scale > ENLARGED:
        faults.append(f"has {width} x {height} pixels and is scaled up {scale:.1f} times. Use a larger picture.")
    learned = _scaled_down(picture, scale)
    if min(learned.shape[:2]) < LEAST:
        return faults
    luma = learned @ LUMA
    if (blur := edge_blur(luma)) > SOFT:
        radius, sigma, alpha = sharpening(max(1, scale) * blur)
        faults.append(
            "is blurred, or was scaled up. Use a sharp original, or put ComfyUI's Image Sharpen last before VAE "
            f"Encode, with sharpen_radius {radius}, sigma {sigma}, alpha {alpha}."
        )
    # Scaled down further, the blocks are too small to matter.
    if scale >= 1 / ENLARGED and jpeg_grid(_middle(picture) @ LUMA) > ON_GRID:
        faults.append("shows JPEG blocks. Use the original, or one that is compressed less.")
    if 255 * noise_level(luma) > NOISY:
        faults.append("is noisy. Use a cleaner original, unless the noise belongs to the style. A blur does not help.")
    if not masked and (share := empty_share(learned)) > EMPTY:
        faults.append(f"is {share:.0%} empty page. Crop it, or connect a mask.")
    return faults


def edge_blur(luma: Tensor, reference: float = 1.0) -> float:
    """The blur of the sharpest strong edges (h w), as the standard deviation of a Gaussian in pixels; 0 without edges.

    From the ratio of gradients before and after a known blur (Zhuo and Sim, Defocus map estimation from a single
    image, 2011). An area without detail has no edges and does not count.
    """
    before, after = _gradient(luma), _gradient(_blurred(luma, reference))
    is_peak = after >= F.max_pool2d(after[None], 3, 1, 1)[0]
    strong = is_peak & (after > after.max() / 4) & (after > 4 / 255)
    if not strong.any():
        return 0.0
    ratio = (before[strong] / after[strong]).clamp(min=1.0001)
    blur = reference / (ratio**2 - 1).sqrt()
    return blur.kthvalue(1 + len(blur) // 10).values.item()


def sharpening(blur: float) -> tuple[int, float, float]:
    """sharpen_radius, sigma and alpha of ComfyUI's Image Sharpen against a blur, in pixels.

    It then adds twice what a Gaussian of this blur takes away: the node counts sigma in radii, and alpha in tens.
    """
    return min(31, round(3 * blur)), 0.33, 0.2


def noise_level(luma: Tensor) -> float:
    """The standard deviation of the noise (h w), from the quietest quarter of its blocks; 0 where that is texture.

    By Immerkaer's mask (Fast noise variance estimation, 1996), which edges and even slopes pass by. Noise differs from
    texture in that all of its variance is between neighbours.
    """
    fine = F.conv2d(luma[None, None], luma.new_tensor([[[[1, -2, 1], [-2, 4, -2], [1, -2, 1]]]]) / 6)
    blocks = rearrange(_whole(luma[1:-1, 1:-1], 16), "(a i) (b j) -> (a b) (i j)", i=16, j=16)
    fine = rearrange(_whole(fine[0, 0], 16), "(a i) (b j) -> (a b) (i j)", i=16, j=16).square().mean(1).sqrt()
    spread = blocks.std(1)
    quiet = spread.argsort()[: math.ceil(len(spread) / 4)]
    level = fine[quiet].median()
    return level.item() if level > UNCORRELATED * spread[quiet].median() else 0.0


def jpeg_grid(luma: Tensor) -> float:
    """The share of small steps beside even runs (h w) that lie on one grid of 8 pixels: 1/8 without JPEG blocks.

    Strong compression makes whole blocks even, so that what varies begins and ends at the blocks' borders (blockiness,
    as in Wang, Sheikh and Bovik, No-reference perceptual quality assessment of JPEG compressed images, 2002).
    """
    counts = torch.stack([_steps_by_place(luma), _steps_by_place(luma.T)])
    return (counts.amax(1).sum() / counts.sum()).item() if counts.sum() >= STEPS else 0.0


def _steps_by_place(luma: Tensor, run: int = 3) -> Tensor:
    """How many small steps along the rows of h w have an even run beside them, by their place modulo 8."""
    change = (luma[:, 1:] - luma[:, :-1]).abs()
    even = change < 0.75 / 255
    runs = F.avg_pool1d(even.float(), run, 1) == 1
    step = ~even & (change <= FAINT)
    found = step[:, run:-run] & (runs[:, : -run - 1] | runs[:, run + 1 :])
    return F.pad(found.sum(0), (0, -found.shape[1] % 8)).view(-1, 8).sum(0)


def empty_share(picture: Tensor) -> float:
    """The share of a picture's cells (h w 3) in which all has the colour of the page; 0 if its border is of many."""
    border = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    page = border.median(0).values
    if ((border - page).abs().amax(-1) < ALIKE).float().mean() < PAGE_BORDER:
        return 0.0
    farthest = F.adaptive_max_pool2d((picture - page).abs().amax(-1)[None], CELLS)
    return (farthest < ALIKE).float().mean().item()


def _scaled_down(picture: Tensor, scale: float) -> Tensor:
    if scale >= 1:
        return picture
    size = [max(1, round(scale * side)) for side in picture.shape[:2]]
    smaller = F.interpolate(rearrange(picture, "h w c -> 1 c h w"), size, mode="bicubic", antialias=True)
    return rearrange(smaller[0].clamp(0, 1), "c h w -> h w c")


def _middle(picture: Tensor) -> Tensor:
    """Of a large picture the middle, which is enough to find JPEG blocks in."""
    top, left = (max(0, (side - LOOKED_AT) // 2) for side in picture.shape[:2])
    return picture[top : top + LOOKED_AT, left : left + LOOKED_AT]


def _blurred(luma: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = F.pad(luma[None, None], 4 * (reach,), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[0, 0]


def _gradient(luma: Tensor) -> Tensor:
    across, down = luma[1:-1, 2:] - luma[1:-1, :-2], luma[2:, 1:-1] - luma[:-2, 1:-1]
    return torch.hypot(across, down) / 2


def _whole(luma: Tensor, block: int) -> Tensor:
    height, width = (side // block * block for side in luma.shape)
    return luma[:height, :width]
