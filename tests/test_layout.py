"""The plan of rooms: who may import whom, where ComfyUI may be imported, and that no import runs in a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import besides the standard library and itself: other rooms, and packages.
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"}
METHOD = {"torch", "einops", "safetensors"}
PLAN = {
    "consislora_core": METHOD | {"filelock", "peft"},
    "host": METHOD | COMFYUI | {"consislora_core", "PIL", "numpy", "aiohttp"},
    "catalogue": {"consislora_core", "PIL"},
    "nodes": METHOD | COMFYUI | {"host", "catalogue", "consislora_core", "demo_model", "PIL", "c2pa"},
    "review": {"host", "catalogue", "consislora_core", "aiohttp"},
    "batch": {"catalogue", "consislora_core", "aiohttp", "tqdm", "PIL", "ray"},
    "demo": {"batch", "PIL", "torch", "psutil"},
}
# Packages that few files need, and which those are.
ONLY = {"ray": {"ray_workers"}, "peft": {"peft_format"}, "c2pa": {"sign"}, "filelock": {"files"}}
LINES = {"nodes": (1800, 330), "consislora_core": (2700, 330)}  # at most: of the room, of a file

FILES = {room: {path.stem: path for path in (ROOT / room).glob("*.py")} for room in PLAN}
EVERY_FILE = [(room, name) for room, files in FILES.items() for name in files]


def imports(room: str, name: str) -> set[str]:
    """What a file imports: files of its own room with a dot before the name, other rooms, and packages."""
    found = set()
    for node in ast.walk(ast.parse(FILES[room][name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level == 0 and path[0] == room or node.level == 1:  # this room, by its name or by a dot
                own = path[1:2] if node.level == 0 else list(filter(None, path[:1]))
                found |= {f".{module}" for module in own or [alias.name for alias in node.names]}
            else:
                found.add(path[0])
    return found


@pytest.mark.parametrize(("room", "name"), EVERY_FILE)
def test_a_room_imports_only_what_the_plan_lets_it(room, name):
    others = {other for other in imports(room, name) if not other.startswith(".")}
    assert others <= PLAN[room] | sys.stdlib_module_names


@pytest.mark.parametrize(("room", "name"), EVERY_FILE)
def test_what_few_files_need_is_imported_by_those_alone(room, name):
    allowed = {package for package, files in ONLY.items() if name in files}
    assert not (ONLY.keys() - allowed) & imports(room, name)


@pytest.mark.parametrize("name", ["__init__", "files"])
def test_the_files_that_a_sheet_needs_are_read_without_torch(name):
    assert not METHOD & imports("consislora_core", name)


@pytest.mark.parametrize("name", FILES["catalogue"])
def test_the_catalogue_needs_no_more_of_the_core_than_its_files(name):
    source = FILES["catalogue"][name].read_text(encoding="utf-8")
    assert source.count("consislora_core") == source.count("consislora_core.files")


@pytest.mark.parametrize("room", PLAN)
def test_no_import_runs_in_a_circle(room):
    left = {name: {own[1:] for own in imports(room, name) if own.startswith(".")} for name in FILES[room]}
    while left:
        ready = {name for name, needs in left.items() if not needs & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in ready}


def test_no_room_imports_one_that_imports_it():
    left = {room: PLAN[room] & PLAN.keys() for room in PLAN}
    while left:
        ready = {room for room, needs in left.items() if not needs & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {room: needs for room, needs in left.items() if room not in ready}


def test_a_node_file_imports_no_other_node_file():
    nodes = {name for name, path in FILES["nodes"].items() if "(io.ComfyNode)" in path.read_text(encoding="utf-8")}
    for name in nodes:
        assert not {f".{other}" for other in nodes} & imports("nodes", name)


@pytest.mark.parametrize("room", LINES)
def test_a_room_stays_small(room):
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in FILES[room].items()}
    whole, single = LINES[room]
    assert sum(lines.values()) <= whole and max(lines.values()) <= single


ROOMS = (".", *PLAN, "demo_model", "demo_model/recipe", "workflows", "subgraphs", "locales")
SHIPPED = [path for room in ROOMS for path in (ROOT / room).glob("*.py")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_is_read_and_written_in_an_encoding_that_is_not_the_systems(path):
    """On Windows that is one of its language."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            named, settings = getattr(call.func, "attr", ""), {keyword.arg for keyword in call.keywords}
            is_text = named in {"read_text", "write_text"} or named in {"run", "Popen"} and "text" in settings
            assert not is_text or "encoding" in settings, f"line {call.lineno}"
