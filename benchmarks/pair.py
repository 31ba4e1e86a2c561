"""`python benchmarks/pair.py [--scale S] [--sdxl] [--only ...] [--tiny]`: a pair, from two pictures to a saved one.

Runs the workflow of a pair in a ComfyUI of its own for each contender: the presets, and ComfyUI's own Train LoRA.
Reports the seconds of each part, also in benchmarks/results/pair.md; the same with the loop of the published scripts
(diffusers, PEFT), computed from a step of both on one UNet; and what a catalogue takes, each LoRA trained once.

It takes the demo model, whose seconds say nothing of SDXL: compare ratios. `--sdxl` takes a checkpoint of SDXL's full
size and random weights, and needs an NVIDIA GPU (results/pair_sdxl.md). `--scale` takes fewer training steps than the
paper's, for all alike. `--tiny` tries either in a few steps of the demo model, and writes nothing.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.common import set_up

    set_up(packages=("torch", "einops", "psutil", "aiohttp", "diffusers", "peft"))

import torch
from PIL import Image

from benchmarks.common import RESULTS, comfyui_version, joined, measure_in_a_process, table, template
from benchmarks.photo_graphs import CONTENDERS, DEMO, PLAIN, TINY_ENCODERS, Base, Graphs, sdxl
from catalogue.api_form import Workflow
from consislora_core.schedule import PAPER, PRESETS, image_stage, style_stage
from demo.run import IMAGES
from demo.server import PACK, ComfyServer

CHECKPOINT = "random_sdxl.safetensors"
PICTURES = {"content": "crown-flat.png", "style": "umbrella-high-contrast.png"}
TINY_SCALE = 0.002
LOADER = "ConsisLoRACatalogLoad"
PARTS = START, LOADED, READ, CONTENT, STYLE_1, STYLE_2, DRAWN = (
    "server's start", "model loaded", "pictures and texts encoded", "content LoRA", "style LoRA, stage 1", "stage 2",
    "drawn and saved",
)  # fmt: skip
PART_OF = {
    "ConsisLoRADemoModel": LOADED, "CheckpointLoaderSimple": LOADED, "ConsisLoRATrainStyle": STYLE_2,
    **dict.fromkeys(("ConsisLoRASampler", "KSampler", "LoraLoaderModelOnly", "VAEDecode", "SaveImage"), DRAWN),
}  # fmt: skip
TRAINERS = "ConsisLoRATrainImage", "TrainLoraNode"
TRAININGS = CONTENT, STYLE_1, STYLE_2
# Steps a second on an H200 at full size: of whole trainings of SHORT steps, in the middle of one, drawn with guidance.
SHORT, IN_SHORT, IN_MIDDLE, GUIDED = 60, 13.4, 23.3, 6.19  # results/dynamic_vram.md, training_gpu.md, dynamic_vram.md
BEGINNING = SHORT / IN_SHORT - SHORT / IN_MIDDLE  # seconds that a training takes beside its steps
GUIDED_STEPS = 30
CATALOGUES = [(1, 1), (5, 5), (10, 10), (20, 10), (10, 20), (200, 1), (1, 200)]  # content images, style images

Seconds = Counter[str]  # by part


class PairGraphs(Graphs):
    """The workflows of photos.py without scores, from files in ComfyUI's input folder to one in its output folder."""

    def _scored(self, graph, pair, picture) -> Workflow:
        graph.add("SaveImage", images=picture, filename_prefix="pair")
        return graph.nodes

    def from_disk(self, workflow: Workflow) -> Workflow:
        """The workflow with Load Image nodes in place of Load Catalogue."""
        (loader,) = (name for name, node in workflow.items() if node["class_type"] == LOADER)
        loaded = dict(enumerate(PICTURES))
        nodes = {role: {"class_type": "LoadImage", "inputs": {"image": file}} for role, file in PICTURES.items()}
        for name, node in workflow.items():
            links = {key: [loaded[link[1]], 0] for key, link in node["inputs"].items() if _comes_from(loader, link)}
            nodes[name] = {**node, "inputs": node["inputs"] | links}
        del nodes[loader]
        return nodes


def _comes_from(loader: str, value) -> bool:
    return isinstance(value, list) and value[0] == loader


class Clock:
    """Adds up the seconds of each node of a workflow in `seconds`, by ComfyUI's messages. parts: of its trainings."""

    def __init__(self, workflow: Workflow, parts: Iterator[str], seconds: Seconds):
        kinds = {name: node["class_type"] for name, node in workflow.items()}
        self.part = {name: next(parts) if kind in TRAINERS else PART_OF.get(kind, READ) for name, kind in kinds.items()}
        self.seconds, self.node, self.since = seconds, None, 0.0

    def __call__(self, kind: str, data) -> None:
        if kind == "executing":
            now = time.monotonic()
            if self.node:
                self.seconds[self.part[self.node]] += now - self.since
            self.node, self.since = data["node"], now


class Bench(NamedTuple):
    base: Base
    scale: float  # of all training steps
    folder: Path  # of the servers; the checkpoint lies in its models

    def measure(self, contender: str) -> Seconds:
        """A pair in a server that has just started."""
        seconds, began, recipe = Counter(), time.monotonic(), CONTENDERS[contender]
        parts = iter((CONTENT, STYLE_1))  # the order in which `Graphs.pair` adds them
        options = "--extra-model-paths-config", str(self.folder / "models.yaml")
        with ComfyServer(self.folder / contender, Path(os.environ["COMFYUI_PATH"]), *options) as server:
            seconds[START] = time.monotonic() - began
            for file in PICTURES.values():
                side = self.base.side
                Image.open(IMAGES / file).convert("RGB").resize((side, side)).save(server.base / "input" / file)
            graphs = PairGraphs(server.get("/object_info"), self.base, TINY_ENCODERS, self.scale)

            def run(workflow: Workflow) -> list[Path]:
                return server.images(server.run(workflow, 7200, Clock(workflow, parts, seconds)))

            if contender != PLAIN:
                workflow = graphs.pair(recipe, 0)
            else:
                files = []
                for file, prompt in zip(PICTURES.values(), ("A [c]", "A [v]"), strict=True):
                    training, name = graphs.plain_training(recipe, file, prompt)
                    run(training)
                    files.append(max(listed for listed in server.get("/models/loras") if listed.startswith(name)))
                workflow = graphs.plain_pair(*files, 0)
            (picture,) = run(graphs.from_disk(workflow))
            Image.open(picture).save(self.folder / f"{contender}.png")
        return seconds


