"""A job put into the shared workflow, and what the server would not take of it."""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from consislora_core.catalog import SETTINGS, Job
from consislora_core.files import portable

INPUTS = "consislora_batch"  # folder in the server's input folder; pictures there are named by their bytes
PROMPTS = {"prompt": "positive", "negative_prompt": "negative"}
ADAPTERS = {"content_lora": "content", "style_lora": "style"}

Workflow = dict[str, dict]  # ComfyUI's API form: nodes by id


def catalogue_folder(name: str) -> str:
    """The folder in the server's output folder for the results of a sheet."""
    return f"consislora_batch/{portable(name)}"


def filled(
    workflow: Workflow, job: Job, content: str, style: str, folder: str, metadata: dict[str, dict]
) -> tuple[Workflow, str]:
    """The workflow of one job, and its key: the name that its picture has on the server.

    content, style: names of the uploaded pictures. folder: the catalogue's on the server. metadata: of LoRA files by
    name; ours tell their weights by a hash, so that a file replaced under its name makes another job. Raises ValueError
    for a workflow that lacks what the job needs.
    """
    made = copy.deepcopy(workflow)
    load, save = (the_one(made, f"ConsisLoRACatalog{verb}") for verb in ("Load", "Save"))
    pictures = {"contents": f"{INPUTS}/{content}", "styles": f"{INPUTS}/{style}", "catalogue": folder}
    made[load]["inputs"] |= {**pictures, "run": "one pair per run", "index": 0, "name": ""}
    for column in SETTINGS:
        for node in takers(made, job, column, column):
            node["inputs"][column] = getattr(job, column)
    for column, socket in PROMPTS.items():
        for node in takers(made, job, column, socket):
            made[node["inputs"][socket][0]]["inputs"]["text"] = getattr(job, column)
    for column, socket in ADAPTERS.items():
        for node in [*takers(made, job, column, socket), made[save]] if getattr(job, column) else []:
            node["inputs"][socket] = [column, 0]
            made[column] = {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": getattr(job, column)}}
    made = {node: made[node] for node in reached(made, save)}
    adapters = [metadata.get(getattr(job, column)) for column in ADAPTERS]
    key = hashlib.sha256(json.dumps([made, adapters], sort_keys=True).encode()).hexdigest()[:32]
    made[load]["inputs"]["name"] = key
    return made, key


def the_one(workflow: Workflow, kind: str) -> str:
    found = [node for node, content in workflow.items() if content["class_type"] == kind]
    if len(found) != 1:
        raise ValueError(f"the workflow has {len(found)} nodes of the kind {kind}; it needs exactly one.")
    return found[0]


def takers(workflow: Workflow, job: Job, column: str, name: str) -> list[dict]:
    """The nodes that mix or guide content and style and have an input of that name, if the job has that column."""
    if getattr(job, column) is None:
        return []
    mixers = [node for node in workflow.values() if {"content_strength", "content_guidance"} & node["inputs"].keys()]
    found = [node for node in mixers if name in node["inputs"]]
    if not found:
        raise ValueError(f"no node of the workflow takes {column}. Leave the column empty, or choose another workflow.")
    return found


def reached(workflow: Workflow, last: str) -> list[str]:
    """The node and all that it needs."""
    found = [last]
    for node in found:
        links = [value[0] for value in workflow[node]["inputs"].values() if isinstance(value, list)]
        found += [link for link in dict.fromkeys(links) if link not in found]
    return found


def refused(workflow: Workflow, object_info: dict) -> Iterator[str]:
    """What the server would not take. object_info: what its /object_info tells of every node."""
    for node in workflow.values():
        kind = node["class_type"]
        if kind not in object_info:
            yield f"the server has no node {kind}. Install the pack it is from, or update it."
            continue
        told = object_info[kind]["input"]
        specs = {**told.get("required", {}), **told.get("optional", {})}
        for name, value in node["inputs"].items():
            if name in specs and not isinstance(value, list):
                yield from out_of_range(f"{name} of {kind}", value, *specs[name])


def out_of_range(what: str, value: object, kind: str | list, options: dict | None = None) -> Iterator[str]:
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None and value not in choices:
        near = [choice for choice in choices if PurePosixPath(str(choice)).name == PurePosixPath(str(value)).name]
        some = ", ".join(map(str, (near or choices)[:5])) or "none"
        how = " Choose one with --checkpoint." if what.startswith("ckpt_name ") else ""
        yield f"{what} is {value!r}, which the server does not have. It has {some}.{how}"
    elif kind in ("INT", "FLOAT"):
        least, most = options.get("min", value), options.get("max", value)
        if not least <= value <= most:
            yield f"{what} is {value}; it must be from {least} to {most}."


def mismatched(job: Job, metadata: dict[str, dict]) -> Iterator[str]:
    """Adapters that cannot work together. metadata: of LoRA files by name, as their trainer wrote it."""
    bases = {}
    for column in ADAPTERS:
        facts = metadata.get(getattr(job, column) or "", {})
        architecture = facts.get("modelspec.architecture", "stable-diffusion-xl")
        if not str(architecture).startswith("stable-diffusion-xl"):
            yield f"{column} was trained on {architecture}, not on SDXL."
        bases[column] = facts.get("consislora.base_model_hash")
    if None not in bases.values() and len(set(bases.values())) == 2:
        yield "content_lora and style_lora were trained on different base models. Train one of them again."
