"""Names stay in their folder, and are valid on every system."""

import os

import pytest

from catalogue import names
from catalogue.names import as_spelled, inside, is_portable, portable

OUTSIDE = ["..", "../a", "a/../../b", "/etc/passwd", "\\\\host\\a", "..\\a", "C:\\a", "C:a", "a\0b"]
UNPORTABLE = ["CON", "nul.png", "COM1", "lpt9.txt", "a/aux", "com\u00b9", "a.", "a ", " a", "a<b", "a?b", "a\nb"]
UNPORTABLE += ["x" * 250]


@pytest.mark.parametrize("name", OUTSIDE + UNPORTABLE)
def test_a_name_that_leads_out_or_not_every_system_takes_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not a name inside the folder"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a.png", "a/b c/d.png", "a\\b", "console", "\u732b.png", "..a", "com10"])
def test_an_ordinary_name_is_a_path_inside(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path.joinpath(*name.replace("\\", "/").split("/"))


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_a_link_may_not_lead_out_but_within(tmp_path):
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "within").symlink_to(folder / "real")
    with pytest.raises(ValueError, match="leads out of the folder folder through a link"):
        inside(folder, "out/a.png")
    assert inside(folder, "within/a.png").parent.resolve() == folder / "real"


def test_a_name_that_no_file_system_takes_with_its_folders_is_refused(tmp_path):
    for name in ("a/" * 3000 + "b", "/".join(["x" * 190] * 6)):
        with pytest.raises(ValueError, match="^'[ax/]+'... is too long a name.* Shorten it.$"):
            inside(tmp_path, name)


def test_on_windows_a_name_is_as_long_as_long_paths_allow(tmp_path, monkeypatch):
    folder = tmp_path / ("\u732b" * 60)  # of three bytes each: Windows counts characters
    name = "x" * (names.LONGEST_OF_WINDOWS - len(f"{folder}/"))
    monkeypatch.setattr(names, "has_long_paths", lambda: False)
    assert inside(folder, name) == folder / name
    with pytest.raises(ValueError, match=r"has more than 247 characters. Shorten it, or turn on long paths"):
        inside(folder, f"{name}s")
    monkeypatch.setattr(names, "has_long_paths", lambda: True)
    assert inside(folder, f"{name}s")


def test_a_path_of_any_depth_is_looked_for(tmp_path):
    deep = tmp_path.joinpath(*"a" * 3000)
    assert as_spelled(deep) == deep


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_a_link_to_itself_is_a_name_without_a_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert not inside(tmp_path, "loop").exists()


@pytest.mark.parametrize("text", [*OUTSIDE, *UNPORTABLE, "", ".", "...", "\ud800", "\u732b" * 200, "a/b"])
def test_any_text_becomes_a_name(text):
    assert is_portable(portable(text))
    assert "/" not in portable(text)


def test_an_ordinary_name_is_kept():
    assert portable("Teapot, blue (2)") == "Teapot, blue (2)"