def parts_section(found: dict[str, Seconds]) -> tuple[str, list]:
    labels = {name: CONTENDERS[name].label if name in CONTENDERS else name for name in found}
    sums = {
        name: (sum(seconds[part] for part in TRAININGS), sum(seconds.values()) - seconds[START])
        for name, seconds in found.items()
    }
    rows = []
    for name, seconds in found.items():
        ratios = ["not measured"] * 2
        if PAPER in found:
            ratios = [f"{ours / papers:.2f}" for ours, papers in zip(sums[name], sums[PAPER], strict=True)]
        rows.append([labels[name], *(f"{seconds[part]:.1f}" for part in PARTS), f"{sums[name][1]:.1f}", *ratios])
    header = ["seconds", *PARTS, "in all, after the start", "trained, times paper", "in all, times paper"]
    return table(header, rows)


def growth_section(found: dict[str, Seconds]) -> str:
    """What catalogues take, as sums of the measured parts: each LoRA is trained once, each pair drawn."""
    rows = []
    for contents, styles in CATALOGUES:
        pairs, cells = contents * styles, []
        for seconds in found.values():
            content, style = seconds[CONTENT], seconds[STYLE_1] + seconds[STYLE_2]
            shared = contents * content + styles * style + pairs * seconds[DRAWN]
            cells.append(f"{shared / pairs:.1f} ({pairs * (content + style + seconds[DRAWN]) / shared:.1f})")
        rows.append([f"{contents} x {styles}", pairs, *cells])
    return table(["content x style images", "pairs", *found], rows)


def computed_section() -> str:
    """What a pair would take on an H200 at SDXL's size, by the rates measured there."""
    rows = []
    for preset in PRESETS:
        steps = 2 * image_stage(preset=preset).steps + style_stage(preset=preset).steps
        trained, drawn = steps / IN_MIDDLE + len(TRAININGS) * BEGINNING, GUIDED_STEPS / GUIDED
        worst = steps / IN_SHORT + drawn
        rows.append([preset, steps, *(f"{seconds:.0f}" for seconds in (trained, drawn, trained + drawn, worst))])
    return table(["preset", "steps", "trained", "drawn", "in all", "in all, at worst"], rows)


def with_published_loop(found: dict[str, Seconds], device: str) -> dict[str, Seconds]:
    """Adds what paper would take with the training of the published scripts, from steps on training.py's UNet."""
    training = str(PACK / "benchmarks" / "training.py")
    ours, plain = (
        measure_in_a_process(training, "side", name, device, "speed")["seconds"] for name in ("fast", "plain")
    )
    paper = found[PAPER]
    slower = Counter({part: paper[part] * (plain / ours if part in TRAININGS else 1) for part in paper})
    return {**found, "published loop, computed": slower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("--scale", type=float, default=1.0, help="training steps, as a part of the paper's")
    parser.add_argument("--sdxl", action="store_true", help="SDXL's size with random weights, on an NVIDIA GPU")
    contenders = (*PRESETS, PLAIN)
    parser.add_argument("--only", nargs="+", choices=contenders, default=contenders, help="measure these alone")
    parser.add_argument("--tiny", action="store_true", help="try this script in a few steps of the demo model")
    options = parser.parse_args()
    is_full = options.sdxl and not options.tiny
    if is_full and torch.version.cuda is None:
        sys.exit("--sdxl needs an NVIDIA GPU; with --tiny it tries this script without one.")
    with tempfile.TemporaryDirectory() as work:
        base, folder = sdxl(CHECKPOINT) if is_full else DEMO, Path(work)
        (folder / "models.yaml").write_text(f"pair: {{base_path: '{folder.as_posix()}', checkpoints: checkpoints}}")
        if is_full:
            sys.path.append(str(PACK / "tests"))
            from benchmarks.dynamic_vram import write_checkpoint

            write_checkpoint(folder / "checkpoints" / CHECKPOINT)
        bench = Bench(base, TINY_SCALE if options.tiny else options.scale, folder)
        found = {name: bench.measure(name) for name in options.only}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.tiny and PAPER in found:
        found = with_published_loop(found, device)
    introduction, growth, computed = template("pair")
    facts = dict(
        options=shlex.join(["", *sys.argv[1:]]).removeprefix("''"), date=date.today(), comfyui=comfyui_version(),
        torch=torch.__version__, model="SDXL's size, random weights" if is_full else "demo model", side=base.side,
        machine=torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        scale=bench.scale, parts=parts_section(found), growth=growth_section(found), computed=computed_section(),
        in_short=IN_SHORT, in_middle=IN_MIDDLE, beginning=BEGINNING, guided=GUIDED, guided_steps=GUIDED_STEPS,
    )  # fmt: skip
    sections = [introduction, growth] if is_full else [introduction, growth, computed]
    text = joined([section.format(**facts) for section in sections])
    print(text)
    if not options.tiny:
        (RESULTS / f"pair{'_sdxl' * options.sdxl}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
