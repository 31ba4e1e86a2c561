"""The subgraph blueprints: up to date, in the node library, and at work on the canvas of both frontends."""

import json
import re
import shutil

import pytest
from browser import queue, queued
from prompts import load_script
from test_help import ROOT

from demo.run import IMAGES

FOLDER = ROOT / "subgraphs"
TRAIN, STYLISE, CELL = NAMES = [f"{name} (ConsisLoRA)" for name in ("Train a Pair", "Stylise", "Catalogue Cell")]
TURN = """([id, name, value]) => {
    app.graph.getNodeById(id).widgets.find(widget => widget.name === name).value = value
}"""
SEEN = """name => app.graph.nodes.filter(({ title }) => title === name).map(({ id }) => id)[0]"""
VALUES = """id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(({ name, value }) => [name, value]))"""
# Nodes of ComfyUI around those that are there, and links as [from, its output, to, its input].
CONNECT = """([kinds, links]) => {
    for (const [type, values] of kinds) {
        const node = LiteGraph.createNode(type)
        app.graph.add(node)
        for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name]
        node.title = values.title ?? type
    }
    const titled = title => app.graph.nodes.find(node => node.title === title)
    for (const [from, output, to, input] of links) {
        const source = titled(from), target = titled(to)
        source.connect(
            source.outputs.findIndex(({ name }) => name === output), target,
            target.inputs.findIndex(({ name }) => name === input))
    }
}"""
DRAWN = """app.graph.nodes.some(({ type, imgs }) => type === "PreviewImage" && imgs?.[0]?.naturalWidth)"""
MODEL = [("base", output, to, output.lower()) for output in ("MODEL", "CLIP", "VAE") for to in NAMES]


@pytest.fixture(scope="module")
def build():
    return load_script(FOLDER / "build.py")


@pytest.fixture
def empty(each_frontend):
    each_frontend.complaints.clear()
    each_frontend.evaluate("app.graph.clear()")
    yield each_frontend
    assert each_frontend.complaints == []


def test_the_files_are_what_the_generator_makes(build, object_info):
    made = build.files(object_info)
    stale = [path.name for path, text in made.items() if not path.exists() or path.read_text(encoding="ascii") != text]
    assert not stale, "run `python subgraphs/build.py` beside a running ComfyUI"
    assert set(made) == set(FOLDER.glob("*.json"))


def test_the_server_offers_each_of_them(server):
    entries = server.get("/global_subgraphs").values()
    assert {entry["name"] for entry in entries if "ConsisLoRA" in entry["info"]["node_pack"]} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_added_from_the_node_library_every_widget_turns_what_it_is_named_for(name, empty, object_info):
    host = added(empty, name)
    (node,), (subgraph,) = written(name)["nodes"], written(name)["definitions"]["subgraphs"]
    widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    assert widgets and set(widgets) <= empty.evaluate(VALUES, host).keys()
    at_first = queued(empty)
    for inner in at_first.values():
        for input, value in inner["inputs"].items():
            assert isinstance(value, list) or fits(value, spec(object_info, inner["class_type"], input)), (input, value)
    for slot in subgraph["inputs"]:
        if slot["name"] in widgets:
            targets = targets_of(slot, subgraph)
            type, input = targets[0][1:]
            value = another(at_first[f"{host}:{targets[0][0]}"]["inputs"][input], spec(object_info, type, input))
            empty.evaluate(TURN, [host, slot["name"], value])
            prompt = queued(empty)
            assert all(prompt[f"{host}:{number}"]["inputs"][input] == value for number, _, input in targets), slot


