"""A training with store, checkpoints, progress and cancel."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.cli_args import args
from torch import Tensor

from ..consislora_core import __version__
from ..consislora_core.files import escape_text
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.store import fingerprint
from ..consislora_core.trainer import Trainer
from .paths import training_store
from .progress import Progress, stop_if_cancelled
from .prompt_graph import text_behind
from .reference_check import report_faults
from .training_key import TrainingRequest, tensor_fingerprint
from .training_model import clean_latents, encoded_conditioning, loss_scale, open_for_training

Cancelled = comfy.model_management.InterruptProcessingException
OutOfMemory = comfy.model_management.OOM_EXCEPTION  # at which ComfyUI unloads its models
# How allocators say it that have no exception of their own: MPS, DirectML, XPU, C++, torch's on a CPU, and NVIDIA's and
# AMD's libraries.
NO_MEMORY = re.compile(
    r"out.?of.?(device.|host.)?memory|not enough (gpu video )?memory|(can't|cannot|failed to) allocate"
    r"|invalid buffer size|bad.alloc|_ALLOC_FAILED",
    re.I,
)

IN_PLACE = "modified by an inplace operation"  # in autograd's error

CHECKPOINT_EVERY = 50  # steps, and less often where saving would take more than this share of the time
CHECKPOINT_SHARE = 1 / 100


class Trained(NamedTuple):
    """What a training gave. losses: of every step. from_store: it was trained before."""

    lora: ImageLora
    losses: list[float]
    from_store: bool = False


def train(request: TrainingRequest, memory: str, hidden: Any = None) -> Trained:
    """Trains one LoRA, or takes it from the store.

    memory: one of `training_model.MEMORY`. hidden: the running node's hidden inputs, for progress and metadata. Raises
    ValueError for inputs that do not fit the model, FloatingPointError for a loss that is not finite, `Cancelled`, and
    `OutOfMemory` with advice.
    """
    report_faults(request, hidden)
    (trained,) = _find_or_train([request], hidden, memory)
    return trained


def train_each(request: TrainingRequest, memory: str, at_once: int, hidden: Any = None) -> list[ImageLora]:
    """One LoRA for each image of the request's latent; up to `at_once` of those that the store lacks train together.

    Raises as `train` does.
    """
    report_faults(request, hidden)
    requests = request.for_each_image()
    names = [request.key or number for number, request in enumerate(requests)]
    wanted = dict(zip(names, requests, strict=True))  # equal images train once
    store = training_store()
    missing = [name for name, request in wanted.items() if request.key is None or not store.has(request.key)]
    groups = [[name] for name in wanted if name not in missing]
    groups += [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    loras = {}
    for number, group in enumerate(groups):
        trained = _find_or_train([wanted[name] for name in group], hidden, memory, (number, len(groups)))
        loras |= {name: lora for name, (lora, *_) in zip(group, trained, strict=True)}
    return [loras[name] for name in names]


def _find_or_train(
    requests: Sequence[TrainingRequest], hidden: Any, memory: str, run: tuple[int, int] = (0, 1)
) -> list[Trained]:
    """The LoRA of each request, from the store or trained now. run: as `Progress` takes it."""
    stage = requests[0].stage
    progress = Progress(requests[0].model, stage, hidden and hidden.unique_id, run)
    keys = [request.key for request in requests]
    if None in keys:
        return _train(requests, hidden, progress, memory)
    store = training_store()
    with ExitStack() as locks:
        for key in sorted(keys):  # all processes lock in the same order, so that no two wait for each other
            locks.enter_context(store.locked(key, waiting=stop_if_cancelled))
        found = {key: Trained(*known, from_store=True) for key in keys if (known := store.find(key))}
        if found:
            logging.info("ConsisLoRA %s stage: trained before, taken from %s.", stage.name, escape_text(store.folder))
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        if missing:
            name, *others = missing  # of the checkpoint
            if others:
                name = fingerprint(list(missing))
                locks.enter_context(store.locked(name, waiting=stop_if_cancelled))
            resume, save = partial(store.resume, name), partial(store.save_checkpoint, name)
            trained = _train(list(missing.values()), hidden, progress, memory, resume, save)
            for key, result in zip(missing, trained, strict=True):
                store.keep(key, result.lora, result.losses)
                found[key] = result
            store.drop_checkpoint(name)
    return [found[key] for key in keys]


def _train(
    requests: Sequence[TrainingRequest],
    hidden: Any,
    progress: Progress,
    memory: str,
    resume: Callable[[Trainer], list] = lambda trainer: [],
    save: Callable[[Trainer, list], None] = lambda trainer, losses: None,
) -> list[Trained]:
    """Trains requests that differ in their latents and masks only, as one batch.

    resume: sets a new trainer to an earlier checkpoint and returns the losses until there, a tuple of all requests' for
    each step. save: writes a checkpoint; called every `CHECKPOINT_EVERY` steps or less often, and on cancel.
    """
    try:
        return _train_together(requests, hidden, progress, memory, resume, save)
    except (RuntimeError, MemoryError) as error:
        if IN_PLACE in str(error):
            raise ValueError(
                "A node before this one changes the model's values in place, as FreeU_V2 does, through which nothing "
                "can be learned. Connect the model from before that node; the LoRA then works behind it too."
            ) from error
        if not is_out_of_memory(error):
            raise
    # Out here no traceback holds the tensors of the training any more.
    raise OutOfMemory(_out_of_memory_text(requests))


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error is of too little memory, by ComfyUI's own test where it has one, or by its words."""
    is_oom = getattr(comfy.model_management, "is_oom", lambda error: isinstance(error, OutOfMemory))
    return isinstance(error, MemoryError) or is_oom(error) or bool(NO_MEMORY.search(str(error)))


