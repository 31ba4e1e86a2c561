"""What transparent pictures are laid on."""

from PIL import Image, ImageColor

from . import escape_text

Colour = tuple[int, int, int]  # RGB in sRGB
WHITE = (255, 255, 255)
STYLE = "style"  # the background colour of the style image
CELLS = 64  # to a side: in how many of its parts `border_colour` looks at a picture
ALIKE = 16  # values of a channel that it takes for one


def on_background(picture: Image.Image, colour: Colour) -> Image.Image:
    """A picture (RGB or RGBA) on a colour: RGB."""
    if picture.mode == "RGB":
        return picture
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, colour), picture.getchannel("A"))


def read_background(text: str) -> Colour | str:
    """A colour, or STYLE, from what a user writes. Raises ValueError for what is neither."""
    if text.strip().lower() == STYLE:
        return STYLE
    try:
        colour = ImageColor.getrgb(text.strip())
    except ValueError:
        colour = ()
    if len(colour) != 3 or max(colour) > 255:
        raise ValueError(
            f"background is {escape_text(text)!r:.100}, which is no colour. Write a name such as white, a hex value "
            f"such as #f4f1ec, or {STYLE} for the background colour of the style image."
        )
    return colour


def border_colour(picture: Image.Image) -> Colour:
    """The usual colour of the border of a picture (RGB): the mean of those that are most often alike."""
    cells = picture.resize((CELLS, CELLS), Image.Resampling.BOX)
    ends = 0, CELLS - 1
    border = [cells.getpixel((x, y)) for x in range(CELLS) for y in range(CELLS) if x in ends or y in ends]
    groups: dict[Colour, list[Colour]] = {}
    for colour in border:
        groups.setdefault(tuple(value // ALIKE for value in colour), []).append(colour)
    usual = max(groups.values(), key=len)
    return tuple(round(sum(values) / len(usual)) for values in zip(*usual, strict=True))
