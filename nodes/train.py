"""Train ConsisLoRA: one image to a content part and a style part, then the style part anew."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..consislora_core import __version__, lora_file
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.schedule import PRESETS, Stage, image_stage, style_stage
from ..consislora_core.store import fingerprint
from ..consislora_core.trainer import Trainer
from . import bridge, graph, identity
from .progress import Progress, loss_curve
from .sockets import CATEGORY, ConsisLora, LoraModel, LossMap, aliases

CHECKPOINT_EVERY = 50  # steps; where these are quick, seldom enough to take no more of the time than
CHECKPOINT_SHARE = 1 / 100

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
MEMORY = io.Combo.Input(
    "memory",
    options=list(bridge.MEMORY),
    default="auto",
    optional=True,
    tooltip="fast keeps a step's intermediate results; lean computes part of them twice, which takes less memory and "
    "some more time. Both give the same LoRA. auto: fast where it fits, as the log tells.",
)
PRESET = io.Combo.Input(
    "preset",
    options=list(PRESETS),
    default=PRESETS[0],
    optional=True,
    tooltip="paper: the schedule as set here. quality: three noises in each step, for about three times the work, and "
    "a learning rate that falls to 0 towards the end. fast: quality in a third of the steps, stage 2 in a fifth, at "
    "as many times the learning rates. Both take more memory, and content_guidance 0.25 and style_strength 1.4 in "
    "sampling.",
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
                MEMORY,
                PRESET,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, positive, precision, memory="auto", **schedule) -> io.NodeOutput:
        return train(cls.hidden, model, latent, positive, image_stage(**schedule), precision, memory)


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
                MEMORY,
                PRESET,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, positive, content_lora, precision, memory="auto", **schedule) -> io.NodeOutput:
        frozen = {"content": content_lora.part("content")}
        return train(cls.hidden, model, latent, positive, style_stage(**schedule), precision, memory, frozen)


class TrainImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        one = TrainImage.define_schema()
        latent = io.Latent.Input(
            "latent", tooltip="The images, from VAE Encode, in one batch: all of one size. Each gets a LoRA of its own."
        )
        at_once = io.Int.Input(
            "at_once",
            default=4,
            min=1,
            max=64,
            tooltip="How many images train side by side. More go faster together, and take more memory.",
        )
        return io.Schema(
            node_id="ConsisLoRATrainImages",
            display_name="Train ConsisLoRA (each image)",
            category=CATEGORY,
            **aliases("train lora", "batch training"),
            description="Learns each image of a batch as a content LoRA and a style LoRA of its own, several at once. "
            "The LoRAs are those that Train ConsisLoRA (image) gives one by one, and neither node trains again what "
            "the other has trained.",
            inputs=[latent if one_input.id == "latent" else one_input for one_input in one.inputs[:-2]]
            + [at_once, MEMORY, PRESET],
            outputs=[
                ConsisLora.Output(
                    display_name="consislora", is_output_list=True, tooltip="The LoRAs, in the order of the images."
                )
            ],
            hidden=one.hidden,
        )

    @classmethod
    def execute(cls, model, latent, positive, precision, at_once, memory="auto", **schedule) -> io.NodeOutput:
        stage = image_stage(**schedule)
        return io.NodeOutput(train_each(cls.hidden, model, latent, positive, stage, precision, memory, at_once))


class Job(NamedTuple):
    """All that decides what a training gives. base: the model's fingerprint."""

    model: ModelPatcher
    base: str
    latent: dict
    positive: list
    stage: Stage
    frozen: dict[str, lora_file.Part]
    dtype: torch.dtype

    def origin(self, hidden: io.HiddenHolder | None) -> dict[str, str]:
        """The LoRA's metadata."""
        origin = {
            "stage": self.stage.name,
            "prompt": graph.text_behind(hidden, "positive"),
            "steps": str(self.stage.steps),
            "rank": str(self.stage.rank),
            "seed": str(self.stage.seed),
            "image_hash": identity.tensor_fingerprint(self.latent["samples"]),
            "base_model_hash": self.base,
            "version": __version__,
        }
        return {f"consislora.{key}": value for key, value in origin.items()}


class Trained(NamedTuple):
    lora: ImageLora
    losses: list[float]  # of every step
    before: bool = False  # and not now


def train(
    hidden: io.HiddenHolder | None,
    model: ModelPatcher,
    latent: dict,
    positive: list,
    stage: Stage,
    precision: str,
    memory: str,
    frozen: dict[str, lora_file.Part] | None = None,
) -> io.NodeOutput:
    bridge.find_roles(model)
    base = identity.base_fingerprint(model)
    job = Job(model, base, latent, positive, stage, frozen or {}, bridge.training_dtype(model, precision))
    ((lora, losses, before),) = remembered([job], hidden, Progress(model, stage, hidden and hidden.unique_id), memory)
    told = "trained before" if before else None
    curve = {"consislora_loss": [loss_curve(stage, losses, told=told)]}
    return io.NodeOutput(lora, {"loss": losses}, lora_file.to_state_dict(lora), ui=curve)


