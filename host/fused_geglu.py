"""GEGLU's product, y = value gelu(gate), and its gradients: on NVIDIA GPUs one fused kernel each, else torch's."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

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
    if value.is_cuda and (kernels := _kernels()):
        return kernels[0](value, gate)
    return gelu(gate).mul_(value)


def geglu_backward(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `value` and `gate`, given that of the product; all of the same shape."""
    if value.is_cuda and (kernels := _kernels()):
        return kernels[1](grad, value, gate)
    return gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


@cache
def _kernels() -> tuple[Callable, Callable] | None:
    """Both kernels, compiled by torch at their first use; None where torch cannot compile for this GPU."""
    if torch.version.cuda is None:  # an AMD GPU
        return None
    from torch.cuda.jiterator import _create_jit_fn, _create_multi_output_jit_fn

    kernels = _create_jit_fn(FORWARD), _create_multi_output_jit_fn(BACKWARD, num_outputs=2)
    one = torch.ones(1, device="cuda")
    try:
        kernels[0](one, one), kernels[1](one, one, one)
    except RuntimeError as error:
        logging.info(
            "ConsisLoRA: the fused GEGLU kernels do not compile for this GPU; training is a little slower: %s", error
        )
        return None
    return kernels
