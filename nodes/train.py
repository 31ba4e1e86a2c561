"""Train ConsisLoRA: one image to a content part and a style part, then the style part anew."""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..consislora_core import __version__, lora_file
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.schedule import Stage, image_stage, style_stage
from ..consislora_core.trainer import Trainer
from . import bridge
from .sockets import CATEGORY, ConsisLora, LoraModel, LossMap, aliases

CHECKPOINT_EVERY = 50  # steps: the most that a crash costs

RANK = io.Int.Input(
    "rank",
    default=64,
    min=1,
    max=1024,
    tooltip="Size of the LoRA. 64 is the paper's; 16 to 32 make smaller files that hold less detail.",
)
SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=2**64 - 1,
    control_after_generate=False,
    tooltip="Fixes the first weights and all noise: the same seed and inputs train the same LoRA.",
)
PRECISION = io.Combo.Input(
    "precision",
    options=["auto", *bridge.PRECISIONS],
    default="auto",
    tooltip="What the model computes in; LoRA weights are always fp32. "
    "auto: what the model samples in, but bf16 or fp32 instead of fp16.",
)
OUTPUTS = [
    ConsisLora.Output(display_name="consislora", tooltip="The trained content and style parts."),
    LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
    LoraModel.Output(
        display_name="lora_model", tooltip="The same LoRA for ComfyUI's own Save LoRA and Load LoRA Model nodes."
    ),
]


def learning_rate(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=1e-7, max=1.0, step=1e-7, round=False, tooltip=tooltip)


class TrainImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRATrainImage",
            display_name="Train ConsisLoRA (image)",
            category=CATEGORY,
            **aliases("train lora", "b-lora", "style transfer"),
            description="Learns one image as a content LoRA and a style LoRA (stage 1 of ConsisLoRA). "
            "Use it for the content image, and as the first step for the style image.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model. It is only read: after training it is as it was."),
                io.Latent.Input(
                    "latent",
                    tooltip="The image, from VAE Encode. 1024 x 1024 pixels suit SDXL; other sizes and shapes work.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip='The prompt: "A [c]" for a content image, "A [v]" for a style image.'
                ),
                io.Int.Input("steps", default=1500, min=1, max=100_000, tooltip="Training steps in all."),
                io.Int.Input(
                    "transition_step",
                    default=500,
                    min=0,
                    max=100_000,
                    tooltip="From this step on the loss compares restored images instead of noise. "
                    "0: always; equal to steps, which is the most: never (B-LoRA).",
                ),
                learning_rate("learning_rate", 2e-4, "Learning rate before the transition."),
                learning_rate("reconstruction_learning_rate", 1e-4, "Learning rate after the transition."),
                RANK,
                SEED,
                PRECISION,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        positive,
        steps,
        transition_step,
        learning_rate,
        reconstruction_learning_rate,
        rank,
        seed,
        precision,
    ) -> io.NodeOutput:
        stage = image_stage(steps, transition_step, learning_rate, reconstruction_learning_rate, rank=rank, seed=seed)
        return train(cls.hidden, model, latent, positive, stage, precision)


class TrainStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRATrainStyle",
            display_name="Train ConsisLoRA (style, stage 2)",
            category=CATEGORY,
            **aliases("train style lora", "b-lora", "style transfer"),
            description="Learns the style of an image anew, while its content LoRA from stage 1 "
            "explains the content away.",
            inputs=[
                io.Model.Input("model", tooltip="The SDXL model that stage 1 was trained on."),
                io.Latent.Input("latent", tooltip="The style image, from VAE Encode: the same as in stage 1."),
                io.Conditioning.Input("positive", tooltip='The prompt: "An image in the style of [v]".'),
                ConsisLora.Input(
                    "content_lora",
                    tooltip="What stage 1 learned from this style image. Its content part is held fixed.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=100_000, tooltip="Training steps."),
                learning_rate("reconstruction_learning_rate", 1e-4, "Learning rate."),
                io.Float.Input(
                    "noise_offset",
                    default=0.03,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves whole channels of the noise a little, "
                    "so that overall brightness and colour are learned too.",
                ),
                RANK,
                SEED,
                PRECISION,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        positive,
        content_lora,
        steps,
        reconstruction_learning_rate,
        noise_offset,
        rank,
        seed,
        precision,
    ) -> io.NodeOutput:
        stage = style_stage(steps, reconstruction_learning_rate, noise_offset, rank=rank, seed=seed)
        return train(cls.hidden, model, latent, positive, stage, precision, {"content": content_lora.part("content")})


def train(
    hidden: io.HiddenHolder | None,
    model: ModelPatcher,
    latent: dict,
    positive: list,
    stage: Stage,
    precision: str,
    frozen: dict[str, lora_file.Part] | None = None,
) -> io.NodeOutput:
    """Trains, unless the store has what this very training gave before."""
    bridge.find_roles(model)
    base = bridge.base_fingerprint(model)
    job = Job(model, base, latent, positive, stage, frozen or {}, bridge.training_dtype(model, precision))
    store, key = bridge.store(), bridge.training_key(*job)
    if key is None:
        return output(stage, *job.run(hidden))
    with store.locked(key, waiting=bridge.stop_if_cancelled):
        if found := store.find(key):
            logging.info("ConsisLoRA %s stage: trained before, taken from %s.", stage.name, store.folder)
            return output(stage, *found, told="trained before")
        lora, losses = job.run(hidden, partial(store.resume, key), partial(store.save_checkpoint, key))
        store.keep(key, lora, losses)
    return output(stage, lora, losses)


def output(stage: Stage, lora: ImageLora, losses: list[float], told: str | None = None) -> io.NodeOutput:
    curve = {"consislora_loss": [bridge.loss_curve(stage, losses, told=told)]}
    return io.NodeOutput(lora, {"loss": losses}, lora_file.to_state_dict(lora), ui=curve)


class Job(NamedTuple):
    """All that decides what a training gives. base: the model's fingerprint."""

    model: ModelPatcher
    base: str
    latent: dict
    positive: list
    stage: Stage
    frozen: dict[str, lora_file.Part]
    dtype: torch.dtype

    def run(
        self,
        hidden: io.HiddenHolder | None,
        resume: Callable[[Trainer], list[float]] = lambda trainer: [],
        save: Callable[[Trainer, list[float]], None] = lambda trainer, losses: None,
    ) -> tuple[ImageLora, list[float]]:
        """The trained LoRA and the loss of every step.

        resume: sets a new trainer to where an earlier one was left, and gives the losses until there. save: keeps a
        trainer for it, every `CHECKPOINT_EVERY` steps and on a cancel. Raises OutOfMemory with advice.
        """
        try:
            return self._run(hidden, resume, save)
        except bridge.OutOfMemory:
            pass
        # Out here no traceback holds the tensors of the training any more.
        height, width = (8 * side for side in self.latent["samples"].shape[-2:])
        raise bridge.OutOfMemory(
            f"There is not enough memory to train on {width} x {height} pixels in {self.dtype}. Close what else uses "
            "the graphics card and queue again: training goes on from its last checkpoint. Or use a smaller image, "
            "precision bf16, or a lower rank."
        )

    def _run(
        self,
        hidden: io.HiddenHolder | None,
        resume: Callable[[Trainer], list[float]],
        save: Callable[[Trainer, list[float]], None],
    ) -> tuple[ImageLora, list[float]]:
        progress = bridge.Progress(self.model, self.stage, hidden and hidden.unique_id)
        with bridge.open_for_training(self.model, self.latent["samples"].shape, self.dtype) as denoiser:
            z_0 = bridge.clean_latents(self.model, self.latent)
            cond = bridge.encoded_conditioning(self.model, self.positive, z_0)
            with Trainer(denoiser, z_0, cond, self.stage, self.frozen, bridge.loss_scale(self.dtype)) as trainer:
                losses = progress.losses = resume(trainer)
                if losses:
                    logging.info("ConsisLoRA %s stage: goes on from step %d.", self.stage.name, trainer.step)
                try:
                    for event in trainer:
                        losses.append(event.loss)
                        if event.step % CHECKPOINT_EVERY == 0:
                            save(trainer, losses)
                        progress.show(event)
                except bridge.Cancelled:
                    save(trainer, losses)
                    raise
                return ImageLora(trainer.parts(), self.origin(hidden)), losses

    def origin(self, hidden: io.HiddenHolder | None) -> dict[str, str]:
        """The LoRA's metadata."""
        origin = {
            "stage": self.stage.name,
            "prompt": bridge.text_behind(hidden, "positive"),
            "steps": str(self.stage.steps),
            "rank": str(self.stage.rank),
            "seed": str(self.stage.seed),
            "image_hash": bridge.tensor_fingerprint(self.latent["samples"]),
            "base_model_hash": self.base,
            "version": __version__,
        }
        return {f"consislora.{key}": value for key, value in origin.items()}