def _train_together(
    requests: Sequence[TrainingRequest],
    hidden: Any,
    progress: Progress,
    memory: str,
    resume: Callable[[Trainer], list],
    save: Callable[[Trainer, list], None],
) -> list[Trained]:
    model, stage, dtype = requests[0].model, requests[0].stage, requests[0].dtype
    latent = {"samples": torch.cat([request.latent["samples"] for request in requests])}
    shape = (len(requests), *latent["samples"].shape[1:])
    with open_for_training(model, shape, dtype, memory) as denoiser:
        z_0 = clean_latents(model, latent)
        cond = encoded_conditioning(model, requests[0].positive, z_0)
        loras = len(requests)
        frozen = [request.frozen for request in requests] if loras > 1 else requests[0].frozen
        mask = _masks_of(requests, z_0)
        with Trainer(denoiser, z_0, cond, stage, frozen, loss_scale(dtype), loras, mask=mask) as trainer:
            losses = _run(trainer, progress, resume, save)
            return [
                Trained(ImageLora(trainer.parts(row), _metadata(request, hidden)), [step[row] for step in losses])
                for row, request in enumerate(requests)
            ]


def _masks_of(requests: Sequence[TrainingRequest], z_0: Tensor) -> Tensor | None:
    """The masks for all of z_0 (b 1 h w), on its device; None if no request has one."""
    if all(request.mask is None for request in requests):
        return None
    everything = torch.ones(len(z_0) // len(requests), 1, *z_0.shape[-2:])
    return torch.cat([everything if request.mask is None else request.mask for request in requests]).to(z_0.device)


def _run(trainer: Trainer, progress: Progress, resume: Callable, save: Callable) -> list[tuple[float, ...]]:
    """All steps from the last checkpoint on; the losses of every step."""
    losses = resume(trainer)
    progress.losses = [sum(step) / len(step) for step in losses]
    if losses:
        logging.info("ConsisLoRA %s stage: goes on from step %d.", trainer.stage.name, trainer.step)
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
    except Cancelled:
        if losses:  # before the first step has ended there is nothing to go on from
            save(trainer, losses)
        raise
    return losses


def _metadata(request: TrainingRequest, hidden: Any) -> dict[str, str]:
    """What a LoRA's file says of its training; nothing with ComfyUI's option --disable-metadata."""
    if args.disable_metadata:
        return {}
    facts = {
        "stage": request.stage.name,
        "prompt": text_behind(hidden, "positive"),
        "steps": str(request.stage.steps),
        "rank": str(request.stage.rank),
        "seed": str(request.stage.seed),
        "image_hash": tensor_fingerprint(request.latent["samples"]),
        "base_model_hash": request.base_hash,
        **({} if request.mask is None else {"mask_hash": tensor_fingerprint(request.mask)}),
        "version": __version__,
    }
    return {f"consislora.{name}": value for name, value in facts.items()}


def _out_of_memory_text(requests: Sequence[TrainingRequest]) -> str:
    height, width = (8 * side for side in requests[0].latent["samples"].shape[-2:])
    fewer = f", fewer than {len(requests)} images at once" if len(requests) > 1 else ""
    return (
        f"There is not enough memory to train on {width} x {height} pixels in {requests[0].dtype}. Close what else "
        "uses the graphics card and queue again: training goes on from its last checkpoint. Or choose memory lean"
        f"{fewer}, a smaller image, precision bf16, or a lower rank."
    )
