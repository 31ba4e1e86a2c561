"""Pictures as they come from artists, phones and broken disks, and the folders they are in."""

import io
import os
import re
import shutil
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, PngImagePlugin

from catalogue import pictures
from catalogue.backgrounds import STYLE, border_colour, on_background, read_background
from catalogue.pictures import find_pictures, open_cut_out, open_picture, pair_up, picture_key

CASES = Path(__file__).parent / "data" / "cases"

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(mode: str = "RGB", size=(40, 20), colour=RED) -> Image.Image:
    return Image.new(mode, size, colour)


def colours(path) -> set:
    opened = open_picture(path)
    assert opened.mode == "RGB"
    return {colour for _, colour in opened.getcolors()}


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_every_kind_of_file_opens(tmp_path, suffix):
    picture(colour=WHITE).save(tmp_path / f"a{suffix}")
    assert colours(tmp_path / f"a{suffix}") == {WHITE}


@pytest.mark.parametrize("name", ["picture.jfif", "picture.avif", "picture_end_cut_off.jpg", "picture_cut_out.png"])
def test_what_comfyui_loads_opens(name):
    if name.endswith("avif") and ".avif" not in pictures.SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    assert open_picture(CASES / name).mode == "RGB"


def test_a_cut_out_is_opaque_in_its_square_alone():
    expected = picture("L", (256, 256), 0)
    expected.paste(255, (64, 64, 192, 192))
    assert open_cut_out(CASES / "picture_cut_out.png").getchannel("A").tobytes() == expected.tobytes()
    assert open_picture(CASES / "picture_cut_out.png").getpixel((63, 128)) == WHITE


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize(("stored", "shown"), [(65535, 255), (0, 0), (32896, 128)])
def test_sixteen_bits_become_eight(tmp_path, name, stored, shown):
    picture("I;16", colour=stored).save(tmp_path / name)
    assert colours(tmp_path / name) == {(shown,) * 3}


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path, name):
    picture("CMYK", colour=(0, 255, 255, 0)).save(tmp_path / name)
    (red, green, blue), *_ = colours(tmp_path / name)
    assert red > 230 and green < 40 and blue < 40


