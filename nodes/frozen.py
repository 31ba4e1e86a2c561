"""A UNet whose own weights never learn, while LoRA does: what that saves of a training step's time and memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen(base: Any, dtype: torch.dtype, device: torch.device, lean: bool) -> Iterator[None]:
    """Within the context, ComfyUI's model `base` can be trained around: its UNet computes in `dtype`, and gradients
    go through it to LoRA's. Afterwards it is as it was.

    lean: its output blocks compute their activations twice in place of keeping them.
    """
    unet = base.diffusion_model
    with ExitStack() as stack:
        stack.enter_context(_ordinary_parameters(unet))
        stack.enter_context(_computing_in(base, dtype, device))
        stack.enter_context(_keeping_no_casts(unet))
        stack.enter_context(_gating_in_place(unet))
        stack.enter_context(_reading_text_once(unet))
        if lean:
            stack.enter_context(_recomputing(unet))
        yield


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


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear):
        return type(layer).forward_comfy_cast_weights(layer, x)
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    y = _linear(x, weight, bias)
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
        else:
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            back = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return back, None


@contextmanager
def _keeping_no_casts(unet: nn.Module) -> Iterator[None]:
    def frozen_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: _FrozenLayer.apply(x, layer) if x.requires_grad else _forward(layer, x)

    plain = comfy.ops.disable_weight_init
    forwards = plain.Linear.forward_comfy_cast_weights, plain.Conv2d.forward_comfy_cast_weights
    layers = [layer for layer in unet.modules() if getattr(type(layer), "forward_comfy_cast_weights", None) in forwards]
    with _set(layers, "forward_comfy_cast_weights", frozen_forward):
        yield


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
    gates = [module for module in unet.modules() if type(module) is GEGLU and "forward" not in vars(module)]
    with _set(gates, "forward", lambda gate: lambda x: _Gate.apply(gate.proj(x))):
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
