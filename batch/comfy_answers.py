"""What ComfyUI says, and how it differs from what proxies, tunnels, pods that start and other packs say."""

import json

import aiohttp

PREVIEW_FRAME = 1  # BinaryEventTypes.PREVIEW_IMAGE in ComfyUI's protocol.py

# What ComfyUI's JSON is known by, at a path and in a websocket message: its type, or keys and the types at them.
ANSWERS = {
    "/queue": {"queue_running": list, "queue_pending": list},
    "/prompt": {"prompt_id": str},
    "/upload/image": {"name": str},
    "/system_stats": {"system": dict},
    "/view_metadata/loras": dict,
    "/models/loras": list,
}
REFUSAL = {"error": object, "node_errors": object}  # of a workflow
EVENTS = {"progress": {"value": (int, float), "max": (int, float)}, "executing": {"node": object}}


def is_comfyuis(path: str, response: aiohttp.ClientResponse, said: object) -> bool:
    """Whether ComfyUI itself gave this answer to a request at a path.

    Any other is passing: a proxy, a tunnel or a pod that starts answers anything in its place, with any status.
    """
    if path == "/view":  # 416: the file is shorter
        return "Content-Disposition" in response.headers and response.status in (200, 206, 416)
    if path == "/prompt" and response.status == 400:
        return _is_like(REFUSAL, said)
    if response.status >= 300 or isinstance(said, bytes):
        return False
    if path.startswith("/history/"):
        return said == {} or _is_like({path.rpartition("/")[2]: dict}, said)
    if path == "/object_info":
        return isinstance(said, dict) and any(_is_like({"input": dict}, node) for node in said.values())
    return _is_like(ANSWERS.get(path, object), said)


def _is_like(pattern: dict | type | tuple, data: object) -> bool:
    """Whether data are of a type, or hold at least these keys with values like these."""
    if not isinstance(pattern, dict):
        return isinstance(data, pattern)
    return isinstance(data, dict) and all(key in data and _is_like(pattern[key], data[key]) for key in pattern)


def as_json(text: str | bytes, otherwise: object = None):
    """What a JSON text holds; `otherwise` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def read_event(message: str | bytes) -> tuple[str, dict | bytes] | None:
    """The type and data of a websocket message; None for one that is not as ComfyUI's: other packs send anything."""
    if isinstance(message, bytes):
        # A preview is two 32-bit numbers, kind of frame and kind of image, then an image file.
        return "preview" if int.from_bytes(message[:4], "big") == PREVIEW_FRAME else "binary", message[8:]
    event = as_json(message)
    if _is_like({"type": str, "data": dict}, event) and _is_like(EVENTS.get(event["type"], dict), event["data"]):
        return event["type"], event["data"]
    return None
