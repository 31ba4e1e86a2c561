"""Pictures at every pair of content and style values, on one page with labelled axes."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..consislora_core.lora_file import ImageLora
from ..host import drawing
from ..host.guider import GuidanceSettings, build_dual_guider
from ..host.model_inputs import check_latent, check_vae
from ..host.progress import show_text
from ..host.provenance import HIDDEN, note
from ..host.sampling import ksampler_sigmas, sample
from .guidance_inputs import guidance_inputs, model_and_prompts, optional_inputs, sampling_inputs
from .sockets import CATEGORY, aliases
from .widget_values import checked

# Bytes of the computer's memory that a pixel takes: of a picture in fp32; of the page, which is drawn in 8 bits first.
PICTURE_BYTES, PAGE_BYTES = 12, 20


class Sweep(NamedTuple):
    """What a grid varies: guidance or strength, and the values of each axis."""

    quantity: str
    content: list[float]
    style: list[float]

    def cells(self) -> Iterator[dict[str, float]]:
        """The two inputs of every picture, row by row from the top left: content grows to the right, style upward."""
        for style in reversed(self.style):
            for content in self.content:
                yield {f"content_{self.quantity}": content, f"style_{self.quantity}": style}


class StrengthGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAStrengthGrid",
            display_name="Strength Grid",
            category=CATEGORY,
            **aliases("xy plot", "compare strengths"),
            description="One picture for each pair of content and style values, from one seed, with labelled axes.",
            inputs=[
                *model_and_prompts(),
                io.Vae.Input("vae", tooltip="Of the same checkpoint; turns all latents into pictures at the end."),
                *sampling_inputs(),
                io.Combo.Input(
                    "sweep",
                    options=["guidance", "strength"],
                    default="guidance",
                    tooltip="What the grid varies: both guidances or both strengths. "
                    "Their own widgets are then not read.",
                ),
                *sweep_inputs("content"),
                *sweep_inputs("style"),
                io.Int.Input(
                    "cell_size",
                    default=256,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Width of a picture in the grid, in pixels. images keeps the full size.",
                ),
                *guidance_inputs(),
                *optional_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures on one page: content across, style up."),
                io.Image.Output(
                    display_name="images", tooltip="The single pictures, row by row from the top left of the grid."
                ),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    @checked
    def execute(
        cls, model, positive, negative, vae, latent_image, seed, steps, sampler_name, scheduler, denoise, sweep,
        content_from, content_to, content_steps, style_from, style_to, style_steps, cell_size,
        content: ImageLora | None = None, style: ImageLora | None = None, **guidance,
    ) -> io.NodeOutput:  # fmt: skip
        check_vae(model, vae)
        check_latent(model, latent_image, "latent_image")
        if (count := len(latent_image["samples"])) != 1:
            raise ValueError(f"latent_image holds {count} latents; a grid is drawn from one. Set its batch_size to 1.")
        text = check_memory(latent_image["samples"], vae, content_steps, style_steps, cell_size)
        logging.info("ConsisLoRA grid: %s", text)
        show_text(cls.hidden, text)
        settings = GuidanceSettings(**guidance)
        axes = spaced(content_from, content_to, content_steps), spaced(style_from, style_to, style_steps)
        swept = Sweep(sweep, *axes)
        sigmas = ksampler_sigmas(model, steps, sampler_name, scheduler, denoise)
        cells = list(swept.cells())
        latents = []
        for number, cell in enumerate(cells):
            guider = build_dual_guider(model, positive, negative, content, style, replace(settings, **cell))
            sampled = sample(guider, latent_image, seed, sampler_name, sigmas, run=(number, len(cells)))
            latents.append(sampled["samples"])
        # All at the end, so that model and VAE take turns on a small GPU only once.
        images = vae.decode(torch.cat(latents))
        noted = dict(seed=seed, steps=steps, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        noted |= dict(content_from=content_from, content_to=content_to, content_steps=content_steps)
        noted |= dict(style_from=style_from, style_to=style_to, style_steps=style_steps, sweep=sweep)
        note(cls.hidden, {"content": content, "style": style}, {**noted, **guidance})
        return io.NodeOutput(drawing.draw_grid(images, swept.quantity, *axes, cell_size), images)


def check_memory(latent: Tensor, vae: Any, columns: int, rows: int, cell: int) -> str:
    """What a grid takes, in words. latent: b c h w. Raises ValueError if the computer has less memory free."""
    scale, count = vae.spacial_compression_decode(), columns * rows
    height, width = (side * scale for side in latent.shape[-2:])
    page_width, page_height = drawing.grid_page_size(columns, rows, cell, (height, width))
    gigabytes = (count * height * width * PICTURE_BYTES + page_width * page_height * PAGE_BYTES) / 1e9
    free = comfy.model_management.get_free_memory(torch.device("cpu")) / 1e9
    text = f"{count} pictures of {width} x {height} pixels, on a page of {page_width} x {page_height}"
    if gigabytes > free:
        raise ValueError(
            f"This grid is {text}, which takes {gigabytes:.1f} GB of memory, and {free:.1f} GB are free. "
            "Lower cell_size, content_steps or style_steps, or make latent_image smaller."
        )
    return f"{text}: {gigabytes:.2f} GB of memory"


def sweep_inputs(image: str) -> list[io.Input]:
    value = dict(min=-10.0, max=10.0, step=0.05)
    return [
        io.Float.Input(f"{image}_from", default=0.0, tooltip=f"First {image} value.", **value),
        io.Float.Input(f"{image}_to", default=2.0, tooltip=f"Last {image} value.", **value),
        io.Int.Input(
            f"{image}_steps",
            default=3,
            min=1,
            max=20,
            tooltip=f"How many {image} values, evenly spaced; 1 is the first value alone.",
        ),
    ]


def spaced(first: float, last: float, count: int) -> list[float]:
    """`count` evenly spaced values; 1 is the first alone."""
    return torch.linspace(first, last, count).tolist()
