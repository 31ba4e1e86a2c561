"""Results as PNG, WebP, JPEG and TIFF: pixels, profile, and what other programs read in them."""

import io
import json
import logging
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from catalogue.pictures import open_picture
from catalogue.sizes import latent_size

FORMATS = ["PNG", "WebP", "JPEG", "TIFF"]
TEXTS = {"prompt": '{"1": {}}', "workflow": '{"nodes": []}', "consislora": '{"name": "cup"}'}
TITLE, CREATOR, RIGHTS = (
    "\u732b & <\u00e9> \x00\ud83d",
    "A. Smith; B. J\u00f6ns",
    "\u00a9 2026 \u682a\u5f0f\u4f1a\u793e",
)
NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
}


@pytest.fixture
def files(pack):
    return pack.host.picture_files


@pytest.fixture
def write(files, pack, tmp_path):
    """Writes a picture, with metadata or these texts, and gives the file's path."""

    def write(image, format, bits=8, texts=TEXTS, title=TITLE, record='{"seed": 7}'):
        metadata = files.Metadata(texts, pack.host.xmp.Credits(title, CREATOR, RIGHTS, record))
        path = tmp_path / f"picture{files.KINDS[format].suffix}"
        path.write_bytes(files.encode_picture(image, format, bits, metadata))
        return path

    return write


def noise(channels: int = 3, height: int = 67, width: int = 33) -> torch.Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(0))


def smooth(channels: int = 3) -> torch.Tensor:
    ramp = torch.linspace(0.2, 0.8, 64)
    return torch.stack(channels * [ramp[:, None] * ramp], -1)


def opened(path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_come_back_whole_in_another_program(write, format, channels):
    image = noise(channels)
    path, layout = write(image, format, 16), {3: "rgb48le", 4: "rgba64le"}[channels]
    with av.open(path) as container:
        read = next(container.decode(video=0)).to_ndarray(format=layout)
    assert np.array_equal(read, (image.numpy() * 65535).round())


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_8_bits_and_what_pillow_makes_of_16_are_the_pictures_own(write, format, bits, channels):
    image = noise(channels)
    read = np.asarray(opened(write(image, format, bits))).astype(float)
    assert np.abs(read - image.numpy() * 255).max() <= (0.501 if bits == 8 else 1)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_keeps_colours_close_and_opens_in_a_catalogue(write, format):
    image = smooth()
    read = np.asarray(open_picture(write(image, format)))
    assert np.abs(read - image.numpy() * 255).max() < 4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_profile_of_srgb_which_changes_no_pixel(write, format, bits):
    picture = opened(write(noise(), format, bits))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert open_picture(write(noise(), format, bits)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", ["PNG", "WebP", "TIFF"])
def test_alpha_stays(write, format, bits):
    image = torch.full((8, 8, 4), 0.4)
    image[:, 4:] = torch.tensor([0.8, 0.8, 0.8, 0.0])
    picture = opened(write(image, format, bits))
    assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 102 and picture.getpixel((7, 0))[3] == 0
    assert picture.getpixel((7, 0))[0] == pytest.approx(204, abs=2)  # the colour under it too
    if format == "TIFF":
        assert picture.tag_v2[338] == (2,)  # by which other programs know the fourth channel for alpha


def test_a_jpeg_keeps_the_colour_of_fine_lines(write):
    image = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.2, 0.8]]).repeat(16, 16, 1)
    read = np.asarray(opened(write(image, "JPEG"))).astype(float)
    assert np.abs(read - image.numpy() * 255).max() < 20


def test_a_jpeg_shows_the_picture_on_white(write):
    image = torch.zeros(16, 16, 4)
    image[:8, :, 3] = 1
    picture = opened(write(image, "JPEG"))
    assert picture.mode == "RGB" and picture.getpixel((3, 3)) == (0, 0, 0) and picture.getpixel((3, 12)) == (255,) * 3


# What other programs read


def xmp(path) -> dict[str, list[str]]:
    """The texts of each property, by an XML parser."""
    picture = opened(path)
    packet = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
    (description,) = ElementTree.fromstring(packet).iter(f"{{{NAMESPACES['rdf']}}}Description")
    return {node.tag: [text for text in node.itertext() if text.strip()] for node in description}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_xmp_says_title_creators_rights_and_that_a_model_made_it(write, format, bits):
    read = xmp(write(noise(), format, bits))
    assert read[f"{{{NAMESPACES['dc']}}}title"] == ["\u732b & <\u00e9> \\ud83d"]
    assert read[f"{{{NAMESPACES['dc']}}}creator"] == ["A. Smith", "B. J\u00f6ns"]
    assert read[f"{{{NAMESPACES['dc']}}}rights"] == [RIGHTS]
    (source,) = read[f"{{{NAMESPACES['iptc']}}}DigitalSourceType"]
    assert source == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.skipif(not shutil.which("exiftool"), reason="no exiftool")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_exiftool_reads_it_without_a_complaint(write, format, bits):
    path = write(noise(), format, bits)
    printed = subprocess.run(["exiftool", "-j", path], capture_output=True, check=True).stdout
    (read,) = json.loads(printed)
    assert (read["Creator"], read["Rights"]) == (["A. Smith", "B. J\u00f6ns"], RIGHTS)
    assert read["ProfileDescription"].startswith("sRGB")
    assert not {"Error", "Warning"} & read.keys()


