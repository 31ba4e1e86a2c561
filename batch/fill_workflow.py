"""Fills the shared workflow with a job, and checks the result against a server."""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from catalogue.api_form import LOAD, SAVE, Workflow, single_node, with_upstream
from catalogue.names import portable
from catalogue.sheets import SETTINGS, Job

INPUTS = "consislora_batch"  # in the server's input folder; pictures there are named by their bytes
PROMPTS = {"prompt": "positive", "negative_prompt": "negative"}
LORAS = {"content_lora": "content", "style_lora": "style"}
CREDITS = ("title", "creator", "rights")
# Inputs of the nodes that balance content and style.
BALANCES = {"content_strength", "content_guidance", "keep_colours"}


def catalogue_folder(name: str) -> str:
    """Where the results of a sheet go, inside the server's output folder."""
    return f"consislora_batch/{portable(name)}"


def fill_workflow(
    workflow: Workflow, job: Job, content: str, style: str, folder: str, metadata: dict[str, dict]
) -> tuple[Workflow, str]:
    """The workflow of one job, and its key: the name of its picture on the server.

    content, style: names of the uploaded pictures. folder: of the catalogue on the server. metadata: of LoRA files by
    name, which in our files has a hash of the weights, so that another file under the same name makes another job.
    Raises ValueError for a workflow that lacks what the job needs.
    """
    filled = copy.deepcopy(workflow)
    load, save = (single_node(filled, kind) for kind in (LOAD, SAVE))
    pictures = {"contents": f"{INPUTS}/{content}", "styles": f"{INPUTS}/{style}", "catalogue": folder}
    filled[load]["inputs"] |= {**pictures, "run": "one pair per run", "index": 0, "name": ""}
    for column in SETTINGS:
        for node in nodes_taking(filled, job, column, column):
            node["inputs"][column] = getattr(job, column)
    for column, socket in PROMPTS.items():
        for node in nodes_taking(filled, job, column, socket):
            text_node = filled[node["inputs"][socket][0]]
            if "text" not in text_node["inputs"]:
                raise ValueError(
                    f"column {column} cannot be put in: {socket} comes from {text_node['class_type']}, which has no "
                    "text. Leave the column empty, or connect CLIP Text Encode itself."
                )
            text_node["inputs"]["text"] = getattr(job, column)
    for column, socket in LORAS.items():
        for node in [*nodes_taking(filled, job, column, socket), filled[save]] if getattr(job, column) else []:
            node["inputs"][socket] = [column, 0]
            filled[column] = {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": getattr(job, column)}}
    filled[save]["inputs"] |= {column: getattr(job, column) for column in CREDITS if getattr(job, column) is not None}
    filled = {node: filled[node] for node in with_upstream(filled, save)}
    lora_metadata = [metadata.get(getattr(job, column)) for column in LORAS]
    key = hashlib.sha256(json.dumps([filled, lora_metadata], sort_keys=True).encode()).hexdigest()[:32]
    filled[load]["inputs"]["name"] = key
    if not filled[save]["inputs"].get("title"):
        filled[save]["inputs"]["title"] = job.name  # there the result is called by its key
    return filled, key


def nodes_taking(workflow: Workflow, job: Job, column: str, name: str) -> list[dict]:
    """The nodes that balance content and style and have an input `name`; none if the job leaves `column` empty.

    Raises ValueError if there are none though the job has a value.
    """
    if getattr(job, column) is None:
        return []
    balancing = [node for node in workflow.values() if BALANCES & node["inputs"].keys()]
    found = [node for node in balancing if name in node["inputs"]]
    if not found:
        raise ValueError(f"no node of the workflow takes {column}. Leave the column empty, or choose another workflow.")
    return found


def server_problems(workflow: Workflow, object_info: dict) -> Iterator[str]:
    """What the server would refuse. object_info: the answer of its /object_info."""
    for node in workflow.values():
        kind = node["class_type"]
        if kind not in object_info:
            yield f"the server has no node {kind}. Install the pack it is from, or update it."
            continue
        inputs = object_info[kind]["input"]
        specs = {**inputs.get("required", {}), **inputs.get("optional", {})}
        for name, value in node["inputs"].items():
            if name in specs and not isinstance(value, list):
                yield from value_problems(f"{name} of {kind}", value, *specs[name])


def value_problems(what: str, value: object, kind: str | list, options: dict | None = None) -> Iterator[str]:
    """Whether a value is out of range or not among the choices of an input."""
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None and value not in choices:
        near = [choice for choice in choices if PurePosixPath(str(choice)).name == PurePosixPath(str(value)).name]
        shown = ", ".join(map(str, (near or choices)[:5])) or "none"
        hint = " Choose one with --checkpoint." if what.startswith("ckpt_name ") else ""
        yield f"{what} is {value!r}, which the server does not have. It has {shown}.{hint}"
    elif kind in ("INT", "FLOAT"):
        try:
            number = {"INT": int, "FLOAT": float}[kind](value)  # as ComfyUI does
        except (TypeError, ValueError, OverflowError):
            yield f"{what} is {value!r}; it must be a number."
            return
        least, most = options.get("min", number), options.get("max", number)
        if not least <= number <= most:
            yield f"{what} is {value}; it must be from {least} to {most}."


def lora_problems(job: Job, metadata: dict[str, dict]) -> Iterator[str]:
    """LoRAs of other architectures, or of two base models. metadata: of LoRA files by name."""
    bases = {}
    for column in LORAS:
        facts = metadata.get(getattr(job, column) or "", {})
        architecture = facts.get("modelspec.architecture", "stable-diffusion-xl")
        if not str(architecture).startswith("stable-diffusion-xl"):
            yield f"{column} was trained on {architecture}, not on SDXL."
        bases[column] = facts.get("consislora.base_model_hash")
    if None not in bases.values() and len(set(bases.values())) == 2:
        yield "content_lora and style_lora were trained on different base models. Train one of them again."
