"""Picture files in the formats that studios ask for, with sRGB's profile, and with what tells how they were made."""

import functools
import logging
import struct
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, TiffTags
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from .xmp import Credits, xmp_packet

MAKE, MODEL, XMP, PROFILE = 0x010F, 0x0110, 700, 34675  # tags of EXIF and TIFF
# The texts that the frontend reads from EXIF, where core's nodes put them.
IN_EXIF = {MODEL: "prompt", MAKE: "workflow"}
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
SEGMENT = 65533  # bytes that a segment of a JPEG holds
FAINT = 1 / 255  # an alpha below which colours do not count


class Metadata(NamedTuple):
    """What a picture file tells beside its pixels. texts: PNG's text chunks, by name. credits: None for no XMP."""

    texts: Mapping[str, str]
    credits: Credits | None

    @property
    def xmp(self) -> bytes:
        return xmp_packet(self.credits) if self.credits else b""

    @property
    def exif(self) -> Image.Exif:
        exif = Image.Exif()
        for tag, name in IN_EXIF.items():
            if name in self.texts:
                exif[tag] = f"{name}:{self.texts[name]}"
        return exif


NOTHING = Metadata({}, None)


def text_chunks(metadata: Metadata) -> PngInfo:
    """Texts and XMP, for Pillow to write into a PNG."""
    info = PngInfo()
    for name, text in metadata.texts.items():
        info.add_text(name, text)
    if metadata.xmp:
        info.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
    return info


def _in_png(metadata: Metadata) -> dict[str, Any]:
    return {"pnginfo": text_chunks(metadata)}


def _in_webp(metadata: Metadata) -> dict[str, Any]:
    return {"exif": metadata.exif.tobytes() if metadata.texts else b"", "xmp": metadata.xmp}


def _in_tiff(metadata: Metadata) -> dict[str, Any]:
    exif = metadata.exif
    if metadata.xmp:
        exif[XMP] = metadata.xmp
    return {"exif": exif}


def _in_jpeg(metadata: Metadata) -> dict[str, Any]:
    """What fits into segments of 64 KB: the workflow is left out first, then the prompt, then the record in XMP."""
    texts, credits, left_out = dict(metadata.texts), metadata.credits, []
    while len(exif := Metadata(texts, None).exif.tobytes()) > SEGMENT:
        left_out.append("workflow" if "workflow" in texts else "prompt")
        del texts[left_out[-1]]
    if credits and len(JPEG_XMP + metadata.xmp) > SEGMENT:
        left_out.append("record of the LoRAs")
        credits = credits._replace(record="")
    if left_out:
        logging.warning("ConsisLoRA: too long for a JPEG, and left out of it: %s.", ", ".join(left_out))
    xmp = JPEG_XMP + Metadata({}, credits).xmp
    marker = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp if credits else b""
    return {"exif": exif if texts else b"", "extra": marker}  # Pillow takes `xmp` only in new versions


class Kind(NamedTuple):
    """A kind of file. longest: pixels of a side. settings, metadata: for Pillow. encode: 16 bits, where it has them."""

    suffix: str
    longest: int
    has_alpha: bool
    settings: dict[str, Any]
    metadata: Callable[[Metadata], dict[str, Any]]
    encode: Callable[[np.ndarray, Metadata], bytes] | None = None


def encode_picture(image: Tensor, format: str, bits: int, metadata: Metadata) -> bytes:
    """The file of one of ComfyUI's IMAGE batch (h w 1, 3, or 4 with alpha; 0 to 1), in sRGB.

    A kind without alpha gets the picture on white; one without 16 bits has 8. Raises ValueError for a picture that is
    too large for the kind.
    """
    kind, (height, width) = KINDS[format], image.shape[:2]
    if max(height, width) > kind.longest:
        raise ValueError(
            f"The picture is {width} x {height} pixels, and {format} takes {kind.longest} at most. Choose PNG or TIFF "
            "as format; what was sampled is still cached."
        )
    image = image.float().cpu()
    image = image.expand(-1, -1, 3) if image.shape[-1] == 1 else image
    if image.shape[-1] == 4 and not kind.has_alpha:
        image = torch.lerp(torch.ones(3), image[..., :3], image[..., 3:])
    if bits == 16 and kind.encode:
        return kind.encode(_whole_numbers(image, np.uint16), metadata)
    file, picture = BytesIO(), Image.fromarray(_whole_numbers(image, np.uint8))
    picture.save(file, format, icc_profile=srgb_profile(), **kind.settings, **kind.metadata(metadata))
    return file.getvalue()


def _whole_numbers(image: Tensor, dtype: type) -> np.ndarray:
    return (image.clamp(0, 1) * np.iinfo(dtype).max).round().numpy().astype(dtype)


@functools.cache
def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (h w c) in another size (width, height), by Lanczos in floating point.

    Colours count by their alpha, so that those of transparent parts do not show at an edge.
    """
    if image.shape[1::-1] == size:
        return image
    image = image.float().cpu()
    colours, alpha = image[..., :3], image[..., 3:]
    if not alpha.numel():
        return _scaled(image, size)
    weight = _scaled(alpha, size)
    weighted = _scaled(colours * alpha, size) / weight.clamp(min=FAINT)
    return torch.cat([torch.where(weight > FAINT, weighted, _scaled(colours, size)), weight], -1)


def _scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    channels = [Image.fromarray(channel.numpy()).resize(size, Image.Resampling.LANCZOS) for channel in image.unbind(-1)]
    return torch.from_numpy(np.stack(channels, -1)).clamp(0, 1)


# Pillow has no 16 bits with colour.


def _png_of_16_bits(values: np.ndarray, metadata: Metadata) -> bytes:
    """values: h w 3, or h w 4 with alpha."""
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    differences = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    lines = np.insert(differences, 0, 2, axis=1)  # each row begins with its filter: 2, less the row above
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile()))]
    chunks += [chunk[:2] for chunk in text_chunks(metadata).chunks]
    chunks += [(b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _tiff_of_16_bits(values: np.ndarray, metadata: Metadata) -> bytes:
    """values: h w 3, or h w 4 with alpha."""
    height, width, channels = values.shape
    differences = np.diff(values, axis=1, prepend=np.zeros_like(values[:, :1]))
    data = zlib.compress(differences.astype("<u2").tobytes())
    directory = ImageFileDirectory_v2(prefix=b"II")
    tags = {
        256: width,
        257: height,
        258: (16,) * channels,  # bits
        259: 8,  # deflate
        262: 2,  # RGB
        273: 0,  # the data begin at the end of the directory: Pillow adds where that is
        277: channels,
        278: height,  # rows in one piece
        279: len(data),
        317: 2,  # differences to the pixel at the left
        PROFILE: srgb_profile(),
        **({338: 2} if channels == 4 else {}),  # alpha, by which colours are not multiplied
        **_in_tiff(metadata)["exif"],
    }
    directory.tagtype[273] = TiffTags.LONG
    for tag, value in tags.items():
        directory[tag] = value
    return b"II*\0" + struct.pack("<I", 8) + directory.tobytes(8) + data


KINDS = {
    "PNG": Kind(".png", 2**31 - 1, True, {"compress_level": 4}, _in_png, _png_of_16_bits),
    "WebP": Kind(".webp", 16383, True, {"quality": 95, "exact": True}, _in_webp),
    "JPEG": Kind(".jpg", 65500, False, {"quality": 95, "subsampling": "4:4:4"}, _in_jpeg),
    "TIFF": Kind(".tif", 2**31 - 1, True, {"compression": "tiff_adobe_deflate"}, _in_tiff, _tiff_of_16_bits),
}
