"""Files are whole or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from catalogue.sheets import Result, ResultsSheet
from consislora_core import files, lora_file
from consislora_core.files import escape_text, locked, write_file, write_numbered, written_whole


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


def numbered(folder: Path) -> list[Path]:
    return [folder / f"a_{number}.txt" for number in range(1, 4)]


def test_a_number_that_another_process_takes_meanwhile_is_left_to_it(tmp_path):
    first, second, _ = numbered(tmp_path)

    def write(path):
        with written_whole(path, new=True) as unfinished:
            unfinished.write_text("mine")
            first.touch()  # as another process may

    assert write_numbered(numbered(tmp_path), write) == second
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {first.name: "", second.name: "mine"}


def test_a_new_file_that_fails_leaves_nothing_and_its_number_free(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("held by a scanner")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr("os.replace", refuse)
        with written_whole(tmp_path / "a_1.txt", new=True) as unfinished:
            unfinished.touch()
    assert list(tmp_path.iterdir()) == []


def test_a_network_folder_without_locks_is_an_error_like_others_of_the_disk(tmp_path, monkeypatch):
    def no_locks(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with pytest.raises(OSError, match="This network folder has no locks; choose another: .*results.csv.lock"):
        ResultsSheet(tmp_path / "results.csv").record([Result("cup")])


def test_when_every_number_is_taken_it_says_so(tmp_path):
    for path in numbered(tmp_path):
        path.touch()
    with pytest.raises(FileExistsError, match="every number is taken"):
        write_numbered(numbered(tmp_path), Path.touch)


@pytest.fixture
def scanner(monkeypatch):
    """A virus scanner that holds every file for a moment whenever it is opened, changed, replaced or removed."""
    held = set()

    def hold(owner, name):
        action = getattr(owner, name)

        def refused_once(path, *arguments, **settings):
            if (name, path) not in held and not str(path).endswith(".lock"):
                held.add((name, path))
                raise PermissionError(13, "used by another process")
            return action(path, *arguments, **settings)

        monkeypatch.setattr(owner, name, refused_once)

    for name in ("open", "chmod", "unlink"):
        hold(Path, name)
    hold(os, "replace")
    monkeypatch.setattr(files, "HELD", 5.0)  # as on Windows
    return held


def write_a_file(path):
    write_file(path, b"new")


def write_a_new_file(path):
    write_file(path, b"new", new=True)


def write_a_lora(path):
    lora_file.write_tensors({"a": torch.zeros(1)}, path, {"format": "pt"})


def write_a_sheet_and_append_to_it(path):
    ResultsSheet(path).record([Result("a")])
    ResultsSheet(path).record([Result("b")])
    assert ResultsSheet(path).entries().keys() == {"a", "b"}


@pytest.mark.parametrize("write", [write_a_file, write_a_new_file, write_a_lora, write_a_sheet_and_append_to_it])
def test_a_file_that_a_virus_scanner_holds_is_tried_again(tmp_path, scanner, write):
    write(tmp_path / "a.csv")
    assert {name for name, _ in scanner} == {"open", "chmod", "replace", "unlink"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["a.csv"]


def test_a_file_that_stays_refused_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HELD", 0.3)
    with pytest.raises(PermissionError):
        files.patiently(refused)


def refused(*_, **__):
    raise PermissionError(13, "in use")


class LockOfWindows:
    """filelock's before version 4 on Windows, where a folder that cannot be written looks like a lock that is held."""

    def __init__(self, path):
        self.path = path

    def acquire(self, timeout):
        raise Timeout(str(self.path))


def test_a_folder_of_windows_that_cannot_be_written_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FileLock", LockOfWindows)
    monkeypatch.setattr(os, "open", refused)  # which makes a file
    with pytest.raises(PermissionError), locked(tmp_path / "a.lock", pytest.fail, "another process writes"):
        pass
