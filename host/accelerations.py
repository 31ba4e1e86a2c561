"""Which accelerations of training a device and its torch have: they are measured on NVIDIA GPUs and on CPUs."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from comfy.cli_args import args


def has_measured_kernels(device: torch.device) -> bool:
    """Whether training uses its own GPU kernels and recorded steps: on NVIDIA, on AMD if ComfyUI was started --fast."""
    return device.type == "cuda" and (torch.version.cuda is not None or bool(args.fast))


def has_fused_attention(device: torch.device) -> bool:
    """Whether torch's attention saves no scores for backward."""
    return device.type == "cpu" or device.type == "cuda" and torch.version.cuda is not None


@cache
def onednn_linear() -> Callable | None:
    """oneDNN's linear layer in fp32 on a CPU, or None."""
    one = torch.ones(1, 1)
    example = one, one, None, "none", [], ""
    return _private("oneDNN's linear layer", lambda: torch.ops.mkldnn._linear_pointwise, *example)


@cache
def gelu_backward() -> Callable | None:
    """The gradient of GELU's input, given that of its output and the input; or None."""
    one = torch.ones(1)
    return _private("the fused GEGLU", lambda: torch.ops.aten.gelu_backward, one, one)


@cache
def group_norm_backward() -> Callable | None:
    """torch's backward pass of a group norm, or None."""
    one, mean = torch.ones(1, 1, 1), torch.ones(1, 1)
    example = one, one, mean, mean, one.flatten(), 1, 1, 1, 1, [True, False, False]
    return _private("the split group norm", lambda: torch.ops.aten.native_group_norm_backward, *example)


def _private(what: str, find: Callable[[], Callable], *example: Any) -> Callable | None:
    """A function that torch has under a private name; None where it has moved or does not take this example."""
    try:
        function = find()
        function(*example)
    except Exception as error:
        log_missing(what, error)
        return None
    return function


def log_missing(what: str, error: Exception) -> None:
    """Logs that an acceleration stays off."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    logging.info("ConsisLoRA: %s cannot be used here, which makes training slower: %s", what, reason)
