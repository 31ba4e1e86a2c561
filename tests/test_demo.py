"""The demo's main job through the real server, on the demo model."""

import json
import threading

import pytest
from PIL import Image

from batch.comfy_client import WorkflowError
from demo.run import IMAGES, WORKFLOW, nodes, with_sampler
from demo.sheet import sheet


@pytest.fixture
def prompt(server):
    """The shared workflow as shipped, but for a handful of training steps."""
    for picture in IMAGES.glob("*.png"):
        server.upload(picture)
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in nodes(prompt, "ConsisLoRATrainImage"):
        prompt[node]["inputs"] |= {"steps": 4, "transition_step": 2}
    for node in nodes(prompt, "ConsisLoRATrainStyle"):
        prompt[node]["inputs"]["steps"] = 3
    return prompt


def test_two_pictures_go_in_two_loras_and_a_picture_come_out(server, prompt):
    previews = []
    loras = server.base / "models" / "loras" / "consislora"
    earlier, log = set(loras.glob("*.safetensors")), server.log
    entry = server.run(prompt, on_event=lambda kind, data: previews.append(data) if kind == "preview" else None)
    (result,) = nodes(prompt, "SaveImage")
    (picture,) = server.images({"outputs": {result: entry["outputs"][result]}})
    with Image.open(picture) as image:
        assert image.size == (256, 256)
    assert sorted(file.stem[:-6] for file in set(loras.glob("*.safetensors")) - earlier) == ["content", "style"]
    assert len(previews) >= 3
    log = server.log.removeprefix(log)
    assert "image stage, step 4 of 4: reconstruction loss" in log
    assert "style stage, step 3 of 3: reconstruction loss" in log


def test_other_strengths_do_not_train_again(server, prompt):
    server.run(prompt)
    ran = []
    server.run(
        with_sampler(prompt, style_strength=0.25),
        on_event=lambda kind, data: ran.append(data["node"]) if kind == "executing" else None,
    )
    assert not {*nodes(prompt, "ConsisLoRATrainImage"), *nodes(prompt, "ConsisLoRATrainStyle")} & set(ran)
    assert set(nodes(prompt, "ConsisLoRASampler")) <= set(ran)


def test_training_stops_within_a_step_and_the_next_job_runs(server, prompt):
    (content, *_) = nodes(prompt, "ConsisLoRATrainImage")
    for node in nodes(prompt, "ConsisLoRATrainImage"):
        prompt[node]["inputs"] |= {"steps": 100_000, "seed": 1}
    steps, cancelled = [], threading.Event()

    def cancel_at_once(kind, data):
        if kind == "progress" and data["node"] in nodes(prompt, "ConsisLoRATrainImage"):
            steps.append(data["value"])
            if not cancelled.is_set():
                cancelled.set()
                server.cancel()

    with pytest.raises(WorkflowError, match=r"ConsisLoRATrainImage .*cancelled"):
        server.run(prompt, on_event=cancel_at_once)
    assert max(steps) <= 10

    for node in nodes(prompt, "ConsisLoRATrainImage"):
        prompt[node]["inputs"]["steps"] = 4
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_a_sheet_holds_every_picture_under_its_label(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    page = sheet([[("one", tmp_path / "red.png"), ("two", tmp_path / "red.png")], [("three", tmp_path / "red.png")]])
    red = sum(count for count, colour in page.getcolors(1 << 20) if colour == (255, 0, 0))
    assert red == 3 * 256 * 256
