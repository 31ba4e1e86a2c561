"""GEGLU's gate, y = value gelu(gate), and its gradients: on NVIDIA's GPUs one pass over memory each, else by torch."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

GATED = """
template <typename T> T gated(T value, T gate) {
    float g = gate, v = value;
    return v * g * 0.5f * (1.0f + erff(0.70710678f * g));
}"""
GATED_BACK = """
template <typename T> void gated_back(T grad, T value, T gate, T& value_back, T& gate_back) {
    float g = gate, v = value, y_back = grad;
    float cdf = 0.5f * (1.0f + erff(0.70710678f * g)), pdf = 0.39894228f * expf(-0.5f * g * g);
    value_back = y_back * g * cdf;
    gate_back = y_back * v * (cdf + g * pdf);
}"""


def gated(value: Tensor, gate: Tensor) -> Tensor:
    """value gelu(gate); both halves of any one shape."""
    if value.is_cuda and (kernels := _kernels()):
        return kernels[0](value, gate)
    return gelu(gate).mul_(value)


def gated_back(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `value` and `gate`."""
    if value.is_cuda and (kernels := _kernels()):
        return kernels[1](grad, value, gate)
    return gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


@cache
def _kernels() -> tuple[Callable, Callable] | None:
    """Both as kernels that torch compiles at their first use, for a GPU that it can compile for; else None."""
    if torch.version.cuda is None:  # but an AMD one
        return None
    from torch.cuda.jiterator import _create_jit_fn, _create_multi_output_jit_fn

    kernels = _create_jit_fn(GATED), _create_multi_output_jit_fn(GATED_BACK, num_outputs=2)
    one = torch.ones(1, device="cuda")
    try:
        kernels[0](one, one), kernels[1](one, one, one)
    except RuntimeError as error:
        logging.info("ConsisLoRA: no kernels of its own for this GPU, which trains a little slower: %s", error)
        return None
    return kernels
