"""Gives a result the colours of its content image, or a content image the palette of its style image.

Colours are compared in OKLab (B. Ottosson, 2020, https://bottosson.github.io/posts/oklab): lightness L, and hue and
chroma as a and b.
"""

from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import COARSE, silhouette
from .recolour import whiteness

TO_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
WIDE, NARROW = 12, 2  # radius of the windows in which colours and the silhouette follow the picture, at COARSE pixels
SMOOTH, SHARP = 1e-2, 1e-3  # variance of colour in a window that counts as an edge, for the same
HALVINGS = 12  # of the interval in which the largest chroma lies
MARGIN = 1e-4  # by which a colour may be out of gamut: rounding
CONTRAST = 4.0  # the largest factor of contrast: a flat picture's has nothing but noise in it


def keep_colours(pictures: Tensor, content: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
    """Pictures (b h w 3, 0 to 1) in the colours of their content image (1 or b, any size, 3).

    With r and c a picture and its content image in OKLab, m the mask, and G the guided filter, which smooths within
    the picture's own outlines,

        (a, b)' = (a, b)_r + strength m G((a, b)_c - (a, b)_r)

    Only what a window differs by on average moves; the style's own variation of colour within it stays. White and black
    have no chroma, so that they stay white and black, as does line art. Chroma beyond sRGB is lowered at the same hue
    and lightness.

    strength: 0 to 1; 0 returns the pictures as they are. mask: 1 or b, any size, 0 to 1; without one the content
    image's silhouette. Pixels at 0 stay bit-identical. Raises ValueError for batches that do not go together.
    """
    if strength == 0:
        return pictures
    _check_batches(pictures, content_image=content, mask=mask)
    rows = [
        (picture[None], content[[i % len(content)]], None if mask is None else mask[[i % len(mask)]])
        for i, picture in enumerate(pictures)
    ]
    return torch.cat([_keep_colours_of_one(*row, strength) for row in rows])


def _check_batches(pictures: Tensor, **batches: Tensor | None) -> None:
    for name, batch in batches.items():
        if batch is not None and len(batch) not in (1, len(pictures)):
            raise ValueError(f"{name} has a batch of {len(batch)}; give 1, or one for each of {len(pictures)} images.")


def _keep_colours_of_one(picture: Tensor, content: Tensor, mask: Tensor | None, strength: float) -> Tensor:
    x, theirs = map(_channels_first, (picture, content))
    small = _coarse(x)
    theirs = F.interpolate(theirs, small.shape[-2:], mode="area")
    lab, guide = to_oklab(x), to_oklab(small)
    missing = guided_filter(lab, guide, (to_oklab(theirs) - guide)[:, 1:], WIDE, SMOOTH)
    if mask is None:
        weight = _inside(silhouette(theirs), lab, guide)
    else:
        weight = F.interpolate(mask[:, None].float(), x.shape[-2:], mode="bilinear", antialias=True)
    moved = to_srgb(torch.cat([lab[:, :1], lab[:, 1:] + strength * weight * missing], 1))
    return torch.where(weight.movedim(1, -1) > 0, moved.movedim(1, -1).to(picture.dtype), picture)


def match_palette(pictures: Tensor, style: Tensor, strength: float = 1.0, together: bool = False) -> Tensor:
    """Pictures (b h w 3, 0 to 1) in the palette of a style image (1 or b, any size, 3). Shapes stay where they are.

    With c and s the two in OKLab, and means and standard deviations over what is not white in their silhouettes
    (E. Reinhard et al., Color Transfer between Images, 2001),

        c' = c + strength ((c - mean c) std s / std c + mean s - c)

    inside a picture's silhouette, with std s / std c at most CONTRAST; white and the background stay. Without an even
    background all of a picture counts.

    strength: 0 to 1; 0 returns the pictures as they are. together: means and standard deviations of the whole batch, so
    that a colour becomes the same one in every frame of a film. Raises ValueError for batches that do not go together.
    """
    if strength == 0:
        return pictures
    _check_batches(pictures, style_image=style)
    own, wanted = (map(_palette, [batch] if together else batch.split(1)) for batch in (pictures, style))
    rows = zip(pictures.split(1), cycle(own), cycle(wanted), strict=False)
    return torch.cat([_match_palette_of_one(*row, strength) for row in rows])


Palette = tuple[Tensor, Tensor]  # mean and standard deviation in OKLab, 1 3 1 1


def _match_palette_of_one(picture: Tensor, own: Palette, wanted: Palette, strength: float) -> Tensor:
    (mean, std), (wanted_mean, wanted_std) = own, wanted
    x = _channels_first(picture)
    small = _coarse(x)
    lab, guide = to_oklab(x), to_oklab(small)
    moved = (lab - mean) * (wanted_std / std).clamp(max=CONTRAST) + wanted_mean
    weight = strength * _inside(silhouette(small), lab, guide) * (1 - whiteness(x))
    matched = to_srgb(torch.lerp(lab, moved, weight)).movedim(1, -1).to(picture.dtype)
    return torch.where(weight.movedim(1, -1) > 0, matched, picture)


def _palette(pictures: Tensor) -> Palette:
    """Of what is not white in the silhouettes of all pictures (b h w 3)."""
    small = torch.cat([_coarse(_channels_first(picture)) for picture in pictures.split(1)])
    weight = F.interpolate(silhouette(small).float(), small.shape[-2:], mode="nearest") * (1 - whiteness(small)) + 1e-6
    lab, weight = to_oklab(small), weight / weight.sum()
    mean = (weight * lab).sum((0, 2, 3), keepdim=True)
    return mean, (weight * (lab - mean) ** 2).sum((0, 2, 3), keepdim=True).sqrt() + 1e-6


def _channels_first(picture: Tensor) -> Tensor:
    """A picture (1 h w 3) as 1 3 h w, fp32, from 0 to 1."""
    return picture.movedim(-1, 1).float().clamp(0, 1)


def _coarse(x: Tensor) -> Tensor:
    """A picture (1 3 h w), its shorter side scaled down to about COARSE."""
    size = [max(1, side // max(1, min(x.shape[-2:]) // COARSE)) for side in x.shape[-2:]]
    return F.interpolate(x, size, mode="area")


def _inside(silhouette: Tensor, lab: Tensor, guide: Tensor) -> Tensor:
    """A coarse silhouette (b 1 h w) as weights (b 1 H W) from 0 to 1, which follow the picture's edges.

    lab, guide: the picture in OKLab, in full size (b 3 H W) and coarse.
    """
    inside = F.interpolate(silhouette.float(), guide.shape[-2:], mode="nearest")
    return (1.2 * guided_filter(lab, guide, inside, NARROW, SHARP) - 0.1).clamp(0, 1)


def guided_filter(guide: Tensor, small_guide: Tensor, small: Tensor, radius: int, eps: float) -> Tensor:
    """A small image (b n h w) in the size of its guide (b c H W), smooth except where the guide has edges.

    In each window of small_guide (b c h w), the image is fitted as a linear function of the guide, whose mean over the
    windows is applied to the guide (K. He and J. Sun, Fast guided filter, arXiv 1505.00996). eps: a variance.
    """
    c = guide.shape[1]
    mean, mean_guide = _box(small, radius), _box(small_guide, radius)
    var, cov = (
        _box(torch.einsum("bihw,bjhw->bijhw", small_guide, other).flatten(1, 2), radius).unflatten(1, (c, -1))
        - torch.einsum("bihw,bjhw->bijhw", mean_guide, mean_other)
        for other, mean_other in ((small_guide, mean_guide), (small, mean))
    )
    slope = torch.linalg.solve(
        var.movedim((1, 2), (-2, -1)) + eps * torch.eye(c, device=var.device), cov.movedim((1, 2), (-2, -1))
    ).movedim((-2, -1), (1, 2))
    offset = mean - torch.einsum("bijhw,bihw->bjhw", slope, mean_guide)
    slope, offset = (
        F.interpolate(_box(part, radius), guide.shape[-2:], mode="bilinear") for part in (slope.flatten(1, 2), offset)
    )
    return torch.einsum("bijhw,bihw->bjhw", slope.unflatten(1, (c, -1)), guide) + offset


def _box(x: Tensor, radius: int) -> Tensor:
    """The mean over a square window; beyond the border the picture goes on with its last pixels."""
    x = F.pad(x, (radius,) * 4, "replicate")
    return F.avg_pool2d(F.avg_pool2d(x, (2 * radius + 1, 1), 1), (1, 2 * radius + 1), 1)


def to_oklab(x: Tensor) -> Tensor:
    """sRGB (b 3 h w, 0 to 1) as OKLab: L from 0 to 1, a and b around 0."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return _mapped(TO_LAB, _mapped(TO_CONES, linear) ** (1 / 3))


def to_srgb(lab: Tensor) -> Tensor:
    """OKLab (b 3 h w) as sRGB, 0 to 1. A colour out of gamut gets the largest chroma of its hue and lightness."""
    light, chroma = lab[:, :1], lab[:, 1:]
    scale, step = torch.ones_like(light), 1.0
    is_out = _is_out_of_gamut(_to_linear(light, chroma))
    for _ in range(HALVINGS if is_out.any() else 0):
        step /= 2
        too_much = _is_out_of_gamut(_to_linear(light, scale * chroma))
        scale = torch.where(is_out, torch.where(too_much, scale - step, scale + step), scale)
    linear = _to_linear(light, scale * chroma).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).clamp(0, 1)


def _is_out_of_gamut(linear: Tensor) -> Tensor:
    return ((linear < -MARGIN) | (linear > 1 + MARGIN)).any(1, keepdim=True)


def _to_linear(light: Tensor, chroma: Tensor) -> Tensor:
    return _mapped(TO_CONES.inverse(), _mapped(TO_LAB.inverse(), torch.cat([light, chroma], 1)) ** 3)


def _mapped(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", matrix.to(x), x)
