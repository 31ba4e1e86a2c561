"""The demo's main job: two pictures in, two LoRAs, a stylised picture and a contact sheet out."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
import time
import webbrowser
from pathlib import Path

from batch.comfy_client import WorkflowError
from demo.server import PACK, ComfyServer, ServerError
from demo.sheet import sheet

NAME = "train_and_stylise_demo"
WORKFLOW = PACK / "workflows" / "api" / f"{NAME}.json"
IMAGES = PACK / "demo" / "images"
CONTENTS, STYLES = (0.5, 1.0, 1.3), (0.0, 0.25, 0.5, 0.75, 1.0, 1.3)  # strengths
LORA_OUTPUTS = ("ConsisLoRASave", "LossGraphNode")
PLAIN_PROMPT = "a crown in the style of flat red bold navy outline halftone on pale cyan"


def main(comfyui: Path, output: Path, serve: bool) -> None:
    """Runs the demo and leaves its results in `output`; with `serve`, opens ComfyUI in the browser instead."""
    try:
        with ComfyServer(output / "comfyui", comfyui) as server:
            for picture in IMAGES.glob("*.png"):
                server.upload(picture)
            keep_open(server) if serve else train_and_stylise(server, output)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except (ServerError, WorkflowError, TimeoutError) as error:
        sys.exit(str(error))


def keep_open(server: ComfyServer) -> None:
    address = f"{server.url}/?template={NAME}&source=ComfyUI-ConsisLoRA"
    print(f"ComfyUI with the workflow is at {address}\nPress Ctrl-C to stop it.", flush=True)
    webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def train_and_stylise(server: ComfyServer, output: Path) -> None:
    """Runs the workflow, and again at other strengths; leaves a contact sheet and the LoRA files in `output`."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    locked, papers = with_structure_lock(prompt), trained_as_in_the_paper(prompt)
    loras = server.base / "models" / "loras" / "consislora"
    earlier = set(loras.glob("*.safetensors"))
    clock, papers_clock = Clock(locked), Clock(papers)

    of_paper = picture(server, papers, papers_clock)
    result = picture(server, prompt, clock)
    with_lock = picture(server, locked, clock)
    plain = picture(server, without_loras(prompt), clock)
    varied = [[cell(server, prompt, content, style, clock) for style in STYLES] for content in CONTENTS]

    content, style = (IMAGES / prompt[node]["inputs"]["image"] for node in nodes(prompt, "LoadImage"))
    first_row = [
        ("content image", content),
        ("style image", style),
        ("the model, no LoRA", plain),
        ("trained as in the paper", of_paper),
        ("result", result),
        ("with structure lock", with_lock),
    ]
    page = output / "contact_sheet.png"
    sheet([first_row, *varied]).save(page)
    files = [
        shutil.copy(file, output / f"{file.stem[:-6]}.safetensors")
        for file in set(loras.glob("*.safetensors")) - earlier
    ]
    print(clock.report(), "\nFor comparison, trained as in the paper:", papers_clock.report(), sep="\n")
    print(f"\nContact sheet: {page}", *(f"LoRA: {file}" for file in sorted(files)), sep="\n")


def nodes(prompt: dict, class_type: str) -> list[str]:
    return [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]


def picture(server: ComfyServer, prompt: dict, clock: Clock) -> Path:
    """The picture that a workflow saves; ComfyUI has the LoRAs of an earlier workflow cached."""
    entry = server.run(prompt, timeout=3600, on_event=clock)
    return server.images({"outputs": {node: entry["outputs"][node] for node in nodes(prompt, "SaveImage")}})[0]


def cell(server: ComfyServer, prompt: dict, content: float, style: float, clock: Clock) -> tuple[str, Path]:
    changed = with_sampler(prompt, content_strength=content, style_strength=style)
    return f"content {content:g}, style {style:g}", picture(server, changed, clock)


def without_loras(prompt: dict) -> dict:
    """The same workflow without LoRAs: the base model alone, with a prompt for subject and style."""
    changed = with_sampler(prompt, content_strength=0, style_strength=0, content_guidance=0, style_guidance=0)
    (sampler,) = nodes(changed, "ConsisLoRASampler")
    changed[changed[sampler]["inputs"]["positive"][0]]["inputs"]["text"] = PLAIN_PROMPT
    return changed


def trained_as_in_the_paper(prompt: dict) -> dict:
    """The same workflow with the paper's training, on the pictures' own colours; it saves the picture alone."""
    changed = {node: copy.deepcopy(prompt[node]) for node in prompt if prompt[node]["class_type"] not in LORA_OUTPUTS}
    recoloured = {node: prompt[node]["inputs"]["image"] for node in nodes(prompt, "ConsisLoRARecolour")}
    for node in nodes(changed, "VAEEncode"):
        inputs = changed[node]["inputs"]
        inputs["pixels"] = recoloured.get(inputs["pixels"][0], inputs["pixels"])
    for node in (*nodes(changed, "ConsisLoRATrainImage"), *nodes(changed, "ConsisLoRATrainStyle")):
        changed[node]["inputs"]["preset"] = "paper"
    return changed


def with_structure_lock(prompt: dict) -> dict:
    """The same workflow, begun at the noise that the content image is made from, in the style image's palette."""
    changed = with_sampler(prompt, structure_lock=True, latent_image=["content latent", 0])
    content, style = (prompt[recolour]["inputs"]["image"] for recolour in nodes(prompt, "ConsisLoRARecolour"))
    (decode,) = nodes(prompt, "VAEDecode")
    palettes = {"images": content, "style_image": style, "strength": 1.0}
    encoded = {"pixels": ["palette", 0], "vae": prompt[decode]["inputs"]["vae"]}
    changed["palette"] = {"class_type": "ConsisLoRAMatchPalette", "inputs": palettes, "_meta": {"title": "Palette"}}
    changed["content latent"] = {"class_type": "VAEEncode", "inputs": encoded, "_meta": {"title": "To latent"}}
    return changed


def with_sampler(prompt: dict, **inputs) -> dict:
    changed = copy.deepcopy(prompt)
    for node in nodes(changed, "ConsisLoRASampler"):
        changed[node]["inputs"] |= inputs
    return changed


class Clock:
    """Times each node by ComfyUI's messages while workflows run, and prints the progress of a training."""

    def __init__(self, prompt: dict):
        self.titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
        self.trainings = {
            node_id for node_id, node in prompt.items() if node["class_type"].startswith("ConsisLoRATrain")
        }
        self.seconds = dict.fromkeys(self.titles, 0.0)
        self.node, self.since = None, 0.0

    def __call__(self, kind: str, data: dict | bytes) -> None:
        if kind == "executing":
            self.turn_to(data["node"])
        elif kind == "progress" and data["node"] in self.trainings and data["value"] % max(1, data["max"] // 10) == 0:
            spent = time.monotonic() - self.since
            print(f"{self.titles[data['node']]}: step {data['value']} of {data['max']}, {spent:.0f} s", flush=True)

    def turn_to(self, node: str | None) -> None:
        now = time.monotonic()
        if self.node:
            self.seconds[self.node] += now - self.since
        self.node, self.since = node, now

    def report(self) -> str:
        lines = [f"{seconds:7.1f} s  {self.titles[node]}" for node, seconds in self.seconds.items() if seconds >= 0.1]
        return "\n".join(["", *lines, f"{sum(self.seconds.values()):7.1f} s  in all"])
