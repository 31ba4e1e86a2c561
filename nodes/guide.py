"""Sample with content and style guided separately: as a guider for any sampler, or all in one node."""

from comfy_api.latest import io

from ..consislora_core.lora_file import ImageLora
from ..host.frames import sample_frames, with_anchor_attention
from ..host.guider import GuidanceSettings, build_dual_guider, build_reconstruction_guider
from ..host.model_inputs import check_latent, check_picture_in
from ..host.provenance import HIDDEN, note
from ..host.sampling import ksampler_sigmas, sample, sample_locked
from .guidance_inputs import guidance_inputs, model_and_prompts, optional_inputs, sampling_inputs
from .sockets import CATEGORY, aliases
from .widget_values import checked

OFF, CONSISTENT = "off", "consistent"


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAGuider",
            display_name="Dual Guidance",
            category=CATEGORY,
            **aliases("cfg guider", "style guidance", "content guidance"),
            description="Guides content and style separately, for SamplerCustomAdvanced: any sampler, any sigmas.",
            inputs=[*model_and_prompts(), *guidance_inputs(), *optional_inputs()],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
            hidden=HIDDEN,
        )

    @classmethod
    @checked
    def execute(cls, model, positive, negative, content=None, style=None, **guidance) -> io.NodeOutput:
        settings = GuidanceSettings(**guidance)
        note(cls.hidden, {"content": content, "style": style}, guidance)
        return io.NodeOutput(build_dual_guider(model, positive, negative, content, style, settings))


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
                    tooltip="Keeps the outlines of latent_image: begins with the noise that this picture is made "
                    "from (Euler inversion), not the seed's. Best is the content image after Match Palette, encoded.",
                ),
                *optional_inputs(),
                io.Combo.Input(
                    "frames",
                    options=[OFF, CONSISTENT],
                    default=OFF,
                    optional=True,
                    tooltip="consistent: latent_image holds the frames of a film. Each begins with its own noise, as "
                    "with structure_lock, and also reads the first one, so that all look alike.",
                ),
                io.Float.Input(
                    "variation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="With structure_lock: how much of the noise is the seed's. At 0 every seed draws the same.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent, for VAE Decode.")],
            hidden=HIDDEN,
        )

    @classmethod
    @checked
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, sampler_name, scheduler, denoise,
        structure_lock=False, content: ImageLora | None = None, style: ImageLora | None = None, frames=OFF,
        variation=0.0, **guidance,
    ) -> io.NodeOutput:  # fmt: skip
        settings, is_film = GuidanceSettings(**guidance), frames == CONSISTENT
        guided = with_anchor_attention(model) if is_film else model
        guider = build_dual_guider(guided, positive, negative, content, style, settings)
        check_latent(model, latent_image, "latent_image")
        sigmas = ksampler_sigmas(model, steps, sampler_name, scheduler, denoise)
        noted = dict(seed=seed, steps=steps, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        note(cls.hidden, {"content": content, "style": style}, {**noted, **guidance})
        if not (is_film or structure_lock):
            return io.NodeOutput(sample(guider, latent_image, seed, sampler_name, sigmas))
        check_lockable(latent_image, "frames" if is_film else "structure_lock")
        inverting = build_reconstruction_guider(model, negative, content)
        if is_film:
            return io.NodeOutput(sample_frames(guider, inverting, latent_image, seed, sampler_name, sigmas))
        return io.NodeOutput(sample_locked(guider, inverting, latent_image, seed, sampler_name, sigmas, variation))


def check_lockable(latent: dict, turned_on: str) -> None:
    """Raises ValueError for a latent that cannot be inverted, as an input that is turned on wants it."""
    if latent.get("noise_mask") is not None:
        raise ValueError(f"{turned_on} does not work with a mask on latent_image. Turn it off, or remove the mask.")
    check_picture_in(latent, "latent_image", turned_on)
