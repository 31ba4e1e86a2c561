"""Puts labelled pictures on one page."""

from pathlib import Path

from PIL import Image, ImageDraw

CELL, LABEL, GAP = 256, 30, 12

Cell = tuple[str, Path]  # label, picture


def sheet(rows: list[list[Cell]]) -> Image.Image:
    """The pictures in lines, all scaled to one size, each below its label."""
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, len(rows) * (CELL + LABEL + GAP) + GAP), "white")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            _draw(page, cell, x=GAP + j * (CELL + GAP), y=GAP + i * (CELL + LABEL + GAP))
    return page


def _draw(page: Image.Image, cell: Cell, x: int, y: int) -> None:
    label, path = cell
    ImageDraw.Draw(page).text((x, y), label, "black", font_size=18)
    with Image.open(path) as picture:
        page.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y + LABEL))
