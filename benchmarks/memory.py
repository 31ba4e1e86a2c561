"""`python benchmarks/memory.py`: the memory that training takes beyond the model, ours beside ComfyUI's TrainLoraNode.

Each measurement is a process of its own: it builds a UNet of about 1 GB in ComfyUI's classes, trains it for a few steps
through the node, and reports the peak growth of its resident memory. Exits with 1 if our growth, less activations, LoRA
and optimizer, is above 15 % of the UNet.
"""

import json
import sys
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import GIVE_BACK, comfyui_version, measure_in_a_process, set_up, template
from benchmarks.trainers import (
    SDXL_UNET,
    SIZES,
    Size,
    fast,
    host,
    peak_growth,
    random_inputs,
    random_model,
    saved_for_backward,
    train_lora_node,
)

ALLOWED = 0.15
STEPS, RANK, SIDE = 3, 64, 64
CHANNELS = {"float32": SIZES["narrow"].channels, "float16": 128}  # about 1 GB in either
TRAINERS = {"ConsisLoRATrainImage": fast, "TrainLoraNode": train_lora_node}


def watch_learned_parameters() -> dict[int, int]:
    """The parameters that an optimizer moves from now on: size in bytes by address."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    tensors = {}

    def note(optimizer, *_):
        for group in optimizer.param_groups:
            tensors.update((parameter.data_ptr(), parameter.nbytes) for parameter in group["params"])

    register_optimizer_step_pre_hook(note)
    return tensors


def measure(trainer: str, stored: str, channels: str, what: str) -> dict:
    """One measurement in this process; sizes in bytes."""
    with host("cpu") as pack:
        import torch

        with torch.inference_mode():
            model = random_model(Size(int(channels), SIDE, RANK, stored), "cpu")
            lora = watch_learned_parameters()
            latent, positive = random_inputs(SIDE)
            unet = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.model.parameters()}
            if what == "activations":
                with saved_for_backward() as kept:
                    TRAINERS[trainer](pack, model, latent, positive, 1, RANK, "fp32")
                return {"activations": sum(size for address, size in kept.items() if address not in {**unet, **lora})}
            with peak_growth() as growth:
                TRAINERS[trainer](pack, model, latent, positive, STEPS, RANK, "fp32")
        return {"unet": sum(unet.values()), "growth": growth[0], "lora": 4 * sum(lora.values())}


def compute_full_size(activations: int) -> list[str]:
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
        kept = activations / 2 * wider * (side / (8 * SIDE)) ** 2
        parts = [unet, lora, kept, rest]
        rows.append(
            f"| {side} x {side} | " + " | ".join(f"{size / 1e9:.1f} GB" for size in (*parts, sum(parts))) + " |"
        )
    return rows


def report() -> bool:
    """Prints everything as Markdown; whether our node is within bounds."""
    import torch

    (explanation,) = template("memory")
    versions = dict(date=date.today(), comfyui=comfyui_version(), torch=torch.__version__)
    print(explanation.rstrip().format(steps=STEPS, rank=RANK, allowed=ALLOWED, **versions))
    within = True
    for stored, channels in CHANNELS.items():
        # Counted where nothing is cast, so that casts do not count as activations.
        counted = measure_in_a_process(__file__, "ConsisLoRATrainImage", "float32", str(channels), "activations")
        for trainer in TRAINERS:
            sizes = measure_in_a_process(__file__, trainer, stored, str(channels), "growth", malloc=GIVE_BACK)
            cells = [trainer, stored, *(f"{sizes[key] / 1e6:.0f} MB" for key in ("unet", "growth", "lora"))]
            if trainer == "ConsisLoRATrainImage":
                rest = (sizes["growth"] - sizes["lora"] - counted["activations"]) / sizes["unet"]
                within = within and rest < ALLOWED
                cells += [f"{counted['activations'] / 1e6:.0f} MB", f"{rest:.1%}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        if stored == "float32":
            computed = compute_full_size(counted["activations"])
    print("\n# SDXL itself, computed from these parts\n", *computed, sep="\n")
    return within


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        set_up()
        sys.exit(not report())
