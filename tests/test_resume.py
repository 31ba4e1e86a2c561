"""Trained once, whatever happens to ComfyUI meanwhile: a real server, killed, restarted, and two of them at once."""

import json
import random
import time
from pathlib import Path

import pytest
from conftest import COMFYUI
from safetensors import safe_open

from demo.run import IMAGES, WORKFLOW, nodes
from demo.server import ComfyServer, ServerError, link_folder

STEPS = 120  # a checkpoint comes every 50


def job(name: str, **settings) -> dict:
    """The shared workflow's training of the content image, saved in fp32 under a name."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    train, save = nodes(prompt, "ConsisLoRATrainImage")[0], nodes(prompt, "ConsisLoRASave")[0]
    prompt[train]["inputs"] |= {"steps": STEPS, "transition_step": 40, "rank": 4, **settings}
    prompt[save]["inputs"] |= {"filename": f"consislora/{name}", "precision": "fp32"}
    wanted = [save]
    for node in wanted:
        wanted += [link[0] for link in prompt[node]["inputs"].values() if isinstance(link, list)]
    return {node: prompt[node] for node in wanted}


def trains(server: ComfyServer, prompt: dict) -> list[int]:
    """The steps that the server trains for a workflow."""
    (node,) = nodes(prompt, "ConsisLoRATrainImage")
    steps = []

    def watch(kind, data):
        if kind == "progress" and data["node"] == node:
            steps.append(data["value"])

    server.run(prompt, on_event=watch)
    return steps


def saved(server: ComfyServer, name: str, number: int = 1) -> bytes:
    return (server.base / f"models/loras/consislora/{name}_{number:05}.safetensors").read_bytes()


def check_every_file_is_whole(loras: Path) -> None:
    for path in loras.rglob("*"):
        if path.suffix in (".safetensors", ".lora", ".checkpoint"):
            with safe_open(path, framework="pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.fixture
def base(tmp_path):
    """A folder for servers of this test alone, with the picture in it."""
    (tmp_path / "input").mkdir()
    for picture in IMAGES.glob("*.png"):
        (tmp_path / "input" / picture.name).write_bytes(picture.read_bytes())
    return tmp_path


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_bytes(server, base, kills):
    prompt, moments, reached = job("killed", seed=kills), random.Random(kills), {}
    server.upload(next(IMAGES.glob("crown-flat.png")))
    server.run(prompt)

    for kill in range(kills):
        # Later each time, so that the training gets somewhere, and the last time between checkpoint and end.
        moment = moments.uniform(0.85 * STEPS * kill / kills, 0.85 * STEPS * (kill + 1) / kills)
        with ComfyServer(base, COMFYUI) as killed, pytest.raises(ServerError):

            def kill_at(kind, data, server=killed, moment=moment):
                if kind == "progress" and data["value"] >= moment:
                    reached.setdefault(moment, data["value"])
                    time.sleep(moments.uniform(0, 0.1))
                    server.kill()

            killed.run(prompt, on_event=kill_at)
        check_every_file_is_whole(base / "models" / "loras")

    with ComfyServer(base, COMFYUI) as resumed:
        steps = trains(resumed, prompt)
        assert "goes on from step" in resumed.log
    assert steps[0] > 50
    assert saved(resumed, "killed") == saved(server, "killed")
    print(f"killed at steps {[*reached.values()]} of {STEPS}; resumed at {steps[0]}; the same bytes as without a kill")

    with ComfyServer(base, COMFYUI) as restarted:
        assert trains(restarted, prompt) == []
        assert "image stage: trained before, taken from " in restarted.log
        assert saved(restarted, "killed", 2) != b""
        assert trains(restarted, job("killed", seed=kills, steps=40, learning_rate=3e-4))[0] == 1
    check_every_file_is_whole(base / "models" / "loras")


def test_of_two_servers_at_the_same_training_one_trains_and_the_other_waits_and_reads(server, base):
    server.upload(next(IMAGES.glob("crown-flat.png")))
    (base / "models").mkdir()
    link_folder(base / "models" / "loras", server.base / "models" / "loras")
    before = server.log
    with ComfyServer(base, COMFYUI) as other:
        queued = []
        for number, one in enumerate((server, other)):
            queued.append((one, one.queue(job(f"shared{number}", seed=100, steps=24, transition_step=8))))
        for number, one in enumerate((server, other)):
            queued.append((one, one.queue(job(f"own{number}", seed=101 + number, steps=24, transition_step=8))))
        for one, prompt_id in queued:
            assert one.wait(prompt_id)["status"]["status_str"] == "success"
        logs = server.log.removeprefix(before), other.log
    assert sorted(log.count("step 24 of 24") for log in logs) == [1, 2]
    (waited,) = (log for log in logs if "another process is at the same training; waiting" in log)
    assert "image stage: trained before, taken from " in waited
    check_every_file_is_whole(server.base / "models" / "loras" / "consislora")  # beside it are broken ones, for tests
    assert tensors(server, "shared0") == tensors(server, "shared1")
    assert tensors(server, "own0") != tensors(server, "own1")


def tensors(server: ComfyServer, name: str) -> bytes:
    """All but the header, which has the file's name."""
    data = saved(server, name)
    return data[8 + int.from_bytes(data[:8], "little") :]
