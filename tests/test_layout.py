"""The rooms keep to themselves: core and batch client know no ComfyUI, and no import runs in a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = {path.stem: path for path in (ROOT / "consislora_core").glob("*.py") if path.stem != "__init__"}
NODES = {path.stem: path for path in (ROOT / "nodes").glob("*.py") if path.stem != "__init__"}
BATCH = {path.stem: path for path in (ROOT / "batch").glob("*.py") if path.stem != "__main__"}
NODE_FILES = {name for name, path in NODES.items() if "(io.ComfyNode)" in path.read_text(encoding="utf-8")}


def imports(path: Path) -> set[str]:
    """Names of the modules a file imports, those of its own folder, or of batch, with a dot before them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            package, _, module = node.module.partition(".")
            own = [module] if module else [alias.name for alias in node.names]
            found |= {"." + name for name in own} if package == "batch" else {package}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {"." + name for name in ([node.module] if node.module else [alias.name for alias in node.names])}
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_no_comfyui(name):
    allowed = {"torch", "einops", "safetensors", "filelock", "PIL"} | {"." + other for other in CORE}
    assert imports(CORE[name]) <= allowed | sys.stdlib_module_names


@pytest.mark.parametrize("name", BATCH)
def test_the_batch_client_needs_neither_comfyui_nor_torch(name):
    allowed = {"aiohttp", "tqdm", "PIL", "consislora_core"} | {"." + other for other in BATCH}
    assert imports(BATCH[name]) <= allowed | sys.stdlib_module_names | ({"ray"} if name == "cluster" else set())


@pytest.mark.parametrize("folder", [CORE, NODES, BATCH], ids=["core", "nodes", "batch"])
def test_no_import_runs_in_a_circle(folder):
    left = {name: {other[1:] for other in imports(path) if other.startswith(".")} for name, path in folder.items()}
    while left:
        ready = {name for name, needs in left.items() if not needs & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in ready}


@pytest.mark.parametrize("name", sorted(NODE_FILES))
def test_a_node_file_imports_no_other_node_file(name):
    assert not {"." + other for other in NODE_FILES} & imports(NODES[name])
