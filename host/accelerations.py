"""Which accelerations of training a device and its torch have: they are measured on NVIDIA GPUs and on CPUs."""

import logging
from collections.abc import Callable
from functools import cache

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
    """oneDNN's linear layer in fp32 on a CPU, which torch has under a private name; None where it has moved."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(1, 1)
        linear(one, one, None, "none", [], "")
    except Exception as error:
        log_missing("oneDNN's linear layer", error)
        return None
    return linear


def log_missing(what: str, error: Exception) -> None:
    """Logs that an acceleration stays off."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    logging.info("ConsisLoRA: %s cannot be used here, which makes training slower: %s", what, reason)
