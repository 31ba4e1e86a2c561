"""Writes into every picture which LoRAs made it, at which strengths and with what rights, beside its workflow."""

import json
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link

from ..consislora_core.files import escape_text
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.store import fingerprint
from .progress import running_server

CHUNK = "consislora"  # the name of the PNG text chunk
KEPT = 1000  # records
HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo]  # the hidden inputs that `note` needs
RIGHTS = {"prompt": "consislora.prompt", "rights": "consislora.rights", "permission": "consislora.permission"}

records: dict[str, dict] = {}  # by `_node_key`: what nodes have noted


def note(hidden: Any, loras: Mapping[str, ImageLora | None], settings: Mapping[str, Any]) -> None:
    """Adds the LoRAs and settings of the running node to the metadata of all pictures of this workflow.

    loras: by the role of the image they were learned from. settings: the node's inputs, of which numbers and text are
    noted.
    """
    if hidden is None or not hidden.prompt:
        return
    numbers = {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}
    record = {**{image: describe_lora(lora) for image, lora in loras.items() if lora is not None}, **numbers}
    records[_node_key(hidden.prompt, hidden.unique_id)] = record
    if len(records) > KEPT:
        del records[next(iter(records))]
    if hidden.extra_pnginfo is not None:
        hidden.extra_pnginfo.setdefault(CHUNK, {})[hidden.unique_id] = record


def describe_lora(lora: ImageLora) -> dict[str, str]:
    """What a picture says of a LoRA: the hash of its weights, which its file has as well, its prompt and rights."""
    known = {name: escape_text(lora.metadata[entry]) for name, entry in RIGHTS.items() if lora.metadata.get(entry)}
    return {"weights": lora.weights_hash, **known}


def recall(posted: dict) -> dict:
    """Adds earlier records to a queued workflow: nodes whose results are cached do not run, and note nothing."""
    prompt, extra = posted.get("prompt", {}), posted.setdefault("extra_data", {})
    extra["extra_pnginfo"] = extra.get("extra_pnginfo") or {}  # queued through the API there is none
    found = {node: records.get(_node_key(prompt, node)) for node in prompt}
    if known := {node: record for node, record in found.items() if record}:
        extra["extra_pnginfo"][CHUNK] = known
    return posted


def _node_key(prompt: dict, node: str) -> str:
    """A hash of a node and of all nodes upstream of it."""
    upstream, left = {}, [node]
    while left:
        name = left.pop()
        if name in prompt and name not in upstream:
            upstream[name] = [prompt[name]["class_type"], prompt[name]["inputs"]]
            left += [value[0] for value in prompt[name]["inputs"].values() if is_link(value)]
    return fingerprint(json.dumps([node, upstream], sort_keys=True))


def listen() -> None:
    """Has the server call `recall` for every queued workflow, if there is a server."""
    if server := running_server():
        server.add_on_prompt_handler(recall)
