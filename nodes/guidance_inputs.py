"""The inputs that Dual Guidance, its sampler and the grid share."""

import comfy.samplers
from comfy_api.latest import io

from .sockets import ConsisLora


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
            tooltip="Pulls toward the content image's subject. 0 is off and costs nothing; "
            "leave it at 0 while content is not connected.",
            **scale,
        ),
        io.Float.Input(
            "style_guidance",
            tooltip="Pulls toward the style image's style. 0 is off and costs nothing; "
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
        "content_positive": "A prompt for the subject, such as: a [c]",
        "content_negative": "A prompt for what is in the style image, such as: a [v]",
        "style_positive": "A prompt for the style, such as: in the style of [v]",
        "style_negative": "A prompt for the content image's own style, such as: in the style of [c]",
    }
    return [
        ConsisLora.Input("content", optional=True, tooltip="Trained on the content image."),
        ConsisLora.Input("style", optional=True, tooltip="Trained on the style image, best in two stages."),
        *(
            io.Conditioning.Input(
                name, optional=True, tooltip=f"{what}. Without one the negative prompt is used, which is faster."
            )
            for name, what in prompts.items()
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