def test_a_pair_is_trained_and_drawn(empty, server):
    for file in ("crown-flat.png", "balloon-halftone.png"):
        server.upload(IMAGES / file)
    few = {"steps": 2, "transition_step": 1, "style_steps": 1, "rank": 4, "resolution": 256}
    for name, values in ((TRAIN, few), (STYLISE, {"width": 256, "height": 256, "steps": 2})):
        host = added(empty, name)
        for widget, value in values.items():
            empty.evaluate(TURN, [host, widget, value])
    kinds = [("ConsisLoRADemoModel", {"title": "base"}), ("PreviewImage", {})]
    kinds += [("LoadImage", {"title": file, "image": file}) for file in ("crown-flat.png", "balloon-halftone.png")]
    links = [
        *(link for link in MODEL if link[2] != CELL),
        ("crown-flat.png", "IMAGE", TRAIN, "content_image"),
        ("balloon-halftone.png", "IMAGE", TRAIN, "style_image"),
        *((TRAIN, image, STYLISE, image) for image in ("content", "style")),
        (STYLISE, "images", "PreviewImage", "images"),
    ]
    empty.evaluate(CONNECT, [kinds, links])
    queue(empty)
    empty.wait_for_function(DRAWN)


def test_a_cell_makes_the_pair_of_its_index(empty, server):
    catalogue = server.base / "input" / "cells"
    for folder, names in (("contents", ["crown-flat", "owl-flat"]), ("styles", ["balloon-halftone"])):
        (catalogue / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(IMAGES / f"{name}.png", catalogue / folder)
    made = f"cells {id(empty)}"
    values = {"contents": "cells/contents", "styles": "cells/styles", "catalogue": made, "resolution": 256}
    values |= {"train_steps": 2, "transition_step": 1, "style_steps": 1, "steps": 2}
    host = added(empty, CELL)
    for widget, value in values.items():
        empty.evaluate(TURN, [host, widget, value])
    empty.evaluate(CONNECT, [[("ConsisLoRADemoModel", {"title": "base"})], [link for link in MODEL if link[2] == CELL]])
    results = server.base / "output" / made
    for index in (0, 1):
        empty.evaluate(TURN, [host, "index", index])
        queue(empty)
        while len([*results.glob("*.png")]) <= index:
            empty.wait_for_timeout(200)
            assert not failed(server)


def failed(server) -> bool:
    """Whether the last workflow ended with an error."""
    return any(last["status"]["status_str"] == "error" for last in server.get("/history?max_items=1").values())


def added(frontend, name: str) -> int:
    """Adds a blueprint to the canvas from the node library; its node's id."""
    search = frontend.get_by_placeholder(re.compile(r"^Search( Nodes)?\.\.\.$")).first
    if not search.is_visible():
        frontend.locator("#graph-canvas").focus()
        frontend.keyboard.press("n")
    search.fill(name)
    frontend.get_by_text(name, exact=True).first.click()
    if (host := frontend.evaluate(SEEN, name)) is None:  # newer frontends wait for the place to put it
        frontend.mouse.click(1100, 500)
        frontend.wait_for_function(f"name => ({SEEN})(name) !== undefined", arg=name)
        host = frontend.evaluate(SEEN, name)
    return host


def written(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="ascii"))


def targets_of(slot: dict, subgraph: dict) -> list[tuple[int, str, str]]:
    """The inner nodes behind an input, as (number, type, input)."""
    nodes, links = ({entry["id"]: entry for entry in subgraph[kind]} for kind in ("nodes", "links"))
    ends = [(nodes[links[link]["target_id"]], links[link]["target_slot"]) for link in slot["linkIds"]]
    return [(node["id"], node["type"], node["inputs"][number]["name"]) for node, number in ends]


def spec(object_info: dict, type: str, input: str) -> list:
    known = object_info[type]["input"]
    return {**known.get("required", {}), **known.get("optional", {})}[input]


def choices(spec: list) -> list | None:
    return spec[0] if isinstance(spec[0], list) else spec[1].get("options")


def fits(value, spec: list) -> bool:
    """Whether a widget can have this value."""
    if choices(spec):
        return value in choices(spec)
    if spec[0] in ("INT", "FLOAT"):
        return isinstance(value, int | float) and spec[1]["min"] <= value <= spec[1]["max"]
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[spec[0]])


def another(value, spec: list):
    """Another value that the widget can have."""
    if choices(spec):
        return next(choice for choice in choices(spec) if choice != value)
    return "turned" if isinstance(value, str) else value + spec[1].get("step", 1)
