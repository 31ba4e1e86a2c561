"""A training step recorded once as CUDA graphs: thousands of kernels for the price of one launch each time after."""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from traceback import clear_frames
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 1  # steps before the recording, in which libraries choose their kernels and AdamW allocates its moments


class Step(NamedTuple):
    """One training step. compute: from tensors to tensors. update: takes them, and moves the weights."""

    compute: Callable[..., Sequence[Tensor]]
    update: Callable[..., None]


class RecordedStep:
    """A `Step` as two CUDA graphs, if it launches the same kernels each time, on inputs of the same shapes.

    The next call overwrites what `compute` returned. A step that cannot be recorded runs as usual, which is logged.

    What a recording allocates it frees as well: torch's allocator cudaMallocAsync, ComfyUI's default, ends the process
    at memory that is freed later. So results are copied into the tensors that the step returned before it was recorded.
    """

    def __init__(self, step: Step):
        self.step, self.warm, self.recordable = step, 0, True
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self.stream = _stream(torch.cuda.current_device())

    def compute(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The step's `compute`, replayed once it is recorded."""
        if self.graphs is None and self.recordable and self.warm >= WARM_UP:
            self._record(inputs)
        if self.graphs is None:
            self.warm += 1
            self.outputs = self._on_stream(self.step.compute, *inputs)
            return self.outputs
        for recorded, new in zip(self.inputs, inputs, strict=True):
            recorded.copy_(new)
        self.graphs[0].replay()
        return self.outputs

    def update(self, *computed: Tensor) -> None:
        """The step's `update`, replayed once it is recorded. computed: what `compute` returned."""
        if self.graphs is None:
            self._on_stream(self.step.update, *computed)
        else:
            self.graphs[1].replay()

    def _on_stream(self, work: Callable, *inputs: Tensor):
        if not self.recordable:
            return work(*inputs)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.autograd.set_multithreading_enabled(False):
            result = work(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _compute_in_place(self) -> None:
        for output, new in zip(self.outputs, self.step.compute(*self.inputs), strict=True):
            output.copy_(new)

    def _record(self, inputs: Sequence[Tensor]) -> None:
        # Other threads may go on using the device.
        settings = {"stream": self.stream, "capture_error_mode": "thread_local"}
        before, own_errors = torch.cuda.current_stream(), []

        def noting(work: Callable, *inputs: Tensor):
            try:
                with torch.autograd.set_multithreading_enabled(False):  # another thread frees tensors when it likes
                    return work(*inputs)
            except BaseException as error:
                clear_frames(error.__traceback__)  # which hold tensors
                if not isinstance(error, RuntimeError):  # but the step's own, such as ComfyUI's cancel
                    own_errors.append(error)
                raise

        try:
            compute, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            self.inputs = [tensor.clone() for tensor in inputs]
            with torch.cuda.graph(compute, **settings):
                noting(self._compute_in_place)
            with torch.cuda.graph(update, pool=compute.pool(), **settings):
                noting(self.step.update, *self.outputs)
            self.graphs = compute, update
        except BaseException as error:
            torch.cuda.set_stream(before)
            self.recordable, self.inputs, self.outputs = False, None, None
            compute = update = None
            _end_recording()
            if own_errors:
                raise own_errors[0] from None
            if not isinstance(error, Exception):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            logging.info("ConsisLoRA: steps cannot be recorded here, which makes training slower: %s", reason)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all recordings on a device: the default one cannot be recorded, and cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


def _end_recording() -> None:
    """Records nothing: after a failed recording, torch's random numbers stay in recording mode until one succeeds."""
    gc.collect()
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
