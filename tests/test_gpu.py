"""A training step that a GPU records, and pictures on it. Skipped where there is no NVIDIA GPU.

It holds with either of torch's allocators; ComfyUI's default is PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync.
"""

import gc
import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import relative_error, run
from test_recording import STAGE, Cancelled
from test_recording import trained as trained_on

from consislora_core.recording import RecordedStep
from consislora_core.schedule import OPTIMIZERS

pytestmark = [
    pytest.mark.usefixtures("in_full_fp32"),
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.cuda is None, reason="there is no NVIDIA GPU"),
]
trained = partial(trained_on, "cuda")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recorded_steps_train_the_same_lora(optimizer):
    stage = replace(STAGE, optimizer=optimizer)
    lora, work = trained(recordable=True, stage=stage)
    assert isinstance(work, RecordedStep) and work.graphs is not None
    assert relative_error(lora, trained(recordable=False, stage=stage)[0]) < 1e-4


def test_recorded_steps_with_a_mask_train_the_same_lora():
    mask = torch.ones(1, 1, *run("stage1_content")["z_0"].shape[-2:], device="cuda").tril()
    lora, work = trained(recordable=True, mask=mask)
    assert work.graphs is not None
    assert relative_error(lora, trained(recordable=False, mask=mask)[0]) < 1e-4
    assert relative_error(lora, trained(recordable=True)[0]) > 1e-2


def test_trainings_follow_one_another_and_leave_no_memory_behind():
    first = trained(recordable=True)[0]
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        assert relative_error(trained(recordable=True)[0], first) < 1e-4
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("step", range(2, 8))
def test_a_training_that_is_cancelled_before_in_or_after_a_recording_hinders_no_other(step):
    steps = iter(range(1, step))

    def cancel(x):
        if next(steps, None) is None:
            raise Cancelled

    with suppress(Cancelled):  # a step that was recorded before is not seen
        trained(recordable=True, observe=cancel)
    lora, work = trained(recordable=True)
    assert work.graphs is not None
    assert relative_error(lora, trained(recordable=False)[0]) < 1e-4


def test_steps_that_cannot_be_recorded_go_on_and_leave_the_gpu_fit_for_use(caplog):
    caplog.set_level(logging.INFO)
    lora, work = trained(recordable=True, observe=lambda x: float(x.sum()))  # a host sync
    assert work.graphs is None
    assert "steps cannot be recorded here" in caplog.text
    assert relative_error(lora, trained(recordable=False)[0]) < 1e-4
    assert torch.randn(3, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_pictures_on_the_gpu_go_with_those_on_the_cpu(pack):
    """As with ComfyUI's option --gpu-only, where results stay on the card and loaded pictures may not be there."""
    photo, result = torch.rand(2, 1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 64, 64).tril()

    def made(device):
        images = result.to(device)
        kept = pack.nodes.KeepColours.execute(images, photo, 0.75, mask).result[0]
        matched = pack.nodes.MatchPalette.execute(images, photo, 1.0).result[0]
        (scores,) = pack.nodes.evaluate.score_pictures(images, photo, photo)
        return kept.cpu(), matched.cpu(), torch.tensor(list(scores.values()))

    for ours, theirs in zip(made("cuda"), made("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs)
