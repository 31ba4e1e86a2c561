"""`python benchmarks/training.py`: what a training step costs in time and memory, side by side with other ways.

Prints Markdown, for benchmarks/results/training.md, and draws training.png beside it.
Ours, `fast` and `lean`; a plain recipe as published scripts have it (diffusers, PEFT, autocast, AdamW); ComfyUI's own
TrainLoraNode. Same shape of UNet, image, rank and precision; each measurement is a process of its own. On a CUDA device
the UNet is SDXL's own size, on a CPU a narrow one. Exits with 1 if a bound in `BOUNDS` or `BATCH_BOUND` is missed.
"""

import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

from memory import CHANNELS, LATENT, RANK, ROOT, peak_growth, saved_for_backward

SIZES = {  # channels of the UNet's first level, side of the latent, rank, computed in
    "cpu": dict(channels=CHANNELS["float32"], side=LATENT[-1], rank=RANK, dtype="float32"),  # benchmarks/memory.py's
    "cuda": dict(channels=320, side=128, rank=64, dtype="bfloat16"),
}
ROUNDS, STEPS = 3, 8
NOISES = 3  # a step of the preset fast
PRODUCT = re.compile(r"aten::((add)?mm|(badd)?bmm|mkldnn_convolution|convolution_backward|_scaled_dot_product_\w+)")
BOUNDS = {  # ours, the other: at least so many times its speed, or at most so much of its memory
    ("fast", "plain", "speed"): 1.3,
    ("preset fast", "plain", "speed"): 1.3,
    ("lean", "plain", "memory"): 0.60,
    ("fast", "TrainLoraNode", "speed"): 3.0,
    ("lean", "TrainLoraNode", "memory"): 0.35,
}
BATCH, BATCH_BOUND, SAME = 8, 1.3, 1e-4
FLAT_STEPS = 2000
GROWTH = {  # on a UNet of 64 channels: side of the latent, rank, images in a batch
    "resolution (latent side)": [(side, 16, 1) for side in (64, 96, 128, 192)],  # 512 to 1536 pixels
    "rank": [(16, rank, 1) for rank in (4, 16, 64, 256)],
    "images in a batch": [(16, 16, images) for images in (1, 2, 4, 8, 16)],
}


def fast(pack, model, latent, positive, steps, rank, precision, memory="fast", preset="paper"):
    """ConsisLoRATrainImage."""
    pack.nodes.train.TrainImage.execute(
        model, latent, positive, steps=steps, transition_step=0, learning_rate=2e-4,
        reconstruction_learning_rate=1e-4, rank=rank, seed=0, precision=precision, memory=memory, preset=preset,
    )  # fmt: skip


def lean(*given):
    fast(*given, memory="lean")


def several_noises(pack, model, latent, positive, steps, rank, precision):
    """As many steps, of `NOISES` noises each."""
    fast(pack, model, latent, positive, NOISES * steps, rank, precision, preset="fast")


def train_lora_node(pack, model, latent, positive, steps, rank, precision):
    """TrainLoraNode with the same rank and precision, else its defaults."""
    from comfy_extras.nodes_train import TrainLoraNode

    inputs = dict(
        model=model, positive=positive, steps=steps, rank=rank, seed=0, training_dtype=precision, lora_dtype="fp32",
        batch_size=1, grad_accumulation_steps=1, learning_rate=2e-4, optimizer="AdamW", loss_function="MSE",
        algorithm="LoRA", gradient_checkpointing=True, existing_lora="[None]",
    )  # fmt: skip
    # Given one latent alone it fails in ComfyUI 0.3.75; with two it still trains on one of them a step.
    TrainLoraNode.execute(latents=[latent, latent], **{name: [value] for name, value in inputs.items()})


