"""Workflows in ComfyUI's API form: what they are, and how to find one's way in them."""

LOAD, SAVE = "ConsisLoRACatalogLoad", "ConsisLoRACatalogSave"

Workflow = dict[str, dict]  # nodes by id


def is_workflow(data: object) -> bool:
    """Whether this is a workflow in API form, with every node that others are linked to."""
    return isinstance(data, dict) and all(
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
        and all(len(link) == 2 and isinstance(link[0], str) and link[0] in data for link in links(node))
        for node in data.values()
    )


def links(node: dict) -> list[list]:
    """The links into a node: each the id of a node and the number of its output."""
    return [value for value in node["inputs"].values() if isinstance(value, list)]


def single_node(workflow: Workflow, kind: str) -> str:
    """The id of the one node of a class. Raises ValueError if there is another number of them."""
    found = [node_id for node_id, node in workflow.items() if node["class_type"] == kind]
    if len(found) != 1:
        raise ValueError(f"the workflow has {len(found)} nodes of the kind {kind}; it needs exactly one.")
    return found[0]


def with_upstream(workflow: Workflow, last: str) -> list[str]:
    """A node and all nodes upstream of it."""
    found = [last]
    for node in found:
        origins = dict.fromkeys(origin for origin, _ in links(workflow[node]))
        found += [origin for origin in origins if origin not in found]
    return found
