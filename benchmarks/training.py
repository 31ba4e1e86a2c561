"""`python benchmarks/training.py`: what a training step costs in time and memory beside other ways.

Prints Markdown, for benchmarks/results/training.md, and draws a chart beside it. It measures ours, `fast` and `lean`; a
plain recipe as in published scripts (diffusers, PEFT, autocast, AdamW); and ComfyUI's own TrainLoraNode. Same shape of
UNet, image, rank and precision; each measurement is a process of its own. On a CUDA device the UNet is SDXL's own size,
for training_gpu.md; on a CPU a narrow one, but for Muon's share of a step, which takes 10 GB there. Exits with 1 if a
bound is missed.
"""

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import (
    COLOURS,
    GIVE_BACK,
    RESULTS,
    chart_axes,
    comfyui_version,
    measure_in_a_process,
    set_up,
    template,
)
from benchmarks.trainers import (
    PRECISIONS,
    SIZES,
    TRAINERS,
    Size,
    fast,
    host,
    muon,
    peak_growth,
    plain_recipe,
    plain_unet,
    random_inputs,
    random_model,
    saved_for_backward,
)

PRODUCT = re.compile(r"aten::((add)?mm|(badd)?bmm|mkldnn_convolution|convolution_backward|_scaled_dot_product_\w+)")
OURS = ("fast", "Muon", "lean")
ALL = (*OURS, "plain", "TrainLoraNode")
RATIOS = {  # ours, the other: at least this many times its speed, or at most this share of its memory
    ("fast", "plain", "speed"): 1.3,
    ("Muon", "plain", "speed"): 1.3,
    ("lean", "plain", "memory"): 0.60,
    ("fast", "TrainLoraNode", "speed"): 3.0,
    ("lean", "TrainLoraNode", "memory"): 0.35,
}


class Plan(NamedTuple):
    """What is measured side by side, and how many times."""

    size: Size
    rounds: int
    steps: int
    ratios: dict[tuple[str, str, str], float]


PLANS = {
    "cpu": Plan(SIZES["narrow"], 3, 8, RATIOS),
    "cuda": Plan(SIZES["sdxl"], 1, 8, {**RATIOS, ("fast", "plain", "speed"): 3.0}),
}
WHOLE = {"fast": 16e9, "lean": 8e9}  # bytes at most, UNet included, at SDXL's size
MUON_SHARE = 0.02  # of a step's time, at SDXL's size
SHARE, PAIR = 0.45, 120  # on a GPU: at least this share of a large product's FLOP/s; at most these seconds a pair
PAIR_STEPS = 1500 + 1500 + 1000
BATCH, BATCH_BOUND, SAME = 8, {"cpu": 1.3, "cuda": 2.0}, 1e-4
FLAT_STEPS = 2000
GROWTH = {  # side of the latent, rank, images in a batch
    "resolution (latent side)": [(side, 16, 1) for side in (64, 96, 128, 192)],  # 512 to 1536 pixels
    "rank": [(16, rank, 1) for rank in (4, 16, 64, 256)],
    "images in a batch": [(16, 16, images) for images in (1, 2, 4, 8, 16)],
}


def read_clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def record_step_ends(pack: ModuleType | None = None, clock: Callable[[], float] = read_clock) -> list[float]:
    """The times at which steps end, from now on: of the pack's Trainer; without a pack, of any optimizer."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends = []
    if pack is None:
        register_optimizer_step_post_hook(lambda *_: ends.append(clock()))
        return ends
    train_step = pack.host.training_run.Trainer.train_step

    def timed(trainer, *inputs):
        event = train_step(trainer, *inputs)
        ends.append(clock())
        return event

    pack.host.training_run.Trainer.train_step = timed
    return ends


def seconds_a_step(ends: list[float]) -> float:
    """The median, without the first two steps."""
    return statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))


def measure_side(trainer: str, device: str, what: str) -> dict:
    """Seconds a step, or a noise where a step has several; and memory, which is not measured for "speed"."""
    import torch

    size = PLANS[device].size
    steps = 3 if what == "memory" else PLANS[device].steps
    with host(device) as pack:
        if trainer == "plain":
            unet = plain_unet(size, device)

            def train():
                plain_recipe(unet, size, steps, device)
        else:
            with torch.inference_mode():
                model = random_model(size, device)
            unet, (latent, positive) = model.model.diffusion_model, random_inputs(size.side)

            def train():
                with torch.inference_mode():
                    TRAINERS[trainer](pack, model, latent, positive, steps, size.rank, PRECISIONS[size.dtype])

        ends = record_step_ends(pack if trainer in OURS else None)
        own = sum(weight.nbytes for weight in unet.parameters())
        with nullcontext([0]) if what == "speed" else peak_growth(device) as growth:
            train()
        seconds = seconds_a_step(ends)
        whole = growth[0] + own if device == "cpu" else torch.cuda.max_memory_reserved()
        return {"seconds": seconds, "growth": growth[0], "whole": whole}


def count_onednn_linear() -> dict:
    """For FlopCounterMode: oneDNN's linear, and its FLOP from the shapes of x and weight."""
    import torch

    def flop(x, weight, *_, out_shape=None, **__):
        return 2 * math.prod(x) * weight[0]

    return {torch.ops.mkldnn._linear_pointwise: flop} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}


