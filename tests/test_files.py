"""Names stay in their folder, and files are whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consislora_core import files
from consislora_core.files import inside, is_portable, portable, written_whole

OUTSIDE = ["..", "../a", "a/../../b", "/etc/passwd", "\\\\host\\a", "..\\a", "C:\\a", "C:a", "a\0b"]
UNPORTABLE = [
    "CON",
    "nul.png",
    "COM1",
    "lpt9.txt",
    "a/aux",
    "com\u00b9",
    "a.",
    "a ",
    " a",
    "a<b",
    "a?b",
    "a\nb",
    "x" * 250,
]


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


@pytest.mark.parametrize("text", [*OUTSIDE, *UNPORTABLE, "", ".", "...", "\ud800", "\u732b" * 200, "a/b"])
def test_any_text_becomes_a_name(text):
    assert is_portable(portable(text))
    assert "/" not in portable(text)


def test_an_ordinary_name_is_kept():
    assert portable("Teapot, blue (2)") == "Teapot, blue (2)"


def test_a_file_that_fails_half_way_leaves_the_earlier_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with pytest.raises(OSError, match="full"), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("full")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "earlier")]


def test_a_process_that_is_killed_leaves_no_half_file_under_the_name(tmp_path):
    code = """
import os, sys
from pathlib import Path
from consislora_core.files import written_whole
with written_whole(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half")
    os._exit(9)
"""
    root = Path(files.__file__).resolve().parent.parent
    (tmp_path / "a.txt").write_text("earlier")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=root)
    assert (tmp_path / "a.txt").read_text() == "earlier"
