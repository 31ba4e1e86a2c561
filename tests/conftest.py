"""The fixtures: a real server, ComfyUI in this process, the pack loaded as ComfyUI loads it, a browser."""

import contextlib
import importlib
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from in_process import COMFYUI, ROOT, load_comfy, load_pack
from prompts import quick

# A shell that starts tests in the background has them ignore Ctrl-C, and the programs to which they send it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# At the end: ComfyUI goes to the front, and its `nodes` must be found before ours.
sys.path.append(str(ROOT))


NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"


def pytest_addoption(parser):
    parser.addoption(
        "--front-end-root", metavar="DIR", help="test with this frontend of ComfyUI; `newest` fetches the newest"
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory, pytestconfig):
    """A ComfyServer with the pack in it, one for all tests."""
    from demo.server import ComfyServer

    frontend = front_end_root(pytestconfig.getoption("--front-end-root"), tmp_path_factory.mktemp("frontend"))
    with ComfyServer(tmp_path_factory.mktemp("comfyui"), COMFYUI, *frontend) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(server):
    """What the server says of every node."""
    return server.get("/object_info")


def front_end_root(chosen: str | None, work: Path) -> list[str]:
    """ComfyUI's option for another frontend than the one it comes with: in a folder, or the newest published."""
    if chosen == "newest":
        chosen = str(fetch_frontend("comfyui-frontend-package", work))
    return ["--front-end-root", chosen] if chosen else []


def fetch_frontend(package: str, work: Path) -> Path:
    """The files of a published frontend, which are kept in `work`. Raises CalledProcessError if pip gets none."""
    static = work / "comfyui_frontend_package" / "static"
    if not static.exists():
        with tempfile.TemporaryDirectory(dir=work) as unfinished:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", unfinished]
            subprocess.run([*pip, package], check=True)
            (wheel,) = Path(unfinished).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(unfinished)
            with contextlib.suppress(OSError):  # another process of the same run was quicker
                (Path(unfinished) / static.parent.name).rename(static.parent)
    return static


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
    """The pack as a package, in this process: `pack.nodes.NODES`, `pack.host.guider`, and so on."""
    # Tests import these rooms by themselves as well: the same modules under both names keep their classes the same.
    for room in ("consislora_core", "catalogue"):
        modules = pkgutil.iter_modules(importlib.import_module(room).__path__)
        for name in [room, *(f"{room}.{module.name}" for module in modules)]:
            sys.modules[f"consislora_pack.{name}"] = importlib.import_module(name)
    return load_pack()


@pytest.fixture(scope="module")
def host():
    """(denoiser, z_0, cond) on the tiny UNet in diffusers."""
    from reference import diffusers_denoiser, diffusers_unet, run

    tensors = run("stage1_content")
    cond = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"], tensors["time_ids"][None]
    return diffusers_denoiser(diffusers_unet()), tensors["z_0"], cond


@pytest.fixture
def guide(pack):
    """The guidance nodes."""
    return pack.nodes.guide


@pytest.fixture(scope="module")
def loras():
    """The authors' LoRAs of a content image and a style image."""
    from reference import DATA

    from consislora_core import lora_file

    files = {"content": "stage1_content", "style": "stage2_style"}
    return {image: lora_file.read(DATA / "loras" / f"{name}.safetensors") for image, name in files.items()}


@pytest.fixture
def in_full_fp32(monkeypatch):
    """A GPU would round what convolutions take in to TF32."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def store(pack):
    """The store of trainings in this process, empty, or a test would get what another one has trained."""
    store = pack.host.paths.training_store()
    shutil.rmtree(store.folder, ignore_errors=True)
    return store


@pytest.fixture(scope="module")
def chromium():
    """A real browser, for one module. Without one its tests are skipped, but fail on CI."""
    import browser  # and with it Playwright, which the other tests do without

    if browser.chromium() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium found: install it to run the browser tests")
    with browser.browser() as context:
        yield context


@pytest.fixture(scope="module")
def frontend(chromium, server):
    """ComfyUI's frontend with an empty graph; `frontend.complaints` collects the errors that it reports."""
    from browser import opened

    page = opened(chromium, server)
    yield page
    page.close()


@pytest.fixture(scope="module", params=["own", NEWEST_FRONTEND])
def each_frontend(request, chromium, server, pytestconfig):
    """The frontend that ComfyUI comes with, and the newest one that we know, in turn."""
    from browser import opened

    static = None
    if request.param != "own":
        work = pytestconfig.cache.mkdir(request.param.replace("==", "-"))
        try:
            static = fetch_frontend(request.param, work)
        except subprocess.CalledProcessError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{request.param} could not be fetched: {error}")
    page = opened(chromium, server, static)
    yield page
    page.close()
