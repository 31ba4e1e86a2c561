"""Sheets and pictures as they come from artists, spreadsheets, phones and broken disks."""

import json
import os
import struct
import threading
import zlib

import pytest
from PIL import Image

from consislora_core import catalog
from consislora_core.catalog import (
    Job,
    Result,
    ResultsSheet,
    find_pictures,
    open_picture,
    pair_up,
    picture_key,
    read_jobs,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def sheet(tmp_path, text: str, name: str = "jobs.csv", encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


# Job sheets

SAME = [
    Job("cup.png", "ink.png", "cup in ink", seed=7, content_strength=0.5),
    Job("cup.png", "oil.png", "cup__oil", prompt='a [c], "big"'),
]


@pytest.mark.parametrize(
    "text",
    [
        "content,style,name,seed,content_strength,prompt\ncup.png,ink.png,cup in ink,7,0.5,\n"
        'cup.png,oil.png,,,,"a [c], ""big"""\n',
        "\ufeffContent;Style;Name;Seed;Content Strength;Prompt\r\ncup.png;ink.png;cup in ink;7;0,5;\r\n;;;;;\r\n"
        'cup.png;oil.png;;;;"a [c], ""big"""',
        "content\tstyle\tname\tseed\tcontent_strength\tprompt\ncup.png\tink.png\tcup in ink\t7\t0.5\n"
        'cup.png\toil.png\t\t\t\t"a [c], ""big"""',
    ],
    ids=["commas", "as a spreadsheet abroad saves it", "tabs"],
)
def test_csv_of_every_kind_is_read(tmp_path, text):
    assert read_jobs(sheet(tmp_path, text)) == SAME


def test_json_is_read(tmp_path):
    rows = [
        {"content": "cup.png", "style": "ink.png", "name": "cup in ink", "seed": 7, "content_strength": 0.5},
        {"content": "cup.png", "style": "oil.png", "seed": None, "prompt": 'a [c], "big"'},
    ]
    assert read_jobs(sheet(tmp_path, json.dumps(rows), "jobs.json")) == SAME


def test_jobs_without_a_name_get_one_each(tmp_path):
    jobs = read_jobs(
        sheet(tmp_path, "content,style,name\na/x.png,y.png,\nb/X.jpg,y.png,\nx.png,y.png,x__y_3\nx.png,y.png,")
    )
    assert [job.name for job in jobs] == ["x__y", "X__y_2", "x__y_3", "x__y_4"]


def test_all_problems_are_told_at_once(tmp_path):
    text = (
        "content,style,name,seed,content_strength,sead\na.png,b.png,x,1.5,strong,\n,b.png,../x,,nan,3\n\n"
        "a.png,b.png,same,,,\na.png,b.png,Same,,,\n"
    )
    with pytest.raises(ValueError) as caught:
        read_jobs(sheet(tmp_path, text))
    assert str(caught.value).splitlines() == [
        "jobs.csv has 7 problems:",
        "- column sead: there is no such column. Known are content, style, name, prompt, negative_prompt, "
        "content_lora, style_lora, content_strength, style_strength, content_guidance, style_guidance, "
        "cfg, steps, seed.",
        "- row 2, column content_strength: 'strong' is not a number, such as 0.8.",
        "- row 2, column seed: '1.5' is not a whole number, such as 42.",
        "- row 3, column content: it is empty, and it is needed.",
        "- row 3, column content_strength: 'nan' is not a number, such as 0.8.",
        "- row 3, column name: '../x' is not a name inside the folder results. Use letters, digits and spaces, with / "
        "for subfolders; not .., a drive, a name that Windows keeps for devices, or a dot or space at an end.",
        "- row 6, column name: 'Same' is the name of row 5 too. Choose another.",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    with pytest.raises(ValueError, match="jobs.csv has 100 problems:(\n.*){30}\n... and 70 more$"):
        read_jobs(sheet(tmp_path, "content,style,seed\n" + "a,b,x\n" * 100))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("jobs.csv", "", "holds no jobs"),
        ("jobs.csv", "content,style\n", "holds no jobs"),
        ("jobs.csv", "content,style,style\n", "the column style is there twice"),
        ("jobs.csv", "content,style\na,b,c\n", "row 2 has more cells"),
        ("jobs.csv", 'content,style\n"a,b\n', "cannot be read as a sheet: unexpected end of data"),
        ("jobs.csv", "content,style\n" + "a" * 200_000, "field larger than field limit"),
        ("jobs.json", "{}", "a list of objects was expected"),
        ("jobs.json", "[1]", "a list of objects was expected"),
        ("jobs.json", "[" * 100_000, "cannot be read as a sheet"),
        ("jobs.json", '[{"content": ["a"], "style": true}]', "column content: .* is not text"),
        ("jobs.json", '[{"content": "a", "style": "b", "seed": ' + "9" * 5000 + "}]", "cannot be read as a sheet"),
        ("jobs.json", '[{"content": "a", "style": "b", "cfg": 1' + "0" * 400 + "}]", "column cfg: 10"),
    ],
)
def test_what_is_no_sheet_is_told_in_words(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=words):
        read_jobs(sheet(tmp_path, text, name))


def test_another_encoding_a_missing_and_a_huge_sheet_are_told_in_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Save it as CSV UTF-8"):
        read_jobs(sheet(tmp_path, "content,style\n\u732b,b", encoding="shift_jis"))
    with pytest.raises(ValueError, match="none.csv cannot be read: No such file"):
        read_jobs(tmp_path / "none.csv")
    monkeypatch.setattr(catalog, "MAX_ROWS", 2)
    with pytest.raises(ValueError, match="more than 2 rows"):
        read_jobs(sheet(tmp_path, "content,style\n" + "a,b\n" * 3))
    monkeypatch.setattr(catalog, "MAX_SHEET_BYTES", 10)
    with pytest.raises(ValueError, match="is larger than"):
        read_jobs(sheet(tmp_path, "content,style\n"))


# The sheet of results


@pytest.fixture(params=["results.csv", "results.json"])
def results(request, tmp_path):
    return ResultsSheet(tmp_path / "out" / request.param)


CUP = Result(
    "cup", "k1", "cup.png", "ink.png", "cup.png", content_strength=1 / 3, seed=2**64 - 1, reason='"so", \u732b\nsaid'
)
POT = Result("pot", error="it is empty")


def test_results_come_back_as_they_were_in_their_order(results):
    assert results.read() == {}
    results.record([POT, CUP])
    results.record([Result("pan")])
    assert list(results.read().values()) == [POT, CUP, Result("pan")]
    results.record([Result("pot", "k2")], forget=["pan", "none"])
    assert list(results.read().values()) == [Result("pot", "k2"), CUP]


def test_a_clock_that_jumps_changes_no_order(results):
    for year in (2026, 1970, 2099):
        results.record([Result(f"in {year}", finished=f"{year}-01-01T00:00:00+00:00")])
    assert list(results.read()) == ["in 2026", "in 1970", "in 2099"]


def test_a_column_that_a_person_added_stays(tmp_path):
    results = ResultsSheet(sheet(tmp_path, "name;my note\ncup;nice\npot;bad\n", "results.csv"))
    results.record([CUP])
    assert results.read()["cup"] == CUP
    header, first, *_ = results.path.read_text("utf-8-sig").splitlines()
    assert header.endswith("my_note")
    assert ",nice" in results.path.read_text("utf-8-sig")


def test_a_sheet_that_was_damaged_by_hand_is_told_and_left_alone(tmp_path):
    results = ResultsSheet(sheet(tmp_path, "name,seed\n,1\ncup,x\n", "results.csv"))
    with pytest.raises(
        ValueError, match="results.csv has 2 problems:\n- row 2, column name(.|\n)*- row 3, column seed: 'x'"
    ):
        results.read()


def test_one_is_done_when_key_and_pictures_are_those_of_the_job(tmp_path):
    (tmp_path / "cup.png").touch()
    assert CUP.done("k1", tmp_path)
    assert not CUP.done("k2", tmp_path)
    assert not CUP.done("k1", tmp_path / "elsewhere")
    assert not POT.done("", tmp_path)


def test_many_writers_lose_nothing(results):
    def write(writer):
        for number in range(5):
            ResultsSheet(results.path).record([Result(f"{writer} {number}")])

    threads = [threading.Thread(target=write, args=[writer]) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results.read()) == 20


def test_a_refused_write_leaves_the_earlier_sheet(results, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    results.record([CUP])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.record([POT])
    assert list(results.read().values()) == [CUP]
    assert sorted(path.suffix for path in results.path.parent.iterdir()) == sorted([results.path.suffix, ".lock"])


def test_a_full_sheet_is_told(results, monkeypatch):
    results.record([CUP])
    monkeypatch.setattr(catalog, "MAX_ROWS", 1)
    with pytest.raises(ValueError, match="Go on in another folder"):
        results.record([POT])


# Pictures


def picture(mode: str = "RGB", size=(40, 20), colour=RED) -> Image.Image:
    return Image.new(mode, size, colour)


def colours(path) -> set:
    opened = open_picture(path)
    assert opened.mode == "RGB"
    return {colour for _, colour in opened.getcolors()}


@pytest.mark.parametrize("suffix", catalog.SUFFIXES)
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
def test_a_bad_file_is_told_by_name(tmp_path, damage, name):
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
    monkeypatch.setattr(catalog, "MAX_PICTURE_BYTES", 10)
    with pytest.raises(ValueError, match="a.png is larger than"):
        open_picture(tmp_path / "a.png")


# Folders


@pytest.fixture
def root(tmp_path):
    for name in ("things/b.PNG", "things/A.jpg", "things/readme.txt", "things/sub/c.png", "looks/ink.png", "other.png"):
        path = tmp_path / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "input"


def test_folders_and_files_are_found_in_order_and_once(root):
    found = find_pictures(root, "things\n\n other.png \nthings/A.jpg")
    assert [path.relative_to(root).as_posix() for path in found.paths] == ["things/A.jpg", "things/b.PNG", "other.png"]
    assert found.problems == {}


def test_what_cannot_be_found_is_told(root):
    (root / "none").mkdir()
    found = find_pictures(root, "things\nnone\nnowhere\n../x\n/etc")
    assert len(found.paths) == 2
    assert [text.split(",")[0][:30] for text in found.problems.values()] == [
        "there are no pictures in " + str(root)[:5],
        "there is no such folder or fil",
        "'../x' is not a name inside th",
        "'/etc' is not a name inside th",
    ]


def test_a_link_that_leads_out_is_passed_over(root):
    (root.parent / "secret.png").write_bytes(b"x")
    (root / "things" / "z.png").symlink_to(root.parent / "secret.png")
    found = find_pictures(root, "things")
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
    one, other = root / "things" / "A.jpg", root / "other.png"
    assert picture_key(one, one) == picture_key(one, root / "things" / "b.PNG")
    assert len({picture_key(one, other), picture_key(other, one), picture_key(one), picture_key(other)}) == 4
