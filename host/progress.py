"""Shows on a node how its training goes: bar, preview, losses, time left, free memory; and stops it on cancel."""

import logging
import math
import sys
import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..consislora_core.files import escape_text
from ..consislora_core.schedule import Stage
from ..consislora_core.trainer import StepEvent

SHOW_EVERY, LOG_EVERY = 20, 50  # steps
PREVIEW = 256  # pixels of a preview's longer side

run_began: float | None = None  # by the monotonic clock


def begin_run() -> None:
    """Notes that a run of a workflow begins now."""
    global run_began
    run_began = time.monotonic()


def seconds_of_run(shared_by: int) -> float | None:
    """Each picture's share of the time since the run began; None if nobody noted that."""
    return None if run_began is None else round((time.monotonic() - run_began) / shared_by, 1)


def running_server() -> Any:
    """ComfyUI's PromptServer; None where nodes run without one, as in a test."""
    module = sys.modules.get("server")
    return getattr(module and module.PromptServer, "instance", None)


def stop_if_cancelled() -> None:
    """Raises ComfyUI's InterruptProcessingException when the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(hidden: Any, text: str) -> None:
    """Shows a text on the running node, below its inputs."""
    if hidden and hidden.unique_id and (server := running_server()):
        server.send_progress_text(escape_text(text), hidden.unique_id)


def loss_curve(stage: Stage, losses: list[float], first: int = 0, caption: str | None = None) -> dict:
    """What web/js/loss_curve.js draws: the losses of the steps from `first` on, counted from 0.

    caption: text beside the curve; with None the last one stays.
    """
    phases = [[phase.loss, phase.steps] for phase in stage.phases]
    return {"first": first, "losses": losses[first:], "phases": phases, "caption": caption}


class Progress:
    """Shows a training on its node: a bar, every `SHOW_EVERY` steps the predicted image, the losses, the time left and
    the free memory; and every `LOG_EVERY` steps the loss in the log.

    node: the running node's id, for the browser. run: number of this training, from 0, and how many the node makes.
    losses: of all steps so far; the training appends to the list.
    """

    def __init__(self, model: ModelPatcher, stage: Stage, node: str | None, run: tuple[int, int] = (0, 1)):
        number, runs = run
        self.bar = comfy.utils.ProgressBar(runs * stage.steps)
        self.before = number * stage.steps
        self.stage, self.node = stage, node
        self.losses: list[float] = []
        self.sent = 0  # how many of them the browser has
        self.began: tuple[float, int] | None = None  # when the first step of this run had ended, and which that was
        self.device, self.least_free = model.load_device, math.inf
        factors = model.model.latent_format
        self.previewer = factors.latent_rgb_factors and latent_preview.Latent2RGBPreviewer(
            factors.latent_rgb_factors, getattr(factors, "latent_rgb_factors_bias", None)
        )

    def show(self, event: StepEvent) -> None:
        """Shows one step. Raises ComfyUI's InterruptProcessingException when the user pressed cancel."""
        stop_if_cancelled()
        self.began = self.began or (time.monotonic(), event.step)
        is_last, shows_picture = event.step == self.stage.steps, event.step % SHOW_EVERY == 1
        if (is_last or shows_picture) and (server := running_server()):
            curve = loss_curve(self.stage, self.losses, self.sent, self.time_and_memory(event.step))
            server.send_sync("consislora.loss", {"node": self.node, **curve})
            self.sent = len(self.losses)
        preview = self._preview(event.z_0_hat) if self.previewer and shows_picture else None
        self.bar.update_absolute(self.before + event.step, preview=preview)
        if is_last or event.step % LOG_EVERY == 0:
            logging.info(
                "ConsisLoRA %s stage, step %d of %d: %s loss %.4f, learning rate %g",
                event.stage,
                event.step,
                self.stage.steps,
                event.phase,
                event.loss,
                event.learning_rate,
            )

    def _preview(self, z_0_hat: Tensor) -> tuple[str, Image.Image, int]:
        """The first x0 prediction as ComfyUI's progress bar takes it, whose pixels stay visible when it is enlarged."""
        picture = self.previewer.decode_latent_to_preview(z_0_hat.float().cpu())
        size = [max(1, PREVIEW * side // max(picture.size)) for side in picture.size]
        return "JPEG", picture.resize(size, Image.NEAREST), PREVIEW

    def time_and_memory(self, step: int) -> str:
        """The time left and the free memory, as text; after the last step the time taken and the least free memory."""
        free = comfy.model_management.get_free_memory(self.device)
        self.least_free = min(self.least_free, free)
        began, first = self.began
        spent = time.monotonic() - began
        if step == self.stage.steps:
            return f"took {_minutes(spent)}, at least {self.least_free / 1e9:.1f} GB free"
        to_go = self.bar.total - self.before - step
        left = f"{_minutes(spent / (step - first) * to_go)} left, " if step > first else ""
        return f"{left}{free / 1e9:.1f} GB free"


def _minutes(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
