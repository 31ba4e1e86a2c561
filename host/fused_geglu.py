"""GEGLU's product, y = value gelu(gate), and its gradients: a fused kernel each where measured, else torch's."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

from .accelerations import gelu_backward, has_measured_kernels, log_missing

FORWARD = """
template <typename T> T geglu(T value, T gate) {
    float g = gate, v = value;
    return v * g * 0.5f * (1.0f + erff(0.70710678f * g));
}"""
BACKWARD = """
template <typename T> void geglu_backward(T grad, T value, T gate, T& grad_value, T& grad_gate) {
    float g = gate, v = value, grad_y = grad;
    float cdf = 0.5f * (1.0f + erff(0.70710678f * g)), pdf = 0.39894228f * expf(-0.5f * g * g);
    grad_value = grad_y * g * cdf;
    grad_gate = grad_y * v * (cdf + g * pdf);
}"""


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """value gelu(gate), of two tensors of the same shape (arXiv 2002.05202)."""
    if has_measured_kernels(value.device) and (kernels := _kernels()):
        return kernels[0](value, gate)
    return gelu(gate).mul_(value)


def geglu_backward(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `value` and `gate`, given that of the product; all of the same shape. Needs `gelu_backward`."""
    if has_measured_kernels(value.device) and (kernels := _kernels()):
        return kernels[1](grad, value, gate)
    return gelu(gate).mul_(grad), gelu_backward()(grad * value, gate)


@cache
def _kernels() -> tuple[Callable, Callable] | None:
    """Both kernels, compiled by torch at their first use; None where torch cannot compile for this GPU."""
    try:
        from torch.cuda.jiterator import _create_jit_fn, _create_multi_output_jit_fn

        kernels = _create_jit_fn(FORWARD), _create_multi_output_jit_fn(BACKWARD, num_outputs=2)
        one = torch.ones(1, device="cuda")
        kernels[0](one, one), kernels[1](one, one, one)
    except Exception as error:
        log_missing("the fused GEGLU kernels", error)
        return None
    return kernels
