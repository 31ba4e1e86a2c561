"""Writes the subgraph blueprints, nodes made of nodes, from the descriptions below.

    python subgraphs/build.py [http://127.0.0.1:8188]

asks a running ComfyUI that has this pack, at that address, which widgets and sockets every node has.
ComfyUI finds them in this folder and offers them in its node library, under the names of their files.
"""

import json
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from workflows.build import (
    BLUE,
    BOTH,
    BROWN,
    GREEN,
    SDXL,
    TITLE,
    WIDTH,
    Column,
    From,
    Group,
    Node,
    Workflow,
    all_nodes,
    decoded,
    graph_form,
    is_widget,
    latents,
    learn_content,
    learn_style,
    sampling,
    scaled,
    specs,
    text,
    write,
)

FOLDER = Path(__file__).resolve().parent
# The two ends of a subgraph, by the numbers that the frontend gives them. Descriptions take them for nodes.
INPUTS, OUTPUTS = "subgraph inputs", "subgraph outputs"
NUMBERS = {INPUTS: -10, OUTPUTS: -20}


class Blueprint(NamedTuple):
    """description, search: what the node library shows, and other words that find it there (newer frontends).

    asks: the names of the inputs in order, sockets first, which nodes take by `asked`. gives: the outputs by name.
    """

    description: str
    search: list[str]
    asks: list[str]
    gives: dict[str, From]
    workflow: Workflow


def asked(name: str, value: str | int | float | None = None) -> From:
    """An input of the blueprint; value: what its widget shows at first, if not the default."""
    return From("base", name, value)  # where workflows have their base model


MODELS = ["MODEL", "CLIP", "VAE"]
LORAS = {image: asked(image) for image in ("content", "style")}
TRAINED = {"content": From("content_training", "consislora"), "style": From("stage_2_training", "consislora")}
COMMON = {name: asked(name) for name in ("preset", "rank", "seed")}
STAGE_1 = {"steps": asked("steps"), "transition_step": asked("transition_step"), **COMMON}
STAGE_2 = {"steps": asked("style_steps"), **COMMON}
GUIDANCE = {name: asked(name) for name in ("content_guidance", "style_guidance")}
STRENGTH = {name: asked(name) for name in ("content_strength", "style_strength")}
SAMPLED = {name: asked(name, value) for name, value in SDXL.sampling.items()}
SIDE = SDXL.side


def train_a_pair() -> Workflow:
    masked = {"mask": asked("style_mask")}
    settings = SDXL._replace(stage_1={**STAGE_1, **masked}, stage_2={**STAGE_2, **masked})
    images = [
        Group(title, BLUE, [{f"{image}_sized": sized(asked(f"{image}_image")), **latents(image, SDXL)}])
        for image, title in (("content", "The subject"), ("style", "The style"))
    ]
    content = learn_content(SDXL._replace(stage_1=STAGE_1), mask=asked("content_mask"))[:1]
    style = learn_style(settings)[:2]
    return [images, [Group("Learn the subject", BROWN, content), Group("Learn the style, in two stages", BROWN, style)]]


def stylise() -> Workflow:
    size = {"width": asked("width", SIDE), "height": asked("height", SIDE), "batch_size": asked("pictures")}
    inputs = sampling(SDXL._replace(sampling={"seed": asked("seed"), **SAMPLED, **GUIDANCE, **STRENGTH}))
    made = {"sampled": sampled({**LORAS, **inputs}), "decoded": decoded()}
    return [[Group("The subject in the style", GREEN, [words(size), made])]]


def catalogue_cell() -> Workflow:
    """The workflow `catalogue` with its settings outside."""
    folders = {name: asked(name) for name in ("contents", "styles", "catalogue", "index")}
    size = {side: From("pairs", side) for side in ("width", "height")}
    settings = SDXL._replace(
        stage_1={"preset": asked("preset"), "steps": asked("train_steps"), "transition_step": asked("transition_step")},
        stage_2={"preset": asked("preset"), "steps": asked("style_steps")},
    )
    inputs = sampling(SDXL._replace(sampling={"seed": asked("seed"), **SAMPLED, **GUIDANCE}))
    coloured = {"images": From("decoded", "IMAGE"), "content_image": From("pairs", "content")}
    saved = {"images": From("coloured", "images"), "job": From("pairs", "job"), **TRAINED, "size": asked("size")}
    pairs = Node(
        "ConsisLoRACatalogLoad", "One subject, one style", {**folders, "resolution": asked("resolution", SIDE)}
    )
    fitted = {"image": From("pairs", "content"), "upscale_method": "lanczos", **size}
    columns = [
        {"pairs": pairs},
        {"content_sized": Node("ImageScale", "To the latent's size", fitted), **latents("content", SDXL)},
        {"style_sized": sized(From("pairs", "style")), **latents("style", SDXL)},
    ]
    made = {
        "sampled": sampled({**TRAINED, **inputs}),
        "decoded": decoded(),
        "coloured": Node(
            "ConsisLoRAKeepColours", "The product's own colours", {**coloured, "keep_colours": asked("keep_colours")}
        ),
        "result": Node("ConsisLoRACatalogSave", "Into the catalogue", saved),
    }
    return [
        [Group("The folders", BLUE, columns)],
        [
            Group("Learn the subject", BROWN, learn_content(settings)[:1]),
            Group("Learn the style, in two stages", BROWN, learn_style(settings)[:2]),
        ],
        [Group("The subject in the style", GREEN, [words({**size, "batch_size": 1}), made])],
    ]


