"""A UNet whose own weights never learn, while LoRA does: what that saves of a training step's time and memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .gating import gated, gated_back

WIDE = 1280 * 1280  # channels in times channels out of a convolution: with less it is the image that weighs
LARGE = 2**22  # values in a group norm's image, from which on it pays to share its groups out


@contextmanager
def frozen(base: Any, dtype: torch.dtype, device: torch.device, lean: bool) -> Iterator[None]:
    """Within the context, ComfyUI's model `base` can be trained around: its UNet computes in `dtype`, and gradients
    go through it to LoRA's. Afterwards it is as it was.

    lean: its output blocks compute their activations twice in place of keeping them.
    """
    unet = base.diffusion_model
    with ExitStack() as stack:
        stack.enter_context(_ordinary_parameters(unet, laid_out=not lean))
        stack.enter_context(_computing_in(base, dtype, device))
        stack.enter_context(_keeping_no_casts(unet))
        stack.enter_context(_gating_by_halves(unet))
        stack.enter_context(_dividing_large_groups(unet))
        stack.enter_context(_reading_text_once(unet))
        if lean:
            stack.enter_context(_recomputing(unet))
        yield


@contextmanager
def _ordinary_parameters(unet: nn.Module, laid_out: bool) -> Iterator[None]:
    """Frozen parameters that share their bytes with the UNet's inference tensors, which autograd refuses.

    laid_out: of wide convolutions on a GPU copies with channels last, which it would make anew in each step.
    """
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
            wide = shared.ndim == 4 and shared.shape[-1] > 1 and len(shared) * shared.shape[1] >= WIDE
            if laid_out and wide and shared.is_cuda:
                shared = shared.contiguous(memory_format=torch.channels_last)
            module._parameters[name] = nn.Parameter(shared, requires_grad=False)
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


@contextmanager
def _set(modules: Iterable[nn.Module], name: str, value: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Within the context, each module has an attribute of its own, even where its class or another node has one."""
    before = [(module, name in vars(module), vars(module).get(name)) for module in modules]
    try:
        for module, *_ in before:
            setattr(module, name, value(module))
        yield
    finally:
        for module, had, own in before:
            if had:
                setattr(module, name, own)
            else:
                vars(module).pop(name, None)


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
    manual_cast_dtype = base.manual_cast_dtype
    try:
        base.manual_cast_dtype = dtype
        with _set(layers, "comfy_cast_weights", lambda _: True):
            yield
    finally:
        base.manual_cast_dtype = manual_cast_dtype


