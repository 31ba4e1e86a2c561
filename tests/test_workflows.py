"""The shared workflow files: up to date, known to the server, and the same in the real frontend."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from demo.run import IMAGES, NAME

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
USES = ["content_only", "dual_guidance", "style_only"]  # of saved LoRAs
NAMES = [f"{use}_{base}" for use in ["catalogue", *USES, "train_and_stylise"] for base in ("demo", "sdxl")]
FEW = {"steps": 4, "transition_step": 2, "learning_rate": 0.01, "reconstruction_learning_rate": 0.01}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
# The frontend looks unpublished nodes up in ComfyUI's registry; a server without API nodes forbids it that.
ELSEWHERE = ("Failed to load resource", "Content Security Policy")


def graph(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def quick(name: str, **changes) -> dict:
    """The API form with few but long steps and other changed inputs, its LoRAs in a folder that no other test uses."""
    prompt = json.loads(json.dumps(api(name)).replace('"consislora/', '"workflows/'))
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in {**FEW, **changes}.items() if key in node["inputs"]}
    return prompt


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def chromium():
    """A real browser. Where there is none a person is told so; on CI it must be there."""
    path = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium found: install it to run the browser tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        context = browser.new_context(viewport={"width": 1800, "height": 1000})
        context.set_default_timeout(300_000)  # a busy machine takes minutes to draw its first page
        yield context
        browser.close()


@pytest.fixture
def frontend(chromium, server):
    """ComfyUI's frontend, up and empty; `frontend.complaints` gathers what it reports as errors."""
    page = chromium.new_page()
    page.complaints = []
    page.on("console", lambda said: said.type == "error" and complain(page, said.text))
    page.on("pageerror", lambda error: complain(page, str(error)))
    page.goto(server.url)
    page.wait_for_function("window.app?.graph && window.app.vueAppReady")
    yield page
    page.close()


def complain(page, text: str) -> None:
    if not any(reason in text for reason in ELSEWHERE):
        page.complaints.append(text)


def test_the_files_are_what_the_generator_makes(build, object_info):
    stale = [path.name for path, text in build.files(object_info).items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python workflows/build.py` beside a running ComfyUI"


def test_only_graph_forms_are_templates(server):
    assert sorted(server.get("/workflow_templates")["ComfyUI-ConsisLoRA"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_server_knows_every_node_and_input_and_misses_none(name, object_info):
    for node in api(name).values():
        known = object_info[node["class_type"]]["input"]
        required, optional = known.get("required", {}), known.get("optional", {})
        assert required.keys() <= node["inputs"].keys() <= required.keys() | optional.keys()


@pytest.mark.parametrize("name", NAMES)
def test_links_join_slots_of_one_type_that_name_the_link(name):
    nodes = {node["id"]: node for node in graph(name)["nodes"]}
    for link, origin, output, target, slot, kind in graph(name)["links"]:
        assert nodes[origin]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert link in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


@pytest.mark.parametrize("name", NAMES)
def test_every_node_lies_in_one_group_and_on_no_other_node(name):
    boxes = [[*node["pos"], *node["size"]] for node in graph(name)["nodes"]]
    groups = [group["bounding"] for group in graph(name)["groups"]]
    assert all(sum(overlap(box, group) for group in groups) == 1 for box in boxes)
    assert not any(overlap(one, other) for i, one in enumerate(boxes) for other in boxes[:i])


def overlap(one: list, other: list) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_frontend_opens_it_and_queues_the_same_as_the_api_form(name, frontend):
    frontend.complaints.clear()
    prompt = frontend.evaluate(
        """async graph => {
            await window.app.loadGraphData(graph)
            return (await window.app.graphToPrompt()).output
        }""",
        graph(name),
    )
    assert prompt == api(name)
    assert frontend.locator(".comfy-missing-nodes").count() == 0
    assert frontend.evaluate("window.app.graph.nodes.filter(node => node.has_errors).map(node => node.title)") == []
    assert frontend.complaints == []


def test_the_address_that_the_demo_opens_shows_the_workflow(chromium, server):
    page = chromium.new_page()
    page.goto(f"{server.url}/?template={NAME}&source=ComfyUI-ConsisLoRA")
    count = len(graph(NAME)["nodes"])
    page.wait_for_function(f"window.app?.graph?.nodes.length === {count}")
    page.close()


def test_what_training_saves_first_makes_pictures_that_guidance_changes(server):
    for file in IMAGES.glob("*.png"):
        server.upload(file)
    server.run(quick("train_and_stylise_demo"))
    off = {"content_guidance": 0.0, "style_guidance": 0.0}
    pictures = [made(server, quick(f"{use}_demo", **changes)) for use in USES for changes in ({}, off)]
    assert all(picture.size == (128, 128) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def made(server, prompt: dict) -> Image.Image:
    (file,) = server.images(server.run(prompt))
    with Image.open(file) as image:
        return image.convert("RGB")
