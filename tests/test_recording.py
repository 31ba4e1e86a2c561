"""Training steps recorded, with a tape in place of a GPU's graphs, and steps that cannot be, by whoever's fault.

test_gpu.py has a real GPU.
"""

import logging
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import diffusers_denoiser, diffusers_unet, flat, relative_error, run
from test_trainer import SHORT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consislora_core import recording
from consislora_core.schedule import OPTIMIZERS, image_stage
from consislora_core.trainer import Denoiser, Trainer

# With AdamW's own eps the sign of a gradient near 0, which no two runs share, would move a weight by a whole step.
STAGE = image_stage(**{**SHORT, "steps": 12, "eps": 1e-3})
STAGE = replace(STAGE, phases=tuple(phase._replace(fades=True) for phase in STAGE.phases))


def trained(device: str, recordable: bool, observe=lambda x: None, stage=STAGE, mask=None):
    """The LoRA of a short training on the tiny UNet, and the last step's work; `observe` gets what is denoised."""
    tensors = run("stage1_content")
    sigmas = diffusers_denoiser(None).sigmas
    levels, unet = sigmas.to(device), diffusers_unet().to(device)
    text, pooled = tensors["prompt_embeds"].to(device), tensors["pooled_prompt_embeds"].to(device)
    time_ids = tensors["time_ids"][None].to(device)

    def denoise(x, sigma, cond):
        observe(x)
        timestep, s = (levels - sigma.unsqueeze(-1)).abs().argmin(-1), sigma.view(-1, 1, 1, 1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return x - s * unet(x / (s**2 + 1).sqrt(), timestep, text, added_cond_kwargs=added).sample

    host = Denoiser(unet, denoise, sigmas, recordable=recordable)
    with Trainer(host, tensors["z_0"].to(device), None, stage, mask=mask) as trainer:
        for _ in trainer:
            pass
        return flat(trainer.parts()), trainer.work


class Tape(TorchDispatchMode):
    """Keeps of a block of code what a CUDA graph would: which operations ran, and on which tensors.

    Replayed without Python. While it records, nothing is written into tensors from before, and no number is read.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "the CPU reads a number of the device"
        kwargs, returns = kwargs or {}, operation._schema.returns
        if operation._schema.is_mutable:  # in place
            self.operations.append((operation, args, kwargs, []))
            return args[0] if returns else None
        result = operation(*args, **kwargs)
        if not any(returned.alias_info for returned in returns):  # a view sees what its tensor gets
            self.operations.append((operation, args, kwargs, tensors_of(result)))
        return result

    def pool(self):
        """As a graph's."""

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for operation, args, kwargs, kept in self.operations:
                for tensor, new in zip(kept, tensors_of(operation(*args, **kwargs)), strict=False):
                    tensor.copy_(new)


def tensors_of(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class Cancelled(BaseException):
    """As ComfyUI's, which is no Exception since 0.20."""


class CancelledBefore(Exception):
    """As ComfyUI's until then."""


@pytest.fixture
def tapes(monkeypatch):
    """A torch whose CUDA graphs are tapes."""
    diffusers_unet()  # diffusers looks at torch.cuda when it is imported
    stream, mode = SimpleNamespace(wait_stream=lambda other: None), [0]
    fake = dict(
        Stream=lambda device: stream, current_stream=lambda: stream, stream=lambda stream: nullcontext(),
        set_stream=lambda stream: None, graph=lambda tape, **_: tape, current_device=lambda: 0, CUDAGraph=Tape,
        get_sync_debug_mode=lambda: mode[-1], set_sync_debug_mode=mode.append,
    )  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recording._stream.cache_clear()
    yield
    recording._stream.cache_clear()


@pytest.fixture
def step(tapes):
    """A RecordedStep that would now be recorded."""
    recorded = recording.RecordedStep(recording.Step(lambda x: [x + 1], lambda y: None))
    step_times(recorded, recording.WARM_UP)
    return recorded


def wait_for_the_gpu():
    if torch.cuda.get_sync_debug_mode() == "warn":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def step_times(recorded, times):
    for _ in range(times):
        recorded.update(*recorded.compute(torch.zeros(1)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recorded_steps_train_the_same_lora(tapes, optimizer):
    """Whatever Python still decided or counted in a step would stay as it was when the step was recorded."""
    stage = replace(STAGE, optimizer=optimizer)
    lora, work = trained("cpu", recordable=True, stage=stage)
    assert work.graphs is not None
    assert relative_error(lora, trained("cpu", recordable=False, stage=stage)[0]) < 1e-5


@pytest.mark.parametrize("error", [AttributeError, AssertionError, KeyError, ImportError, RuntimeError])
def test_a_torch_that_records_no_more_runs_steps_as_usual_and_logs_it(step, monkeypatch, caplog, error):
    caplog.set_level(logging.INFO)

    def moved(*_, **__):
        raise error("moved")

    monkeypatch.setattr(torch.cuda, "graph", moved)
    assert step.compute(torch.zeros(1))[0] == 1
    step_times(step, 1)
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
    step_times(other, recording.WARM_UP + 2)
    assert other.graphs is None
    assert caplog.text.count("the CPU waits for the GPU") == 1
    step_times(step, 1)
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
    step_times(other, recording.WARM_UP + 1)
    assert other.graphs is not None
