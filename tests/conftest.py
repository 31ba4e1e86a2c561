"""What every test can lean on: a real server, ComfyUI in this process, and the pack loaded as ComfyUI loads it."""

import asyncio
import importlib
import importlib.util
import os
import pkgutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from prompts import quick

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))

# A shell that starts tests in the background has them ignore Ctrl-C, and the programs that they press it for as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# At the end: ComfyUI goes to the front, and its `nodes` must be found before ours.
sys.path.append(str(ROOT))


def pytest_addoption(parser):
    parser.addoption(
        "--front-end-root", metavar="DIR", help="test with this frontend of ComfyUI; `newest` fetches the newest"
    )


def load_comfy(base: Path, cpu: bool = True) -> ModuleType:
    """Import ComfyUI into this process, on the CPU unless told otherwise, with `base` as its base directory."""
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    # ComfyUI reads these on import, and a test must neither need a GPU nor write into ComfyUI's own folders.
    args.cpu = cpu
    args.base_directory = str(base)
    args.use_pytorch_cross_attention = True
    import comfy.sd

    return comfy


def load_pack() -> ModuleType:
    """Load the pack as ComfyUI does: by path, under a name of its own, nodes and all."""
    spec = importlib.util.spec_from_file_location("consislora_pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    asyncio.run(extension.get_node_list())
    return pack


@pytest.fixture(scope="session")
def server(tmp_path_factory, pytestconfig):
    """A ComfyServer with the pack in it, one for all tests."""
    from demo.server import ComfyServer

    frontend = front_end_root(pytestconfig.getoption("--front-end-root"), tmp_path_factory.mktemp("frontend"))
    with ComfyServer(tmp_path_factory.mktemp("comfyui"), COMFYUI, *frontend) as server:
        yield server


def front_end_root(chosen: str | None, work: Path) -> list[str]:
    """ComfyUI's option for another frontend than the one it comes with: in a folder, or the newest published."""
    if chosen == "newest":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
        subprocess.run([*pip, "comfyui-frontend-package"], check=True)
        (wheel,) = work.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(work)
        chosen = str(work / "comfyui_frontend_package" / "static")
    return ["--front-end-root", chosen] if chosen else []


@pytest.fixture(scope="session")
def trained(server):
    """Both LoRAs in models/loras/workflows, from few steps with the demo model; the demo's pictures in input."""
    from demo.run import IMAGES

    for file in IMAGES.glob("*.png"):
        server.upload(file)
    server.run(quick("train_and_stylise_demo", rights="photo: A. Smith", permission="trained with permission"))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """The package `comfy`, in this process; after it `import folder_paths`, `import nodes` are ComfyUI's too."""
    return load_comfy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack as a package, in this process: `pack.nodes.NODES`, `pack.nodes.train`, and so on."""
    # Under ComfyUI the core is a part of the pack; one copy of it under both names keeps its classes one.
    core = importlib.import_module("consislora_core")
    names = ["consislora_core", *(f"consislora_core.{module.name}" for module in pkgutil.iter_modules(core.__path__))]
    sys.modules.update({f"consislora_pack.{name}": importlib.import_module(name) for name in names})
    return load_pack()


@pytest.fixture
def in_full_fp32(monkeypatch):
    """A GPU would round what convolutions take in to TF32."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def chromium():
    """A real browser, for one module. Where there is none a person is told so; on CI it must be there."""
    import browser  # and with it Playwright, which the other tests do without

    if browser.chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium found: install it to run the browser tests")
    with browser.browser() as context:
        yield context


@pytest.fixture(scope="module")
def frontend(chromium, server):
    """ComfyUI's frontend, up and empty; `frontend.complaints` gathers what it reports as errors."""
    from browser import opened

    page = opened(chromium, server)
    yield page
    page.close()
