"""Damaged picture files of which nothing is missing that one would see; ComfyUI's Load Image opens these too."""

import io
import zlib
from contextlib import suppress

from PIL import Image, ImageChops

BAND = 512  # pixels
MISSING = 0.01  # share of its pixels that a picture without its last bytes may lack
JPEG_START, JPEG_END, JPEG_RESTART = b"\xff\xd8", b"\xff\xd9", b"\xff\xdd"
JPEG_MARKERS = [bytes([0xFF, number]) for number in range(0xD0, 0xD8)]  # of restarts, in turn
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = b"\0\0\0\0IDAT"  # as far as Pillow reads when it opens a file
PNG_ORIENTATION = (b"eXIf", b"iTXtXML:com.adobe.xmp\0", b"zTXtRaw profile type exif\0", b"tEXtRaw profile type exif\0")
PNG_SHOWN = (b"tRNS", b"iCCP", *PNG_ORIENTATION)  # how chunks begin that change what a viewer shows
UNCOMPRESSED_STARTS = (b"BM", b"II*\0", b"MM\0*")  # of BMP and TIFF, which seldom are compressed


def repaired(data: bytes) -> bytes | None:
    """The bytes of a damaged picture file made readable; None for other kinds of files or damage.

    Raises ValueError where a part of the picture is missing.
    """
    if data.startswith(JPEG_START):
        return _completed_jpeg(data)
    if data.startswith(PNG_START):
        return _without_extras(data)
    if data.startswith(UNCOMPRESSED_STARTS):
        return _filled(data)
    return None


def _filled(data: bytes) -> bytes | None:
    """An uncompressed picture with black for the pixels that it may lack; None for a compressed one."""
    with Image.open(io.BytesIO(data), formats=["BMP", "TIFF"]) as picture:
        is_compressed = any(tile[0] != "raw" for tile in picture.tile)
    return None if is_compressed else data + bytes(int(MISSING * len(data)))


def _completed_jpeg(data: bytes) -> bytes:
    """A JPEG with its end.

    The pixels that it lacks are those that other bytes in place of the missing ones change. After a restart marker
    decoders go on with the next pixels, and before it they wait for it, so where a picture has such markers, the next
    one is among the other bytes, and no pixel may be missing.
    """
    data, noise = data.removesuffix(JPEG_END[:1]), bytes([0x55]) * 2**20
    completed, has_markers = data + JPEG_END, JPEG_RESTART in data
    others = noise + _next_marker(data) + noise if has_markers else noise
    one, other = map(_decoded_jpeg, (completed, data + others + JPEG_END))
    if _changed_pixels(one, other) > (0 if has_markers else MISSING * one.width * one.height):
        raise ValueError("a part of the picture is missing")
    return completed


def _next_marker(data: bytes) -> bytes:
    """The restart marker that follows the last one: they take turns."""
    places = [data.rfind(marker) for marker in JPEG_MARKERS]
    return JPEG_MARKERS[(places.index(max(places)) + 1) % len(places) if max(places) > 0 else 0]


def _decoded_jpeg(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        picture.load()
    return picture


def _changed_pixels(one: Image.Image, other: Image.Image) -> int:
    """How many pixels differ. Counted in bands, because large pictures take much memory."""
    count = 0
    for top in range(0, one.height, BAND):
        band = (0, top, one.width, min(top + BAND, one.height))
        change = ImageChops.difference(*(picture.crop(band).convert("RGB") for picture in (one, other)))
        count += sum(change.convert("L").histogram()[1:])
    return count


def _without_extras(data: bytes) -> bytes:
    """A PNG without the chunks that do not show, of which one may be damaged, or a text longer than Pillow takes.

    Those that show stay if they can be read, also with a wrong checksum: Load Image reads them too.
    """
    kept, start = [PNG_START], len(PNG_START)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunk, content = data[start:end], data[start + 4 : end - 4]
        if content[:1].isupper():  # critical, as the pixels are
            kept.append(chunk)
        elif content.startswith(PNG_SHOWN):
            chunk = chunk[:4] + content + zlib.crc32(content).to_bytes(4, "big")
            alone = io.BytesIO(b"".join([*kept[:2], chunk, PNG_PIXELS]))
            with suppress(Exception), Image.open(alone, formats=["PNG"]):
                kept.append(chunk)
        start = end
    return b"".join(kept)
