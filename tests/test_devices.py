"""What other devices than an NVIDIA GPU lack is not asked of them. None of them is here: torch tells what they have."""

import re
from pathlib import Path

import pytest
import torch
import torchgen
from reference import comfy_model
from test_guidance import conditioning, guider, sampled
from test_training_nodes import train_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DOUBLE = {torch.float64, torch.complex64, torch.complex128}
# What a CPU takes for scaled_dot_product_attention; the second for what is no computation.
ELSEWHERE = re.compile(r"_scaled_dot_product_flash_attention_for_cpu.*|profiler::.*")


class Operators(TorchDispatchMode):
    """The operators that are called, by name. Refuses double precision, as the GPUs of Apple do."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name().removeprefix("aten::"))
        result = operator(*args, **(kwargs or {}))
        assert not any(torch.is_tensor(leaf) and leaf.dtype in DOUBLE for leaf in tree_leaves(result)), operator.name()
        return result


@pytest.fixture(scope="module")
def lacking():
    """Whether the GPUs of Apple lack an operator, by torch's own list."""
    listed = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry.partition("(")[0]: entry for entry in listed.read_text(encoding="utf-8").split("\n- func: ")[1:]}

    def is_lacking(name: str) -> bool:
        entry = entries.get(name, "dispatch:")
        if delegate := re.search(r"structured_delegate: (\S+)", entry):
            return is_lacking(delegate[1])
        return "dispatch:" in entry and not re.search(r"^ +[\w, ]*(MPS|Composite\w+)\b.*:", entry, re.MULTILINE)

    return is_lacking


@pytest.fixture
def on_no_cpu(pack, monkeypatch):
    """As on a device without the accelerations of CPUs and NVIDIA GPUs."""
    monkeypatch.setattr(pack.host.frozen_unet, "onednn_linear", lambda: None)
    monkeypatch.setattr(pack.host.training_model, "has_fused_attention", lambda device: False)
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **{**kwargs, "fused": False}))


def test_the_list_knows_what_is_lacking(lacking):
    assert not lacking("linalg_vector_norm") and not lacking("_foreach_lerp_.Scalar") and not lacking("add.Tensor")
    assert lacking("_thnn_fused_gru_cell") and lacking("mkldnn::_linear_pointwise")


@pytest.mark.usefixtures("store", "on_no_cpu")
@pytest.mark.parametrize("settings", [{}, {"preset": "quality"}, {"precision": "bf16", "memory": "lean"}], ids=str)
def test_training_takes_operators_alone_that_apples_gpus_have(pack, comfy, lacking, settings):
    model = comfy_model()
    with Operators() as called:
        train_image(pack.nodes.train, model, **settings)
    assert [name for name in sorted(called.names) if lacking(name) and not ELSEWHERE.fullmatch(name)] == []


def test_guidance_takes_operators_alone_that_apples_gpus_have(pack, guide, loras, comfy, lacking):
    own = {"content_positive": conditioning("content_positive"), "start_percent": 0.1, "reuse_steps": 2}
    guided = guider(guide, comfy_model(), loras, **own)
    with Operators() as called:
        sampled(guided)
    assert [name for name in sorted(called.names) if lacking(name) and not ELSEWHERE.fullmatch(name)] == []
