"""A step that cannot be recorded, by the device's fault, torch's or its own. test_gpu.py records some."""

import logging
import warnings
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
    """A RecordedStep that would now be recorded, on a torch whose graphs record nothing."""
    stream, mode = SimpleNamespace(wait_stream=lambda other: None), [0]
    fake = SimpleNamespace(
        Stream=lambda device: stream, current_stream=lambda: stream, stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None, graph=lambda graph, **_: nullcontext(), current_device=lambda: 0,
        CUDAGraph=lambda: SimpleNamespace(pool=lambda: None, replay=lambda: None),
        get_sync_debug_mode=lambda: mode[-1], set_sync_debug_mode=mode.append,
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fake)
    recording._stream.cache_clear()
    recorded = recording.RecordedStep(recording.Step(lambda x: [x + 1], lambda y: None))
    run(recorded, recording.WARM_UP)
    yield recorded
    recording._stream.cache_clear()


def wait_for_the_gpu():
    if torch.cuda.get_sync_debug_mode() == "warn":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def run(recorded, times):
    for _ in range(times):
        recorded.update(*recorded.compute(torch.zeros(1)))


@pytest.mark.parametrize("error", [AttributeError, AssertionError, KeyError, ImportError, RuntimeError])
def test_a_torch_that_records_no_more_runs_steps_as_usual_and_logs_it(step, monkeypatch, caplog, error):
    caplog.set_level(logging.INFO)

    def moved(*_, **__):
        raise error("moved")

    monkeypatch.setattr(torch.cuda, "graph", moved)
    assert step.compute(torch.zeros(1))[0] == 1
    run(step, 1)
    assert step.graphs is None
    assert "steps cannot be recorded here" in caplog.text and "moved" in caplog.text


@pytest.mark.parametrize("cancel", [Cancelled, CancelledBefore])
def test_a_cancel_while_a_step_is_recorded_is_a_cancel(step, cancel):
    def work(x):
        raise cancel

    step.step = recording.Step(work, lambda y: None)
    with pytest.raises(cancel):
        step.compute(torch.zeros(1))
    assert step.graphs is None


@pytest.mark.parametrize("waiting", ["compute", "update"])
def test_a_step_in_which_the_cpu_waits_for_the_gpu_is_not_even_tried(step, caplog, waiting):
    """With the allocator cudaMallocAsync, which ComfyUI takes by default, trying would end the process."""
    caplog.set_level(logging.INFO)

    def compute(x):
        if waiting == "compute":
            wait_for_the_gpu()
        return [x + 1]

    def update(y):
        if waiting == "update":
            wait_for_the_gpu()

    other = recording.RecordedStep(recording.Step(compute, update))
    run(other, recording.WARM_UP + 2)
    assert other.graphs is None
    assert caplog.text.count("the CPU waits for the GPU") == 1
    run(step, 1)
    assert step.graphs is not None


def test_a_step_that_waits_for_the_gpu_in_its_first_run_alone_is_recorded(step):
    """Libraries do, when they choose their kernels."""
    runs = []

    def compute(x):
        runs.append(x)
        if len(runs) == 1:
            wait_for_the_gpu()
        return [x + 1]

    other = recording.RecordedStep(recording.Step(compute, lambda y: None))
    run(other, recording.WARM_UP + 1)
    assert other.graphs is not None
