"""Draws what nodes show: pictures with their scores, and pictures in a grid with labelled axes."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, FAINT, PAPER, BAR = "#1d1d1f", "#d9d9de", "white", "#3f789e"
CARD, GAP, LINE = 256, 16, 28  # pixels: a picture on a card, the space between, a line of text
LINES = 4  # of text, as wide as an axis of a grid is


def to_picture(image: Tensor) -> Image.Image:
    """A Pillow image from one of ComfyUI's IMAGE batch (h w 3, h w 4 with alpha, or h w 1 for grey; 0 to 1)."""
    colours = image.expand(-1, -1, 3) if image.shape[-1] == 1 else image
    return Image.fromarray((colours.float().clamp(0, 1) * 255).round().byte().cpu().numpy())


def to_image(picture: Image.Image) -> Tensor:
    """ComfyUI's IMAGE (1 h w 3, fp32, 0 to 1) from a Pillow image."""
    return torch.from_numpy(np.array(picture.convert("RGB")))[None].float().div_(255)


def to_mask(alpha: Image.Image) -> Tensor:
    """ComfyUI's MASK (1 h w, fp32) from a picture's alpha: 1 where it is opaque."""
    return torch.from_numpy(np.array(alpha))[None].float().div_(255)


def mapped(tensor: Tensor, folder: Path) -> Tensor:
    """A copy in a temporary file in the folder, of which only those parts take memory that are being used.

    tensor: fp32, on the CPU. Raises OSError with the folder's name where the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(tensor.contiguous().numpy())
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float32, "c", shape=tuple(tensor.shape)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def stack_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """ComfyUI's IMAGE (b h w 3, 0 to 1) from pictures of one size."""
    return torch.cat([to_image(picture) for picture in pictures])


def draw_card(pictures: Mapping[str, Image.Image], scores: Mapping[str, float]) -> Image.Image:
    """The pictures side by side, each with its caption below, and a bar from 0 to 1 for every score."""
    width = len(pictures) * (CARD + GAP) + GAP
    page = Image.new("RGB", (width, CARD + 3 * GAP + LINE * (1 + len(scores))), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    for i, (caption, picture) in enumerate(pictures.items()):
        left = GAP + i * (CARD + GAP)
        fitted = _fit_square(picture, CARD)
        page.paste(fitted, (left + (CARD - fitted.width) // 2, GAP + (CARD - fitted.height) // 2))
        draw.text((left, GAP + CARD + LINE // 2), caption, INK, font, anchor="lm")
    bar_left, bar_right = GAP + 130, width - GAP - 70
    for i, (name, score) in enumerate(scores.items()):
        y = 2 * GAP + CARD + LINE * (i + 1) + LINE // 2
        filled = bar_left + round((bar_right - bar_left) * min(max(score, 0), 1))
        draw.rectangle((bar_left, y - 6, bar_right, y + 6), FAINT)
        draw.rectangle((bar_left, y - 6, filled, y + 6), BAR)
        draw.text((GAP, y), name, INK, font, anchor="lm")
        draw.text((width - GAP, y), f"{score:.2f}", INK, font, anchor="rm")
    return page


def grid_page_size(columns: int, rows: int, cell: int, picture: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the page that `draw_grid` draws, in pixels. picture: height and width of each picture."""
    return _margin(cell) + columns * cell, rows * _cell_height(cell, picture) + _margin(cell)


def _cell_height(cell: int, picture: tuple[int, int]) -> int:
    height, width = picture
    return max(1, round(cell * height / width))


def _margin(cell: int) -> int:
    """Of an axis: a line of values, one for its name, and the space around them."""
    return LINES * max(14, cell // 14)


def draw_grid(images: Tensor, quantity: str, content: Sequence[float], style: Sequence[float], cell: int) -> Tensor:
    """Pictures (b h w 3, row by row from the top left) as one (1 h w 3), with labelled axes: content right, style up.

    quantity: what the values on the axes are, such as "strength". cell: width of a picture, in pixels.
    """
    height, margin = _cell_height(cell, images.shape[1:3]), _margin(cell)
    font = ImageFont.load_default(margin // LINES)
    page = Image.new("RGB", grid_page_size(len(content), len(style), cell, images.shape[1:3]), PAPER)
    for i, image in enumerate(images):
        row, column = divmod(i, len(content))
        picture = to_picture(image).resize((cell, height), Image.Resampling.LANCZOS)
        page.paste(picture, (margin + column * cell, row * height))
    _draw_axis(page, f"content {quantity}", content, (margin, page.height - margin), cell, font)
    # The upward axis is drawn horizontally and turned.
    upward = Image.new("RGB", (len(style) * height, margin), PAPER)
    _draw_axis(upward, f"style {quantity}", style, (0, 0), height, font, name_first=True)
    page.paste(upward.transpose(Image.Transpose.ROTATE_90), (0, 0))
    return to_image(page)


def _draw_axis(
    page: Image.Image, name: str, values: Sequence[float], corner: tuple[int, int], cell: int, font, name_first=False
) -> None:
    """Draws a horizontal axis from its top left `corner`: values centred in their cells, the name below or above."""
    draw, (left, top) = ImageDraw.Draw(page), corner
    lines = [top + font.size, top + 3 * font.size]
    name_at, values_at = lines if name_first else reversed(lines)
    draw.text((left + len(values) * cell // 2, name_at), name, INK, font, anchor="mm")
    for i, value in enumerate(values):
        draw.text((left + i * cell + cell // 2, values_at), f"{value:.2f}", INK, font, anchor="mm")


def _fit_square(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture, scaled to fit a square."""
    scale = side / max(picture.size)
    size = [max(1, round(scale * length)) for length in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)
