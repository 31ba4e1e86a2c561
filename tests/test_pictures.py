"""Pictures as they come from artists, phones and broken disks, and the folders they are in."""

import struct
import zlib

import pytest
from PIL import Image

from catalogue import pictures
from catalogue.pictures import find_pictures, open_picture, pair_up, picture_key

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
    assert found.problems == {}


def test_what_cannot_be_found_is_reported(root):
    (root / "none").mkdir()
    found = find_pictures(root, "subjects\nnone\nnowhere\n../x\n/etc")
    assert len(found.paths) == 2
    assert [text.split(",")[0][:30] for text in found.problems.values()] == [
        "there are no pictures in " + str(root)[:5],
        "there is no such folder or fil",
        "'../x' is not a name inside th",
        "'/etc' is not a name inside th",
    ]


def test_a_link_that_leads_out_is_skipped(root):
    (root.parent / "secret.png").write_bytes(b"x")
    (root / "subjects" / "z.png").symlink_to(root.parent / "secret.png")
    found = find_pictures(root, "subjects")
    assert [path.name for path in found.paths] == ["A.jpg", "b.PNG"]
    assert "it is a link that leads out of the folder input" in found.problems["z.png"]


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


def test_another_picture_has_another_key(root):
    (root / "other.png").write_bytes(b"y")
    one, other = root / "subjects" / "A.jpg", root / "other.png"
    assert picture_key(one, one) == picture_key(one, root / "subjects" / "b.PNG")
    assert len({picture_key(one, other), picture_key(other, one), picture_key(one), picture_key(other)}) == 4