def test_alpha_is_laid_on_white(tmp_path):
    picture("RGBA", colour=(255, 0, 0, 0)).save(tmp_path / "a.png")
    picture("LA", colour=(0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    picture().save(tmp_path / "keyed.png", transparency=RED)
    assert colours(tmp_path / "a.png") == colours(tmp_path / "p.png") == colours(tmp_path / "keyed.png") == {WHITE}
    assert colours(tmp_path / "half.png") == {(127, 127, 127)}


def png(bits: int, kind: int, values: list[tuple[int, ...]]) -> bytes:
    """A PNG of one line, of 8 or 16 bits, of a kind of colours: 4 grey with alpha, 6 RGB with alpha."""
    line = b"".join(value.to_bytes(bits // 8, "big") for pixel in values for value in pixel)
    header = struct.pack(">IIBBBBB", len(values), 1, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + line)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def chunk(kind: bytes, content: bytes, right: bool = True) -> bytes:
    """Of a PNG. right: with the checksum of the content."""
    checksum = zlib.crc32(kind + content) ^ (not right)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def tiff(bits: int, alpha: int, values: list[tuple[int, ...]]) -> bytes:
    """A TIFF of one line. alpha: what it says of the last of each pixel's values, 1 for colours times alpha, 2 not."""
    line = b"".join(value.to_bytes(bits // 8, "little") for pixel in values for value in pixel)
    samples = len(values[0])
    sizes = 8 + len(line)  # where the sizes of the samples are
    tags = [
        (256, 4, 1, len(values)), (257, 4, 1, 1), (258, 3, samples, sizes), (259, 3, 1, 1),
        (262, 3, 1, 2 if samples == 4 else 1), (273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, 1),
        (279, 4, 1, len(line)), (338, 3, 1, alpha),
    ]  # fmt: skip
    if samples == 2:  # both sizes fit into the tag itself
        tags[2] = (258, 3, 2, bits << 16 | bits)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    start = sizes + 2 * samples
    return struct.pack("<2sHI", b"II", 42, start) + line + struct.pack(f"<{samples}H", *[bits] * samples) + directory


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


# As studios export cut-outs: red left under the transparent part, a shadow half transparent, the subject.
CUT_OUT = [(255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 255)]
GREY_CUT_OUT = [(200, 0), (0, 128), (255, 255)]


def cut_out(mode: str = "RGBA") -> Image.Image:
    drawn = Image.new(mode, (3, 1))
    drawn.putdata(CUT_OUT if mode == "RGBA" else GREY_CUT_OUT)
    return drawn


def palette_cut_out(kind: str, transparency: bytes | int) -> bytes:
    drawn = Image.new("P", (3, 1))
    drawn.putpalette([value for pixel in CUT_OUT for value in pixel[:3]])
    drawn.putdata([0, 1, 2])
    return saved(drawn, kind, transparency=transparency)


def line(picture: Image.Image) -> list:
    return [picture.getpixel((x, 0)) for x in range(picture.width)]


def wide(values: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [tuple(257 * value for value in pixel) for pixel in values]


TIMES_ALPHA = [(0, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 255)]
CUT_OUTS = {
    "a.png": saved(cut_out(), "PNG"),
    "palette.png": palette_cut_out("PNG", bytes([0, 128, 255])),
    "sixteen.png": png(16, 6, wide(CUT_OUT)),
    "grey.png": saved(cut_out("LA"), "PNG"),
    "grey sixteen.png": png(16, 4, wide(GREY_CUT_OUT)),
    "a.webp": saved(cut_out(), "WEBP", lossless=True, exact=True),
    "a.tif": saved(cut_out(), "TIFF", compression="tiff_lzw"),
    "sixteen.tif": tiff(16, 2, wide(CUT_OUT)),
    "times alpha.tif": tiff(8, 1, TIMES_ALPHA),
    "times alpha, sixteen.tif": tiff(16, 1, wide(TIMES_ALPHA)),
    "grey, times alpha.tif": tiff(8, 1, [(0, 0), (0, 128), (255, 255)]),
}


@pytest.mark.parametrize("name", CUT_OUTS)
def test_the_alpha_of_every_kind_of_file_is_kept_and_what_is_under_it_does_not_show(tmp_path, name):
    (tmp_path / name).write_bytes(CUT_OUTS[name])
    opened = open_cut_out(tmp_path / name)
    assert opened.mode == "RGBA"
    assert line(opened.getchannel("A")) == [0, 128, 255]
    subject = WHITE if name.startswith("grey") else BLUE
    assert line(open_picture(tmp_path / name)) == [WHITE, (127, 127, 127), subject]
    on_green = on_background(opened, GREEN)
    assert line(on_green) == [GREEN, (0, 127, 0), subject]


def test_a_gif_has_holes_and_no_soft_edges(tmp_path):
    (tmp_path / "a.gif").write_bytes(palette_cut_out("GIF", 0))
    assert line(open_cut_out(tmp_path / "a.gif").getchannel("A")) == [0, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_in_which_nothing_is_transparent_is_no_cut_out(tmp_path, mode):
    picture("RGB").convert(mode).save(tmp_path / "a.png")
    assert open_cut_out(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize(
    ("text", "colour"),
    [("white", WHITE), (" #00ff00 ", GREEN), ("#f00", RED), ("rgb(0, 0, 255)", BLUE), ("Style", STYLE)],
)
def test_a_background_is_a_colour_or_the_styles(text, colour):
    assert read_background(text) == colour


@pytest.mark.parametrize("text", ["", "whit", "#12345", "#ff000080", "rgb(300, 0, 0)", "255,0,0", "x" * 1000, "\ud83d"])
def test_a_background_that_is_no_colour_is_refused_in_words(text):
    with pytest.raises(ValueError, match="which is no colour. Write a name such as white, a hex value") as refused:
        read_background(text)
    assert len(str(refused.value)) < 300 and str(refused.value).encode()


def test_the_border_colour_is_that_of_the_paper_also_with_noise_and_with_something_across_the_border():
    paper, noise = (200, 180, 90), Image.effect_noise((300, 200), 12)
    shown = Image.merge("RGB", [noise.point(lambda value, shift=value - 128: value + shift) for value in paper])
    shown.paste(BLUE, (40, 30, 300, 120))
    assert all(abs(found - value) <= 3 for found, value in zip(border_colour(shown), paper, strict=True))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    frames = [picture(colour=BLUE), picture(colour=GREEN)]
    lossless = {"lossless": True} if name.endswith("webp") else {}
    picture().save(tmp_path / name, save_all=True, append_images=frames, **lossless)
    assert colours(tmp_path / name) == {RED}


def test_a_photo_is_turned_upright(tmp_path):
    photo = picture()
    photo.paste(WHITE, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    photo.save(tmp_path / "a.png", exif=exif)
    opened = open_picture(tmp_path / "a.png")
    assert opened.size == (20, 40)
    assert [opened.getpixel((10, y)) for y in (5, 35)] == [WHITE, RED]


# Colour profiles


def swapping_profile() -> bytes:
    """Of a screen whose red is green."""
    with Image.open(CASES / "picture_red_that_is_green.png") as shown:
        return shown.info["icc_profile"]


D50 = (0.9642, 1.0, 0.8249)


def profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The smallest that ICC.1 knows: a header, and the tags, whose lengths are multiples of 4."""
    start, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, tag in tags.items():
        table += name + struct.pack(">II", start, len(tag))
        start += len(tag)
    header = struct.pack(">I4x", start) + b"\x02\x10\0\0" + device + space + connection + bytes(12) + b"acsp"
    return (header + bytes(28) + xyz(D50)[8:]).ljust(128, b"\0") + table + b"".join(tags.values())


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(65536 * value) for value in values))


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(256 * gamma), 0)


def grey_profile(gamma: float) -> bytes:
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": xyz(D50), b"kTRC": gamma_curve(gamma)})


class Space(NamedTuple):
    """A colour space: the XYZ of its red, green and blue in the light of D50, and its gamma."""

    primaries: tuple[tuple[float, float, float], ...]
    gamma: float

    def profile(self, device: bytes = b"mntr") -> bytes:
        tags = {name: xyz(primary) for name, primary in zip((b"rXYZ", b"gXYZ", b"bXYZ"), self.primaries, strict=True)}
        curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_curve(self.gamma))
        return profile(device, b"RGB ", b"XYZ ", {b"wtpt": xyz(D50), **tags, **curves})

    def in_srgb(self, colour: tuple[int, int, int]) -> np.ndarray:
        light = np.linalg.solve(
            np.transpose(SRGB), np.transpose(self.primaries) @ (np.array(colour) / 255) ** self.gamma
        )
        light = light.clip(0, 1)
        return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142))
SPACES = {
    "Adobe RGB": Space(((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)), 2.2),
    "Display P3": Space(((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)), 2.2),
    "ProPhoto RGB": Space(((0.7977, 0.2880, 0), (0.1352, 0.7119, 0), (0.0313, 0.0001, 0.8249)), 1.8),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("space", SPACES)
def test_wide_colours_are_converted_as_the_matrices_say(tmp_path, space, suffix):
    exact = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    for colour in (0, 200, 0), (150, 120, 100), (90, 140, 200), WHITE:
        for device in b"mntr", b"scnr", b"spac":
            icc = SPACES[space].profile(device)
            picture(colour=colour).save(tmp_path / f"a{suffix}", icc_profile=icc, **exact)
            (shown,) = colours(tmp_path / f"a{suffix}")
            assert np.abs(SPACES[space].in_srgb(colour) - shown).max() < 2


def test_the_inks_of_cmyk_are_those_of_the_profile(tmp_path):
    """Of a press on which cyan is printed as a grey of L* = 50, and every other ink as black."""
    paper, cyan, black = bytes([255, 128, 128]), bytes([128, 128, 128]), bytes([0, 128, 128])
    one = struct.pack(">I", 65536)
    lookup = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + (one + 3 * bytes(4) + one + 3 * bytes(4) + one)
    inks = paper + 7 * black + cyan + 7 * black  # the last of the four inks changes fastest
    tables = bytes(range(256))
    press = profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": xyz(D50), b"A2B0": lookup + 4 * tables + inks + 3 * tables})
    for suffix, settings in {".tif": {}, ".jpg": {"quality": 100}}.items():
        for ink, shown in {(0, 0, 0, 0): 255, (255, 0, 0, 0): 119, (0, 0, 0, 255): 0}.items():
            picture("CMYK", colour=ink).save(tmp_path / f"a{suffix}", icc_profile=press, **settings)
            (colour,) = colours(tmp_path / f"a{suffix}")
            assert all(abs(value - shown) <= 2 for value in colour)


def test_colours_are_those_of_the_profile(tmp_path):
    assert colours(CASES / "picture_red_that_is_green.png") == {GREEN}
    palette = picture("P", colour=0)
    palette.putpalette([255, 0, 0])
    for number, tagged in enumerate([picture("RGBA", colour=(255, 0, 0, 255)), palette]):
        tagged.save(tmp_path / f"{number}.png", icc_profile=swapping_profile())
        assert colours(tmp_path / f"{number}.png") == {GREEN}
    picture("LA", colour=(128, 255)).save(tmp_path / "grey.png", icc_profile=grey_profile(1))
    assert colours(tmp_path / "grey.png") == {(188, 188, 188)}  # what half the light is in sRGB


def test_without_a_profile_that_fits_colours_stay(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 90) for _ in range(3)])
    for profile in (None, srgb, b"damaged", grey_profile(1)):
        noise.save(tmp_path / "a.png", icc_profile=profile)
        assert open_picture(tmp_path / "a.png").tobytes() == noise.tobytes()
    picture("L", colour=128).save(tmp_path / "grey.png", icc_profile=swapping_profile())
    assert colours(tmp_path / "grey.png") == {(128, 128, 128)}


# Damage


@pytest.fixture(
    params=[{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=["plain", "progressive", "restarts"]
)
def jpeg(request) -> bytes:
    data = io.BytesIO()
    subject = Image.new("RGB", (400, 400), WHITE)
    subject.paste(Image.merge("RGB", [Image.effect_noise((200, 200), 90) for _ in range(3)]), (100, 100))
    subject.save(data, "JPEG", **request.param)
    return data.getvalue()


def opened(data: bytes, folder: Path) -> Image.Image:
    (folder / "a.jpg").write_bytes(data)
    return open_picture(folder / "a.jpg")


@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_that_lacks_only_its_end_is_whole(tmp_path, jpeg, missing):
    assert opened(jpeg[:-missing], tmp_path).tobytes() == opened(jpeg, tmp_path).tobytes()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_jpeg_of_which_a_part_is_missing_is_damaged(tmp_path, jpeg, share):
    with pytest.raises(ValueError, match="a.jpg is damaged .a part of the picture is missing"):
        opened(jpeg[: int(len(jpeg) * share)], tmp_path)
    with pytest.raises(ValueError, match="picture_half.jpg is damaged"):
        open_picture(CASES / "picture_half.jpg")


@pytest.mark.parametrize("jpeg", [{"restart_marker_rows": 1}], indirect=True, ids=["restarts"])
def test_a_jpeg_that_ends_at_a_restart_marker_or_near_one_is_damaged(tmp_path, jpeg):
    markers = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", jpeg)]
    for end in (markers[5], markers[len(markers) // 2], markers[-1]):
        for beside in (-5, -1, 0, 1, 2, 4):
            with pytest.raises(ValueError, match="a part of the picture is missing"):
                opened(jpeg[: end + beside], tmp_path)


@pytest.mark.parametrize(
    ("name", "mode", "most"), [("a.bmp", "RGB", 20), ("a.bmp", "1", 20), ("a.tif", "RGB", 20), ("a.gif", "P", 2)]
)
def test_any_other_picture_may_lack_its_last_bytes_but_no_part(tmp_path, name, mode, most):
    path = tmp_path / name
    Image.merge("RGB", [Image.effect_noise((200, 200), 90) for _ in range(3)]).convert(mode).save(path)
    data, whole = path.read_bytes(), open_picture(path)
    for missing in (1, 2, most):
        path.write_bytes(data[:-missing])
        change = ImageChops.difference(open_picture(path), whole).convert("L").histogram()
        assert sum(change[1:]) < 0.01 * 200 * 200
    for share in (0.5, 0.95):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            open_picture(path)


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw"])
def test_a_compressed_tiff_without_its_last_bytes_is_refused(tmp_path, compression):
    picture(size=(200, 200)).save(tmp_path / "a.tif", compression=compression)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.tif is (damaged|no picture of a known kind)"):
        open_picture(tmp_path / "a.tif")


def test_long_texts_in_a_png_do_not_matter(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    texts.add_itxt("parameters", "x" * 2_000_000, zip=True)
    picture().save(tmp_path / "a.png", pnginfo=texts)
    assert colours(tmp_path / "a.png") == {RED}


def opened_with(folder: Path, *chunks: bytes) -> Image.Image:
    """A red PNG with chunks before its pixels, opened."""
    data = saved(picture(), "PNG")
    (folder / "a.png").write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return open_cut_out(folder / "a.png")


SIDEWAYS = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: turn by 90 degrees
BESIDE_PIXELS = {
    b"gAMA": struct.pack(">I", 45455),
    b"pHYs": struct.pack(">IIB", 1, 1, 1),
    b"tIME": bytes(7),
    b"iCCP": b"x\0\0" + zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    b"eXIf": b"MM\0*\0\0\0\x08\0\0",
    b"sRGB": b"\0",
    b"cHRM": bytes(32),
    b"bKGD": bytes(6),
    b"tRNS": bytes(6),
    b"tEXt": b"workflow\0text",
    b"caBX": bytes(40),  # Content Credentials
    b"cICP": b"\x09\x10\0\1",
    b"zzZz": b"unknown",
}


@pytest.mark.parametrize("kind", BESIDE_PIXELS)
@pytest.mark.parametrize("damage", ["wrong checksum", "empty", "twice"])
def test_whatever_is_damaged_in_a_png_beside_its_pixels_does_not_matter(tmp_path, kind, damage):
    bad = chunk(kind, b"") if damage == "empty" else chunk(kind, BESIDE_PIXELS[kind], right=False)
    opened = opened_with(tmp_path, *[bad] * (1 + (damage == "twice")))
    assert (opened.mode, opened.tobytes()) == ("RGB", picture().tobytes())


@pytest.mark.parametrize(
    "profile",
    [b"x\0\0" + zlib.compress(bytes(3_000_000)), b"x\0\1", b"x\0\0no zlib"],
    ids=["huge", "of another compression", "damaged"],
)
def test_a_profile_in_a_png_that_cannot_be_read_leaves_the_colours(tmp_path, profile):
    assert opened_with(tmp_path, chunk(b"iCCP", profile)).tobytes() == picture().tobytes()


@pytest.mark.parametrize("is_right", [True, False], ids=["right checksums", "wrong checksums"])
@pytest.mark.parametrize("damage", [chunk(b"gAMA", b""), chunk(b"tEXt", b"a\0b", right=False)], ids=["empty", "wrong"])
def test_a_damaged_png_still_has_its_colours_its_transparency_and_its_orientation(tmp_path, is_right, damage):
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(swapping_profile()), is_right)
    (colour,) = opened_with(tmp_path, damage, profile).getcolors()
    assert colour[1] == GREEN
    assert opened_with(tmp_path, damage, chunk(b"tRNS", b"\0\xff\0\0\0\0", is_right)).mode == "RGBA"
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    in_hex = b"\nexif\n%8d\n%s" % (
        len(SIDEWAYS) + 6,
        (b"Exif\0\0" + SIDEWAYS).hex().encode(),
    )  # as ImageMagick writes it
    for turned in (
        chunk(b"eXIf", SIDEWAYS, is_right),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp, is_right),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(in_hex), is_right),
    ):
        assert opened_with(tmp_path, damage, turned).size == (20, 40)


def empty(path):
    path.write_bytes(b"")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-30])


def only_a_head(path):
    path.write_bytes(path.read_bytes()[:20])


def words(path):
    path.write_text("no picture")


def a_program(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def a_folder(path):
    path.unlink()
    path.mkdir()


def floating_point(path):
    picture("F", colour=0.5).save(path, format="TIFF")


@pytest.mark.parametrize("damage", [empty, cut_off, only_a_head, words, a_program, a_folder, floating_point])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_bad_file_is_reported_by_name(tmp_path, damage, name):
    path = tmp_path / name
    Image.effect_noise((40, 40), 50).save(path)
    damage(path)
    with pytest.raises(ValueError, match=f"^{name} (is|is empty|is damaged|is no picture|cannot be read)"):
        open_picture(path)


@pytest.mark.parametrize("side", [20_000, 9_500], ids=["beyond Pillow's own limit", "where Pillow warns"])
def test_pixels_are_bounded_before_they_take_memory(tmp_path, side):
    path = tmp_path / "a.png"
    picture().save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.png has more than 80 million pixels"):
        open_picture(path)


def test_bytes_are_bounded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 10)
    with pytest.raises(ValueError, match="a.png is larger than"):
        open_picture(tmp_path / "a.png")


# Folders


@pytest.fixture
def root(tmp_path):
    names = "subjects/b.PNG subjects/A.jpg subjects/readme.txt subjects/sub/c.png styles/ink.png other.png"
    for name in names.split():
        path = tmp_path / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "input"


def test_folders_and_files_are_found_in_order_and_once(root):
    found = find_pictures(root, "subjects\n\n other.png \nsubjects/A.jpg")
    assert [path.relative_to(root).as_posix() for path in found.paths] == [
        "subjects/A.jpg",
        "subjects/b.PNG",
        "other.png",
    ]
    assert list(found.problems) == ["subjects/readme.txt"]


def test_what_cannot_be_found_is_reported(root):
    (root / "none").mkdir()
    found = find_pictures(root, "subjects\nnone\nnowhere\n../x\n/etc")
    assert len(found.paths) == 2
    assert [text.split(",")[0][:30] for text in found.problems.values()] == [
        "files of the kind .txt are not",
        "there are no pictures in " + str(root)[:5],
        "there is no such folder or fil",
        "'../x' is not a name inside th",
        "'/etc' is not a name inside th",
    ]


def test_every_file_that_cannot_be_used_is_listed_but_dot_files_and_the_systems_own(root):
    icon = () if os.name == "nt" else ("Icon\r",)  # no name there
    for name in ("photo.heic", "Thumbs.db", "desktop.ini", *icon, "no suffix", ".DS_Store"):
        (root / "subjects" / name).write_bytes(b"x")
    shutil.copy(CASES / "._picture.jpg", root / "subjects")
    found = find_pictures(root, "subjects")
    assert [path.name for path in found.paths] == ["A.jpg", "b.PNG"]
    assert sorted(found.problems) == [f"subjects/{name}" for name in ("no suffix", "photo.heic", "readme.txt")]


def test_of_a_folder_that_holds_nothing_but_folders_one_is_named(root):
    (root / "range" / "shoes").mkdir(parents=True)
    (root / "range" / "hats").mkdir()
    advice = "files there, or name the folders in it, each on a line, as range/hats."
    assert find_pictures(root, "range/").problems["range/"].endswith(advice)


def test_pictures_come_in_the_order_in_which_people_count(root):
    for name in ("10.png", "2.png", "b10.png", "B9.png"):
        (root / "styles" / name).write_bytes(b"x")
    names = [path.name for path in find_pictures(root, "styles").paths]
    assert names == ["2.png", "10.png", "B9.png", "b10.png", "ink.png"]


@pytest.mark.parametrize(("written", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_is_found_in_either_spelling_of_its_accents(root, written, asked):
    folder = root / unicodedata.normalize(written, "caf\u00e9")
    folder.mkdir()
    shutil.copy(CASES / "picture.jfif", folder / unicodedata.normalize(written, "th\u00e9.jfif"))
    for name in ("caf\u00e9", "caf\u00e9/th\u00e9.jfif"):
        assert len(find_pictures(root, unicodedata.normalize(asked, name)).paths) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_a_name_that_is_no_utf_8_is_escaped_wherever_it_is_said(root):
    name = os.fsdecode(b"caf\xe9")
    for suffix in (".png", ".txt"):
        (root / "subjects" / f"{name}{suffix}").write_bytes(b"x")
    found = find_pictures(root, "subjects\n\ud83d")
    assert sorted(found.problems) == ["\\ud83d", "subjects/caf\\udce9.txt", "subjects/readme.txt"]
    with pytest.raises(ValueError, match=r"caf\\udce9.png is no picture") as caught:
        open_picture(found.paths[-1])
    "".join([*found.problems.values(), str(caught.value)]).encode()


def test_a_folder_that_may_not_be_read_is_listed_and_the_others_are_taken(root, monkeypatch):
    def listed(folder):
        if folder.name == "styles":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", listed)  # root, which tests may be, may read all
    found = find_pictures(root, "styles\nsubjects")
    assert len(found.paths) == 2 and "Permission denied" in found.problems["styles"]


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_a_link_that_leads_out_is_skipped(root):
    (root.parent / "secret.png").write_bytes(b"x")
    (root / "subjects" / "z.png").symlink_to(root.parent / "secret.png")
    found = find_pictures(root, "subjects")
    assert [path.name for path in found.paths] == ["A.jpg", "b.PNG"]
    assert "it is a link that leads out of the folder input" in found.problems["subjects/z.png"]


def test_every_content_is_paired_with_every_style(root):
    pairs = pair_up([root / "a.png", root / "b.png"], [root / "s.png", root / "t.png"], "{style}/{content}")
    assert [pair.name for pair in pairs] == ["s/a", "t/a", "s/b", "t/b"]
    assert (pairs[1].content.name, pairs[1].style.name) == ("a.png", "t.png")


def test_names_are_portable_and_no_two_the_same(root):
    contents = [root / "a.png", root / "A.jpg", root / "a{style}.png", root / "CON:.png"]
    names = [pair.name for pair in pair_up(contents, [root / "s.png"], "{content}__{style}")]
    assert len({name.casefold() for name in names}) == 4
    assert names[0].startswith("a__s_") and names[2:] == ["a{style}__s", "CON___s"]
    assert pair_up(contents[:1], [root / "s.png"], "same")[0].name == "same"


def test_long_names_are_shortened_with_a_mark_and_stay_apart(root):
    contents = [root / f"{'x' * 240}{end}.png" for end in "ab"] + [root / "cup.png"]
    names = [pair.name for pair in pair_up(contents, [root / f"{'s' * 240}.png"], "{content}__{style}/{content}")]
    assert len(set(names)) == 3 and all("~" in name and len(part) < 190 for name in names for part in name.split("/"))
    assert names == [
        pair.name for pair in pair_up(contents, [root / f"{'s' * 240}.png"], "{content}__{style}/{content}")
    ]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("", "cup__ink"),
        ("  ", "cup__ink"),
        ("{content} ", "cup"),
        (" new / {content}\t", "new/cup"),
        ("{style};{content}", "ink_cup"),
        ("100 %/{content}%(style)s", "100 %/cup%(style)s"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_a_pattern_gives_names_that_sheet_and_disk_give_back(root, pattern, name):
    assert pair_up([root / "cup.png"], [root / "ink.png"], pattern)[0].name == name


def test_of_many_equal_names_none_is_given_twice(root):
    files = [root / f"{number}.png" for number in range(100)]
    assert len(set(pair_up(files, files, "same").names)) == 10_000


def test_another_picture_has_another_key(root):
    (root / "other.png").write_bytes(b"y")
    one, other = root / "subjects" / "A.jpg", root / "other.png"
    assert picture_key(one, one) == picture_key(one, root / "subjects" / "b.PNG")
    assert len({picture_key(one, other), picture_key(other, one), picture_key(one), picture_key(other)}) == 4
