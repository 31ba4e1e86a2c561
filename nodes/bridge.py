"""The one room that knows the insides of ComfyUI's models: MODEL to `Denoiser`, gradients on, progress, stop."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..consislora_core.roles import targets
from ..consislora_core.schedule import Stage
from ..consislora_core.trainer import Denoiser, StepEvent

NEARLY_CLEAN = 1e-4  # a sigma to rise from: at 0 there is no direction to rise in
Cancelled = comfy.model_management.InterruptProcessingException
OutOfMemory = comfy.model_management.OOM_EXCEPTION  # on which ComfyUI unloads its models
MEMORY = ("auto", "fast", "lean")
# About what a step holds beside weights and LoRA, in values per latent pixel and model channel; it grows with both,
# since attention keeps no scores. From UNets of 64 to 128 channels (the activations that benchmarks/memory.py counts
# are 236 for fast), with room for what comes and goes.
KEPT = {"fast": 340, "lean": 100}
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
        stack.enter_context(_computing_in(base, dtype, model.load_device))
        stack.enter_context(_keeping_no_casts(base.diffusion_model))
        stack.enter_context(_gating_in_place(base.diffusion_model))
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
def _computing_in(base: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """ComfyUI's manual cast to `dtype`, for weights stored in another one and for what `_FrozenLayer` is to take on."""
    taken_on = (nn.Conv2d, nn.Linear) if _onednn_has_linear(device, dtype) else nn.Conv2d
    layers = [
        module
        for module in base.diffusion_model.modules()
        if hasattr(module, "comfy_cast_weights")
        and (
            isinstance(module, taken_on) or any(p is not None and p.dtype != dtype for p in module._parameters.values())
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


def _onednn_has_linear(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In fp32 on a CPU by oneDNN; torch would take MKL, and copy the bias into the output before each product."""
    if _onednn_has_linear(x.device, x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


@contextmanager
def _cast(layer: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias where and as x is."""
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


class _FrozenLayer(torch.autograd.Function):
    """A frozen linear or convolution that keeps nothing for the way back: the cast weight is made once more there.

    Autograd would keep every cast copy until then, which adds up to a second UNet, and the input of a convolution,
    which only a weight that learns would need. And newer ComfyUI casts into buffers that it uses again for the next
    layer.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape = layer, x.shape
        if not isinstance(layer, nn.Linear):
            return type(layer).forward_comfy_cast_weights(layer, x)
        with _cast(layer, x) as (weight, bias):
            return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        with _cast(layer, grad) as (weight, _):
            if isinstance(layer, nn.Linear):
                return _linear(grad, weight.T), None
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry), None


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


class _Gate(torch.autograd.Function):
    """GEGLU's product (b n 2d to b n d) that keeps its input alone, and makes no copy of a half or of its gradient."""

    @staticmethod
    def forward(ctx, halves):
        ctx.save_for_backward(halves)
        x, gate = halves.chunk(2, dim=-1)
        return nn.functional.gelu(gate).mul_(x)

    @staticmethod
    def backward(ctx, grad):
        (halves,) = ctx.saved_tensors
        x, gate = halves.chunk(2, dim=-1)
        back = torch.empty_like(halves)
        x_back, gate_back = back.chunk(2, dim=-1)
        torch.mul(grad, nn.functional.gelu(gate), out=x_back)
        torch.ops.aten.gelu_backward.grad_input(grad * x, gate, grad_input=gate_back)
        return back


@contextmanager
def _gating_in_place(unet: nn.Module) -> Iterator[None]:
    gates = [module for module in unet.modules() if type(module) is GEGLU]
    with _forwards(gates, lambda forward: lambda x, gate=forward.__self__: _Gate.apply(gate.proj(x))):
        yield


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