def diffusers_unet(channels: int, rank: int):
    """A UNet of SDXL's shape with LoRA in the two role blocks."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel(
        block_out_channels=(channels, 2 * channels, 4 * channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(channels // 64, channels // 32, channels // 16),
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    ).requires_grad_(False)  # fmt: skip
    layers = r"up_blocks\.0\.attentions\.[01]\..*\.(to_q|to_k|to_v|to_out\.0)"
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
    return unet


def plain_unet(device: str, dtype):
    """On the device in the precision, its LoRA in fp32."""
    unet = diffusers_unet(SIZES[device]["channels"], SIZES[device]["rank"]).to(device, dtype)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


def plain_recipe(unet, side: int, steps: int, device: str, dtype) -> None:
    """The loop of the published scripts: frozen weights in the precision, LoRA in fp32, autocast, AdamW."""
    import torch

    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=1e-4)
    z_0, text, pooled = (torch.randn(shape, device=device) for shape in ((1, 4, side, side), (1, 77, 2048), (1, 1280)))
    conditions = {"text_embeds": pooled.to(dtype), "time_ids": torch.full((1, 6), 8.0 * side, device=device)}
    alpha_bar = torch.linspace(0.999, 0.005, 1000, device=device)
    for _ in range(steps):
        noise, t = torch.randn_like(z_0), torch.randint(0, 1000, (1,), device=device)
        z_t = alpha_bar[t].sqrt() * z_0 + (1 - alpha_bar[t]).sqrt() * noise
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            n_hat = unet(z_t.to(dtype), t, text.to(dtype), added_cond_kwargs=conditions).sample
        loss = torch.nn.functional.mse_loss(n_hat.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()  # for the log


EXPLANATION = f"""\
A UNet of SDXL's shape with {{channels}} channels (SDXL: 320) and random weights, a {{side}} x {{side}} image, rank
{{rank}}, {{dtype}}. Steps per second: the median of {ROUNDS} processes, of the median step in each. Peak growth: over
what was taken before training began. plain: diffusers' UNet, PEFT's LoRA on the same two blocks, AdamW; like ours it
builds no graph before the first LoRA. TrainLoraNode adapts every layer, copies the model, and checkpoints gradients, as
is its default. preset fast: {NOISES} noises a step, each counted as a step.
"""
TRAINERS = {"fast": fast, "preset fast": several_noises, "lean": lean, "TrainLoraNode": train_lora_node}


@contextmanager
def host(device: str) -> Iterator:
    """The pack in a ComfyUI of its own."""
    sys.path.append(str(ROOT / "tests"))
    import conftest

    with tempfile.TemporaryDirectory() as base:
        conftest.load_comfy(Path(base), cpu=device == "cpu")
        yield conftest.load_pack()


def sdxl_shaped(channels: int, device: str, dtype):
    """A MODEL of random weights, made in inference mode as a loader node would."""
    import memory
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        model = memory.sdxl_shaped(dtype, channels)
    model.load_device = torch.device(device)
    return model


def given(side: int, images: int = 1):
    import torch

    torch.manual_seed(0)
    positive = [[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]]
    return {"samples": torch.randn(images, 4, side, side)}, positive


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_ends() -> list[float]:
    """When each optimizer step from now on is over."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    return ends


def seconds_a_step(ends: list[float]) -> float:
    """The median, the first two steps aside."""
    return statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))


@contextmanager
def growth_of(device: str) -> Iterator[list[int]]:
    """The most memory taken beyond what is taken now, in bytes."""
    import torch

    if device == "cpu":
        with peak_growth() as growth:
            yield growth
    else:
        torch.cuda.reset_peak_memory_stats()
        start, growth = torch.cuda.memory_allocated(), [0]
        yield growth
        growth[0] = torch.cuda.max_memory_allocated() - start


