"""`python benchmarks/fidelity/held_out.py [--images 4]`: losses on noises that no step was trained on.

Two questions, by the preset *fast* on the pairs for tuning. Do they settle before a training is over, so that it could
stop earlier? And are they, with products in fp8, as near those in fp32 as in bf16? The tables are also in
benchmarks/results/held_out.md.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import RESULTS, comfyui_version, joined, table, template
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import CONTENT_PROMPT, FAST, Bench, first_pairs
from benchmarks.fidelity.studio import Studio
from consislora_core.losses import add_noise, reconstruction_loss
from consislora_core.trainer import Trainer
from demo.server import PACK

MARKS = 10  # in a training
FEW, MANY = 24, 64  # noises at a mark, and for products
TOLERANCE = 1e-2  # of losses in bf16, as tests/test_parity.py has it
NO_TRAINING_HAS = 1_000_003  # a seed
FP8 = torch.float8_e4m3fn
# Where an operator has the two. By name, since not every torch has the third.
OPERANDS = {"aten.mm.default": (0, 1), "aten.addmm.default": (1, 2), "mkldnn._linear_pointwise.default": (0, 1)}


def rounded(x: Tensor) -> Tensor:
    """x to the nearest values of fp8, at the scale at which its largest is the largest there is."""
    scale = x.abs().amax().clamp(min=1e-12) / torch.finfo(FP8).max
    return (x / scale).to(FP8).to(x.dtype) * scale


class Fp8Products(TorchDispatchMode):
    """Within it, both operands of a product with one of these layers' weights are rounded to fp8."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.weights = {layer.weight.untyped_storage().data_ptr() for layer in layers}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        places = OPERANDS.get(str(function), ())
        if any(args[place].untyped_storage().data_ptr() in self.weights for place in places):
            args = [rounded(arg) if place in places else arg for place, arg in enumerate(args)]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def held_out_losses(trainer: Trainer, noises: int) -> Tensor:
    """Reconstruction losses (noises loras) at evenly spaced noise levels, each on one of a LoRA's latents."""
    generator, model, z_0 = torch.Generator().manual_seed(NO_TRAINING_HAS), trainer.model, trainer.z_0
    losses = []
    for i in range(noises):
        rows = z_0[:, i % z_0.shape[1]]
        noise = torch.randn(rows.shape[1:], generator=generator).expand_as(rows)
        sigma = model.sigmas[(2 * i + 1) * len(model.sigmas) // (2 * noises)].expand(len(rows))
        with trainer.inserted.cast(model.dtype):
            z_0_hat = model.denoise(add_noise(rows, noise, sigma.view(-1, 1, 1, 1)), sigma, trainer.cond)
        spans = zip(rows, z_0_hat, noise, sigma, strict=True)
        losses.append(torch.stack([reconstruction_loss(*span) for span in spans]))
    return torch.stack(losses)


class HeldOut(Bench):
    @contextmanager
    def trainer(self, prompt: str, drawings: list[Drawing], dtype: torch.dtype) -> Iterator[Trainer]:
        """Of stage 1 of *fast*, a LoRA for each drawing."""
        host, studio = self.studio.pack.host.training_model, self.studio
        stage, _ = self.stages(FAST)
        recolourings = [studio.recoloured_latents(drawing, FAST.recolourings) for drawing in drawings]
        shape = (len(drawings), *recolourings[0].shape[1:])
        with host.open_for_training(studio.model, shape, dtype) as denoiser:
            z_0 = host.clean_latents(studio.model, {"samples": torch.cat(recolourings)})
            cond = host.encoded_conditioning(studio.model, studio.text(prompt), z_0)
            with Trainer(denoiser, z_0, cond, stage, loras=len(drawings)) as trainer:
                yield trainer

    def curve(self, *training: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean losses (marks loras) in a training, from its beginning to its end, and the trainer's state then."""
        with self.trainer(*training, torch.float32) as trainer:
            marks = {trainer.stage.steps * mark // MARKS for mark in range(1, MARKS + 1)}
            means = [held_out_losses(trainer, FEW).mean(0)]
            for event in trainer:
                if event.step in marks:
                    print(f"{training[0]}: step {event.step} ...", file=sys.stderr, flush=True)
                    means.append(held_out_losses(trainer, FEW).mean(0))
            return torch.stack(means), trainer.state_dict()

    def losses_by_product(self, state: dict[str, Tensor], *training: Any) -> dict[str, Tensor]:
        """Losses (n) of trained LoRAs, by how products are computed."""
        losses = {}
        for dtype, ways in {torch.float32: PRODUCTS, torch.bfloat16: {BF16: None}}.items():
            with self.trainer(*training, dtype) as trainer:
                trainer.load_state_dict(state)
                for way, layers in ways.items():
                    with nullcontext() if layers is None else Fp8Products(layers(trainer.model.unet)):
                        losses[way] = held_out_losses(trainer, MANY).flatten()
        return losses


def linear_layers(named: str) -> Callable[[nn.Module], list[nn.Linear]]:
    """Those of a UNet in whose name this is."""
    return lambda unet: [
        layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear) and named in name
    ]


EXACT, BF16 = "all in fp32", "all in bf16"
PRODUCTS = {
    EXACT: None,
    "linear layers in fp8": linear_layers(""),
    "those of transformer blocks": linear_layers("transformer_blocks"),
    "their feed-forward layers": linear_layers(".ff."),
    "of these the second": linear_layers(".ff.net.2"),
}


def curve_row(label: str, means: Tensor) -> list[str]:
    """Loss at each mark as a part of that at the end, of all LoRAs; and how many of them fell in the last tenth."""
    parts = means.mean(1) / means[-1].mean()
    fell = int((means[-1] < means[-2]).sum())
    return [label, *(f"{part:.2f}" for part in parts), f"{fell} of {means.shape[1]}"]


def product_row(way: str, losses: Tensor, exact: Tensor) -> list[str]:
    error = ((losses - exact) / exact).abs()
    median, high = error.quantile(torch.tensor([0.5, 0.95])).tolist()
    beyond = (error > TOLERANCE).double().mean()
    return [way, *(f"{100 * value:.2f}%" for value in (median, high, error.max())), f"{100 * beyond:.1f}%"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses on noises that no step was trained on.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images, and style images")
    parser.add_argument("--scale", type=float, default=1.0, help="training steps, as a part of fast's")
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["tune"], options.images, options.images)
    bench = HeldOut(Studio(options.work), pairs, options.scale, 1)
    images = {"content": (CONTENT_PROMPT, bench.contents), "style": ("A [v]", bench.styles)}
    curves, losses = [], {way: [] for way in [*PRODUCTS, BF16]}
    for role, training in images.items():
        means, state = bench.curve(*training)
        curves.append(curve_row(f"{role} images", means))
        for way, found in bench.losses_by_product(state, *training).items():
            losses[way].append(found)
    exact = torch.cat(losses.pop(EXACT))
    report = joined(template("held_out")).format(
        date=date.today(), images=options.images, scale=options.scale, comfyui=comfyui_version(),
        torch=torch.__version__, threads=torch.get_num_threads(), few=FEW, many=MANY, drawings=2 * options.images,
        tolerance=f"{100 * TOLERANCE:.0f}%",
        curves=table(["", *(f"{mark / MARKS:g}" for mark in range(MARKS + 1)), "fell in the last tenth"], curves),
        products=table(
            ["", "median", "95% are below", "most", "beyond the tolerance"],
            [product_row(way, torch.cat(found), exact) for way, found in losses.items()],
        ),
    )  # fmt: skip
    (RESULTS / "held_out.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
