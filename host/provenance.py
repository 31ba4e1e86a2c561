"""Writes into every picture which LoRAs made it, at which strengths and with what rights, beside its workflow."""

import json
from collections.abc import Collection, Mapping
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

PREFIX = "ConsisLoRA"  # of the ids of our nodes

records: dict[str, dict] = {}  # by `_node_keys`: what nodes have noted


def note(hidden: Any, loras: Mapping[str, ImageLora | None], settings: Mapping[str, Any]) -> None:
    """Adds the LoRAs and settings of the running node to the metadata of all pictures of this workflow.

    loras: by the role of the image they were learned from. settings: the node's inputs, of which numbers and text are
    noted.
    """
    if hidden is None or not hidden.prompt:
        return
    numbers = {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}
    record = {**{image: describe_lora(lora) for image, lora in loras.items() if lora is not None}, **numbers}
    key = _node_keys(hidden.prompt, [hidden.unique_id])[hidden.unique_id]
    records.pop(key, None)  # the new one goes to the end: the first is the oldest
    records[key] = record
    if len(records) > KEPT:
        del records[next(iter(records))]
    if isinstance(hidden.extra_pnginfo, dict):
        hidden.extra_pnginfo[CHUNK] = {**recorded(hidden), hidden.unique_id: record}


def recorded(hidden: Any) -> dict[str, dict]:
    """What the nodes of the running workflow have noted so far, by node; empty if a client's own metadata is there."""
    extra = hidden and hidden.extra_pnginfo
    found = extra.get(CHUNK) if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else {}


def describe_lora(lora: ImageLora) -> dict[str, str]:
    """What a picture says of a LoRA: the hash of its weights, which its file has as well, its prompt and rights."""
    known = {name: escape_text(lora.metadata[entry]) for name, entry in RIGHTS.items() if lora.metadata.get(entry)}
    return {"weights": lora.weights_hash, **known}


def recall(posted: dict) -> dict:
    """Adds earlier records to a queued workflow: nodes whose results are cached do not run, and note nothing.

    Leaves everything as it is where there is no node of ours, and metadata that takes no entries.
    """
    prompt = posted.get("prompt")
    if not isinstance(prompt, dict) or not (ours := [name for name, node in prompt.items() if _is_ours(node)]):
        return posted
    extra = posted.setdefault("extra_data", {})
    extra["extra_pnginfo"] = extra.get("extra_pnginfo") or {}  # queued through the API there is none
    keys = _node_keys(prompt, ours)
    known = {name: record for name in ours if (record := records.get(keys[name]))}  # `note` may drop one meanwhile
    if known and isinstance(extra["extra_pnginfo"], dict):
        extra["extra_pnginfo"][CHUNK] = known
    return posted


def _is_ours(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("class_type")).startswith(PREFIX)


def _node_keys(prompt: dict, names: Collection[str]) -> dict[str, str]:
    """Hashes by name, each of a node and of all nodes upstream of it: of these nodes, and of those upstream of them."""
    keys: dict[str, str] = {}
    left, opened = list(names), set()
    while left:
        name = left.pop()
        node = prompt.get(name, {})
        inputs = node.get("inputs", {})
        upstream = [value[0] for value in inputs.values() if is_link(value) and value[0] in prompt]
        if name not in opened:
            opened.add(name)
            left += [name, *(origin for origin in upstream if origin not in opened)]
        elif name not in keys:
            known = {entry: _comparable(value, keys) for entry, value in inputs.items()}
            keys[name] = fingerprint(json.dumps([name, node.get("class_type"), known], sort_keys=True))
    return keys


def _comparable(value: Any, keys: Mapping[str, str]) -> Any:
    """An input's value with a hash in place of a link; whole numbers as ComfyUI makes them for a float widget."""
    if is_link(value):
        return [keys.get(value[0]), value[1]]
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else value


def listen() -> None:
    """Has the server call `recall` for every queued workflow, if there is a server."""
    if server := running_server():
        server.add_on_prompt_handler(recall)
