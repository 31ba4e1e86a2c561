"""The one room that knows ComfyUI's insides: MODEL to `Denoiser`, gradients on, progress, stop, safe paths."""

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..consislora_core import lora_file
from ..consislora_core.lora_file import ImageLora, Part
from ..consislora_core.roles import targets
from ..consislora_core.schedule import Stage
from ..consislora_core.store import CODE, Nameless, Store, fingerprint
from ..consislora_core.trainer import Denoiser, StepEvent

NEARLY_CLEAN = 1e-4  # a sigma to rise from: at 0 there is no direction to rise in
Cancelled = comfy.model_management.InterruptProcessingException
OutOfMemory = comfy.model_management.OOM_EXCEPTION  # on which ComfyUI unloads its models
MEMORY = ("auto", "fast", "lean")
# About what a step holds beside weights and LoRA, in values per latent pixel and model channel; it grows with both,
# since attention keeps no scores. From UNets of 64 to 128 channels (the activations that benchmarks/memory.py counts
# are 280 for fast), with room for what comes and goes.
KEPT = {"fast": 400, "lean": 100}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_dtype(model: ModelPatcher, precision: str) -> torch.dtype:
    """What to compute in.

    "auto" is what the model samples in, but for fp16, whose gradients overflow: bf16, or fp32 where bf16 is slow.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    inference = model.model.manual_cast_dtype or model.model.get_dtype()
    if inference != torch.float16:
        return inference
    return torch.bfloat16 if comfy.model_management.should_use_bf16(model.load_device) else torch.float32


@contextmanager
def open_for_training(
    model: ModelPatcher, latent_shape: tuple[int, ...], dtype: torch.dtype, memory: str = "fast"
) -> Iterator[Denoiser]:
    """The model as the core trains it: its own weights in place, gradients on. Afterwards it is as it was.

    What the trainer touches must be made inside: ComfyUI runs nodes in inference mode, whose tensors autograd refuses.
    latent_shape: of all that is in one step. memory: one of `MEMORY`; the numbers are the same with each.
    """
    base = model.model
    find_roles(model)
    lean = _make_room(model, latent_shape, dtype, memory)
    options = comfy.patcher_extension.merge_nested_dicts(
        model.model_options.get("transformer_options", {}), {"wrappers": model.wrappers, "cond_or_uncond": [0]}
    )

    rows = _Rows(dtype)

    def denoise(x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return base.apply_model(x, sigma, transformer_options={**options, "sigmas": sigma}, **rows.of(cond, len(x)))

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_in_training())
        stack.enter_context(_ordinary_parameters(base.diffusion_model))
        stack.enter_context(_computing_in(base, dtype))
        stack.enter_context(_keeping_no_casts(base.diffusion_model))
        stack.enter_context(_reading_text_once(base.diffusion_model))
        if lean and not _is_wrapped(options):
            stack.enter_context(_recomputing(base.diffusion_model))
        yield Denoiser(base.diffusion_model, denoise, base.model_sampling.sigmas.detach().clone().float())


def _is_wrapped(options: dict) -> bool:
    """Whether nodes act around the forward pass, such as Apply ConsisLoRA: they would be missing on the way back."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrapped = bool(comfy.patcher_extension.get_all_wrappers(kind, options))
    if wrapped:
        logging.info("ConsisLoRA: other nodes act on this model, so it cannot train lean and trains fast.")
    return wrapped


def loss_scale(dtype: torch.dtype) -> float:
    return 2.0**16 if dtype == torch.float16 else 1.0


def find_roles(model: ModelPatcher) -> None:
    """Raises ValueError for a model without the content and style blocks of SDXL."""
    targets(dict(model.model.diffusion_model.named_modules()) if hasattr(model.model, "diffusion_model") else {})


