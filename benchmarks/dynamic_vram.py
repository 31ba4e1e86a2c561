"""`python benchmarks/dynamic_vram.py [--tiny]`: trains, cancels, goes on and samples with dynamic VRAM, and without.

Needs `COMFYUI_PATH` to be a ComfyUI of 0.16 or newer, and an NVIDIA GPU, for five minutes: the workflow
train_and_stylise_sdxl in few steps, with a checkpoint of SDXL's full size and random weights. Reports steps a second
and what training logged, also in benchmarks/results/dynamic_vram.md after each server. Exits with 1 if a training did
not go on where it was cancelled, or if the base model draws another picture afterwards. --tiny: the demo model on any
computer, which tries the script and writes no report.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "results" / "dynamic_vram.md"
SMALL = 8  # GB
SERVERS = {  # ComfyUI's options, and the GB of the card that another program leaves, where one takes the rest
    "ComfyUI's defaults": ([], None),
    "--disable-cuda-malloc": (["--disable-cuda-malloc"], None),
    f"defaults, {SMALL} GB of the card left": ([], SMALL),
    "--disable-dynamic-vram": (["--disable-dynamic-vram"], None),
}
TAKE = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
taken = torch.empty(int(free - float(sys.argv[1]) * 1e9), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""
CHECKPOINT, PICTURE = "random_sdxl.safetensors", "picture.png"
OUTPUTS = ("SaveImage", "ConsisLoRASave", "LossGraphNode")
TRAINING, SAMPLING = ("ConsisLoRATrainImage", "ConsisLoRATrainStyle"), ("ConsisLoRASampler",)


class Size(NamedTuple):
    """How much is done."""

    template: str
    side: int  # of the picture
    steps: int  # of each training
    cancel_at: int  # step of the first training
    warm_up: int  # steps of each training that are not timed


FULL = Size("train_and_stylise_sdxl", 1024, 60, 30, 10)
TINY = Size("train_and_stylise_demo", 256, 8, 4, 1)


class Found(NamedTuple):
    """What was measured in one server."""

    trained: float  # steps a second
    sampled: float
    goes_on: bool
    unchanged: bool
    seconds: float  # in all, from the start of the server
    log: list[str]


def workflow(size: Size) -> dict:
    """The shared workflow, in few steps."""
    from prompts import api

    prompt = api(size.template)
    few = {"preset": "quality", "steps": size.steps, "transition_step": size.steps // 2}
    few |= {"ckpt_name": CHECKPOINT, "image": PICTURE}
    for node in prompt.values():
        own = {name for name, value in node["inputs"].items() if not isinstance(value, list)}  # and not links
        node["inputs"] |= {name: value for name, value in few.items() if name in own}
        if node["class_type"] in SAMPLING:
            node["inputs"]["steps"] = 10
    return prompt


def base_alone(prompt: dict, end: int) -> dict:
    """The workflow with the base model drawing alone. end: any number above 2, each of which ComfyUI runs anew."""
    nodes = {name: node for name, node in prompt.items() if node["class_type"] not in OUTPUTS}
    by_class = {node["class_type"]: node["inputs"] for node in nodes.values()}
    own = dict(add_noise="enable", noise_seed=1, steps=2, cfg=2.0, sampler_name="euler", scheduler="normal",
               start_at_step=0, end_at_step=end, return_with_leftover_noise="disable")  # fmt: skip
    own |= {name: by_class[SAMPLING[0]][name] for name in ("model", "positive", "negative", "latent_image")}
    drawing = {
        "draw": ("KSamplerAdvanced", own),
        "decode": ("VAEDecode", {"samples": ["draw", 0], "vae": by_class["VAEDecode"]["vae"]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "base"}),
    }
    return nodes | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in drawing.items()}


class Clock:
    """Notes when steps end, by ComfyUI's messages, which pass over some. Cancels from a step on if one is given."""

    def __init__(self, server, cancel_at: int | None = None):
        self.server, self.cancel_at = server, cancel_at
        self.steps: dict[str, list[tuple[int, float]]] = {}  # by node: how many, and when

    def __call__(self, kind: str, data) -> None:
        if kind == "progress":
            self.steps.setdefault(data["node"], []).append((data["value"], time.monotonic()))
            if self.cancel_at is not None and data["value"] >= self.cancel_at:
                self.cancel_at = None
                self.server.cancel()

    def rate(self, prompt: dict, classes: tuple[str, ...], skip: int) -> float:
        """Steps a second in all nodes of these classes, without the first ones of each."""
        count = seconds = 0
        for node, steps in self.steps.items():
            timed = [step for step in steps if step[0] >= steps[0][0] + skip]
            if prompt[node]["class_type"] in classes and timed:
                count += timed[-1][0] - timed[0][0]
                seconds += timed[-1][1] - timed[0][1]
        return count / seconds


