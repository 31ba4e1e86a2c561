"""MODEL to `Denoiser`: weights in place, gradients on, memory choice, conditioning; afterwards as it was."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..consislora_core.trainer import Denoiser
from .accelerations import has_fused_attention, has_measured_kernels
from .frozen_unet import frozen_unet, has_quantised_weights
from .model_inputs import check_roles

MEMORY = ("auto", "fast", "lean")
# A step's activations, in values per latent pixel and model channel, measured on UNets of 64 to 128 channels
# (benchmarks/memory.py counts 236 for fast) and rounded up to leave room for temporary tensors. They grow linearly with
# both, since `_pinned_attention` does not store its scores.
ACTIVATIONS = {"fast": 340, "lean": 100}
# By these names ComfyUI's own nodes make sampling faster: an attention kernel, torch.compile, and caches of steps.
FOR_SAMPLING = {"optimized_attention_override", "torch.compile", "easycache", "lazycache"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_dtype(model: ModelPatcher, precision: str) -> torch.dtype:
    """The dtype to compute a training in.

    precision: one of `PRECISIONS`, or "auto" for the dtype the model samples in. fp16, whose gradients overflow, then
    becomes bf16, or fp32 on devices where bf16 is slow.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    inference = model.model.manual_cast_dtype or model.model.get_dtype()
    if inference != torch.float16:
        return inference
    return torch.bfloat16 if comfy.model_management.should_use_bf16(model.load_device) else torch.float32


def loss_scale(dtype: torch.dtype) -> float:
    """The factor on the loss with which a training in this dtype starts."""
    return 2.0**16 if dtype == torch.float16 else 1.0


@contextmanager
def open_for_training(
    model: ModelPatcher, latent_shape: tuple[int, ...], dtype: torch.dtype, memory: str = "fast"
) -> Iterator[Denoiser]:
    """Loads the model and yields it as the `Denoiser` that the core trains; on exit the model is as it was.

    Make all tensors of the training inside this context: ComfyUI runs nodes in inference mode, whose tensors autograd
    refuses.

    latent_shape: (b, c, h, w) of one step's whole batch. memory: one of `MEMORY`; the numbers are the same with each.
    Raises ValueError for a model without SDXL's content and style blocks, one that adds noise in a way that the method
    does not know, and one of quantised weights that give no gradient.
    """
    check_roles(model)
    flow = is_flow(model)
    with ExitStack() as stack:
        needed = _activations(model, latent_shape, dtype)
        model = stack.enter_context(_with_resident_weights(model, needed[memory]))
        lean = _load_model(model, needed, memory)
        base = model.model
        own = {
            "wrappers": wrappers_that_act(model),
            "cond_or_uncond": [0],
            "optimized_attention_override": _pinned_attention(model.load_device),
        }
        options = comfy.patcher_extension.merge_nested_dicts(options_that_act(model), own)
        batched, recordable = _BatchedConditioning(dtype), _can_be_recorded(model)
        _log_sampling(model)

        def denoise(x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return base.apply_model(
                x, sigma, transformer_options={**options, "sigmas": sigma}, **batched.of(cond, len(x))
            )

        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_in_training_flag())
        stack.enter_context(frozen_unet(base, dtype, model.load_device, lean and not _is_wrapped(options)))
        sigmas = base.model_sampling.sigmas.detach().to("cpu", torch.float32, copy=True)
        yield Denoiser(base.diffusion_model, denoise, sigmas, dtype, recordable, flow)


def _pinned_attention(device: torch.device) -> Callable:
    """torch's attention, as ComfyUI's `optimized_attention_override`: the user's may have no backward pass."""
    attention = attention_pytorch
    if not has_fused_attention(device):
        attention = partial(checkpoint, attention_pytorch, use_reentrant=False, preserve_rng_state=False)
    return lambda users, *args, **kwargs: attention(*args, **kwargs)


def options_that_act(model: ModelPatcher) -> dict[str, Any]:
    """The transformer options of other nodes that act on training: all but those that make sampling faster."""
    options = model.model_options.get("transformer_options", {})
    return {name: value for name, value in options.items() if name not in FOR_SAMPLING}


