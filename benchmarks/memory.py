"""`python benchmarks/memory.py`: the memory that training takes beyond the model, ours beside ComfyUI's TrainLoraNode.

Each measurement is a process of its own: it builds a UNet of about 1 GB in ComfyUI's classes, trains it for a few steps
through the node, and tells by how much its resident memory rose at most. Exits with 1 if what is left of our growth
without activations, LoRA and optimizer is above 15 % of the UNet.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 0.15
STEPS, RANK, LATENT = 3, 64, (1, 4, 64, 64)

SDXL_UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, channel_mult=[1, 2, 4], num_res_blocks=[2, 2, 2],
    transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048, adm_in_channels=2816,
    num_classes="sequential", use_spatial_transformer=True, use_linear_in_transformer=True,
    use_temporal_attention=False, legacy=False,
)  # fmt: skip
CHANNELS = {"float32": 96, "float16": 128}  # about 1 GB in either: 304 and 515 million parameters instead of 2567


def sdxl_shaped(stored, channels):
    """A MODEL of random weights, made in inference mode as a loader node would."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SDXL(dict(SDXL_UNET, model_channels=channels))
    config.set_inference_dtype(stored, torch.float32)
    model = config.get_model({})
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


def train_ours(pack, model, latent, positive, steps):
    """ConsisLoRATrainImage."""
    pack.nodes.train.TrainImage.execute(
        model, latent, positive, steps=steps, transition_step=1, learning_rate=2e-4,
        reconstruction_learning_rate=1e-4, rank=RANK, seed=0, precision="fp32",
    )  # fmt: skip


def train_theirs(pack, model, latent, positive, steps):
    """TrainLoraNode with the same rank and precision, else its defaults."""
    from comfy_extras.nodes_train import TrainLoraNode

    inputs = dict(
        model=model, positive=positive, steps=steps, rank=RANK, seed=0, training_dtype="fp32", lora_dtype="fp32",
        batch_size=1, grad_accumulation_steps=1, learning_rate=2e-4, optimizer="AdamW", loss_function="MSE",
        algorithm="LoRA", gradient_checkpointing=True, existing_lora="[None]",
    )  # fmt: skip
    lists = {name: [value] for name, value in inputs.items()}
    # Given one latent alone it fails in ComfyUI 0.3.75; with two it still trains on one of them a step.
    TrainLoraNode.execute(latents=[latent, latent], **lists)


EXPLANATION = f"""\
{STEPS} steps at rank {RANK} on one 512 x 512 image, computed in fp32, on a UNet like SDXL's, made narrow so that it
takes about 1 GB, with random weights. Peak growth: resident memory over what it was just before the node ran. LoRA:
16 bytes a parameter (weight, gradient and AdamW's two moments in fp32); TrainLoraNode puts LoRA on every layer, ours
on the two role blocks. Activations: what autograd keeps in a step, all weights aside. TrainLoraNode checkpoints
gradients, as is its default. The rest, in % of the UNet, is to stay below {ALLOWED:.0%}. glibc is told to give freed
memory back at once (MALLOC_MMAP_THRESHOLD_), or what it keeps for later would count as well.

| node | weights in | UNet | peak growth | LoRA | activations | the rest |
|---|---|---|---|---|---|---|"""
TRAINERS = {"ConsisLoRATrainImage": train_ours, "TrainLoraNode": train_theirs}


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """How many bytes more than at the start were ever resident, looked at every 2 ms."""
    import psutil

    process, over = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    growth = [0]

    def watch():
        while not over.wait(0.002):
            growth[0] = max(growth[0], process.memory_info().rss - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        over.set()
        watcher.join()


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Every piece of memory that autograd keeps: its address and its size."""
    import torch

    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def learning() -> dict[int, int]:
    """Every tensor that an optimizer has moved, from now on: its address and its size."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    tensors = {}

    def note(optimizer, *_):
        for group in optimizer.param_groups:
            tensors.update((parameter.data_ptr(), parameter.nbytes) for parameter in group["params"])

    register_optimizer_step_pre_hook(note)
    return tensors


def measure(trainer: str, stored: str, channels: str, what: str) -> dict:
    """One measurement in this process; sizes in bytes."""
    sys.path.append(str(ROOT / "tests"))
    from conftest import load_comfy, load_pack

    with tempfile.TemporaryDirectory() as base:
        load_comfy(Path(base))
        pack = load_pack()
        import torch

        torch.manual_seed(0)
        with torch.inference_mode():
            model = sdxl_shaped(getattr(torch, stored), int(channels))
            latent = {"samples": torch.randn(LATENT)}
            positive = [[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]]
            unet = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.model.parameters()}
            lora = learning()
            if what == "activations":
                with saved_for_backward() as kept:
                    TRAINERS[trainer](pack, model, latent, positive, steps=1)
                return {"activations": sum(size for address, size in kept.items() if address not in {**unet, **lora})}
            with peak_growth() as growth:
                TRAINERS[trainer](pack, model, latent, positive, STEPS)
        return {"unet": sum(unet.values()), "growth": growth[0], "lora": 4 * sum(lora.values())}


def in_a_process(*what: str) -> dict:
    # glibc would keep much of what was freed for later, and count it as resident.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *what]
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def full_size(activations: int) -> list[str]:
    """The memory that training takes on SDXL itself, in bf16, by the image's side: computed from our measured parts.

    activations: in bytes, of the small UNet in fp32. They grow with channels and with pixels.
    """
    unet, lora, rest = 2 * 2_567_463_684, 16 * 28_180_480, ALLOWED * 2 * 2_567_463_684
    wider = SDXL_UNET["model_channels"] / CHANNELS["float32"]
    rows = [
        "| image | UNet, fp16 | LoRA and optimizer | activations, bf16 | the rest, at most | in all |",
        "|---|" + 5 * "---|",
    ]
    for side in (512, 768, 1024):
        kept = activations / 2 * wider * (side / (8 * LATENT[-1])) ** 2
        parts = [unet, lora, kept, rest]
        rows.append(
            f"| {side} x {side} | " + " | ".join(f"{size / 1e9:.1f} GB" for size in (*parts, sum(parts))) + " |"
        )
    return rows


def report() -> bool:
    """Print everything as Markdown; whether our node is within bounds."""
    import torch

    comfyui = runpy.run_path(os.environ["COMFYUI_PATH"] + "/comfyui_version.py")["__version__"]
    print(f"# Memory while training\n\n{date.today()}, ComfyUI {comfyui}, torch {torch.__version__}, CPU.")
    print(EXPLANATION)
    within = True
    for stored, channels in CHANNELS.items():
        # Casts must not pass for activations, so these are counted where nothing is cast.
        counted = in_a_process("ConsisLoRATrainImage", "float32", str(channels), "activations")
        for trainer in TRAINERS:
            sizes = in_a_process(trainer, stored, str(channels), "growth")
            cells = [trainer, stored, *(f"{sizes[key] / 1e6:.0f} MB" for key in ("unet", "growth", "lora"))]
            if trainer == "ConsisLoRATrainImage":
                rest = (sizes["growth"] - sizes["lora"] - counted["activations"]) / sizes["unet"]
                within = within and rest < ALLOWED
                cells += [f"{counted['activations'] / 1e6:.0f} MB", f"{rest:.1%}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        if stored == "float32":
            computed = full_size(counted["activations"])
    print("\n# SDXL itself, computed from these parts\n", *computed, sep="\n")
    return within


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
        sys.exit(not report())