def _onednn_has_linear(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In fp32 on a CPU by oneDNN; torch would take MKL, and copy the bias into the output before each product."""
    if _onednn_has_linear(x.device, x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _is_product(layer: nn.Module, x: Tensor) -> bool:
    """Whether it is a convolution of single pixels on a GPU, which would be given a copy with channels last."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1) and x.is_cuda


def _by_pixel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weights, pixels = weight.expand(len(x), -1, -1), x.flatten(2)
    y = weights @ pixels if bias is None else torch.baddbmm(bias.view(1, -1, 1), weights, pixels)
    return y.unflatten(2, x.shape[2:])


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear) and not _is_product(layer, x):
        return type(layer).forward_comfy_cast_weights(layer, x).contiguous()
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    y = _linear(x, weight, bias) if isinstance(layer, nn.Linear) else _by_pixel(x, weight.flatten(1), bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return y


class _FrozenLayer(torch.autograd.Function):
    """A frozen linear or convolution that keeps nothing for the way back: the cast weight is made once more there.

    Autograd would keep every cast copy until then, which adds up to a second UNet, and the input of a convolution,
    which only a weight that learns would need. And newer ComfyUI casts into buffers that it uses again for the next
    layer.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape = layer, x.shape
        return _forward(layer, x)

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, grad, offloadable=True)
        if isinstance(layer, nn.Linear):
            back = _linear(grad, weight.T)
        elif _is_product(layer, grad):
            back = _by_pixel(grad, weight.flatten(1).T)
        else:
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            back = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry).contiguous()
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return back, None


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear or convolution as ComfyUI has them, and of no other kind such as fp8's."""
    plain = comfy.ops.disable_weight_init
    forwards = plain.Linear.forward_comfy_cast_weights, plain.Conv2d.forward_comfy_cast_weights
    return getattr(type(layer), "forward_comfy_cast_weights", None) in forwards


@contextmanager
def _keeping_no_casts(unet: nn.Module) -> Iterator[None]:
    def frozen_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: _FrozenLayer.apply(x, layer) if x.requires_grad else _forward(layer, x)

    layers = [layer for layer in unet.modules() if _is_plain(layer)]
    with _set(layers, "forward_comfy_cast_weights", frozen_forward):
        yield


class _Gate(torch.autograd.Function):
    """GEGLU (b n c to b n d), which keeps no cast weight: x W_1 gelu(x W_2), of the two halves of one frozen layer.

    Each half is a product of its own: the halves of one product lie apart, and GPUs are slow at what lies apart.
    """

    @staticmethod
    def forward(ctx, x, layer):
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        biases = (None, None) if bias is None else bias.chunk(2)
        value, gate = (_linear(x, *half) for half in zip(weight.chunk(2), biases, strict=True))
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        ctx.layer = layer
        ctx.save_for_backward(value, gate)
        return gated(value, gate)

    @staticmethod
    def backward(ctx, grad):
        value, gate = ctx.saved_tensors
        weight, bias, stream = comfy.ops.cast_bias_weight(ctx.layer, grad, offloadable=True)
        value_weight, gate_weight = weight.chunk(2)
        value_back, gate_back = gated_back(grad, value, gate)
        back = _linear(value_back, value_weight.T).add_(_linear(gate_back, gate_weight.T))
        comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return back, None


@contextmanager
def _gating_by_halves(unet: nn.Module) -> Iterator[None]:
    gates = [
        gate
        for gate in unet.modules()
        if type(gate) is GEGLU and _is_plain(gate.proj) and "forward" not in vars(gate).keys() | vars(gate.proj).keys()
    ]
    with _set(gates, "forward", lambda gate: lambda x: _Gate.apply(x, gate.proj)):
        yield


class _GroupNorm(torch.autograd.Function):
    """torch's, with the mean and variance of each group from many blocks of the GPU in place of one."""

    @staticmethod
    def forward(ctx, x, layer):
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        rows, channels = x.shape[:2]
        var, mean = torch.var_mean(x.view(rows, layer.num_groups, -1), dim=-1, correction=0)
        each = rows, layer.num_groups, channels // layer.num_groups
        of_channels = (moment.unsqueeze(-1).expand(each).flatten() for moment in (mean, var))
        y = nn.functional.batch_norm(
            x.view(1, rows * channels, *x.shape[2:]),
            *of_channels,
            weight.repeat(rows),
            bias.repeat(rows),
            eps=layer.eps,
        )
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, torch.rsqrt(var + layer.eps))
        return y.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd = ctx.saved_tensors
        weight, bias, stream = comfy.ops.cast_bias_weight(ctx.layer, grad, offloadable=True)
        rows, channels, *side = x.shape
        shape = rows, channels, math.prod(side), ctx.layer.num_groups
        back, *_ = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, *shape, [True, False, False]
        )
        comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return back, None


@contextmanager
def _dividing_large_groups(unet: nn.Module) -> Iterator[None]:
    def norm(layer: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            large = x.is_cuda and x.is_contiguous() and x[0].numel() >= LARGE
            large = large and x.dtype != torch.float16  # in which a variance may be too large to be told
            return _GroupNorm.apply(x, layer) if large else type(layer).forward(layer, x)

        return run

    plain = comfy.ops.disable_weight_init.GroupNorm
    layers = [one for one in unet.modules() if isinstance(one, plain) and "forward" not in vars(one)]
    with _set(layers, "forward", norm):
        yield


class _Once:
    """A frozen layer that answers without work when it is asked with the very tensor it was asked with before."""

    def __init__(self, layer: nn.Module):
        self.forward, self.x = layer.forward, None

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.x or self.answer._version != self.version:  # other code may have written into the answer
            self.x, self.answer = x, self.forward(x)
            self.version = self.answer._version
        return self.answer


@contextmanager
def _reading_text_once(unet: nn.Module) -> Iterator[None]:
    """The text's keys and values stay as they are from step to step, but for what a LoRA adds."""
    layers = [layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    with _set(layers, "forward", _Once):
        yield


@contextmanager
def _recomputing(unet: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: parts of the output blocks keep their input and are computed again on the way back."""

    def recomputed(part: nn.Module) -> Callable[..., Tensor]:
        forward = part.forward

        def run(x: Tensor, *args, transformer_options: dict | None = None, **kwargs) -> Tensor:
            if transformer_options is not None:  # which goes on to tell of later blocks
                kwargs["transformer_options"] = transformer_options.copy()
            return checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    parts = [part for part in unet.output_blocks.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]
    with _set(parts, "forward", recomputed):
        yield
