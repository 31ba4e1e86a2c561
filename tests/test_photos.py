"""The benchmark on photographs: it trains as the shared workflows do, and goes on where it was killed."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from in_process import COMFYUI, ROOT
from PIL import Image
from prompts import api

from benchmarks.photo_graphs import CONTENDERS, DEMO, TINY_ENCODERS, Graphs, sdxl
from catalogue.sheets import RESULTS, ResultsSheet

TRIAL = [sys.executable, "benchmarks/photos.py", "--trial", "--only", "paper", "plain"]


def trainings(prompt: dict) -> list[list]:
    """Widget values of the nodes that train or recolour, without `memory`, which changes no LoRA."""
    return sorted(
        sorted(
            (name, str(value)) for name, value in node["inputs"].items() if name != "memory" and type(value) is not list
        )
        for node in prompt.values()
        if node["class_type"].startswith(("ConsisLoRATrain", "ConsisLoRARecolour"))
    )


@pytest.mark.parametrize(
    ("contender", "base", "scale", "workflow"),
    [("paper", sdxl(""), 1.0, "catalogue_sdxl"), ("quality", DEMO, 0.2, "catalogue_demo")],
)
def test_a_contender_trains_as_the_shared_workflow_does(server, contender, base, scale, workflow):
    graphs = Graphs(server.get("/object_info"), base, TINY_ENCODERS, scale)
    assert trainings(graphs.pair(CONTENDERS[contender], seed=0)) == trainings(api(workflow))


def drawing(prompt: dict) -> list[dict]:
    """Widget values of Match Palette and of the sampler, but for those in which contenders are not as the workflows."""
    others = ("seed", "content_guidance", "style_guidance")
    return [
        {name: value for name, value in node["inputs"].items() if type(value) is not list and name not in others}
        for kind in ("ConsisLoRAMatchPalette", "ConsisLoRASampler")
        for node in prompt.values()
        if node["class_type"] == kind
    ]


def test_a_locked_contender_draws_as_the_shared_workflow_does(server):
    graphs = Graphs(server.get("/object_info"), sdxl(""), TINY_ENCODERS, 1.0)
    ours, shared = drawing(graphs.pair(CONTENDERS["both locked"], seed=0)), drawing(api("structure_lock_sdxl"))
    assert ours[1]["structure_lock"]
    for our, theirs in zip(ours, shared, strict=True):
        assert our.items() <= theirs.items()


def test_a_night_that_is_killed_goes_on_and_makes_nothing_twice(tmp_path):
    command = [*TRIAL, "--pairs", "1", "--work", str(tmp_path)]
    surroundings = dict(cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(COMFYUI)}, text=True)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **surroundings)
    while not list(tmp_path.glob("paper/*.png")):
        assert first.poll() is None
        time.sleep(0.05)
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        process.kill()
    first.wait()
    on_server = tmp_path / "comfyui" / "output" / "consislora_batch" / "photos"
    before = {file: file.stat().st_mtime_ns for file in on_server.glob("*.png")}
    assert before and not list(tmp_path.glob("plain/*.png"))

    again = subprocess.run(command, capture_output=True, **surroundings)
    assert again.returncode == 0, again.stdout + again.stderr
    results = ResultsSheet(tmp_path / RESULTS).read()
    names = ["crown-flat_0", "crown-flat__balloon-halftone_0"]
    assert set(results) == {f"vae/{names[0]}", *(f"{who}/{name}" for who in ("paper", "plain") for name in names)}
    assert len(list(on_server.glob("*.png"))) == len(results)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert len(list((tmp_path / "comfyui" / "output" / "loras").glob("*.safetensors"))) == 2
    report = (tmp_path / "photos.md").read_text(encoding="utf-8")
    assert report.strip() in again.stdout
    assert "| paper - plain | " in report and "| ConsisLoRA | 0.629 | 0.659 | 0.671 |" in report
    for name in ("photos_sheet.png", "photos_own.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > 4 * 256  # content image, style image or VAE, both contenders
