"""Paints cut-out drawings in styles drawn by lot: fills, outlines, textures, shading, pages, each named in words.

The demo model learns these styles beside the emoji sets' own. Their words alone decide them, and each fits every shape,
so that style and content are independent.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

COLOURS = {
    "red": (214, 40, 48),
    "crimson": (150, 20, 45),
    "orange": (240, 130, 30),
    "gold": (205, 155, 40),
    "yellow": (250, 215, 60),
    "lime": (160, 205, 60),
    "green": (50, 150, 70),
    "olive": (110, 115, 50),
    "teal": (20, 140, 140),
    "cyan": (80, 200, 225),
    "blue": (45, 95, 205),
    "navy": (25, 40, 95),
    "violet": (125, 60, 170),
    "pink": (240, 130, 175),
    "brown": (130, 85, 50),
    "beige": (225, 200, 165),
    "grey": (140, 145, 152),
    "white": (248, 248, 248),
    "black": (22, 22, 26),
}
DARK = ("black", "navy", "brown", "crimson", "violet", "green", "blue", "red")
FILLS = {"own": 16, "shades": 22, "flat": 16, "fade": 12, "palette": 16, "two tones": 8, "empty": 10}
TEXTURES = {"": 66, "halftone": 8, "hatched": 8, "striped": 6, "grainy": 6, "mosaic": 3, "oil paint": 5}
SHADINGS = {"": 58, "soft 3d": 16, "glossy": 8, "shadow": 8, "glow": 5, "sticker": 5}
OUTLINES = {"": 45, "thin": 22, "bold": 22, "thick": 11}
WIDTHS = {"thin": 1, "bold": 5, "thick": 9}  # of the brush, in pixels of 256


class Style(NamedTuple):
    """words: what prompts call it. fill: "as drawn" leaves an emoji set's drawing as it is. Colours: RGB, 0 to 1."""

    words: str
    fill: str
    colours: tuple = ((0, 0, 0),) * 3
    outline: str = ""
    ink: tuple = (0, 0, 0)
    texture: str = ""
    shading: str = ""
    page: tuple = (1, 1, 1)


def draw_style(rng: random.Random, kind: str) -> Style:
    """A style that suits a drawing of this kind ("emoji", "filled", "lines")."""

    def pick(shares: dict) -> str:
        return rng.choices(list(shares), list(shares.values()))[0]

    names = rng.sample(list(COLOURS), 3)
    colours = tuple(_near(name, rng) for name in names)
    fill = pick(FILLS)
    if kind != "emoji" and fill in ("own", "empty", "two tones"):
        fill = "flat"
    if kind == "lines" and fill == "palette":
        fill = "shades"
    outline = "" if kind == "lines" else pick(OUTLINES)
    if fill == "empty" and not outline:
        outline = "thin"
    ink = rng.choice(["black"] * 5 + ["white"] + list(DARK))
    texture = "" if fill == "empty" else pick(TEXTURES)
    shading = pick(SHADINGS) if kind != "lines" else rng.choice(["", "", "", "shadow", "glow"])
    words = {
        "own": "own colours",
        "shades": f"{names[0]} shades",
        "flat": f"flat {names[0]}",
        "fade": f"{names[0]} to {names[1]}",
        "palette": f"{names[0]} {names[1]} {names[2]} palette",
        "two tones": f"{names[0]} and {names[1]} tones",
        "empty": "line art",
    }[fill]
    page, page_words = _page(rng, colours, names, shading)
    if names[0] == "white" and not page_words and not outline:
        page, page_words = _near("black", rng), "on black"
    parts = [words, "lines" * (kind == "lines"), outline and f"{outline} {ink} outline", texture, shading, page_words]
    style = " ".join(part for part in parts if part)
    return Style(style, fill, colours, outline, _near(ink, rng), texture, shading, page)


def _near(name: str, rng: random.Random) -> tuple:
    return tuple(min(max((value + rng.gauss(0, 9)) / 255, 0), 1) for value in COLOURS[name])


def _page(rng: random.Random, colours: tuple, names: list[str], shading: str) -> tuple[tuple, str]:
    if shading == "glow":
        name = rng.choice(["black", "navy"])
        return _near(name, rng), f"on {name}"
    way = rng.random()
    if way < 0.62:
        return (1.0, 1.0, 1.0), ""
    if way < 0.8:
        return tuple(0.28 * value + 0.72 for value in colours[2]), f"on pale {names[2]}"
    if way < 0.92:
        return colours[2], f"on {names[2]}"
    return _near("black", rng), "on black"


# ---- painting: all pictures b c h w, 0 to 1; `side` is their height


