"""A style image without its shapes, so that a LoRA can learn its colours and strokes alone."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

GRIDS = (2, 4)  # patches along a side, of a shuffled picture
WINDOW = 0.35, 0.7  # the side of a crop, as a part of the picture's


def style_patches(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` pictures (count h w c) made of a square picture (h w c): in turn its patches shuffled, and a crop of it.

    All are mirrored at random. The side must be a multiple of both GRIDS.
    """
    ways = (_shuffled, _cropped)
    pictures = torch.stack([ways[i % len(ways)](image, generator) for i in range(count)])
    flips = torch.rand(count, generator=generator) < 0.5
    return torch.where(flips[:, None, None, None], pictures.flip(2), pictures)


def _shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    n = GRIDS[torch.randint(len(GRIDS), (), generator=generator)]
    patches = rearrange(image, "(a h) (b w) c -> (a b) h w c", a=n, b=n)
    order = torch.randperm(n * n, generator=generator)
    return rearrange(patches[order], "(a b) h w c -> (a h) (b w) c", a=n, b=n)


def _cropped(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width, _ = image.shape
    share, top, left = torch.rand(3, generator=generator).tolist()
    side = round(height * (WINDOW[0] + share * (WINDOW[1] - WINDOW[0])))
    y, x = round(top * (height - side)), round(left * (width - side))
    window = rearrange(image[y : y + side, x : x + side], "h w c -> 1 c h w")
    return rearrange(F.interpolate(window, (height, width), mode="bicubic").clamp(0, 1), "1 c h w -> h w c")
