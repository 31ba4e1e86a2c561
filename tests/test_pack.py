"""The pack as ComfyUI loads it, without the server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import consislora_core

ROOT = Path(__file__).resolve().parent.parent


def test_loading_the_pack_leaves_slow_packages_for_later(tmp_path):
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
import in_process
in_process.load_comfy(sys.argv[2])
import comfy_api.latest, nodes  # ComfyUI's own, which are there before any pack
before = set(sys.modules)
in_process.load_pack()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    command = [sys.executable, "-c", script, str(ROOT / "tests"), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    imported = json.loads(answer.splitlines()[-1])
    assert "consislora_pack.nodes" in imported
    assert not {"transformers", "diffusers", "c2pa"} & {name.split(".")[0] for name in imported}


def test_every_node_has_an_id_of_its_own_in_our_category(pack):
    schemas = [node.GET_SCHEMA() for node in pack.nodes.NODES]
    ids = [schema.node_id for schema in schemas]
    assert len(set(ids)) == len(ids)
    assert all(schema.node_id.startswith("ConsisLoRA") and schema.category == "ConsisLoRA" for schema in schemas)


def test_the_core_and_the_package_agree_on_the_version():
    (declared,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert consislora_core.__version__ == declared


def test_our_nodes_do_not_hide_those_of_comfyui(pack):
    import nodes

    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS
