"""The shared workflow files, as tests open and queue them, and the scripts that write files."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
FEW = {"steps": 4, "transition_step": 2, "learning_rate": 0.01, "reconstruction_learning_rate": 0.01}


def graph(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def quick(name: str, **changes) -> dict:
    """The API form with few but long steps and other changed inputs, its LoRAs in a folder that no other test uses."""
    prompt = json.loads(json.dumps(api(name)).replace('"consislora/', '"workflows/'))
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in {**FEW, **changes}.items() if key in node["inputs"]}
    return prompt


def two_steps(name: str) -> dict:
    """The API form with trainings of two steps; sampling stays as it is."""
    prompt = api(name)
    for node in prompt.values():
        if "rank" in node["inputs"]:
            node["inputs"] |= {"steps": 2, "rank": 4}
        if "transition_step" in node["inputs"]:
            node["inputs"]["transition_step"] = 1
    return prompt


def load_script(path: Path) -> ModuleType:
    """A Python file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
