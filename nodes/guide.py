"""Sample with content and style guided apart: as a guider for any sampler, or all in one node."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..consislora_core.guidance import (
    CONTENT,
    CONTENTS_STYLE,
    GUIDANCE,
    Mix,
    Row,
    guidance,
    guidance_rows,
    parts_of,
    wanted,
)
from ..consislora_core.lora_file import ImageLora
from . import bridge, drawing, passes
from .provenance import HIDDEN, note
from .sockets import CATEGORY, ConsisLora, aliases

PROMPTS = [row.prompt for pair in GUIDANCE.values() for row in pair]
OWN_LOOK = {CONTENT: 1.0, CONTENTS_STYLE: 1.0}


class DualGuider(comfy.samplers.CFGGuider):
    """ComfyUI's classifier-free guidance and, on top of it and within a window, ConsisLoRA's.

    model: with a guided pass (passes.py); its plain passes carry `mix`. scales: content and style guidance, by role.
    window: start and end, as fractions of sampling. reuse: for how many steps a guidance serves once computed.
    """

    def __init__(
        self, model: ModelPatcher, mix: Mix, scales: dict[str, float], window: tuple[float, float], reuse: int
    ):
        super().__init__(model)
        self.mix, self.scales, self.window, self.reuse = mix, scales, window, reuse
        self.guidance, self.computed_at = None, None

    def set_prompts(self, positive: list, negative: list, own: dict[str, list | None]) -> None:
        """A guidance row without a prompt of its own reads the negative."""
        used = {row.prompt: own[row.prompt] or negative for row in guidance_rows(self.scales)}
        self.inner_set_conds({"positive": positive, "negative": negative, **used})

    def sample(self, *args, **kwargs):
        try:
            return super().sample(*args, **kwargs)
        finally:
            self.guidance, self.computed_at = None, None

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - ComfyUI's signature
        rows = guidance_rows(self.scales)
        if not rows or not self._in_window(timestep[0]):
            return super().predict_noise(x, timestep, model_options, seed)
        step = int((model_options["transformer_options"]["sample_sigmas"] > timestep[0]).sum())
        # Some samplers ask twice at one noise level, for two latents, and some go back.
        if self.reuse == 1 or self.computed_at is None or step - self.computed_at not in range(self.reuse):
            self.computed_at = step
            theirs = model_options.get("sampler_calc_cond_batch_function")
            model_options = {**model_options, "sampler_calc_cond_batch_function": partial(self._predict, rows, theirs)}
        return super().predict_noise(x, timestep, model_options, seed) + self.guidance

    def _in_window(self, sigma: Tensor) -> bool:
        start, end = (self.inner_model.model_sampling.percent_to_sigma(fraction) for fraction in self.window)
        return end <= sigma <= start

    def _predict(self, rows: list[Row], theirs: Callable | None, args: dict) -> list[Tensor]:
        """What ComfyUI asks of a step, cond and uncond, with the guidance rows in the same batch.

        theirs: another pack's function for cond and uncond, whose business those two then stay.
        """
        asked = [] if theirs else args["conds"]
        everyone = [Row("positive", self.mix), Row("negative", self.mix)][: len(asked)] + rows
        conds = [*asked, *(self.conds[row.prompt] for row in rows)]
        options = {**args["model_options"]}
        options["transformer_options"] = {**options["transformer_options"], passes.ROWS: tuple(everyone)}
        predicted = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)
        by_prompt = {row.prompt: prediction for row, prediction in zip(everyone, predicted, strict=True)}
        self.guidance = guidance(by_prompt, self.scales)
        return theirs(args) if theirs else predicted[: len(asked)]


def guider_for(model, positive, negative, content, style, given: dict) -> DualGuider:
    """A DualGuider from the inputs that both nodes have."""
    bridge.find_roles(model)
    if content is None and style is None:
        raise ValueError("Neither content nor style is connected. Connect Load ConsisLoRA, or a training node, to one.")
    mix = wanted(given["content_strength"], given["style_strength"])
    guider = DualGuider(
        passes.with_guided_pass(model, parts_of(content, style), mix),
        mix,
        scales={role: given[f"{role}_guidance"] for role in GUIDANCE},
        window=(given["start_percent"], given["end_percent"]),
        reuse=given["reuse_steps"],
    )
    guider.set_cfg(given["cfg"])
    guider.set_prompts(positive, negative, {prompt: given.get(prompt) for prompt in PROMPTS})
    return guider


def guidance_inputs() -> list[io.Input]:
    scale = dict(default=1.0, min=0.0, max=10.0, step=0.1)
    strength = dict(default=1.0, min=-10.0, max=10.0, step=0.05)
    percent = dict(min=0.0, max=1.0, step=0.01)
    return [
        io.Float.Input(
            "cfg", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="How closely the picture follows the prompt."
        ),
        io.Float.Input(
            "content_guidance",
            tooltip="Pulls toward the content image's thing. 0 is off and costs nothing; "
            "leave it at 0 while content is not connected.",
            **scale,
        ),
        io.Float.Input(
            "style_guidance",
            tooltip="Pulls toward the style image's look. 0 is off and costs nothing; "
            "leave it at 0 while style is not connected.",
            **scale,
        ),
        io.Float.Input(
            "content_strength",
            tooltip="Of the content LoRA: 1 is as trained, 0 is off, below 0 is the opposite. "
            "No effect while content is not connected.",
            **strength,
        ),
        io.Float.Input(
            "style_strength",
            tooltip="Of the style LoRA: 1 is as trained, 0 is off, below 0 is the opposite. "
            "No effect while style is not connected.",
            **strength,
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            tooltip="Content and style guidance begin here, as a fraction of sampling: 0 is the first step.",
            **percent,
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            tooltip="Content and style guidance end here, as a fraction of sampling: 1 is the last step. "
            "An earlier end is faster.",
            **percent,
        ),
        io.Int.Input(
            "reuse_steps",
            default=1,
            min=1,
            max=10,
            tooltip="For how many steps a guidance is used once it is computed; 1 computes it in every step.",
        ),
    ]


def optional_inputs() -> list[io.Input]:
    prompts = {
        "content_positive": "Words for the thing, such as: a [c]",
        "content_negative": "Words for what stands in the style image, such as: a [v]",
        "style_positive": "Words for the look, such as: in the style of [v]",
        "style_negative": "Words for the content image's own look, such as: in the style of [c]",
    }
    return [
        ConsisLora.Input("content", optional=True, tooltip="Trained on the content image."),
        ConsisLora.Input("style", optional=True, tooltip="Trained on the style image, best in two stages."),
        *(
            io.Conditioning.Input(name, optional=True, tooltip=f"{words}. Faster without: the negative is read.")
            for name, words in prompts.items()
        ),
    ]


def model_and_prompts() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The SDXL model the LoRAs were trained on, or a relative of it."),
        io.Conditioning.Input("positive", tooltip="The whole prompt, such as: a [c] in the style of [v]"),
        io.Conditioning.Input("negative", tooltip="What to keep away from; may be an empty text."),
    ]


def sampling_inputs() -> list[io.Input]:
    return [
        io.Latent.Input("latent_image", tooltip="An empty latent, or a picture's to start from with denoise below 1."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="Fixes the starting noise: the same seed and inputs make the same picture.",
        ),
        io.Int.Input("steps", default=30, min=1, max=10_000, tooltip="Denoising steps."),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            tooltip="How each step is taken, as in KSampler. euler and dpmpp_2m are safe choices.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="How noise is spread over the steps, as in KSampler. normal and karras are safe choices.",
        ),
        io.Float.Input(
            "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1 keeps some of latent_image."
        ),
    ]


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAGuider",
            display_name="Dual Guidance",
            category=CATEGORY,
            **aliases("cfg guider", "style guidance", "content guidance"),
            description="Guides content and style apart, with SamplerCustomAdvanced: any sampler, any sigmas.",
            inputs=[*model_and_prompts(), *guidance_inputs(), *optional_inputs()],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model, positive, negative, content=None, style=None, **given) -> io.NodeOutput:
        note(cls.hidden, {"content": content, "style": style}, given)
        return io.NodeOutput(guider_for(model, positive, negative, content, style, given))


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRASampler",
            display_name="Dual Guidance Sampler",
            category=CATEGORY,
            **aliases("ksampler", "style transfer", "style guidance", "content guidance"),
            description="KSampler with content and style guidance.",
            inputs=[
                *model_and_prompts(),
                *sampling_inputs(),
                *guidance_inputs(),
                io.Boolean.Input(
                    "structure_lock",
                    default=False,
                    tooltip="Begins with latent_image's own noise, found by Euler inversion, in the place of random "
                    "noise, so that outlines stay where they are. Connect the content image's latent.",
                ),
                *optional_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent, for VAE Decode.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        structure_lock=False,
        content: ImageLora | None = None,
        style: ImageLora | None = None,
        **given,
    ) -> io.NodeOutput:
        guider = guider_for(model, positive, negative, content, style, given)
        sigmas = sigmas_for(model, given)
        if structure_lock:
            latent_image = bridge.inverted(restoring(model, negative, content), lockable(latent_image), sigmas)
        note(cls.hidden, {"content": content, "style": style}, given)
        seed, sampler = given["seed"], given["sampler_name"]
        return io.NodeOutput(bridge.sample(guider, latent_image, seed, sampler, sigmas, noised=structure_lock))


def sigmas_for(model: ModelPatcher, given: dict) -> Tensor:
    return bridge.sigmas(model, *(given[name] for name in ("steps", "sampler_name", "scheduler", "denoise")))


def restoring(model: ModelPatcher, negative: list, content: ImageLora | None) -> comfy.samplers.CFGGuider:
    """Predicts the content image as it was: with both parts of its LoRA, and no words."""
    guider = comfy.samplers.CFGGuider(passes.with_mix(model, parts_of(content, None), OWN_LOOK))
    guider.set_conds(negative, negative)
    guider.set_cfg(1.0)
    return guider


def lockable(latent: dict) -> dict:
    if "noise_mask" in latent:
        raise ValueError("structure_lock does not work with a mask on latent_image. Turn it off, or remove the mask.")
    if not latent["samples"].any():
        raise ValueError(
            "structure_lock needs a picture, and latent_image is empty. Connect the content image's latent."
        )
    return latent


class Sweep(NamedTuple):
    """What a grid varies: guidance or strength, and the values of each axis."""

    what: str
    content: list[float]
    style: list[float]

    def cells(self) -> Iterator[dict[str, float]]:
        """The two inputs of every picture, in rows from above: content grows to the right, style upward."""
        for style in reversed(self.style):
            for content in self.content:
                yield {f"content_{self.what}": content, f"style_{self.what}": style}


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
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        latent_image,
        sweep,
        cell_size,
        content: ImageLora | None = None,
        style: ImageLora | None = None,
        **given,
    ) -> io.NodeOutput:
        if (count := len(latent_image["samples"])) != 1:
            raise ValueError(f"latent_image holds {count} latents; a grid is drawn from one. Set its batch_size to 1.")
        swept = Sweep(sweep, swept_values(given, "content"), swept_values(given, "style"))
        sigmas, seed, sampler = sigmas_for(model, given), given["seed"], given["sampler_name"]
        cells = list(swept.cells())
        latents = []
        for i, cell in enumerate(cells):
            guider = guider_for(model, positive, negative, content, style, {**given, **cell})
            sampled = bridge.sample(guider, latent_image, seed, sampler, sigmas, run=(i, len(cells)))
            latents.append(sampled["samples"])
        # All at the end, so that model and VAE take turns on a small GPU only once.
        images = vae.decode(torch.cat(latents))
        note(cls.hidden, {"content": content, "style": style}, {**given, "sweep": sweep})
        return io.NodeOutput(drawing.grid(images, swept.what, swept.content, swept.style, cell_size), images)


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


def swept_values(given: dict, image: str) -> list[float]:
    return torch.linspace(given[f"{image}_from"], given[f"{image}_to"], given[f"{image}_steps"]).tolist()