class Clock:
    """Takes times during a step: on a GPU by CUDA events, which a recorded step records again in each replay."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def mark(self, *_) -> None:
        import torch

        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True, external=True))
        self.marks[-1].record()

    def last(self, count: int) -> list[float]:
        """Seconds between the last `count` marks."""
        pairs = list(zip(self.marks[-count:], self.marks[1 - count :], strict=False))
        if self.device == "cpu":
            return [end - start for start, end in pairs]
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def mark_optimizer(clock: Clock) -> None:
    """Marks the beginning and the end of each optimizer's step, from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(clock.mark)
    register_optimizer_step_post_hook(clock.mark)


def measure_split(device: str) -> dict:
    """The seconds of a `fast` step by its parts, its FLOP, and the FLOP/s of this device in one large product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size, _, all_steps, _ = PLANS[device]
    precision, parts = PRECISIONS[size.dtype], []
    with host(device) as pack, torch.inference_mode():
        model = random_model(size, device)
        unet, clock = model.model.diffusion_model, Clock(device)
        latent, positive = random_inputs(size.side)
        flops = []
        for steps in (1, 2):  # the first also reads the text
            with FlopCounterMode(display=False, custom_mapping=count_onednn_linear()) as counter:
                fast(pack, model, latent, positive, steps, size.rank, precision)
            flops.append(counter.get_total_flops())
        unet.input_blocks[0][0].register_forward_pre_hook(clock.mark)
        unet.output_blocks[0][0].register_forward_pre_hook(clock.mark)
        unet.out.register_forward_hook(clock.mark)
        mark_optimizer(clock)

        def note() -> float:
            end = read_clock()
            parts.append(clock.last(5))
            return end

        ends = record_step_ends(pack, note)
        fast(pack, model, latent, positive, all_steps, size.rank, precision)
    names = ("forward encoder", "forward decoder", "backward", "optimizer")
    split = dict(zip(names, (statistics.median(part) for part in zip(*parts[2:], strict=True)), strict=True))
    return {
        "split": {"other": seconds_a_step(ends) - sum(split.values()), **split},
        "flops": flops[1] - flops[0],
        "rate": measure_matrix_rate(device, getattr(torch, size.dtype)),
    }


def measure_muon(device: str) -> dict:
    """The seconds of a step at SDXL's size, and of Muon's part in it."""
    import torch

    size, seconds = SIZES["sdxl"], []
    with host(device) as pack, torch.inference_mode():
        model, (latent, positive), clock = random_model(size, device), random_inputs(size.side), Clock(device)
        mark_optimizer(clock)

        def note() -> float:
            end = read_clock()
            seconds.extend(clock.last(2))
            return end

        ends = record_step_ends(pack, note)
        muon(pack, model, latent, positive, PLANS[device].steps // 2, size.rank, PRECISIONS[size.dtype])
    return {"step": seconds_a_step(ends), "muon": statistics.median(seconds[2:])}


def measure_pair(device: str) -> dict:
    """Seconds of a whole pair, node to node, with the preset fast and the default numbers of steps."""
    import torch

    size = PLANS[device].size
    with host(device) as pack, torch.inference_mode():
        model, (latent, positive), train = random_model(size, device), random_inputs(size.side, 2), pack.nodes.train
        settings = dict(rank=size.rank, seed=0, precision=PRECISIONS[size.dtype], memory="fast", preset="fast")
        start = time.perf_counter()
        for image in latent["samples"].split(1):
            lora = train.TrainImage.execute(
                model, {"samples": image}, positive, steps=1500, transition_step=500, learning_rate=2e-4,
                reconstruction_learning_rate=1e-4, **settings,
            ).result[0]  # fmt: skip
        train.TrainStyle.execute(
            model, {"samples": image}, positive, lora, steps=1000, reconstruction_learning_rate=1e-4, noise_offset=0.03,
            **settings,
        )  # fmt: skip
        return {"seconds": time.perf_counter() - start}


def measure_products() -> dict:
    """The share of a plain step's seconds on a CPU that goes into matrix products, convolutions and attention."""
    import torch

    size, _, steps, _ = PLANS["cpu"]
    unet = plain_unet(size, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain_recipe(unet, size, steps // 2, "cpu")
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {"share": sum(seconds[name] for name in seconds if PRODUCT.fullmatch(name)) / sum(seconds.values())}


def measure_matrix_rate(device: str, dtype) -> float:
    """FLOP/s of a product of two large matrices."""
    import torch

    n = 2048 if device == "cpu" else 8192
    matrix, times = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(12):
        start = read_clock()
        matrix @ matrix
        times.append(read_clock() - start)
    return 2 * n**3 / statistics.median(times)


def load_demo_model(pack):
    return pack.nodes.demo.LoadDemoModel.execute().result[0]


def random_demo_positive():
    import torch

    return [[torch.randn(1, 32, 192), {"pooled_output": torch.randn(1, 128)}]]


def all_weights(lora):
    import torch

    return torch.cat([side.flatten() for part in lora.parts.values() for layer in part.values() for side in layer[:2]])


def measure_batch(device: str) -> dict:
    """`BATCH` images on the demo model, alone and together: seconds a step and image, and how much the LoRAs differ."""
    import shutil

    import torch

    settings = dict(
        steps=12, transition_step=4, learning_rate=2e-4, reconstruction_learning_rate=1e-4, rank=64, seed=0,
        precision="fp32", memory="fast",
    )  # fmt: skip
    with host(device) as pack, torch.inference_mode():
        torch.backends.cudnn.allow_tf32 = False  # which rounds more than the bound allows
        train = pack.nodes.train
        model, positive = load_demo_model(pack), random_demo_positive()
        images, ends = torch.randn(BATCH, 4, 16, 16), record_step_ends(pack)
        alone, seconds = [], []
        for image in images.split(1):
            ends.clear()
            alone.append(train.TrainImage.execute(model, {"samples": image}, positive, **settings).result[0])
            seconds.append(seconds_a_step(ends))
        shutil.rmtree(pack.host.paths.training_store().folder)
        ends.clear()
        together = train.TrainImages.execute(model, {"samples": images}, positive, at_once=BATCH, **settings).result[0]
        difference = [
            ((all_weights(ours) - all_weights(theirs)).norm() / all_weights(theirs).norm()).item()
            for ours, theirs in zip(together, alone, strict=True)
        ]
        return {
            "alone": statistics.median(seconds),
            "together": seconds_a_step(ends) / BATCH,
            "difference": max(difference),
        }


def measure_flat(device: str) -> dict:
    """A long training of the demo model: its first and last 500 steps, and its memory after them."""
    import psutil
    import torch

    resident = []
    with host(device) as pack, torch.inference_mode():
        model, positive, ends = load_demo_model(pack), random_demo_positive(), record_step_ends(pack)
        show = pack.host.progress.Progress.show

        def watch(progress, event):
            show(progress, event)
            if event.step in (500, FLAT_STEPS):
                resident.append(psutil.Process().memory_info().rss)

        pack.host.progress.Progress.show = watch
        fast(pack, model, {"samples": torch.randn(1, 4, 16, 16)}, positive, FLAT_STEPS, 16, "fp32")
    first, last = (seconds_a_step(part) for part in (ends[:500], ends[-500:]))
    return {"first": first, "last": last, "resident": resident}


def measure_growth(device: str) -> dict:
    """Seconds a step and bytes (saved for backward, LoRA and optimizer) of every point of `GROWTH`."""
    import torch

    points = []
    with host(device) as pack, torch.inference_mode():
        model, ends = random_model(SIZES["growing"], device), record_step_ends(pack)
        unet = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
        for side, rank, images in dict.fromkeys(point for row in GROWTH.values() for point in row):
            latent, positive = random_inputs(side, images)
            settings = dict(
                transition_step=0, learning_rate=2e-4, reconstruction_learning_rate=1e-4, rank=rank, seed=0,
                precision="fp32", at_once=images, memory="fast",
            )  # fmt: skip
            each = pack.nodes.train.TrainImages.execute
            with saved_for_backward() as saved:
                lora = each(model, latent, positive, steps=1, **settings).result[0][0]
            ends.clear()
            each(model, latent, positive, steps=6, **settings)
            activations = sum(size for address, size in saved.items() if address not in unet)
            # Gradient and two moments: the weights are among the saved tensors.
            size = activations + 12 * images * len(all_weights(lora))
            points.append([[side, rank, images], seconds_a_step(ends), size])
    return {"points": points}


MEASUREMENTS = {
    "side": measure_side,
    "split": measure_split,
    "muon": measure_muon,
    "pair": measure_pair,
    "products": measure_products,
    "batch": measure_batch,
    "flat": measure_flat,
    "growth": measure_growth,
}


def compare_trainers(device: str) -> tuple[bool, dict[str, float]]:
    """Prints the table; whether all bounds hold, and seconds a step or noise by trainer."""
    _, rounds, _, ratios = PLANS[device]
    # In turns, so that a machine that slows down slows all of them. Measuring memory costs no time on a GPU.
    what = "speed" if device == "cpu" else "both"
    turns = [{name: measure_in_a_process(__file__, "side", name, device, what) for name in ALL} for _ in range(rounds)]
    seconds = {name: statistics.median(turn[name]["seconds"] for turn in turns) for name in ALL}
    sizes = turns[-1]
    if device == "cpu":
        sizes = {name: measure_in_a_process(__file__, "side", name, device, "memory", malloc=GIVE_BACK) for name in ALL}
    growth = {name: sizes[name]["growth"] for name in ALL}
    print("| | steps per second | times plain | peak growth | of plain | in all |\n|---|---|---|---|---|---|")
    whole = {name: sizes[name]["whole"] for name in ALL}
    for name in ALL:
        print(
            f"| {name} | {1 / seconds[name]:.3g} | {seconds['plain'] / seconds[name]:.2f} | "
            f"{growth[name] / 1e6:.0f} MB | {growth[name] / growth['plain']:.0%} | {whole[name] / 1e9:.1f} GB |"
        )
    print()
    within = True
    for (ours, theirs, what), bound in ratios.items():
        if what == "speed":
            ratio = statistics.median(turn[theirs]["seconds"] / turn[ours]["seconds"] for turn in turns)
            met, text = ratio >= bound, f"{ratio:.2f} times the speed (at least {bound})"
        else:
            ratio = growth[ours] / growth[theirs]
            met, text = ratio <= bound, f"{ratio:.0%} of the memory (at most {bound:.0%})"
        print(f"- {ours} against {theirs}: {text}{mark_missed(met)}")
        within = within and met
    if device == "cuda":
        for name, most in WHOLE.items():
            met = whole[name] <= most
            print(f"- {name}: {whole[name] / 1e9:.1f} GB in all (at most {most / 1e9:.0f} GB){mark_missed(met)}")
            within = within and met
    return within, seconds


def mark_missed(met: bool) -> str:
    return "" if met else " **MISSED**"


def report_products() -> None:
    share = measure_in_a_process(__file__, "products")["share"]
    print(
        f"\nOf a plain step {share:.0%} is spent in matrix products, convolutions and attention, which every "
        f"trainer of this method needs (but for the text, which `fast` reads once): one that did all the rest in "
        f"no time, with torch's own kernels, would be {1 / share:.2f} times as fast.\n"
        "Ours has oneDNN do the products."
    )


def report_split(device: str, seconds: dict[str, float]) -> bool:
    split = measure_in_a_process(__file__, "split", device)
    total, flops, rate = sum(split["split"].values()), split["flops"], split["rate"]
    print("\n| part of a `fast` step | ms | share |\n|---|---|---|")
    for name, part in split["split"].items():
        print(f"| {name} | {1e3 * part:.1f} | {part / total:.0%} |")
    print(
        f"\n{flops / 1e9:.1f} GFLOP a step, {flops / total / 1e9:.1f} GFLOP/s: {flops / total / rate:.0%} of the "
        f"{rate / 1e9:.0f} GFLOP/s that one large matrix product reaches here."
    )
    if device == "cpu":
        return True
    share, pair = flops / total / rate, measure_in_a_process(__file__, "pair", device)["seconds"]
    met = share >= SHARE and pair <= PAIR
    print(
        f"That is to be at least {SHARE:.0%}. With the preset fast a whole pair, from node to node with everything, "
        f"takes {pair:.0f} s (at most {PAIR}).{mark_missed(met)} The paper's steps take "
        f"{PAIR_STEPS * seconds['fast']:.0f} s."
    )
    return met


def report_muon(device: str) -> bool:
    seconds = measure_in_a_process(__file__, "muon", device)
    share = seconds["muon"] / seconds["step"]
    met = share <= MUON_SHARE
    print(
        f"\nAt SDXL's full size, images of 1024 x 1024, rank 64, bfloat16, Muon takes {1e3 * seconds['muon']:.3g} ms "
        f"of the {seconds['step']:.3g} s of a step: {share:.1%} (at most {MUON_SHARE:.0%}).{mark_missed(met)}"
    )
    return met


def report_batch(device: str) -> bool:
    result = measure_in_a_process(__file__, "batch", device)
    ratio = result["alone"] / result["together"]
    bound = BATCH_BOUND[device]
    met = ratio >= bound and result["difference"] < SAME
    print(
        f"\n## Several images at once\n\n{BATCH} images on the demo model: {1e3 * result['alone']:.3g} ms a step and "
        f"image alone, {1e3 * result['together']:.3g} ms side by side, {ratio:.2f} times faster (at least "
        f"{bound}). Largest difference of a LoRA from the one trained alone: {result['difference']:.1e} "
        f"(at most {SAME:.0e})."
        f"{mark_missed(met)}"
    )
    return met


def report_flat(device: str) -> None:
    result = measure_in_a_process(__file__, "flat", device, malloc=GIVE_BACK)
    early, late = result["resident"]
    print(
        f"\n## A long training\n\n{FLAT_STEPS} steps on the demo model: the last 500 took "
        f"{result['last'] / result['first']:.2f} times as long as the first 500; resident memory grew by "
        f"{(late - early) / 1e6:.1f} MB from step 500 to the end."
    )


def report_growth(device: str) -> None:
    points = {tuple(point): rest for point, *rest in measure_in_a_process(__file__, "growth", device)["points"]}
    size = SIZES["growing"]
    print(
        f"\n## Cost of growth\n\nOn a UNet of {size.channels} channels; where they do not "
        f"grow: a {size.side} x {size.side} latent, rank {size.rank}, one image."
    )
    print("Memory: what a step saves for backward, LoRA, its gradient and the optimizer's moments.")
    print("Pixels grow with the square of the side, and attention's work among them with the square of the pixels.")
    for index, (name, row) in enumerate(GROWTH.items()):
        print(f"\n| {name} | ms a step | MB | ms, times the first | MB, times the first |\n|---|---|---|---|---|")
        for point in row:
            (seconds, size), (first, first_size) = points[point], points[row[0]]
            print(
                f"| {point[index]} | {float(f'{1e3 * seconds:.3g}'):g} | {size / 1e6:.1f} | {seconds / first:.1f} | "
                f"{size / first_size:.1f} |"
            )
    picture = "training.png" if device == "cpu" else "training_gpu.png"
    plot_growth(points, picture)
    print(f"\n![cost of growth]({picture})")


def plot_growth(points: dict, file: str) -> None:
    """A chart in benchmarks/results: each list of `GROWTH`, time and memory relative to its first point, log-log."""
    figure, axes = chart_axes(len(GROWTH))
    for index, (axis, (name, row)) in enumerate(zip(axes, GROWTH.items(), strict=True)):
        work = [(point[index] / row[0][index]) ** (2 if index == 0 else 1) for point in row]  # a side counts as pixels
        axis.plot(work, work, color="lightgray", label="linear")
        for column, (label, colour) in enumerate(zip(("time", "memory"), COLOURS, strict=False)):
            axis.plot(
                work, [points[point][column] / points[row[0]][column] for point in row], color=colour, label=label
            )
        axis.set(title=name, xscale="log", yscale="log")
        axis.set_xticks(work, [point[index] for point in row])
        axis.legend()
    figure.savefig(RESULTS / file)


def report() -> bool:
    """Prints everything as Markdown; whether all bounds hold."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, rounds, *_ = PLANS[device]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speed = "the median step" if rounds == 1 else f"the median of {rounds} processes, of the median step in each"
    (explanation,) = template("training")
    versions = dict(date=date.today(), comfyui=comfyui_version(), torch=torch.__version__, machine=name)
    print(explanation.format(size=size, pixels=8 * size.side, speed=speed, **versions))
    within, seconds = compare_trainers(device)
    if device == "cpu":
        report_products()
    within = report_split(device, seconds) and within
    within = report_muon(device) and within
    within = report_batch(device) and within
    report_flat(device)
    report_growth(device)
    return within


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in MEASUREMENTS:
        kind, *rest = sys.argv[1:]
        print(json.dumps(MEASUREMENTS[kind](*rest)))
    else:
        set_up()
        sys.exit(not report())