def train_each(
    hidden: io.HiddenHolder | None,
    model: ModelPatcher,
    latent: dict,
    positive: list,
    stage: Stage,
    precision: str,
    memory: str,
    at_once: int,
) -> list[ImageLora]:
    """The LoRA of each image; those that the store does not have are trained `at_once` at a time."""
    bridge.find_roles(model)
    bridge.check_latent(model, latent)
    base, dtype, store = identity.base_fingerprint(model), bridge.training_dtype(model, precision), identity.store()
    jobs = [Job(model, base, {"samples": one}, positive, stage, {}, dtype) for one in latent["samples"].split(1)]
    keys = [identity.training_key(*job) or number for number, job in enumerate(jobs)]
    wanted = dict(zip(keys, jobs, strict=True))  # the same picture twice is one
    missing = [key for key in wanted if not store.has(key)]
    groups = [[key] for key in wanted if key not in missing]
    groups += [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    found = {}
    for number, group in enumerate(groups):
        progress = Progress(model, stage, hidden and hidden.unique_id, run=(number, len(groups)))
        found |= zip(group, remembered([wanted[key] for key in group], hidden, progress, memory), strict=True)
    return [found[key].lora for key in keys]


def remembered(jobs: list[Job], hidden: io.HiddenHolder | None, progress: Progress, memory: str) -> list[Trained]:
    """What the jobs give: from the store, or trained now, side by side."""
    keys = [identity.training_key(*job) for job in jobs]
    if None in keys:
        return run(jobs, hidden, progress, memory)
    store, stage = identity.store(), jobs[0].stage
    with ExitStack() as locks:
        for key in sorted(keys):  # in one order everywhere, so that no two processes wait for each other
            locks.enter_context(store.locked(key, waiting=bridge.stop_if_cancelled))
        found = {key: Trained(*known, before=True) for key in keys if (known := store.find(key))}
        if found:
            logging.info("ConsisLoRA %s stage: trained before, taken from %s.", stage.name, store.folder)
        missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}
        if missing:
            name = keys[0] if len(missing) == 1 else fingerprint(list(missing))  # of the checkpoint
            resume, save = partial(store.resume, name), partial(store.save_checkpoint, name)
            for key, trained in zip(
                missing, run(list(missing.values()), hidden, progress, memory, resume, save), strict=True
            ):
                store.keep(key, trained.lora, trained.losses)
                found[key] = trained
            store.drop_checkpoint(name)
    return [found[key] for key in keys]


def run(
    jobs: list[Job],
    hidden: io.HiddenHolder | None,
    progress: Progress,
    memory: str,
    resume: Callable[[Trainer], list] = lambda trainer: [],
    save: Callable[[Trainer, list], None] = lambda trainer, losses: None,
) -> list[Trained]:
    """Trains jobs that differ in nothing but their latents, side by side.

    resume: sets a new trainer to where an earlier one was left, and gives the losses until there, for each step those
    of all jobs. save: keeps a trainer for it, every `CHECKPOINT_EVERY` steps or more seldom, and on a cancel. Raises
    OutOfMemory with advice.
    """
    try:
        return _run(jobs, hidden, progress, memory, resume, save)
    except bridge.OutOfMemory:
        pass
    # Out here no traceback holds the tensors of the training any more.
    height, width = (8 * side for side in jobs[0].latent["samples"].shape[-2:])
    fewer = f", fewer than {len(jobs)} images at once" if len(jobs) > 1 else ""
    raise bridge.OutOfMemory(
        f"There is not enough memory to train on {width} x {height} pixels in {jobs[0].dtype}. Close what else uses "
        "the graphics card and queue again: training goes on from its last checkpoint. Or choose memory lean"
        f"{fewer}, a smaller image, precision bf16, or a lower rank."
    )


def _run(
    jobs: list[Job],
    hidden: io.HiddenHolder | None,
    progress: Progress,
    memory: str,
    resume: Callable[[Trainer], list],
    save: Callable[[Trainer, list], None],
) -> list[Trained]:
    model, _, _, positive, stage, frozen, dtype = jobs[0]
    latent = {"samples": torch.cat([job.latent["samples"] for job in jobs])}
    shape = (len(jobs) * stage.noises, *latent["samples"].shape[1:])
    with bridge.open_for_training(model, shape, dtype, memory) as denoiser:
        z_0 = bridge.clean_latents(model, latent)
        cond = bridge.encoded_conditioning(model, positive, z_0)
        apart = len(jobs) > 1
        if apart:
            frozen = [frozen] * len(jobs)
        with Trainer(denoiser, z_0, cond, stage, frozen, bridge.loss_scale(dtype), apart) as trainer:
            losses = resume(trainer)
            progress.losses = [sum(step) / len(step) for step in losses]
            if losses:
                logging.info("ConsisLoRA %s stage: goes on from step %d.", stage.name, trainer.step)
            began, saving = time.monotonic(), 0.0
            try:
                for event in trainer:
                    losses.append(event.losses)
                    progress.losses.append(event.loss)
                    now = time.monotonic()
                    if event.step % CHECKPOINT_EVERY == 0 and saving <= CHECKPOINT_SHARE * (now - began):
                        save(trainer, losses)
                        saving += time.monotonic() - now
                    progress.show(event)
            except bridge.Cancelled:
                save(trainer, losses)
                raise
            return [
                Trained(ImageLora(trainer.parts(row), job.origin(hidden)), [step[row] for step in losses])
                for row, job in enumerate(jobs)
            ]
