"""What a running node reads of the workflow it runs in."""

import json
from collections.abc import Collection, Iterator
from typing import Any

from comfy.cli_args import args


def text_behind(hidden: Any, input_name: str) -> str:
    """The text of the CLIP Text Encode that feeds an input of the running node; empty if another node feeds it."""
    nearest = next(_upstream(hidden, input_name), {"inputs": {}})
    text = nearest["inputs"].get("text")
    return text if isinstance(text, str) else ""


def numbers_behind(hidden: Any, input_name: str, names: Collection[str]) -> dict[str, float]:
    """Values of inputs by name, each from the nearest node that has it upstream of an input of the running node.

    An input that is linked has the number of the node it is linked to, under the same name or as its `value`.
    """
    found = {}
    for node in _upstream(hidden, input_name):
        found = {name: node["inputs"][name] for name in names if name in node["inputs"]} | found
    linked = {name: _linked_value(_graph(hidden), name, value) for name, value in found.items()}
    return {name: value for name, value in linked.items() if _is_number(value)}


def _linked_value(graph: dict, name: str, value: Any) -> Any:
    while isinstance(value, list) and value[0] in graph:
        inputs = graph[value[0]]["inputs"]
        value = inputs.get(name, inputs.get("value"))
    return value


def widget_values_behind(
    hidden: Any, input_name: str, widget: str, kinds: Collection[str], through: Collection[str]
) -> list[str]:
    """The texts of a widget of all nodes of some kinds upstream of an input of the running node.

    through: the kinds of nodes that may lie between.
    """
    nodes = _upstream(hidden, input_name, through)
    values = [node["inputs"].get(widget) for node in nodes if node["class_type"] in kinds]
    return [value for value in values if isinstance(value, str)]


def _graph(hidden: Any) -> dict:
    return (hidden and hidden.prompt) or {}


def _upstream(hidden: Any, input_name: str, through: Collection[str] | None = None) -> Iterator[dict]:
    """The nodes upstream of an input of the running node, the nearest first.

    through: the kinds of nodes whose own inputs are followed; None: all.
    """
    graph = _graph(hidden)
    running = graph.get(hidden and hidden.unique_id, {"inputs": {}})
    links, seen = [running["inputs"].get(input_name)], set()
    for link in links:
        if isinstance(link, list) and link[0] in graph and link[0] not in seen:
            seen.add(link[0])
            yield (node := graph[link[0]])
            if through is None or node["class_type"] in through:
                links += node["inputs"].values()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def workflow_texts(hidden: Any) -> dict[str, str]:
    """The text chunks that ComfyUI's Save Image writes into a PNG, from which the frontend opens the workflow again."""
    if args.disable_metadata or not hidden:
        return {}
    extra = hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, dict) else {}
    texts = {"prompt": hidden.prompt, **extra}
    return {name: json.dumps(value) for name, value in texts.items() if value is not None}