def measure_side(trainer: str, device: str, what: str) -> dict:
    """Seconds a step, or a noise where a step has several; or bytes at the peak."""
    import torch

    size = SIZES[device]
    dtype = getattr(torch, size["dtype"])
    side, steps = size["side"], STEPS if what == "speed" else 3
    with host(device) as pack:
        if trainer == "plain":
            unet = plain_unet(device, dtype)

            def train():
                plain_recipe(unet, side, steps, device, dtype)
        else:
            precision = {"float32": "fp32", "bfloat16": "bf16"}[size["dtype"]]
            with torch.inference_mode():
                model = sdxl_shaped(size["channels"], device, dtype)
            latent, positive = given(side)

            def train():
                with torch.inference_mode():
                    TRAINERS[trainer](pack, model, latent, positive, steps, size["rank"], precision)

        ends = step_ends()
        if what == "speed":
            train()
            return {"seconds": seconds_a_step(ends) / (NOISES if trainer == "preset fast" else 1)}
        with growth_of(device) as growth:
            train()
        return {"bytes": growth[0]}


def onednn_linear() -> dict:
    """What FlopCounterMode does not know: the operation, and its FLOP from the shapes of x and weight."""
    import torch

    def flop(x, weight, *_, out_shape=None, **__):
        return 2 * math.prod(x) * weight[0]

    return {torch.ops.mkldnn._linear_pointwise: flop} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}


