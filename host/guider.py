"""The dual guider: ComfyUI's classifier-free guidance with ConsisLoRA's content and style guidance on top."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import comfy.samplers
from comfy.model_patcher import ModelPatcher
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
    wanted_mix,
)
from ..consislora_core.lora_file import ImageLora
from .guided_unet import ROWS, with_guided_pass, with_mix
from .model_inputs import Conditioning, check_areas, check_cache, check_loras, check_roles, check_text

OWN_STYLE = {CONTENT: 1.0, CONTENTS_STYLE: 1.0}  # the content image in its own style


@dataclass(frozen=True)
class GuidanceSettings:
    """How content and style are guided: the inputs that all guidance nodes have, with their defaults.

    start_percent, end_percent: the window of content and style guidance, as fractions of sampling. reuse_steps: for how
    many steps a guidance is used once it is computed. The four conditionings are the prompts of the guidance rows; a
    row without one reads the negative prompt.
    """

    cfg: float = 5.0
    content_guidance: float = 1.0
    style_guidance: float = 1.0
    content_strength: float = 1.0
    style_strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    reuse_steps: int = 1
    content_positive: Conditioning | None = None
    content_negative: Conditioning | None = None
    style_positive: Conditioning | None = None
    style_negative: Conditioning | None = None

    @property
    def scales(self) -> dict[str, float]:
        """The scale of guidance, by role."""
        return {"content": self.content_guidance, "style": self.style_guidance}

    @property
    def prompts(self) -> dict[str, Conditioning]:
        """The conditionings of the guidance rows that have their own, by the row's prompt."""
        own = {row.prompt: getattr(self, row.prompt) for rows in GUIDANCE.values() for row in rows}
        return {prompt: conditioning for prompt, conditioning in own.items() if conditioning is not None}

    @property
    def mix(self) -> Mix:
        """The strengths of the parts in the two rows of classifier-free guidance."""
        return wanted_mix(self.content_strength, self.style_strength)


class DualGuider(comfy.samplers.CFGGuider):
    """ComfyUI's classifier-free guidance and, within a window, ConsisLoRA's (arXiv 2503.10614, section 4.4).

    model: a clone by `with_guided_pass`, whose plain passes have `settings.mix`.
    """

    def __init__(self, model: ModelPatcher, settings: GuidanceSettings):
        super().__init__(model)
        self.settings = settings
        # Style rows first, beside cond and uncond: a mixer computes from the first row with style parts to the last.
        self.rows = guidance_rows(settings.scales)[::-1]
        self.guidance, self.computed_at = None, None
        self.set_cfg(settings.cfg)

    def set_prompts(self, positive: Conditioning, negative: Conditioning) -> None:
        """Sets all conditionings: a guidance row without a prompt of its own reads the negative one."""
        own = {row.prompt: self.settings.prompts.get(row.prompt, negative) for row in self.rows}
        self.inner_set_conds({"positive": positive, "negative": negative, **own})

    def sample(self, noise, latent_image, *args, **kwargs):
        check_areas(self.original_conds, latent_image)
        try:
            return super().sample(noise, latent_image, *args, **kwargs)
        finally:
            self.guidance, self.computed_at = None, None

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - ComfyUI's signature
        if not self.rows or not self._is_in_window(timestep[0]):
            return super().predict_noise(x, timestep, model_options, seed)
        if self._is_due(timestep[0], model_options):
            theirs = model_options.get("sampler_calc_cond_batch_function")
            model_options = {**model_options, "sampler_calc_cond_batch_function": partial(self._predict, theirs)}
        return super().predict_noise(x, timestep, model_options, seed) + self.guidance

    def _is_in_window(self, sigma: Tensor) -> bool:
        window = self.settings.start_percent, self.settings.end_percent
        if window == (0.0, 1.0):  # the CPU then need not wait until the GPU has computed sigma
            return True
        start, end = (self.inner_model.model_sampling.percent_to_sigma(fraction) for fraction in window)
        return end <= sigma <= start

    def _is_due(self, sigma: Tensor, model_options: dict) -> bool:
        """Whether guidance is computed at this noise level, instead of reused."""
        if self.settings.reuse_steps == 1:
            return True
        step = int((model_options["transformer_options"]["sample_sigmas"] > sigma).sum())
        # Some samplers predict twice at one noise level, for two latents, and some go back.
        if self.computed_at is not None and step - self.computed_at in range(self.settings.reuse_steps):
            return False
        self.computed_at = step
        return True

    def _predict(self, theirs: Callable | None, args: dict) -> list[Tensor]:
        """Predicts cond and uncond, as ComfyUI asks for, and the guidance rows in the same batch.

        theirs: another pack's function for cond and uncond, which then still computes those two.
        """
        asked = [] if theirs else args["conds"]
        rows = [Row("positive", self.settings.mix), Row("negative", self.settings.mix)][: len(asked)] + self.rows
        conds = [*asked, *(self.conds[row.prompt] for row in self.rows)]
        options = {**args["model_options"]}
        options["transformer_options"] = {**options["transformer_options"], ROWS: tuple(rows)}
        predicted = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)
        by_prompt = {row.prompt: prediction for row, prediction in zip(rows, predicted, strict=True)}
        self.guidance = guidance(by_prompt, self.settings.scales)
        return theirs(args) if theirs else predicted[: len(asked)]


def build_dual_guider(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    content: ImageLora | None,
    style: ImageLora | None,
    settings: GuidanceSettings,
    share_encoder: bool = True,
) -> DualGuider:
    """A `DualGuider` for the LoRAs of a content image and a style image, of which one may be missing.

    Raises ValueError if both are missing, if one lacks the part that is wanted of it or does not fit the model, for
    text of another base model, for a model without SDXL's content and style blocks, and for a cache that guidance does
    not go with.
    """
    check_roles(model)
    for name, conditioning in {"positive": positive, "negative": negative, **settings.prompts}.items():
        check_text(model, conditioning, name)
    if content is None and style is None:
        raise ValueError("Neither content nor style is connected. Connect Load ConsisLoRA, or a training node, to one.")
    check_loras(model, content, style)
    rows = guidance_rows(settings.scales)
    check_cache(model, settings.start_percent if rows else 0)
    mixes = [settings.mix, *(row.mix for row in rows)]
    acting = {source: part for source, part in parts_of(content, style).items() if any(source in mix for mix in mixes)}
    guided = with_guided_pass(model, acting, settings.mix, share_encoder)
    guider = DualGuider(guided, settings)
    guider.set_prompts(positive, negative)
    return guider


def build_reconstruction_guider(
    model: ModelPatcher, negative: Conditioning, content: ImageLora | None
) -> comfy.samplers.CFGGuider:
    """A guider that reconstructs the content image: both parts of its LoRA act, with the negative prompt alone."""
    guider = comfy.samplers.CFGGuider(with_mix(model, parts_of(content, None), OWN_STYLE))
    guider.set_conds(negative, negative)
    guider.set_cfg(1.0)
    return guider
