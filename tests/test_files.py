"""Files are whole or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consislora_core import files
from consislora_core.files import escape_text, written_whole


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


@pytest.mark.parametrize("name", [b"caf\xe9.png".decode(errors="surrogateescape"), "\ud83d", "\udc00\ud800"])
def test_a_name_that_is_no_utf_8_becomes_text_that_is(name):
    assert escape_text(name).encode() == escape_text(Path(name)).encode() == ascii(name)[1:-1].encode()


def test_every_other_name_stays_as_it_is():
    assert escape_text("caf\xe9 \u732b \U0001f600\\a\n") == "caf\xe9 \u732b \U0001f600\\a\n"


def test_a_file_that_a_virus_scanner_holds_is_tried_again(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "in use")] * 3

    def held(*paths):
        if refusals:
            raise refusals.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "HELD", 5.0)  # as on Windows
    with written_whole(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "new")]


def test_a_file_that_stays_refused_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HELD", 0.3)
    with pytest.raises(PermissionError):
        files.patiently(refused)


def refused():
    raise PermissionError(13, "in use")