def measure_split(device: str) -> dict:
    """Where the seconds of a `fast` step go, its FLOP, and the FLOP/s that this device does in one large product."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.flop_counter import FlopCounterMode

    size = SIZES[device]
    dtype = getattr(torch, size["dtype"])
    precision = {"float32": "fp32", "bfloat16": "bf16"}[size["dtype"]]
    with host(device) as pack, torch.inference_mode():
        model = sdxl_shaped(size["channels"], device, dtype)
        unet, marks = model.model.diffusion_model, []
        latent, positive = given(size["side"])
        flops = []
        for steps in (1, 2):  # the first also reads the text
            with FlopCounterMode(display=False, custom_mapping=onednn_linear()) as counter:
                fast(pack, model, latent, positive, steps, size["rank"], precision)
            flops.append(counter.get_total_flops())
        unet.input_blocks[0][0].register_forward_pre_hook(lambda *_: marks.append(now()))
        unet.output_blocks[0][0].register_forward_pre_hook(lambda *_: marks.append(now()))
        unet.out.register_forward_hook(lambda *_: marks.append(now()))
        register_optimizer_step_pre_hook(lambda *_: marks.append(now()))
        ends = step_ends()
        fast(pack, model, latent, positive, STEPS, size["rank"], precision)
    parts = [[] for _ in range(5)]
    for step in range(2, STEPS):
        encoder, decoder, back, optimizer = marks[4 * step : 4 * step + 4]
        times = [ends[step - 1], encoder, decoder, back, optimizer, ends[step]]
        for part, start, end in zip(parts, times, times[1:], strict=False):
            part.append(end - start)
    names = ("other", "forward encoder", "forward decoder", "backward", "optimizer")
    return {
        "split": dict(zip(names, map(statistics.median, parts), strict=True)),
        "flops": flops[1] - flops[0],
        "rate": matrix_rate(device, dtype),
    }


def measure_products(device: str) -> dict:
    """The share of a plain step's seconds that goes into matrix products, convolutions and attention."""
    import torch

    dtype = getattr(torch, SIZES[device]["dtype"])
    unet = plain_unet(device, dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain_recipe(unet, SIZES[device]["side"], 4, device, dtype)
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {"share": sum(seconds[name] for name in seconds if PRODUCT.fullmatch(name)) / sum(seconds.values())}


def matrix_rate(device: str, dtype) -> float:
    """FLOP/s of a product of two large matrices."""
    import torch

    n = 2048 if device == "cpu" else 8192
    matrix, times = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(12):
        start = now()
        matrix @ matrix
        times.append(now() - start)
    return 2 * n**3 / statistics.median(times)


def demo_model(pack):
    return pack.nodes.demo.LoadDemoModel.execute().result[0]


def demo_positive():
    import torch

    return [[torch.randn(1, 32, 192), {"pooled_output": torch.randn(1, 128)}]]


def weights(lora):
    import torch

    return torch.cat([side.flatten() for part in lora.parts.values() for layer in part.values() for side in layer[:2]])


def measure_batch(device: str) -> dict:
    """`BATCH` images on the demo model, alone and side by side: seconds a step and image, and how unlike they are."""
    import shutil

    import torch

    settings = dict(
        steps=12, transition_step=4, learning_rate=2e-4, reconstruction_learning_rate=1e-4, rank=64, seed=0,
        precision="fp32", memory="fast",
    )  # fmt: skip
    with host(device) as pack, torch.inference_mode():
        train = pack.nodes.train
        model, positive = demo_model(pack), demo_positive()
        images, ends = torch.randn(BATCH, 4, 16, 16), step_ends()
        alone, seconds = [], []
        for image in images.split(1):
            ends.clear()
            alone.append(train.TrainImage.execute(model, {"samples": image}, positive, **settings).result[0])
            seconds.append(seconds_a_step(ends))
        shutil.rmtree(pack.nodes.identity.store().folder)
        ends.clear()
        together = train.TrainImages.execute(model, {"samples": images}, positive, at_once=BATCH, **settings).result[0]
        unlike = [
            ((weights(ours) - weights(theirs)).norm() / weights(theirs).norm()).item()
            for ours, theirs in zip(together, alone, strict=True)
        ]
        return {
            "alone": statistics.median(seconds),
            "together": seconds_a_step(ends) / BATCH,
            "unlike": max(unlike),
        }


def measure_flat(device: str) -> dict:
    """A long training of the demo model: its first and last 500 steps, and its memory after them."""
    import psutil
    import torch

    resident = []
    with host(device) as pack, torch.inference_mode():
        model, positive, ends = demo_model(pack), demo_positive(), step_ends()
        show = pack.nodes.progress.Progress.show

        def watch(progress, event):
            show(progress, event)
            if event.step in (500, FLAT_STEPS):
                resident.append(psutil.Process().memory_info().rss)

        pack.nodes.progress.Progress.show = watch
        fast(pack, model, {"samples": torch.randn(1, 4, 16, 16)}, positive, FLAT_STEPS, 16, "fp32")
    first, last = (seconds_a_step(part) for part in (ends[:500], ends[-500:]))
    return {"first": first, "last": last, "resident": resident}


def measure_growth(device: str) -> dict:
    """Seconds a step and bytes (kept for the way back, LoRA and optimizer) of every point of `GROWTH`."""
    import torch

    points = []
    with host(device) as pack, torch.inference_mode():
        model, ends = sdxl_shaped(64, device, torch.float32), step_ends()
        unet = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
        for side, rank, images in dict.fromkeys(point for row in GROWTH.values() for point in row):
            latent, positive = given(side, images)
            settings = dict(
                transition_step=0, learning_rate=2e-4, reconstruction_learning_rate=1e-4, rank=rank, seed=0,
                precision="fp32", at_once=images, memory="fast",
            )  # fmt: skip
            each = pack.nodes.train.TrainImages.execute
            with saved_for_backward() as kept:
                lora = each(model, latent, positive, steps=1, **settings).result[0][0]
            ends.clear()
            each(model, latent, positive, steps=6, **settings)
            activations = sum(size for address, size in kept.items() if address not in unet)
            size = activations + 12 * images * len(weights(lora))  # gradient and two moments: the weights are kept
            points.append([[side, rank, images], seconds_a_step(ends), size])
    return {"points": points}


MEASUREMENTS = {
    "side": measure_side,
    "split": measure_split,
    "products": measure_products,
    "batch": measure_batch,
    "flat": measure_flat,
    "growth": measure_growth,
}


def in_a_process(*what: str, giving_back: bool = False) -> dict:
    # For memory glibc is to give back at once what was freed, or it would count as resident; that costs time.
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if giving_back else {})}
    command = [sys.executable, __file__, *what]
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def side_by_side(device: str) -> bool:
    names = ["fast", "preset fast", "lean", "plain", "TrainLoraNode"]
    # In turns, so that a machine that slows down slows all of them.
    rounds = [{name: in_a_process("side", name, device, "speed")["seconds"] for name in names} for _ in range(ROUNDS)]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in names}
    sizes = {name: in_a_process("side", name, device, "memory", giving_back=True)["bytes"] for name in names}
    print("| | steps per second | times plain | peak growth | of plain |\n|---|---|---|---|---|")
    for name in names:
        speed, memory = seconds["plain"] / seconds[name], sizes[name] / sizes["plain"]
        print(f"| {name} | {1 / seconds[name]:.2f} | {speed:.2f} | {sizes[name] / 1e6:.0f} MB | {memory:.0%} |")
    print()
    within = True
    for (ours, theirs, what), bound in BOUNDS.items():
        if what == "speed":
            ratio = statistics.median(one[theirs] / one[ours] for one in rounds)
            met, text = ratio >= bound, f"{ratio:.2f} times the speed (at least {bound})"
        else:
            ratio = sizes[ours] / sizes[theirs]
            met, text = ratio <= bound, f"{ratio:.0%} of the memory (at most {bound:.0%})"
        print(f"- {ours} against {theirs}: {text}{'' if met else ' **MISSED**'}")
        within = within and met
    if device == "cpu":
        share = in_a_process("products", device)["share"]
        print(
            f"\nOf a plain step {share:.0%} is spent in matrix products, convolutions and attention, which every "
            f"trainer of this method needs (but for the text, which `fast` reads once): one that did all the rest in "
            f"no time, with torch's own kernels, would be {1 / share:.2f} times as fast. Ours has oneDNN do the "
            "products in fp32 on a CPU, and three noises at once keep it busier."
        )
    return within