def wrappers_that_act(model: ModelPatcher) -> dict[str, dict]:
    """The wrappers of other nodes that act on training: all but those that make sampling faster."""
    acting = {
        kind: {key: found for key, found in wrappers.items() if key not in FOR_SAMPLING}
        for kind, wrappers in model.wrappers.items()
    }
    return {kind: wrappers for kind, wrappers in acting.items() if wrappers}


def is_flow(model: ModelPatcher) -> bool:
    """Whether the model is sampled by flow matching, x = (1 - sigma) z_0 + sigma n, and not with x = z_0 + sigma n.

    Raises ValueError for a model sampled in a third way.
    """
    sampling = model.get_model_object("model_sampling")
    one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    sigma = torch.tensor([0.25, 0.5, 0.75])
    noise, signal = (sampling.noise_scaling(sigma, *parts).flatten() for parts in ((one, zero), (zero, one)))
    if torch.equal(noise, sigma) and (torch.equal(signal, 1 - sigma) or (signal == 1).all()):
        return bool((signal != 1).any())
    raise ValueError(
        f"model is sampled in a way that ConsisLoRA does not know ({_kind_of_sampling(sampling)}), so it cannot train "
        "on it. Remove the node that sets it (such as ModelSamplingDiscrete) from before this node."
    )


def _kind_of_sampling(sampling: Any) -> str:
    return ", ".join(kind.__name__ for kind in type(sampling).__bases__)


def _log_sampling(model: ModelPatcher) -> None:
    """Says what training assumes where another node has changed how the model is sampled, as for distilled models."""
    if "model_sampling" not in model.object_patches:
        return
    sampling = model.get_model_object("model_sampling")
    logging.info(
        "ConsisLoRA: another node has set this model's sampling (%s). Training assumes that the model predicts so, "
        "at %d noise levels from sigma %.3g to %.3g. To train as the checkpoint itself was trained, connect the model "
        "from before that node.",
        _kind_of_sampling(sampling),
        len(sampling.sigmas),
        sampling.sigmas[0],
        sampling.sigmas[-1],
    )


def _is_wrapped(options: dict) -> bool:
    """Whether other nodes, such as Apply ConsisLoRA, wrap the forward pass: recomputation would run without them."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrapped = bool(comfy.patcher_extension.get_all_wrappers(kind, options))
    if wrapped:
        logging.info("ConsisLoRA: other nodes act on this model, so it cannot train lean and trains fast.")
    return wrapped


def _can_be_recorded(model: ModelPatcher) -> bool:
    """Whether every step runs the same kernels, on a GPU where recording is measured; else logs why it is not."""
    if model.load_device.type == "cpu":
        return False
    why = _obstacle(model)
    if why is None and not all(parameter.is_cuda for parameter in model.model.diffusion_model.parameters()):
        why = "ComfyUI moves weights to the card in each step"
    if why is not None:
        logging.info("ConsisLoRA: trains without recorded steps, which is slower: %s.", why)
    return why is None


def _obstacle(model: ModelPatcher) -> str | None:
    """Why its steps could not be recorded even with all weights on the card; None: they could."""
    modules = list(model.model.diffusion_model.modules())
    if not has_measured_kernels(model.load_device):
        return "measured on NVIDIA only (on AMD, ComfyUI's option --fast turns them on)"
    if any(has_quantised_weights(module) for module in modules):
        return "this model's weights are quantised"
    code = wrappers_that_act(model), model.weight_wrapper_patches, options_that_act(model)
    if any("forward" in vars(module) for module in modules) or any(code):
        return "other nodes act on this model"
    return None


def _activations(model: ModelPatcher, latent_shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a step's activations, for each of `MEMORY`; for auto at the least."""
    batch, _, height, width = latent_shape
    unit = batch * height * width * model.model.model_config.unet_config["model_channels"] * dtype.itemsize
    needed = {kind: count * unit for kind, count in ACTIVATIONS.items()}
    return {**needed, "auto": needed["lean"]}