def words(size: dict) -> Column:
    return {
        "positive": text("Prompt", asked("prompt", BOTH)),
        "negative": text("Negative prompt", asked("negative_prompt", "")),
        "empty": Node("EmptyLatentImage", "Size of the picture", size),
    }


def sized(image: From) -> Node:
    return scaled(image, asked("resolution", SIDE))


def sampled(inputs: dict) -> Node:
    return Node("ConsisLoRASampler", "Sample, guided", {"model": asked("MODEL"), **inputs})


BLUEPRINTS = {
    "Train a Pair (ConsisLoRA)": Blueprint(
        "Learns the subject of one picture and the style of another: two LoRAs, for Stylise (ConsisLoRA) or Save "
        "ConsisLoRA. Wants an SDXL model; the same pictures and settings are trained only once. An empty mask input "
        "learns the whole picture.",
        ["style transfer", "train lora", "b-lora", "sdxl lora"],
        [*MODELS, "content_image", "style_image", "content_mask", "style_mask"]
        + ["preset", "steps", "transition_step", "style_steps", "rank", "seed", "resolution"],
        TRAINED,
        train_a_pair(),
    ),
    "Stylise (ConsisLoRA)": Blueprint(
        "Draws the prompt with the subject of one LoRA in the style of another, each with its own guidance and "
        "strength. Takes what Train a Pair (ConsisLoRA) or Load ConsisLoRA gives; either may be missing.",
        ["style transfer", "b-lora", "text to image", "dual guidance"],
        [*MODELS, *LORAS, "prompt", "negative_prompt", *GUIDANCE, *STRENGTH, "width", "height", "pictures", "seed"]
        + list(SAMPLED),
        {"images": From("decoded", "IMAGE")},
        stylise(),
    ),
    "Catalogue Cell (ConsisLoRA)": Blueprint(
        "One cell of a catalogue: takes the pair of this index from a folder of subjects and a folder of styles, "
        "learns both, draws the subject in the style, and saves it into the catalogue's folder. What is done is "
        "skipped, and a picture that was learned for one cell is not learned again for another.",
        ["style transfer", "batch", "folder", "catalog"],
        [*MODELS, "contents", "styles", "catalogue", "index", "prompt", "negative_prompt", *GUIDANCE, "keep_colours"]
        + ["preset", "train_steps", "transition_step", "style_steps", "seed", *SAMPLED, "resolution", "size"],
        {"images": From("coloured", "images")},
        catalogue_cell(),
    ),
}


def files(object_info: dict) -> dict[Path, str]:
    """The text of every blueprint's file, by its path; `object_info` is the answer of the server's /object_info.

    In ASCII: ComfyUI 0.3.75 reads these files in the encoding of the system.
    """
    return {
        FOLDER / f"{name}.json": json.dumps(workflow_form(name, blueprint, object_info), indent=1) + "\n"
        for name, blueprint in BLUEPRINTS.items()
    }