def time_split(device: str) -> None:
    split = in_a_process("split", device)
    total = sum(split["split"].values())
    print("\n| part of a `fast` step | ms | share |\n|---|---|---|")
    for name, seconds in split["split"].items():
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / total:.0%} |")
    print(
        f"\n{split['flops'] / 1e9:.1f} GFLOP a step, {split['flops'] / total / 1e9:.1f} GFLOP/s: "
        f"{split['flops'] / total / split['rate']:.0%} of the {split['rate'] / 1e9:.0f} GFLOP/s "
        "that one large matrix product reaches here."
    )


def batch(device: str) -> bool:
    result = in_a_process("batch", device)
    ratio = result["alone"] / result["together"]
    met = ratio >= BATCH_BOUND and result["unlike"] < SAME
    print(
        f"\n## Several images at once\n\n{BATCH} images on the demo model: {1e3 * result['alone']:.0f} ms a step and "
        f"image alone, {1e3 * result['together']:.0f} ms side by side, {ratio:.2f} times faster (at least "
        f"{BATCH_BOUND}). Largest difference of a LoRA from the one trained alone: {result['unlike']:.1e} "
        f"(at most {SAME:.0e})."
        f"{'' if met else ' **MISSED**'}"
    )
    return met


def flat(device: str) -> None:
    result = in_a_process("flat", device, giving_back=True)
    early, late = result["resident"]
    print(
        f"\n## A long training\n\n{FLAT_STEPS} steps on the demo model: the last 500 took "
        f"{result['last'] / result['first']:.2f} times as long as the first 500; resident memory grew by "
        f"{(late - early) / 1e6:.1f} MB from step 500 to the end."
    )


def cost_of_growth(device: str) -> None:
    points = {tuple(point): rest for point, *rest in in_a_process("growth", device)["points"]}
    print(
        "\n## Cost of growth\n\nOn a UNet of 64 channels; where they do not grow: a 16 x 16 latent, rank 16, one image."
    )
    print("Memory: what a step keeps for its way back, LoRA, its gradient and the optimizer's moments.")
    print("Pixels grow with the square of the side, and attention's work among them with the square of the pixels.")
    for index, (name, row) in enumerate(GROWTH.items()):
        print(f"\n| {name} | ms a step | MB | ms, times the first | MB, times the first |\n|---|---|---|---|---|")
        for point in row:
            (seconds, size), (first, first_size) = points[point], points[row[0]]
            print(
                f"| {point[index]} | {1e3 * seconds:.0f} | {size / 1e6:.1f} | {seconds / first:.1f} | "
                f"{size / first_size:.1f} |"
            )
    plot(points)
    print("\n![cost of growth](training.png)")


