"""The room that knows the insides of ComfyUI's models: MODEL to `Denoiser`, gradients on, sampling, stop."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..consislora_core.roles import targets
from ..consislora_core.trainer import Denoiser
from .frozen import frozen

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

    rows, recordable = _Rows(dtype), _does_the_same_each_step(model)

    def denoise(x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return base.apply_model(x, sigma, transformer_options={**options, "sigmas": sigma}, **rows.of(cond, len(x)))

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_in_training())
        stack.enter_context(frozen(base, dtype, model.load_device, lean and not _is_wrapped(options)))
        sigmas = base.model_sampling.sigmas.detach().to("cpu", torch.float32, copy=True)
        yield Denoiser(base.diffusion_model, denoise, sigmas, dtype, recordable)


def _is_wrapped(options: dict) -> bool:
    """Whether nodes act around the forward pass, such as Apply ConsisLoRA: they would be missing on the way back."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrapped = bool(comfy.patcher_extension.get_all_wrappers(kind, options))
    if wrapped:
        logging.info("ConsisLoRA: other nodes act on this model, so it cannot train lean and trains fast.")
    return wrapped


def _does_the_same_each_step(model: ModelPatcher) -> bool:
    """Whether an NVIDIA GPU has the whole model and no other node has a say in what it computes."""
    unet = model.model.diffusion_model
    return (
        torch.version.cuda is not None
        and all(parameter.is_cuda for parameter in unet.parameters())
        and not any("forward" in vars(module) for module in unet.modules())
        and not model.wrappers
        and not model.model_options.get("transformer_options")
    )


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
    # Text encoders and VAE have minutes until they are needed.
    loaded = comfy.model_management.current_loaded_models
    ours = [one for one in loaded if one.model is not None and one.model.is_clone(model)]
    comfy.model_management.free_memory(1e30, model.load_device, keep_loaded=ours)
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


class _Rows:
    """Conditioning for the rows of a batch: the very same tensors in every step, so that layers know them again."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.cond, self.count = dtype, None, 0

    def of(self, cond: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        if cond is not self.cond or count != self.count:
            self.cond, self.count = cond, count
            self.rows = {name: value.to(self.dtype).expand(count, *value.shape[1:]) for name, value in cond.items()}
        return self.rows


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