def workflow_form(name: str, blueprint: Blueprint, object_info: dict) -> dict:
    """What the frontend takes as a blueprint: a workflow of one node, which is a subgraph."""
    subgraph = subgraph_form(name, blueprint, object_info)
    inputs = [
        {"name": slot["name"], "type": slot["type"], "link": None}
        | ({"widget": {"name": slot["name"]}} if slot["name"] in promoted(blueprint, object_info) else {})
        for slot in subgraph["inputs"]
    ]
    outputs = [{"name": slot["name"], "type": slot["type"], "links": []} for slot in subgraph["outputs"]]
    node = {
        "id": 1,
        "type": subgraph["id"],
        "title": name,
        "pos": [0, 0],
        "size": [WIDTH, TITLE * (len(inputs) + 1)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": blueprint.search},
    }


def subgraph_form(name: str, blueprint: Blueprint, object_info: dict) -> dict:
    """The definition of a subgraph, as the frontend saves it."""
    made = graph_form(between_ends(blueprint), with_ends(blueprint, object_info))
    ends = {node["type"]: node for node in made["nodes"] if node["type"] in NUMBERS}
    numbers = {ends[end]["id"]: number for end, number in NUMBERS.items()}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, link, strict=True)) for link in made["links"]]
    for link in links:
        for side in ("origin_id", "target_id"):
            link[side] = numbers.get(link[side], link[side])
    inputs = [slot_form(name, "input", slot, slot["links"]) for slot in ends[INPUTS]["outputs"]]
    outputs = [slot_form(name, "output", slot, [slot["link"]]) for slot in ends[OUTPUTS]["inputs"]]
    subgraph = {
        "id": identity(name),
        "version": 1,
        "state": {
            "lastGroupId": len(made["groups"]),
            "lastNodeId": made["last_node_id"],
            "lastLinkId": made["last_link_id"],
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "category": "ConsisLoRA",
        "description": blueprint.description,
        "inputNode": {"id": NUMBERS[INPUTS], "bounding": ends[INPUTS]["pos"] + ends[INPUTS]["size"]},
        "outputNode": {"id": NUMBERS[OUTPUTS], "bounding": ends[OUTPUTS]["pos"] + ends[OUTPUTS]["size"]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": [node for node in made["nodes"] if node["type"] not in NUMBERS],
        "groups": [group for group in made["groups"] if group["title"]],
        "links": links,
        "extra": {},
    }
    number_inputs(subgraph, object_info)
    return subgraph


def slot_form(blueprint: str, side: str, slot: dict, links: list[int]) -> dict:
    name = slot["name"]
    return {"id": identity(blueprint, side, name), "name": name.lower(), "type": slot["type"], "linkIds": links}


def between_ends(blueprint: Blueprint) -> Workflow:
    """The nodes of a blueprint between its inputs and its outputs."""
    start = Group("", "", [{"base": Node(INPUTS, "")}])
    end = Group("", "", [{"given": Node(OUTPUTS, "", blueprint.gives)}])
    return [[start], *blueprint.workflow, [end]]


def with_ends(blueprint: Blueprint, object_info: dict) -> dict:
    """What the server says of its nodes, and the same of the two ends."""
    inputs = {name: type_of(spec) for name, spec in wanted(blueprint, object_info).items()}
    made = all_nodes(blueprint.workflow)
    outputs = {}
    for name, (key, output, _) in blueprint.gives.items():
        node = object_info[made[key].type]
        outputs[name] = [node["output"][node["output_name"].index(output)], {"forceInput": True}]
    return object_info | {
        INPUTS: {"input": {}, "output_name": list(inputs), "output": list(inputs.values())},
        OUTPUTS: {"input": {"required": outputs}, "output_name": [], "output": []},
    }


def wanted(blueprint: Blueprint, object_info: dict) -> dict[str, list]:
    """The specs of a blueprint's inputs by name, each from the first node that takes it."""
    found = {}
    for node in all_nodes(blueprint.workflow).values():
        for name, value in node.inputs.items():
            if isinstance(value, From) and value.node == "base":
                found.setdefault(value.output, specs(node.type, object_info)[name])
    assert sorted(found) == sorted(blueprint.asks), found.keys() ^ set(blueprint.asks)
    return {name: found[name] for name in blueprint.asks}


def promoted(blueprint: Blueprint, object_info: dict) -> list[str]:
    """The inputs that are widgets of the blueprint's node."""
    return [name for name, spec in wanted(blueprint, object_info).items() if is_widget(spec)]


def number_inputs(subgraph: dict, object_info: dict) -> None:
    """Gives nodes all their inputs, as the frontend numbers them: in a subgraph it finds links by number alone."""
    for node in subgraph["nodes"]:
        known, written = specs(node["type"], object_info), {slot["name"]: slot for slot in node["inputs"]}
        before = list(written)
        order = sorted(known, key=lambda name: is_widget(known[name]))
        node["inputs"] = [written.get(name) or unlinked(name, known[name]) for name in order]
        for link in subgraph["links"]:
            if link["target_id"] == node["id"]:
                link["target_slot"] = order.index(before[link["target_slot"]])


def unlinked(name: str, spec: list) -> dict:
    return {"name": name, "type": type_of(spec), "link": None, "widget": {"name": name}}


def type_of(spec: list) -> str:
    """What a socket of an input is called; choices are given as a list by older nodes."""
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def identity(*names: str) -> str:
    """The same at every build, or workflows would hold a blueprint twice."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(["consislora", *names])))


if __name__ == "__main__":
    write(files)