def plot(points: dict) -> None:
    """benchmarks/results/training.png: each row of `GROWTH`, time and memory, relative to its first point, log-log."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (1080, 360), "white")
    pen = ImageDraw.Draw(picture)
    for index, (name, row) in enumerate(GROWTH.items()):
        left, bottom, width = 60 + 350 * index, 310, 270
        pen.rectangle((left, bottom - width, left + width, bottom), outline="gray")
        pen.line((left, bottom, left + width, bottom - width), fill="lightgray")  # linear
        pen.text((left, bottom + 30), f"{name}; gray: linear", fill="black")
        work = [point[index] ** (2 if index == 0 else 1) for point in row]  # a side counts as its pixels
        ratios = [points[row[-1]][column] / points[row[0]][column] for column in (0, 1)]
        span = math.log(max(work[-1] / work[0], *ratios))
        for column, (colour, label) in enumerate((("blue", "time"), ("red", "memory"))):
            line = [
                (
                    left + width * math.log(one / work[0]) / span,
                    bottom - width * math.log(points[point][column] / points[row[0]][column]) / span,
                )
                for one, point in zip(work, row, strict=True)
            ]
            pen.line(line, fill=colour, width=3)
            pen.text((left + 10, bottom - width + 10 + 16 * column), label, fill=colour)
        for one, point in zip(work, row, strict=True):
            pen.text((left + width * math.log(one / work[0]) / span - 6, bottom + 8), str(point[index]), fill="black")
    picture.save(ROOT / "benchmarks" / "results" / "training.png")


def computed() -> None:
    """What arithmetic says of SDXL's own size at 1024 x 1024 pixels, where no GPU has measured it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size = SIZES["cuda"]
    with torch.device("meta"):
        unet = diffusers_unet(size["channels"], size["rank"])
        given = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.zeros(1, 6)}
        z = torch.randn(1, 4, size["side"], size["side"])
        with FlopCounterMode(display=False) as forward:
            n_hat = unet(z, torch.zeros(1), torch.randn(1, 77, 2048), added_cond_kwargs=given).sample
        with FlopCounterMode(display=False) as backward:
            n_hat.sum().backward()
        text = [layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        reading = sum(2 * 77 * layer.in_features * layer.out_features for layer in text)
    flops = forward.get_total_flops() + backward.get_total_flops()
    rate, steps = 790e12, 4000
    print(
        f"\n## Full size on a GPU: computed, not measured\n\n"
        f"A step at 1024 x 1024 pixels, rank {size['rank']}, is {forward.get_total_flops() / 1e12:.2f} TFLOP "
        f"forward and {backward.get_total_flops() / 1e12:.2f} TFLOP back: {flops / 1e12:.1f} TFLOP, "
        f"{1e3 * flops / rate:.0f} ms at the {rate / 1e12:.0f} TFLOP/s of an H200's matrix products. "
        f"A pair (1500 + 1500 + 1000 steps) is {steps * flops / rate:.0f} s at that rate "
        f"and {steps * flops / rate / 0.45:.0f} s at 45 % of it. "
        f"Reading the text in every step would be {reading / flops:.1%} of it. "
        f"The same command on a machine with a GPU measures it."
    )


def report() -> bool:
    """Print everything as Markdown; whether all bounds hold."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[device]
    comfyui = runpy.run_path(os.environ["COMFYUI_PATH"] + "/comfyui_version.py")["__version__"]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"# What a training step costs\n\n{date.today()}, ComfyUI {comfyui}, torch {torch.__version__}, {name}.")
    print(EXPLANATION.format(**{**size, "side": 8 * size["side"]}))
    within = side_by_side(device)
    time_split(device)
    within = batch(device) and within
    flat(device)
    cost_of_growth(device)
    if device == "cpu":
        computed()
    return within


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, *rest = sys.argv[1:]
        print(json.dumps(MEASUREMENTS[kind](*rest)))
    else:
        runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
        sys.exit(not report())
