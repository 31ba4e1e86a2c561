"""The shared workflow files: up to date, known to the server, and the same in the real frontend."""

from io import BytesIO
from pathlib import Path

import av
import pytest
from browser import drop, queued
from images import write_film
from PIL import Image
from prompts import FOLDER, api, graph, load_script, quick
from test_help import open_without_proxy

from demo.run import NAME

USES = ["content_only", "dual_guidance", "style_only"]  # of saved LoRAs
OTHERS = ["catalogue", "catalogue_cut_out", "evaluate_and_gate", "frames", "multi_reference", "strength_grid"]
OTHERS += ["structure_lock", "train_and_stylise", "train_content", "train_style"]
NAMES = sorted(f"{use}_{base}" for use in [*USES, *OTHERS] for base in ("demo", "sdxl"))
MADE_BESIDE = "0.3.75"
# Newer frontends mark these when the server lacks the file, as it does the checkpoint and what nobody has trained yet.
FILE_LOADERS = ["CheckpointLoaderSimple", "CLIPVisionLoader", "ConsisLoRALoad", "LoadImage", "LoadVideo"]


@pytest.fixture(scope="module")
def build():
    return load_script(FOLDER / "build.py")


def test_the_files_are_what_the_generator_makes(build, object_info, server):
    if server.get("/system_stats")["system"]["comfyui_version"] != MADE_BESIDE:
        pytest.skip(f"the files are made beside ComfyUI {MADE_BESIDE}; newer nodes have outputs that nothing here uses")
    stale = [path.name for path, text in build.files(object_info).items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python workflows/build.py` beside a running ComfyUI"


def test_only_graph_forms_are_templates(server):
    assert sorted(server.get("/workflow_templates")["ComfyUI-ConsisLoRA"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_template_browser_gets_a_picture(name, server):
    address = f"{server.url}/api/workflow_templates/ComfyUI-ConsisLoRA/{name}.jpg"
    with open_without_proxy(address) as answer, Image.open(BytesIO(answer.read())) as picture:
        assert picture.format == "JPEG" and picture.width > picture.height


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
        assert nodes[target]["inputs"][slot]["type"] == kind
        assert kind in (nodes[origin]["outputs"][output]["type"], "*")
        assert link in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


@pytest.mark.parametrize("name", NAMES)
def test_the_app_shows_what_one_turns_under_names_that_differ(name, object_info):
    nodes = {node["id"]: node for node in graph(name)["nodes"]}
    app = graph(name)["extra"]["linearData"]
    labels = {
        (number, slot["name"]): slot["label"] for number in nodes for slot in nodes[number]["inputs"] if "label" in slot
    }
    shown = [labels.get((number, widget), widget) for number, widget in app["inputs"]]
    assert len(set(shown)) == len(shown) >= 1
    assert all(widget in api(name)[str(number)]["inputs"] for number, widget in app["inputs"])
    assert app["outputs"] and all(object_info[nodes[number]["type"]]["output_node"] for number in app["outputs"])


@pytest.mark.parametrize("name", NAMES)
def test_every_node_lies_in_one_group_and_on_no_other_node(name):
    boxes = [[*node["pos"], *node["size"]] for node in graph(name)["nodes"]]
    groups = [group["bounding"] for group in graph(name)["groups"]]
    assert all(sum(overlap(box, group) for group in groups) == 1 for box in boxes)
    assert not any(overlap(one, other) for i, one in enumerate(boxes) for other in boxes[:i])


def overlap(one: list, other: list) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_dropped_onto_the_canvas_it_queues_the_same_as_the_api_form(name, frontend):
    frontend.complaints.clear()
    drop(frontend, name, graph(name))
    assert as_saved(queued(frontend), api(name)) == api(name)
    assert nodes_where(frontend, "!(node.type in LiteGraph.registered_node_types)") == []  # missing ones
    assert nodes_where(frontend, f"node.has_errors && !{FILE_LOADERS}.includes(node.type)") == []
    # A widget hangs out; but in ComfyUI 0.33 the preview of a film asks for more than there is, whatever there is.
    assert nodes_where(frontend, "node.computeSize()[1] > node.size[1] && node.type != 'LoadVideo'") == []
    assert frontend.complaints == []


def nodes_where(frontend, condition: str) -> list[str]:
    return frontend.evaluate(f"app.graph.nodes.filter(node => {condition}).map(node => node.title)")


def as_saved(prompt: dict, saved: dict) -> dict:
    """Without what ComfyUI's own nodes have beside the saved inputs: a shown text, or inputs that a newer one added."""
    for name, node in prompt.items():
        if not node["class_type"].startswith("ConsisLoRA"):
            names = saved.get(name, node)["inputs"]
            node["inputs"] = {key: value for key, value in node["inputs"].items() if key in names}
    return prompt


def test_the_address_that_the_demo_opens_shows_the_workflow(chromium, server):
    page = chromium.new_page()
    page.goto(f"{server.url}/?template={NAME}&source=ComfyUI-ConsisLoRA")
    count = len(graph(NAME)["nodes"])
    page.wait_for_function(f"window.app?.graph?.nodes.length === {count}")
    page.close()


def test_guidance_changes_the_pictures_of_what_training_saves_first(server, trained):
    off = {"content_guidance": 0.0, "style_guidance": 0.0}
    pictures = [made(server, quick(f"{use}_demo", **changes)) for use in USES for changes in ({}, off)]
    assert all(picture.size == (256, 256) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_grid_shows_every_pair_and_each_picture_is_another(server, trained):
    *single, page = sorted(server.images(server.run(quick("strength_grid_demo", steps=3))), key=size)
    assert [size(file) for file in single] == 9 * [(256, 256)]
    assert min(size(page)) > 3 * 256
    assert len({Image.open(file).tobytes() for file in single}) == 9


def test_four_pictures_are_split(server, trained):
    saved = server.images(server.run(quick("evaluate_and_gate_demo", steps=1)))
    assert sum(file.name.startswith(("consislora_accepted", "consislora_rejected")) for file in saved) == 4


def test_a_film_comes_back_with_all_its_frames(server, trained):
    write_film(server.base / "input" / "short.mp4", 3)
    files = server.images(server.run(quick("frames_demo", file="short.mp4")))
    with Image.open(next(file for file in files if file.suffix == ".webp")) as clip:
        assert (clip.size, clip.n_frames) == ((256, 256), 3)
    with av.open(next(file for file in files if file.suffix == ".mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 3


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def made(server, prompt: dict) -> Image.Image:
    (file,) = server.images(server.run(prompt))
    with Image.open(file) as image:
        return image.convert("RGB")
