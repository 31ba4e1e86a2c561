"""Writes locales/en/nodeDefs.json from the schemas of the nodes.

    python locales/build.py [http://127.0.0.1:8188]

reads them from a running ComfyUI that has this pack, at that address. Other languages are translated by hand.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

FILE = Path(__file__).resolve().parent / "en" / "nodeDefs.json"


def node_texts(node: dict) -> dict:
    """The texts of a node as nodeDefs.json has them. node: its entry in the server's /object_info."""
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs.items()},
        "outputs": {
            str(i): {"name": name} | ({"tooltip": tip} if tip else {}) for i, (name, tip) in enumerate(outputs)
        },
    }


def file_text(object_info: dict) -> str:
    """The text of the file, an input or output a line. object_info: the answer of the server's /object_info."""
    texts = {name: node_texts(node) for name, node in object_info.items() if name.startswith("ConsisLoRA")}
    indented = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
    return re.sub(
        r'\{\n +("name": .+)\n +(?:("tooltip": .+)\n +)?\}', lambda m: f"{{{' '.join(m.groups('')).strip()}}}", indented
    )


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8188"
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        FILE.write_text(file_text(json.load(answer)), encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