@contextmanager
def left_of_the_card(gigabytes: float | None) -> Iterator[None]:
    """Another program holds all the rest of the GPU's free memory; with None there is no such program."""
    if gigabytes is None:
        yield
        return
    program = [sys.executable, "-c", TAKE, str(gigabytes)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline(), "no memory of the GPU could be taken"
        yield
        holder.stdin.close()


def measure(base: Path, options: list[str], size: Size) -> Found:
    """The whole check in a server of its own."""
    from PIL import Image

    from batch.comfy_client import failure_text
    from demo.server import ComfyServer

    shutil.rmtree(
        base / "models" / "loras", ignore_errors=True
    )  # or the second server would find what the first trained
    prompt, began = workflow(size), time.monotonic()
    with ComfyServer(base, Path(os.environ["COMFYUI_PATH"]), *options) as server:
        picture = Image.open(ROOT / "demo" / "images" / "crown-flat.png").convert("RGB")
        picture.resize((size.side, size.side)).save(base / "input" / PICTURE)
        (before,) = server.images(server.run(base_alone(prompt, 1000)))
        entry = server.wait(server.queue(prompt), on_event=Clock(server, size.cancel_at))
        assert "cancelled" in failure_text(entry), failure_text(entry)
        clock = Clock(server)
        server.run(prompt, on_event=clock)
        (after,) = server.images(server.run(base_alone(prompt, 999)))
        log = [line[line.index("ConsisLoRA") :] for line in server.log.splitlines() if "ConsisLoRA" in line]
        unchanged = Image.open(before).tobytes() == Image.open(after).tobytes()
    return Found(
        clock.rate(prompt, TRAINING, size.warm_up), clock.rate(prompt, SAMPLING, 1),
        any("goes on from step" in line for line in log), unchanged, time.monotonic() - began,
        sorted({line for line in log if any(words in line for words in ("recorded", "cannot be", "memory auto"))}),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try this script with the demo model, without a GPU")
    size = TINY if parser.parse_args().tiny else FULL
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # python put benchmarks/ there
    from benchmarks.common import set_up

    set_up()
    import torch

    if size is FULL and torch.version.cuda is None:
        sys.exit("An NVIDIA GPU is needed; --tiny tries this script without one.")
    with tempfile.TemporaryDirectory() as work:
        if size is FULL:
            write_checkpoint(Path(work) / "models" / "checkpoints" / CHECKPOINT)
        found = {}
        for name, (options, left) in SERVERS.items():
            if left is None or size is FULL:
                with left_of_the_card(left):
                    found[name] = measure(Path(work), options, size)
                report = report_of(found, size)
                if size is FULL:
                    REPORT.write_text(report, encoding="utf-8")
    print(report)
    return int(not all(run.goes_on and run.unchanged for run in found.values()))


def report_of(found: dict[str, Found], size: Size) -> str:
    import torch

    from benchmarks.common import comfyui_version, template

    rows = [
        f"| {name} | {run.trained:.2f} | {run.sampled:.2f} | {'yes' if run.goes_on else 'no'} | "
        f"{'yes' if run.unchanged else 'no'} | {run.seconds:.0f} s |"
        for name, run in found.items()
    ]
    logs = [f"- {name}: {line}" for name, run in found.items() for line in run.log]
    (text,) = template("dynamic_vram")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return text.format(
        date=date.today(), comfyui=comfyui_version(), device=device, torch=torch.__version__, steps=size.steps,
        cancel_at=size.cancel_at, rows="\n".join(rows), logs="\n".join(logs) or "- nothing",
    )  # fmt: skip


def write_checkpoint(path: Path) -> None:
    """A checkpoint of SDXL's full size with random weights."""
    import in_process
    from test_full_size import checkpoint_shapes, write_random

    with tempfile.TemporaryDirectory() as base:
        in_process.load_comfy(Path(base))
        path.parent.mkdir(parents=True)
        write_random(path, checkpoint_shapes())


if __name__ == "__main__":
    sys.exit(main())
