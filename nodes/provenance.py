"""Notes in every picture which LoRAs made it, how strong, and with what rights, beside ComfyUI's workflow."""

import json
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link

from ..consislora_core.lora_file import ImageLora
from ..consislora_core.store import fingerprint
from . import bridge

CHUNK = "consislora"  # the name of the PNG text chunk
KEPT = 1000
HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo]  # what a node that notes asks for
RIGHTS = {"prompt": "consislora.prompt", "rights": "consislora.rights", "permission": "consislora.permission"}

noted: dict[str, dict] = {}  # by the part of a workflow that gave it


def note(hidden: Any, loras: Mapping[str, ImageLora | None], settings: Mapping[str, Any]) -> None:
    """Adds what the running node was given to the metadata of all pictures of this run.

    loras: by the image they were learned from. settings: those of the node's inputs that are numbers.
    """
    if hidden is None or not hidden.prompt:
        return
    numbers = {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}
    record = {**{image: described(lora) for image, lora in loras.items() if lora is not None}, **numbers}
    noted[key(hidden.prompt, hidden.unique_id)] = record
    if len(noted) > KEPT:
        del noted[next(iter(noted))]
    if hidden.extra_pnginfo is not None:
        hidden.extra_pnginfo.setdefault(CHUNK, {})[hidden.unique_id] = record


def described(lora: ImageLora) -> dict[str, str]:
    """What a picture says of a LoRA: its hash, which Save writes into the file too, prompt, and rights."""
    known = {name: lora.metadata[entry] for name, entry in RIGHTS.items() if lora.metadata.get(entry)}
    return {"weights": lora.weights_hash, **known}


def recall(posted: dict) -> dict:
    """A node whose result ComfyUI still has does not run again: what it noted then is added to the workflow queued."""
    prompt, extra = posted.get("prompt", {}), posted.setdefault("extra_data", {})
    extra["extra_pnginfo"] = extra.get("extra_pnginfo") or {}  # queued through the API there is none
    found = {node: noted.get(key(prompt, node)) for node in prompt}
    if known := {node: record for node, record in found.items() if record}:
        extra["extra_pnginfo"][CHUNK] = known
    return posted


def key(prompt: dict, node: str) -> str:
    """A hash of a node and of all that leads to it."""
    behind, left = {}, [node]
    while left:
        name = left.pop()
        if name in prompt and name not in behind:
            behind[name] = [prompt[name]["class_type"], prompt[name]["inputs"]]
            left += [value[0] for value in prompt[name]["inputs"].values() if is_link(value)]
    return fingerprint(json.dumps([node, behind], sort_keys=True))


def listen() -> None:
    """Asks to see every workflow that is queued. Outside of a server there are none."""
    if server := bridge.server():
        server.add_on_prompt_handler(recall)
