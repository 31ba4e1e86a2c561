"""Sample with content and style guided separately: as a guider for any sampler, or all in one node."""

from comfy_api.latest import io

from ..consislora_core.lora_file import ImageLora
from ..host.guider import GuidanceSettings, build_dual_guider, build_reconstruction_guider
from ..host.model_inputs import check_latent, check_picture_in
from ..host.provenance import HIDDEN, note
from ..host.sampling import invert, ksampler_sigmas, sample
from .guidance_inputs import guidance_inputs, model_and_prompts, optional_inputs, sampling_inputs
from .sockets import CATEGORY, aliases
from .widget_values import checked


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
                    tooltip="Begins with latent_image's own noise, found by Euler inversion, instead of random "
                    "noise, so that outlines stay where they are. Connect the content image's latent.",
                ),
                *optional_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent, for VAE Decode.")],
            hidden=HIDDEN,
        )

    @classmethod
    @checked
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, sampler_name, scheduler, denoise,
        structure_lock=False, content: ImageLora | None = None, style: ImageLora | None = None, **guidance,
    ) -> io.NodeOutput:  # fmt: skip
        guider = build_dual_guider(model, positive, negative, content, style, GuidanceSettings(**guidance))
        check_latent(model, latent_image, "latent_image")
        sigmas = ksampler_sigmas(model, steps, sampler_name, scheduler, denoise)
        if structure_lock:
            check_lockable(latent_image)
            latent_image = invert(build_reconstruction_guider(model, negative, content), latent_image, sigmas)
        noted = dict(seed=seed, steps=steps, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        note(cls.hidden, {"content": content, "style": style}, {**noted, **guidance})
        return io.NodeOutput(sample(guider, latent_image, seed, sampler_name, sigmas, noised=structure_lock))


def check_lockable(latent: dict) -> None:
    """Raises ValueError for a latent whose structure cannot be locked."""
    if "noise_mask" in latent:
        raise ValueError("structure_lock does not work with a mask on latent_image. Turn it off, or remove the mask.")
    check_picture_in(latent, "latent_image", "structure_lock")
