"""The archive that the registry makes: small, and all that an empty ComfyUI needs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from prompts import api
from test_help import ROOT
from test_workflows import NAMES

from demo.server import ComfyServer

FEW = {"steps": 2, "transition_step": 1}
MOST = 36_000_000  # bytes, of which the demo model takes 32 million


class Installed(ComfyServer):
    """A ComfyUI with the archive in custom_nodes instead of this checkout."""

    def _make_folders(self) -> None:
        super()._make_folders()
        pack = self.base / "custom_nodes" / "ComfyUI-ConsisLoRA"
        pack.unlink()
        for name in packed():
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, pack / name)


def packed() -> list[str]:
    """The files that go into the archive: those that git tracks, but for .comfyignore's."""
    ignored = tracked("--cached", "--ignored", "--exclude-from=.comfyignore")
    return sorted(set(tracked()) - set(ignored))


def tracked(*options: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


@pytest.fixture(autouse=True)
def checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")


def test_it_is_small():
    assert sum((ROOT / name).stat().st_size for name in packed()) < MOST


def test_it_trains_and_draws_in_an_empty_comfyui(tmp_path):
    with Installed(tmp_path, Path(os.environ["COMFYUI_PATH"])) as server:
        server.post("/consislora/demo_pictures", ["crown-flat.png", "balloon-halftone.png"])  # as its page does
        prompt = api("train_and_stylise_demo")
        for node in prompt.values():
            node["inputs"] |= {name: value for name, value in FEW.items() if name in node["inputs"]}
        assert server.images(server.run(prompt))
        assert len(server.get("/workflow_templates")["ComfyUI-ConsisLoRA"]) == len(NAMES)
        blueprints = [entry["info"]["node_pack"] for entry in server.get("/global_subgraphs").values()]
        assert sum("ConsisLoRA" in pack for pack in blueprints) == 3  # newer ComfyUIs have many of their own
