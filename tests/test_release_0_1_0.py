"""What people have from version 0.1.0 works on: its workflows and its LoRAs, made by that version."""

import json
import shutil

import pytest
from browser import drop
from reference import DATA
from test_workflows import FILE_LOADERS

from consislora_core import lora_file
from demo.run import IMAGES

FOLDER = DATA / "release_0.1.0"


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_a_workflow_trains_and_draws(server):
    prompt = read("train_and_stylise_demo_api.json")
    few = {"steps": 4, "transition_step": 2, "rank": 4, "filename": "release/old"}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in few.items() if name in node["inputs"]}
    for picture in IMAGES.glob("*.png"):
        server.upload(picture)
    assert server.images(server.run(prompt))


@pytest.mark.parametrize("name", ["train_and_stylise_demo", "dual_guidance_sdxl"])
def test_a_workflow_opens_with_nothing_missing(name, frontend):
    frontend.complaints.clear()
    drop(frontend, name, read(f"{name}.json"))
    nodes = "app.graph.nodes.filter((node) => {}).map((node) => node.title)"
    assert frontend.evaluate(nodes.format("!(node.type in LiteGraph.registered_node_types)")) == []
    assert frontend.evaluate(nodes.format(f"node.has_errors && !{FILE_LOADERS}.includes(node.type)")) == []
    assert frontend.complaints == []


def test_a_lora_is_loaded(server):
    folder = server.base / "models" / "loras" / "release"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / "content.safetensors", folder)
    load = {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": "release/content.safetensors"}}
    server.run({"1": load, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}})
    lora = lora_file.read(FOLDER / "content.safetensors")
    assert {role: len(part) for role, part in lora.parts.items()} == {"content": 16, "style": 16}
    assert {layer.alpha for part in lora.parts.values() for layer in part.values()} == {4.0}