@pytest.mark.parametrize("format", ["WebP", "JPEG", "TIFF"])
def test_the_workflow_is_in_exif_where_comfyui_has_it_in_webp(write, format):
    exif = opened(write(noise(), format)).getexif()
    assert (exif[0x0110], exif[0x010F]) == ('prompt:{"1": {}}', 'workflow:{"nodes": []}')


@pytest.mark.parametrize("format", FORMATS)
def test_without_metadata_there_is_the_profile_alone(files, format):
    file = files.encode_picture(noise(), format, 8, files.NOTHING)
    assert Image.open(io.BytesIO(file)).info.keys() & {"icc_profile", "exif", "xmp", "prompt"} == {"icc_profile"}
    for word in (b"Exif", b"EXIF", b"xmp", b"XMP", b"iTXt", b"tEXt"):
        assert word not in file


def test_what_is_too_long_for_a_jpeg_is_left_out_and_logged(write, caplog):
    long = "x" * 70_000
    with caplog.at_level(logging.WARNING):
        exif = opened(write(noise(), "JPEG", texts=TEXTS | {"workflow": long})).getexif()
        assert "left out of it: workflow." in caplog.text and exif[0x0110] == 'prompt:{"1": {}}'
        path = write(noise(), "JPEG", texts={"prompt": long, "workflow": long}, record=long, title=long)
    assert "left out of it: workflow, prompt, record of the LoRAs." in caplog.text
    assert len(xmp(path)[f"{{{NAMESPACES['dc']}}}title"][0]) == 2000


@pytest.mark.parametrize("format", ["PNG", "WebP", "TIFF"])
def test_other_formats_hold_any_length(write, format):
    path = write(noise(), format, texts={"prompt": "x" * 200_000}, record="y" * 200_000)
    assert b"x" * 200_000 in path.read_bytes() and "y" * 200_000 in "".join(sum(xmp(path).values(), []))


# Sizes


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_picture_of_30000_pixels_is_written(write, format):
    assert opened(write(torch.zeros(2, 30_000, 3), format, 16)).size == (30_000, 2)


@pytest.mark.parametrize(("format", "width"), [("WebP", 16384), ("JPEG", 65501)])
def test_a_format_that_is_too_small_for_a_picture_is_refused_in_words(write, format, width):
    write(torch.zeros(1, width - 1, 3), format)
    with pytest.raises(ValueError, match=f"is {width} x 1 pixels, and {format} takes .* Choose PNG or TIFF"):
        write(torch.zeros(1, width, 3), format)


@pytest.mark.parametrize("size", [(1, 1), (33, 67), (37, 11), (301, 7), (1, 500)])
def test_a_picture_gets_any_size_exactly(files, size):
    image = files.resized(noise(4), size)
    assert image.shape == (size[1], size[0], 4)
    assert image.min() >= 0 and image.max() <= 1


def test_scaling_keeps_more_than_8_bits_and_an_even_colour(files):
    scaled = files.resized(torch.full((8, 8, 3), 0.123456), (31, 17))
    assert (scaled - 0.123456).abs().max() < 1e-6


def test_colours_of_transparent_parts_do_not_show_at_an_edge(files):
    image = torch.zeros(32, 32, 4)
    image[:, :16] = torch.tensor([1, 0.5, 0, 1.0])  # orange; beside it black that is transparent
    scaled = files.resized(image, (57, 57))
    shown = scaled[scaled[..., 3] > 0.05]
    assert (shown[:, :3] - torch.tensor([1, 0.5, 0])).abs().max() < 0.05


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((1, 1), 1024, (1024, 1024)),
        ((6000, 4000), 1024, (1256, 840)),
        ((4000, 6000), 1024, (840, 1256)),
        ((30_000, 3000), 1024, (3240, 320)),
        ((128, 64), 256, (360, 184)),
        ((30_000, 1), 1024, (16384, 64)),
        ((1, 30_000), 64, (64, 11088)),
    ],
)
def test_a_latent_has_the_photos_shape_and_the_models_area(size, resolution, expected):
    assert latent_size(size, resolution) == expected