def _make_room(model: ModelPatcher, latent_shape: tuple[int, ...], dtype: torch.dtype, memory: str) -> bool:
    """Loads the model, and nothing beside it; whether to train lean."""
    rows, _, height, width = latent_shape
    unit = rows * height * width * model.model.model_config.unet_config["model_channels"] * dtype.itemsize
    needed = {kind: count * unit for kind, count in KEPT.items()}
    comfy.model_management.unload_all_models()  # text encoders and VAE have minutes until they are needed
    comfy.model_management.load_models_gpu([model], memory_required=needed.get(memory, needed["lean"]))
    if memory != "auto":
        return memory == "lean"
    free = comfy.model_management.get_free_memory(model.load_device)
    lean = needed["fast"] > free
    logging.info(
        "ConsisLoRA: memory auto trains %s; beside the model fast would take about %.1f GB, lean %.1f GB, and "
        "%.1f GB are free.",
        "lean" if lean else "fast",
        needed["fast"] / 1e9,
        needed["lean"] / 1e9,
        free / 1e9,
    )
    return lean


@contextmanager
def _in_training() -> Iterator[None]:
    """Newer ComfyUI lets some models choose code that autograd can follow."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _ordinary_parameters(unet: nn.Module) -> Iterator[None]:
    """Frozen parameters that share their bytes with the UNet's inference tensors, which autograd refuses."""
    originals = [
        (module, name, parameter)
        for module in unet.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, parameter in originals:
            shared = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            shared.set_(parameter.untyped_storage(), parameter.storage_offset(), parameter.shape, parameter.stride())
            module._parameters[name] = nn.Parameter(shared, requires_grad=False)
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


@contextmanager
def _computing_in(base: Any, dtype: torch.dtype) -> Iterator[None]:
    """ComfyUI's manual cast to `dtype`, for weights stored in another one and for what `_FrozenLayer` is to take on."""
    layers = [
        module
        for module in base.diffusion_model.modules()
        if hasattr(module, "comfy_cast_weights")
        and (
            isinstance(module, nn.Conv2d)
            or any(p is not None and p.dtype != dtype for p in module._parameters.values())
        )
    ]
    own_flags = [vars(layer).get("comfy_cast_weights") for layer in layers]
    manual_cast_dtype = base.manual_cast_dtype
    try:
        base.manual_cast_dtype = dtype
        for layer in layers:
            layer.comfy_cast_weights = True
        yield
    finally:
        base.manual_cast_dtype = manual_cast_dtype
        for layer, own in zip(layers, own_flags, strict=True):
            if own is None:
                del layer.comfy_cast_weights
            else:
                layer.comfy_cast_weights = own


class _FrozenLayer(torch.autograd.Function):
    """A frozen linear or convolution that keeps nothing for the way back: the cast weight is made once more there.

    Autograd would keep every cast copy until then, which adds up to a second UNet, and the input of a convolution,
    which only a weight that learns would need. And newer ComfyUI casts into buffers that it uses again for the next
    layer.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape = layer, x.shape
        return type(layer).forward_comfy_cast_weights(layer, x)

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, grad, offloadable=True)
        if isinstance(layer, nn.Linear):
            grad_x = grad @ weight
        else:
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            grad_x = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return grad_x, None


@contextmanager
def _keeping_no_casts(unet: nn.Module) -> Iterator[None]:
    plain = comfy.ops.disable_weight_init
    forwards = plain.Linear.forward_comfy_cast_weights, plain.Conv2d.forward_comfy_cast_weights
    layers = [layer for layer in unet.modules() if getattr(type(layer), "forward_comfy_cast_weights", None) in forwards]
    try:
        for layer in layers:
            layer.forward_comfy_cast_weights = lambda x, layer=layer: _FrozenLayer.apply(x, layer)
        yield
    finally:
        for layer in layers:
            del layer.forward_comfy_cast_weights


class _Rows:
    """Conditioning for the rows of a batch: the very same tensors in every step, so that layers know them again."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.cond, self.count = dtype, None, 0

    def of(self, cond: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        if cond is not self.cond or count != self.count:
            self.cond, self.count = cond, count
            self.rows = {name: value.to(self.dtype).expand(count, *value.shape[1:]) for name, value in cond.items()}
        return self.rows


class _Once:
    """A frozen layer that answers without work when it is asked with the very tensor it was asked with before."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        self.forward, self.x = forward, None

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.x or self.answer._version != self.version:  # other code may have written into the answer
            self.x, self.answer = x, self.forward(x)
            self.version = self.answer._version
        return self.answer


@contextmanager
def _reading_text_once(unet: nn.Module) -> Iterator[None]:
    """The text's keys and values stay as they are from step to step, but for what a LoRA adds."""
    layers = [layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    with _forwards(layers, _Once):
        yield


@contextmanager
def _recomputing(unet: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: parts of the output blocks keep their input and are computed again on the way back."""

    def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args, transformer_options: dict | None = None, **kwargs) -> Tensor:
            if transformer_options is not None:  # which goes on to tell of later blocks
                kwargs["transformer_options"] = transformer_options.copy()
            return checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    parts = [part for part in unet.output_blocks.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]
    with _forwards(parts, recomputed):
        yield


@contextmanager
def _forwards(modules: Sequence[nn.Module], around: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within the context each module's forward is what `around` makes of it."""
    try:
        for module in modules:
            module.forward = around(module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def check_latent(model: ModelPatcher, latent: dict) -> None:
    """Raises ValueError for a latent that the model cannot take."""
    samples = latent["samples"]
    channels = model.model.latent_format.latent_channels
    if samples.ndim != 4 or len(samples) == 0 or samples.shape[1] != channels:
        raise ValueError(
            f"latent has shape {tuple(samples.shape)}; "
            f"this model takes (batch of at least 1, {channels} channels, height, width). "
            "Connect VAE Encode, with the VAE of this checkpoint."
        )


def clean_latents(model: ModelPatcher, latent: dict) -> Tensor:
    """z_0 (b c h w) in the model's space, on its device, as an ordinary tensor. Call inside `open_for_training`."""
    check_latent(model, latent)
    return model.model.process_latent_in(latent["samples"].clone().to(model.load_device, torch.float32))


def encoded_conditioning(model: ModelPatcher, positive: list, z_0: Tensor) -> dict[str, Tensor]:
    """Cross-attention text and SDXL's pooled-and-size vector, for `denoise`. Call inside `open_for_training`.

    Size conditioning is the latent's own size unless the conditioning names one (CLIPTextEncodeSDXL).
    """
    if len(positive) != 1:
        raise ValueError(
            f"positive holds {len(positive)} conditionings; training takes one. Connect a single CLIP Text Encode."
        )
    (text, extras), config = positive[0], model.model.model_config.unet_config
    if text.shape[-1] != config["context_dim"]:
        raise ValueError(
            f"positive has text features of width {text.shape[-1]}, this model takes {config['context_dim']}: "
            "it was encoded with the CLIP of another base model. Connect the CLIP of this checkpoint."
        )
    if extras.get("pooled_output") is None:
        raise ValueError(
            "positive has no pooled text vector, which SDXL needs. "
            "Connect CLIP Text Encode with the CLIP of this checkpoint."
        )
    height, width = (8 * side for side in z_0.shape[-2:])
    given = {
        "width": width,
        "height": height,
        "prompt_type": "positive",
        **extras,
        "cross_attn": text,
        "noise": z_0,
        "device": z_0.device,
    }
    conds = model.model.extra_conds(
        **{key: value.clone() if torch.is_tensor(value) else value for key, value in given.items()}
    )
    encoded = {name: cond.cond.to(z_0.device) for name, cond in conds.items()}
    if encoded["y"].shape[-1] != config["adm_in_channels"]:
        raise ValueError(
            f"positive has a pooled vector of width {extras['pooled_output'].shape[-1]}, which does not fit this "
            "model: it was encoded with the CLIP of another base model. Connect the CLIP of this checkpoint."
        )
    return encoded


def sigmas(model: ModelPatcher, steps: int, sampler_name: str, scheduler: str, denoise: float) -> Tensor:
    """The noise levels that ComfyUI's KSampler would go through."""
    return comfy.samplers.KSampler(
        model, steps, model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise
    ).sigmas


def sample(
    guider: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    sampler_name: str,
    sigmas: Tensor,
    noised: bool = False,
    run: tuple[int, int] = (0, 1),
) -> dict:
    """A latent sampled as ComfyUI's KSampler does, with another guider: noise, mask, preview and progress alike.

    noised: the latent is as noisy as sampling begins already, and no noise is added. run: which of how many runs of
    a node this is, for its progress.
    """
    number, runs = run
    model = guider.model_patcher
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    progress = latent_preview.prepare_callback(model, runs * (len(sigmas) - 1))

    def show(step, z_0_hat, x, steps):
        progress(number * steps + step, z_0_hat, x, runs * steps)

    samples = guider.sample(
        torch.zeros_like(noise) if noised else noise,
        start,
        comfy.samplers.sampler_object(sampler_name),
        sigmas,
        latent.get("noise_mask"),
        show,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}


def inverted(guider: comfy.samplers.CFGGuider, latent: dict, sigmas: Tensor) -> dict:
    """The noisy latent that Euler steps down `sigmas` would turn into this one (DDIM inversion, in sigma's terms)."""
    rising = torch.cat([sigmas.new_tensor([NEARLY_CLEAN]), sigmas.flip(0)[1:]])
    return sample(guider, latent, 0, "euler", rising, noised=True)


def stop_if_cancelled() -> None:
    """Raises Cancelled when the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def server() -> Any:
    """ComfyUI's PromptServer; None where nodes run without one, as in a test."""
    module = sys.modules.get("server")
    return getattr(module and module.PromptServer, "instance", None)


def loss_curve(stage: Stage, losses: list[float], first: int = 0, told: str | None = None) -> dict:
    """What web/js/loss_curve.js draws: the losses of the steps from `first` on, counted from 0.

    told: words to stand beside them; without any the last ones stay.
    """
    phases = [[phase.loss, phase.steps] for phase in stage.phases]
    return {"first": first, "losses": losses[first:], "phases": phases, "told": told}


class Progress:
    """Shows training on the node: a bar, every few steps the restored image, the losses, the time left and the free
    memory, and the loss in the log.

    node: the running node's id, for the browser. run: which of how many trainings of the node this is.
    losses: of all steps so far; training adds to the list.
    """

    def __init__(
        self,
        model: ModelPatcher,
        stage: Stage,
        node: str | None,
        run: tuple[int, int] = (0, 1),
        preview_every: int = 20,
        log_every: int = 50,
    ):
        number, runs = run
        self.bar = comfy.utils.ProgressBar(runs * stage.steps)
        self.before = number * stage.steps
        self.stage, self.node = stage, node
        self.losses: list[float] = []
        self.told = 0  # how many of them the browser knows
        self.began: tuple[float, int] | None = None  # when the first step of this run had ended, and which that was
        self.device, self.least_free = model.load_device, math.inf
        self.preview_every, self.log_every = preview_every, log_every
        factors = model.model.latent_format
        self.previewer = factors.latent_rgb_factors and latent_preview.Latent2RGBPreviewer(
            factors.latent_rgb_factors, getattr(factors, "latent_rgb_factors_bias", None)
        )

    def show(self, event: StepEvent) -> None:
        """Raises Cancelled when the user pressed cancel."""
        stop_if_cancelled()
        self.began = self.began or (time.monotonic(), event.step)
        if (event.step % self.preview_every == 1 or event.step == self.stage.steps) and (browser := server()):
            curve = loss_curve(self.stage, self.losses, self.told, self.time_and_memory(event.step))
            browser.send_sync("consislora.loss", {"node": self.node, **curve})
            self.told = len(self.losses)
        preview = None
        if self.previewer and event.step % self.preview_every == 1:
            picture = self.previewer.decode_latent_to_preview(event.z_0_hat.float().cpu())
            preview = (
                "JPEG",
                picture.resize(
                    (256 * picture.width // max(picture.size), 256 * picture.height // max(picture.size)), Image.NEAREST
                ),
                256,
            )
        self.bar.update_absolute(self.before + event.step, preview=preview)
        if event.step % self.log_every == 0 or event.step == self.stage.steps:
            logging.info(
                "ConsisLoRA %s stage, step %d of %d: %s loss %.4f, learning rate %g",
                event.stage,
                event.step,
                self.stage.steps,
                event.phase,
                event.loss,
                event.learning_rate,
            )

    def time_and_memory(self, step: int) -> str:
        """How long it will take yet and how much memory is free; after the last step how it was."""
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


def store() -> Store:
    """The LoRAs and checkpoints of all trainings, in the first models/loras folder."""
    folder = Path(folder_paths.get_folder_paths("loras")[0], "consislora", "store")
    limit = os.environ.get("CONSISLORA_STORE_GB", "20")
    try:
        return Store(folder, int(float(limit) * 1e9))
    except (ValueError, OverflowError):
        raise ValueError(f"CONSISLORA_STORE_GB is {limit!r}; it must be a number of gigabytes, such as 20.") from None


def training_key(
    model: ModelPatcher,
    base: str,
    latent: dict,
    positive: list,
    stage: Stage,
    frozen: Mapping[str, Part],
    dtype: torch.dtype,
) -> str | None:
    """A hash of all that decides what a training gives; None for a model or text changed by other nodes' code.

    base: the model's `base_fingerprint`.
    """
    try:
        return fingerprint(
            {
                "code": CODE,
                "base": base,
                "changes": _changes(model),
                "latent": latent["samples"],
                "positive": positive,
                "stage": asdict(stage),
                "frozen": frozen,
                "dtype": str(dtype),
            }
        )
    except Nameless as error:
        logging.info("ConsisLoRA: not looked up in the store of trained LoRAs and not kept there: %s.", error)
        return None


def base_fingerprint(model: ModelPatcher) -> str:
    """A short name for a base model: SHA-256 of samples of every weight, as stored and without patches."""
    weights = {key: _sample(entries[0][0]) for key, entries in model.get_key_patches("diffusion_model.").items()}
    return fingerprint([str(model.model.model_config.unet_config), weights])[:16]


def _sample(tensor: Tensor) -> Tensor:
    """All of a small tensor; 16 runs of 64 values of a large one: what changes a model changes whole layers.

    Runs, because a weight may still be on the disk, where single values would take as many pages.
    """
    flat = tensor.detach().reshape(-1)
    return flat if len(flat) <= 1024 else flat[: len(flat) // 16 * 16].view(16, -1)[:, :64].cpu()


def _changes(model: ModelPatcher) -> list:
    """All that nodes have laid over the base model, as far as training sees it, in a form for `fingerprint`."""
    sampling = model.get_model_object("model_sampling")
    numbers = {name: value for name, value in vars(sampling).items() if isinstance(value, (int, float, str))}
    return [
        [kind.__qualname__ for kind in (*type(model.model).__mro__, *type(sampling).__mro__)],
        type(model.model.latent_format).__qualname__,
        numbers,
        dict(sampling.named_buffers()),
        {key: _patch(patches) for key, patches in model.patches.items() if key.startswith("diffusion_model.")},
        {key: value for key, value in model.object_patches.items() if key != "model_sampling"},
        [model.wrappers, model.callbacks, model.injections, model.model_options.get("transformer_options", {})],
    ]


def _patch(value: Any) -> Any:
    """Weight patches as plain values: they are nested lists of strengths, tensors, adapters and plain functions."""
    if isinstance(value, (list, tuple)):
        return [_patch(one) for one in value]
    if isinstance(value, WeightAdapterBase):
        return [type(value).__qualname__, _patch(value.weights)]
    if isinstance(value, FunctionType) and not value.__closure__:
        return f"{value.__module__}.{value.__qualname__}"
    return _sample(value) if torch.is_tensor(value) else value


def tensor_fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]


def text_behind(hidden: Any, input_name: str) -> str:
    """The words of the CLIP Text Encode that feeds an input of the running node; empty if something else feeds it."""
    graph = (hidden and hidden.prompt) or {}
    origin = graph.get(hidden and hidden.unique_id, {"inputs": {}})["inputs"].get(input_name, [None])[0]
    text = graph[origin]["inputs"].get("text") if origin in graph else None
    return text if isinstance(text, str) else ""


def numbers_behind(hidden: Any, input_name: str, names: Collection[str]) -> dict[str, float]:
    """Values of widgets by name, each from the nearest node that has it on the way to an input of the running node."""
    graph = (hidden and hidden.prompt) or {}
    found, seen = {}, set()
    links = [graph.get(hidden and hidden.unique_id, {"inputs": {}})["inputs"].get(input_name)]
    for link in links:
        if isinstance(link, list) and link[0] in graph and link[0] not in seen:
            seen.add(link[0])
            inputs = graph[link[0]]["inputs"]
            links += inputs.values()
            found = {name: value for name, value in inputs.items() if _is_number(value) and name in names} | found
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def workflow_texts(hidden: Any) -> dict[str, str]:
    """What ComfyUI's Save Image writes into a PNG, from which the frontend opens the workflow again."""
    if args.disable_metadata or not hidden:
        return {}
    texts = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in texts.items() if value is not None}


def show_text(hidden: Any, text: str) -> None:
    """Shows a text on the running node."""
    if hidden and hidden.unique_id:
        from server import PromptServer  # there is none where ComfyUI's parts run without a server

        PromptServer.instance.send_progress_text(text, hidden.unique_id)


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def new_picture_path(prefix: str, width: int, height: int) -> Path:
    """Where Save Image would write the next picture."""
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(output_folder()), width, height)
    return Path(folder, f"{name}_{number:05}_.png")


def lora_files() -> list[str]:
    """Names with forward slashes on every system, so that a workflow made on one opens on another."""
    names = folder_paths.get_filename_list("loras")
    return [name.replace("\\", "/") for name in names if name.endswith(".safetensors")]


def lora_path(name: str) -> Path:
    """The file of a name in models/loras; `get_full_path` keeps names inside. Raises ValueError if there is none."""
    found = folder_paths.get_full_path("loras", name)
    if found is None:
        raise ValueError(
            f"There is no LoRA file {name!r} in models/loras. Choose one from the list, or press R to refresh it."
        )
    return Path(found)


def new_lora_path(name: str) -> Path:
    """Where a LoRA of this name is saved: the first models/loras folder, numbered so that nothing is overwritten."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    wanted = (folder / f"{name.removesuffix('.safetensors')}.safetensors").resolve()
    if not name.strip() or not wanted.is_relative_to(folder.resolve()) or wanted.stem.startswith("."):
        raise ValueError(
            f"filename is {name!r}; it must be a name inside models/loras, such as my_product or clients/my_product."
        )
    numbered = (wanted.with_stem(f"{wanted.stem}_{i:05}") for i in range(1, 100_000))
    return next(path for path in numbered if not path.exists())


def save_lora(lora: ImageLora, name: str, precision: str) -> str:
    """Writes the LoRA and returns its name for the loader. Raises ValueError when the disk or folder refuses."""
    path = new_lora_path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lora_file.write(lora, path, PRECISIONS[precision])
    except OSError as error:
        raise ValueError(
            f"The LoRA could not be saved to {path.parent}: {error.strerror or error}. Free some space or "
            "choose a folder that can be written, then queue again: the training itself is still cached."
        ) from error
    return path.relative_to(Path(folder_paths.get_folder_paths("loras")[0]).resolve()).as_posix()