@contextmanager
def _with_resident_weights(model: ModelPatcher, needed: int) -> Iterator[ModelPatcher]:
    """The model; with dynamic VRAM, whose steps cannot be recorded, a copy whose weights stay on the card.

    The copy is read from the checkpoint, and gone afterwards. It is the model itself where a copy has no room beside
    the `needed` bytes, where its loader registered no way to read it again, and where its steps could not be
    recorded either: then a copy is no faster (benchmarks/results/dynamic_vram.md).
    """
    is_dynamic = hasattr(model, "is_dynamic") and model.is_dynamic()
    copy = _resident_copy(model, needed) if is_dynamic and _obstacle(model) is None else None
    if copy is None:
        yield model
        return
    logging.info("ConsisLoRA: reads the model again, so that its weights stay on the card and steps can be recorded.")
    try:
        yield copy
    finally:
        _unload_all([loaded for loaded in _loaded_models() if not loaded.model.is_clone(copy)], copy.load_device)


def _resident_copy(model: ModelPatcher, needed: int) -> ModelPatcher | None:
    _unload_all([], model.load_device)
    room = comfy.model_management.get_free_memory(model.load_device) - comfy.model_management.minimum_inference_memory()
    memory = comfy.model_management.get_free_memory(torch.device("cpu"))
    if model.model_size() + needed > room or model.model_size() > memory:
        return None
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError:  # ComfyUI's, where the loader of another pack registered nothing to read it by
        return None


def _loaded_models() -> list:
    return [loaded for loaded in comfy.model_management.current_loaded_models if loaded.model is not None]


def _unload_all(but: list, device: torch.device) -> None:
    comfy.model_management.free_memory(1e30, device, keep_loaded=but)


def _load_model(model: ModelPatcher, needed: dict[str, int], memory: str) -> bool:
    """Unloads every other model and loads this one; returns whether to train lean. needed: from `_activations`."""
    # Text encoders and VAE are not needed for minutes.
    _unload_all([loaded for loaded in _loaded_models() if loaded.model.is_clone(model)], model.load_device)
    comfy.model_management.load_models_gpu([model], memory_required=needed[memory])
    if memory != "auto":
        return memory == "lean"
    # With dynamic VRAM the weights are loaded when they are used.
    to_load = max(0, model.model_size() - model.loaded_size())
    free = comfy.model_management.get_free_memory(model.load_device) - to_load
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
def _in_training_flag() -> Iterator[None]:
    """Sets the flag by which newer ComfyUI lets some models choose code that autograd can follow."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


class _BatchedConditioning:
    """Conditioning expanded to the batch. Every step gets the same tensor objects, so that layers can cache by them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.cond, self.count = dtype, None, 0

    def of(self, cond: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        if cond is not self.cond or count != self.count:
            self.cond, self.count = cond, count
            self.rows = {name: value.to(self.dtype).expand(count, *value.shape[1:]) for name, value in cond.items()}
        return self.rows


def clean_latents(model: ModelPatcher, latent: dict) -> Tensor:
    """z_0 (b c h w, fp32) in the model's latent space, on its device. Call inside `open_for_training`."""
    return model.model.process_latent_in(latent["samples"].clone().to(model.load_device, torch.float32))


def encoded_conditioning(model: ModelPatcher, positive: list, z_0: Tensor) -> dict[str, Tensor]:
    """The conditioning that `denoise` takes: cross-attention text (1 n d) and SDXL's pooled-and-size vector `y` (1 d).

    Size conditioning is the latent's own size unless the conditioning names one (CLIPTextEncodeSDXL). An inpainting or
    editing model also gets `c_concat` (1 c h w): that all is to be painted, unless the conditioning says otherwise.
    Call inside `open_for_training`.
    """
    ((text, extras),) = positive
    height, width = (8 * side for side in z_0.shape[-2:])
    inputs = {
        "width": width,
        "height": height,
        "prompt_type": "positive",
        "latent_image": z_0[:1],
        **extras,
        "cross_attn": text,
        "noise": z_0[:1],
        "device": z_0.device,
    }
    conds = model.model.extra_conds(
        **{key: value.clone() if torch.is_tensor(value) else value for key, value in inputs.items()}
    )
    return {name: cond.cond.to(z_0.device) for name, cond in conds.items()}