def paint(rgba: Tensor, tones: Tensor, styles: list[Style]) -> Tensor:
    """Pictures b 3 h w. rgba: b 4 h w, colours not premultiplied; tones: b 3, dark, middle and light of the drawing."""
    side, cover = rgba.shape[-1], rgba[:, 3:]
    own = rgba[:, :3] * cover + 1 - cover
    grey = (own * own.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    dark, middle, light = tones.view(-1, 3, 1, 1, 1).unbind(1)
    tone = (0.4 + 0.8 * (grey - middle) / (light - dark).clamp(min=0.35)).clamp(0, 0.8)
    edges = _edges(torch.cat([own, cover], 1))
    colours = own.new_tensor([style.colours for style in styles])[..., None, None]  # b 3 rgb 1 1
    page = own.new_tensor([style.page for style in styles])[..., None, None].expand_as(own)
    ink = own.new_tensor([style.ink for style in styles])[..., None, None]

    def rows(name: str, value: str) -> list[int]:
        return [i for i, style in enumerate(styles) if getattr(style, name) == value]

    fill = rgba[:, :3].clone()
    for name in {style.fill for style in styles} - {"as drawn", "own"}:
        r = rows("fill", name)
        fill[r] = _fill(name, tone[r], grey[r], cover[r], edges[r], colours[r], page[r])
    for name in {style.texture for style in styles} & {"halftone", "hatched", "striped", "grainy"}:
        r = rows("texture", name)
        fill[r] = _texture(name, fill[r], tone[r])
    for name in {style.shading for style in styles} & {"soft 3d", "glossy"}:
        r = rows("shading", name)
        fill[r] = _light(name, fill[r], cover[r])
    page = page.clone()
    for name in {style.shading for style in styles} & {"shadow", "glow", "sticker"}:
        r = rows("shading", name)
        page[r] = _behind(name, page[r], cover[r], colours[r, 0])
    picture = page * (1 - cover) + fill * cover
    for name, brush in WIDTHS.items():
        if r := rows("outline", name):
            lines = _wider(edges[r], brush * side // 256)
            picture[r] = picture[r].lerp(ink[r].expand_as(picture[r]), lines)
    if r := rows("texture", "mosaic"):
        tile = max(side // 20, 1)
        tiles = F.avg_pool2d(picture[r], tile, tile, ceil_mode=True, count_include_pad=False)
        picture[r] = F.interpolate(tiles, scale_factor=tile)[..., :side, :side]
    if r := rows("texture", "oil paint"):
        picture[r] = _kuwahara(picture[r], side // 64)
    return picture.clamp(0, 1)


def moved(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Each drawing a little turned, stretched and shifted: more shapes than the sets hold."""
    b = len(rgba)
    u = 2 * torch.rand(6, b, generator=generator) - 1
    angle, stretch, scale = 0.2 * u[0], (0.15 * u[1]).exp(), (0.14 + 0.1 * u[2]).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos * stretch, -sin / stretch, 0.06 * u[3], sin * stretch, cos / stretch, 0.06 * u[4]], 1)
    grid = F.affine_grid(rows.view(b, 2, 3).to(rgba), list(rgba.shape), align_corners=False)
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    colour, cover = F.grid_sample(premultiplied, grid, align_corners=False).split([3, 1], 1)
    return torch.cat([(colour / cover.clamp(min=1e-3)).clamp(0, 1), cover], 1)


def _edges(x: Tensor) -> Tensor:
    """How strong edges are, in colour or in cover (b 1 h w)."""
    side = x.shape[-1]
    x = F.pad(_blurred(x, side // 128), (1, 1, 1, 1), "replicate")
    across, down = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return (side / 48 * (across**2 + down**2).amax(1, keepdim=True).sqrt() - 0.1).clamp(0, 1)


def _blurred(x: Tensor, radius: int) -> Tensor:
    """Two box filters: nearly a Gaussian."""
    if radius < 1:
        return x
    for _ in range(2):
        x = F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)
    return x


def _wider(edges: Tensor, brush: int) -> Tensor:
    brush |= 1
    return F.max_pool2d(edges, brush, 1, brush // 2) if brush > 1 else edges


def _narrower(cover: Tensor, brush: int) -> Tensor:
    return -_wider(-cover, brush)


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """y and x of each pixel, in units of a 256th of the picture."""
    places = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) * (256 / x.shape[-1])
    return places.view(-1, 1), places.view(1, -1)


def _ramp(tone: Tensor, colour: Tensor) -> Tensor:
    """tone 0: a third of the colour; 0.4: the colour; 0.8: half way to white."""
    below, above = (tone / 0.4).clamp(max=1), (tone / 0.4 - 1).clamp(min=0)
    return colour * (0.35 + 0.65 * below) * (1 - 0.5 * above) + 0.5 * above


def _fill(name: str, tone: Tensor, grey: Tensor, cover: Tensor, edges: Tensor, colours: Tensor, page: Tensor) -> Tensor:
    first, second, third = colours.unbind(1)
    if name == "shades":
        return _ramp(tone, first)
    if name == "fade":
        down = _grid(tone)[0] / 256
        return _ramp(tone, first * (1 - down) + second * down)
    if name == "flat":  # cut from paper: inner edges stay open
        inner = edges * (_narrower(cover, cover.shape[-1] // 32) > 0.9)
        return first * (1 - inner) + page * inner
    if name == "palette":
        low, high = (((tone - limit) * 20).sigmoid() for limit in (0.3, 0.5))
        return (first * (1 - low) + second * low) * (1 - high) + third * high
    if name == "two tones":
        return first * (1 - grey) + second * grey
    return page  # "empty"


def _texture(name: str, fill: Tensor, tone: Tensor) -> Tensor:
    y, x = _grid(fill)
    if name == "halftone":
        dots = 0.5 + 0.25 * (torch.cos(math.pi * (x + y) / 8) + torch.cos(math.pi * (x - y) / 8))
        return fill.lerp(torch.ones_like(fill), (0.85 * (8 * (0.3 + tone * 0.9 - dots)).sigmoid()))
    if name == "hatched":
        strokes = ((torch.sin(math.pi * (x + y) / 6) - 0.2) * 3).clamp(0, 1) * (tone < 0.62)
        crossed = ((torch.sin(math.pi * (x - y) / 6) - 0.2) * 3).clamp(0, 1) * (tone < 0.36)
        return fill * (1 - 0.6 * torch.maximum(strokes, crossed))
    if name == "striped":
        return fill.lerp(torch.ones_like(fill), 0.45 * (torch.sin(math.pi * y / 8) * 4).clamp(0, 1))
    noise = torch.rand(fill[:, :1].shape, device=fill.device)
    return fill * (0.72 + 0.5 * _blurred(noise, 1))  # "grainy"


def _light(name: str, fill: Tensor, cover: Tensor) -> Tensor:
    side = cover.shape[-1]
    if name == "soft 3d":  # lit from the upper left: a cushion under the cut-out
        high = sum(_blurred(cover, side // part) for part in (64, 24, 12)) / 3
        high = F.pad(high, (1, 1, 1, 1), "replicate")
        slope = (high[..., 1:-1, 2:] - high[..., 1:-1, :-2]) + (high[..., 2:, 1:-1] - high[..., :-2, 1:-1])
        lit = (slope * side / 12).clamp(-1, 1)
        return (fill * (1 + 0.45 * lit.clamp(max=0)) + (1 - fill) * 0.5 * lit.clamp(min=0)).clamp(0, 1)
    y = _grid(cover)[0] / 256  # "glossy"
    inside = ((_blurred(cover, side // 20) - 0.75) * 8).clamp(0, 1)
    return fill.lerp(torch.ones_like(fill), 0.55 * inside * ((0.48 - y) * 6).clamp(0, 1))


def _behind(name: str, page: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    side = cover.shape[-1]
    if name == "glow":
        halo = (2.5 * _blurred(cover, side // 16)).clamp(0, 1)
        return page * (1 - halo) + (0.6 * colour + 0.4) * halo
    if name == "sticker":
        rim = _wider(cover, side // 18)
        shade = 0.3 * _blurred(torch.roll(rim, side // 64, -2), side // 64)
        return (page * (1 - shade)).lerp(torch.ones_like(page), rim)
    shade = 0.4 * _blurred(torch.roll(cover, (side // 28, side // 28), (-2, -1)), side // 40)
    return page * (1 - shade)


def _kuwahara(x: Tensor, radius: int) -> Tensor:
    """Oil paint: each pixel takes the mean of its calmest quadrant (Kuwahara et al. 1976)."""
    radius = max(radius, 1)
    size = 2 * radius + 1
    mean, square = (F.avg_pool2d(F.pad(y, [2 * radius] * 4, "replicate"), size, 1) for y in (x, x**2))
    spread = (square - mean**2).sum(1, keepdim=True)
    ends = (slice(0, -2 * radius), slice(2 * radius, None))
    quadrants = [(..., vertical, across) for vertical in ends for across in ends]
    calmest = torch.stack([spread[part] for part in quadrants]).argmin(0)  # b 1 h w
    means = torch.stack([mean[part] for part in quadrants])
    return means.gather(0, rearrange(calmest, "b c h w -> 1 b c h w").expand(-1, -1, 3, -1, -1))[0]
