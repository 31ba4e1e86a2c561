"""A step that cannot be recorded, by the device's fault, torch's or its own. test_gpu.py records some."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from consislora_core import recording


class Cancelled(BaseException):
    """As ComfyUI's, which is no Exception since 0.20."""


class CancelledBefore(Exception):
    """As ComfyUI's until then."""


@pytest.fixture
def step(monkeypatch):
    """A RecordedStep that has run once, on a torch whose graphs `step.graph` opens."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = SimpleNamespace(
        Stream=lambda: stream, current_stream=lambda: stream, stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None, graph=lambda graph, **_: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(pool=lambda: None, replay=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fake)
    work = recording.Step(lambda x: [x + 1], lambda: None)
    recorded = recording.RecordedStep(work)
    recorded.compute(torch.zeros(1))
    return recorded


@pytest.mark.parametrize("error", [AttributeError, AssertionError, KeyError, ImportError, RuntimeError])
def test_a_torch_that_records_no_more_runs_steps_as_usual_and_logs_it(step, monkeypatch, caplog, error):
    caplog.set_level(logging.INFO)

    def moved(*_, **__):
        raise error("moved")

    monkeypatch.setattr(torch.cuda, "graph", moved)
    assert step.compute(torch.zeros(1))[0] == 1
    step.update()
    assert step.graphs is None
    assert "steps cannot be recorded here" in caplog.text and "moved" in caplog.text


@pytest.mark.parametrize("cancel", [Cancelled, CancelledBefore])
def test_a_cancel_while_a_step_is_recorded_is_a_cancel(step, cancel):
    def work(x):
        raise cancel

    step.step = recording.Step(work, lambda: None)
    with pytest.raises(cancel):
        step.compute(torch.zeros(1))
    assert step.graphs is None
