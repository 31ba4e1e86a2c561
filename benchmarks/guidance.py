"""`python benchmarks/guidance.py`: what a dual-guided step costs over one of plain CFG, on the same model and machine.

Everything is sampled through the real guiders, so all overhead counts. The UNet has SDXL's proportions with a tenth of
its channels. What its work depends on shrinks with it, so that the parts of a step keep their proportions:

- The latent. It has to be small, yet so large that work grows with the rows, as at 1024 px: at 64 x 64 the encoder has
  SDXL's share of a pass (43 %), and six rows cost three times what two cost.
- The text. SDXL's inner blocks attend to 77 tokens beside 1024 pixels, here 19 beside 256.
- The LoRA. One of rank r adds 2 r / n to the work of an n x n layer; rank 64 on 1280 channels is rank 6 on 128. Such
  thin products are slow for their FLOP, so the LoRAs cost two or three times what they do at full size.

On the CPU time is the process's own on one thread, so that other processes do not count. The variants take turns, each
repetition compares them with plain CFG in the same one, and the table has the median over repetitions: drift of the
machine cancels. `--sdxl` takes the real size, in bf16 on a GPU. Exits with 1 if a bound is passed (`BOUNDS`).

`--host` measures what a GPU waits for: SDXL's UNet in full depth, but so narrow, and with so few tokens, that a step is
Python and torch's dispatch. It also counts torch's operators, of which those that compute are kernel launches on a GPU.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import (
    GIVE_BACK,
    KEEP,
    RESULTS,
    ROOT,
    comfyui_version,
    measure_in_a_process,
    set_up,
    template,
)

REPETITIONS = 5
CFG, SCALES, END = 5.0, {"content": 1.0, "style": 1.0}, 0.44
PROMPTS = ["content_positive", "content_negative", "style_positive", "style_negative"]


class Size(NamedTuple):
    channels: int
    side: int  # of the latent
    tokens: int
    text: int  # numbers in a token
    rank: int
    device: str
    dtype: str
    steps: int


SIZES = {
    "small": Size(32, 64, 19, 2048, 6, "cpu", "float32", steps=2),
    # LoRAs are copied to the GPU in each sampling, so this one must be as long as a user's.
    "sdxl": Size(320, 128, 77, 2048, 64, "cuda", "bfloat16", steps=33),
    "host": Size(32, 4, 1, 64, 1, "cpu", "float32", steps=33),
}


class Bench(NamedTuple):
    """What every variant needs."""

    size: Size
    pack: ModuleType
    model: Any
    prompts: dict[str, list]
    images: dict[str, Any]  # the content image's LoRA and the style image's


def plain_cfg(bench: Bench, model=None):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model or bench.model)
    guider.set_conds(bench.prompts["positive"], bench.prompts["negative"])
    guider.set_cfg(CFG)
    return guider


def applied(bench: Bench):
    strengths = dict(content_strength=1.0, style_strength=1.0)
    return plain_cfg(bench, bench.pack.nodes.lora.Apply.execute(bench.model, **strengths, **bench.images).result[0])


def dual(bench: Bench, share_encoder: bool = True, **settings):
    host, prompts = bench.pack.host.guider, (bench.prompts["positive"], bench.prompts["negative"])
    images = bench.images["content"], bench.images["style"]
    return host.build_dual_guider(bench.model, *prompts, *images, host.GuidanceSettings(CFG, **settings), share_encoder)


def unshared(bench: Bench):
    return dual(bench, share_encoder=False)


def own_prompts(bench: Bench):
    return dual(bench, **{name: bench.prompts[name] for name in PROMPTS})


def windowed(bench: Bench):
    return dual(bench, end_percent=END)


def reusing(bench: Bench):
    return dual(bench, reuse_steps=3)


def six_passes(bench: Bench):
    """The method without batching: CFG's batch of two, then one whole pass after another, each with its mix."""
    import comfy.samplers

    core, passes = bench.pack.consislora_core.guidance, bench.pack.host.guided_unet
    parts = core.parts_of(**bench.images)
    singles = {row.prompt: passes.with_mix(bench.model, parts, row.mix) for row in core.guidance_rows(SCALES)}

    class SixPasses(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - ComfyUI's signature
            def single(model):
                wrapped = {**model_options["transformer_options"], "wrappers": model.wrappers}
                options = {**model_options, "transformer_options": wrapped}
                negative = [self.conds["negative"]]
                return comfy.samplers.calc_cond_batch(self.inner_model, negative, x, timestep, options)[0]

            plain = super().predict_noise(x, timestep, model_options, seed)
            return plain + core.guidance({prompt: single(model) for prompt, model in singles.items()}, SCALES)

    guider = SixPasses(passes.with_mix(bench.model, parts, core.wanted_mix(1.0, 1.0)))
    guider.set_conds(bench.prompts["positive"], bench.prompts["negative"])
    guider.set_cfg(CFG)
    return guider


VARIANTS: dict[str, Callable[[Bench], Any]] = {
    "plain CFG": plain_cfg,
    "plain CFG, ConsisLoRAApply": applied,
    "ours": dual,
    "ours, nothing shared": unshared,
    "ours, four own prompts": own_prompts,
    "one pass after another": six_passes,
    "ours, in a window": windowed,
    "ours, reuse_steps 3": reusing,
}
SAME_PICTURE = ["ours", "ours, nothing shared", "one pass after another"]
FEWEST_STEPS = {"ours, in a window": 11, "ours, reuse_steps 3": 3}  # so that END guides 45 %, and 3 divides them
BOUNDS = {"ours": 2.2, "ours, in a window": 1.5}
NO_KERNEL = tuple(
    f"aten::{name}" for name in ("empty", "detach", "alias", "_unsafe_view", "_reshape_alias")
)  # and views


def start_comfy(size: Size) -> ModuleType:
    """The pack, in a ComfyUI in this process."""
    sys.path += [str(ROOT / "tests"), os.environ["COMFYUI_PATH"]]
    from comfy.cli_args import args
    from in_process import load_comfy, load_pack

    args.use_pytorch_cross_attention = size == SIZES["host"]  # as ComfyUI chooses for an NVIDIA GPU
    with tempfile.TemporaryDirectory() as base:
        load_comfy(Path(base), cpu=size.device == "cpu")
        return load_pack()


def random_model(size: Size):
    """A MODEL with SDXL's UNet, but fewer channels and random weights that keep activations at their scale."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    from benchmarks.trainers import SDXL_UNET

    config = comfy.supported_models.SDXL(dict(SDXL_UNET, model_channels=size.channels, context_dim=size.text))
    config.set_inference_dtype(getattr(torch, size.dtype), None)
    model = config.get_model({}, device=size.device)
    for name, weights in model.named_parameters():
        if weights.ndim > 1:
            weights.normal_(std=weights[0].numel() ** -0.5)
        else:
            weights.fill_(name.endswith("weight"))
    return comfy.model_patcher.ModelPatcher(model, torch.device(size.device), torch.device("cpu"))


def random_lora(pack: ModuleType, model, rank: int):
    import torch

    def part(role):
        fresh = pack.consislora_core.adapters.fresh_part(model.model.diffusion_model, role, rank, torch.Generator())
        return {path: layer._replace(up=0.1 * torch.randn_like(layer.up)) for path, layer in fresh.items()}

    return pack.consislora_core.lora_file.ImageLora({role: part(role) for role in ("content", "style")}, {})


def make_bench(size: Size) -> Bench:
    pack = start_comfy(size)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = random_model(size)
    prompts = {
        name: [[torch.randn(1, size.tokens, size.text), {"pooled_output": torch.randn(1, 1280)}]]
        for name in ["positive", "negative", *PROMPTS]
    }
    images = {image: random_lora(pack, model, size.rank) for image in ("content", "style")}
    if size == SIZES["host"]:
        matrices = {}  # one of each shape: they fit in the CPU's cache, and no operator waits for memory
        for weights in model.model.parameters():
            if weights.ndim > 1:
                weights.data = matrices.setdefault(weights.shape, weights.data)
    return Bench(size, pack, model, prompts, images)


def count_steps(size: Size, variant: str) -> int:
    return max(size.steps, FEWEST_STEPS.get(variant, 0))


def sigmas(bench: Bench, steps: int):
    return bench.pack.host.sampling.ksampler_sigmas(bench.model, steps, "euler", "simple", 1.0)


def sample(bench: Bench, guider, steps: int, callback=None):
    import comfy.samplers
    import torch

    start = torch.randn(1, 4, bench.size.side, bench.size.side, generator=torch.Generator().manual_seed(7))
    euler = comfy.samplers.sampler_object("euler")
    levels = sigmas(bench, steps)
    return guider.sample(start, torch.zeros_like(start), euler, levels, callback=callback, disable_pbar=True, seed=1)


def read_clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def time_per_step(bench: Bench, name: str, guider) -> float:
    steps = count_steps(bench.size, name)
    start = read_clock(bench.size.device)
    sample(bench, guider, steps)
    return (read_clock(bench.size.device) - start) / steps


def check_pictures(pictures: dict) -> None:
    """Raises RuntimeError unless all ways of computing the same step do."""
    first, *others = (pictures[name] for name in SAME_PICTURE)
    errors = [((other - first).norm() / first.norm()).item() for other in others]
    moved = ((first - pictures["plain CFG"]).norm() / first.norm()).item()
    if not max(errors) < 0.05 * moved:  # NaN is not below anything
        raise RuntimeError(f"The same step gives different pictures: {errors}, where guidance moves it by {moved}.")


def measure_encoder_share(bench: Bench) -> float:
    """The share of a plain pass that is over when the first LoRA is reached."""
    unet, marks = bench.model.model.diffusion_model, {}

    def mark(place):
        return lambda *_: marks.setdefault(place, []).append(read_clock(bench.size.device))

    hooks = [
        unet.register_forward_pre_hook(mark("start")),
        unet.output_blocks[0][0].register_forward_hook(mark("first LoRA")),
        unet.register_forward_hook(mark("end")),
    ]
    sample(bench, plain_cfg(bench), 5)
    for hook in hooks:
        hook.remove()
    return statistics.median((lora - start) / (end - start) for start, lora, end in zip(*marks.values(), strict=True))


def measure_times(bench: Bench) -> dict:
    guiders = {name: make(bench) for name, make in VARIANTS.items()}
    check_pictures({name: sample(bench, guider, 1) for name, guider in guiders.items()})  # warms up as well
    rounds = []
    for repetition in range(REPETITIONS):
        print(f"Repetition {repetition + 1} of {REPETITIONS} ...", file=sys.stderr, flush=True)
        rounds.append({name: time_per_step(bench, name, guider) for name, guider in guiders.items()})
    levels = sigmas(bench, count_steps(bench.size, "ours, in a window"))[:-1]
    end = bench.model.model.model_sampling.percent_to_sigma(END)
    return {"rounds": rounds, "encoder": measure_encoder_share(bench), "guided": int((levels >= end).sum())}


def count_operators(bench: Bench, name: str) -> dict:
    """torch's operators in a step: all, and those that are a kernel launch on a GPU.

    The mean over all steps but the first, in which LoRAs are copied to their device.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    counts, seen = {"operators": 0, "kernels": 0}, []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            counts["operators"] += 1
            counts["kernels"] += not (operator.is_view or operator._schema.name.startswith(NO_KERNEL))
            return operator(*args, **(kwargs or {}))

    guider, steps = VARIANTS[name](bench), count_steps(bench.size, name)
    with torch.inference_mode(False), torch.no_grad(), Counting():  # in inference mode composite operators count as one
        sample(bench, guider, steps, callback=lambda *_: seen.append(dict(counts)))
    return {kind: (seen[-1][kind] - seen[0][kind]) / (steps - 1) for kind in counts}


def measure_memory(bench: Bench, name: str) -> dict:
    sample(bench, plain_cfg(bench), 1)  # so that code loaded on first use is not counted
    from benchmarks.trainers import peak_growth

    with peak_growth(bench.size.device) as growth:
        sample(bench, VARIANTS[name](bench), 2)
    return {"growth": growth[0]}


def measure(size: str, *variant: str) -> dict:
    """All times, or the memory or the operators of one variant, in this process; in seconds and bytes."""
    import torch

    with torch.inference_mode():
        bench = make_bench(SIZES[size])
        if not variant:
            return measure_times(bench)
        return (count_operators if size == "host" else measure_memory)(bench, *variant)


MEMORY = {
    "cpu": "resident memory over what it was just before sampling, each variant in a process of its own",
    "cuda": "memory allocated on the GPU over what it was just before sampling",
}


def write_explanation(size: Size, times: dict) -> str:
    import torch

    gpu = size.device == "cuda"
    (explanation,) = template("guidance_host" if size == SIZES["host"] else "guidance")
    return explanation.rstrip().format(
        date=date.today(),
        comfyui=comfyui_version(),
        torch=torch.__version__,
        machine=torch.cuda.get_device_name() if gpu else "one CPU thread, CPU time",
        size=size,
        encoder=times["encoder"],
        guided=times["guided"],
        window=count_steps(size, "ours, in a window"),
        repetitions=REPETITIONS,
        plain=statistics.median(turn["plain CFG"] for turn in times["rounds"]),
        memory=MEMORY[size.device],
        bounds=", ".join(f"{name} {bound}" for name, bound in BOUNDS.items()),
        more=" ms a step |" * gpu,
        more_lines="---|" * gpu,
    )


def report(name: str) -> bool:
    """Prints and saves everything as Markdown; whether ours is within bounds."""
    size, lines = SIZES[name], []

    def say(line):
        lines.append(line)
        print(line, flush=True)

    times = measure_in_a_process(__file__, "--measure", name, malloc=KEEP)
    say(write_explanation(size, times))
    within = True
    for variant in VARIANTS:
        ratios = [turn[variant] / turn["plain CFG"] for turn in times["rounds"]]
        ratio = statistics.median(ratios)
        within = within and ratio <= BOUNDS.get(variant, ratio)
        cells = [variant, f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        if size.device == "cuda":
            cells.append(f"{1000 * statistics.median(turn[variant] for turn in times['rounds']):.0f}")
        alone = measure_in_a_process(__file__, "--measure", name, variant, malloc=GIVE_BACK)
        cells += [f"{alone[kind]:.0f}" for kind in alone] if name == "host" else [f"{alone['growth'] / 1e6:.0f} MB"]
        say(f"| {' | '.join(cells)} |")
    results = RESULTS / ("guidance.md" if name == "small" else f"guidance_{name}.md")
    results.write_text("\n".join(lines) + "\n")
    return within


def main(arguments: list[str]) -> int | str:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(*arguments[1:])))
        return 0
    if arguments not in ([], ["--sdxl"], ["--host"]):
        return "Usage: python benchmarks/guidance.py [--sdxl | --host]"
    set_up()
    import torch

    if arguments == ["--sdxl"] and not torch.cuda.is_available():
        return "--sdxl needs a GPU with CUDA, and torch finds none. Without --sdxl a small UNet runs on the CPU."
    return int(not report(arguments[0].removeprefix("--") if arguments else "small"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
