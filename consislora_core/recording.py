"""A training step recorded once as CUDA graphs: thousands of kernels for the price of one launch each time after."""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from traceback import clear_frames
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # steps before the recording; in the first, libraries choose their kernels
WAITS = "synchronizing CUDA operation"  # of torch's words where the CPU waits for the GPU, in which a recording fails


class Step(NamedTuple):
    """One training step. compute: from tensors to tensors. update: takes them, and moves the weights."""

    compute: Callable[..., Sequence[Tensor]]
    update: Callable[..., None]


class RecordedStep:
    """A `Step` as two CUDA graphs, if it launches the same kernels each time, on inputs of the same shapes.

    The next call overwrites what `compute` returned. A step that cannot be recorded runs as usual, which is logged.

    torch's allocator cudaMallocAsync, which is ComfyUI's default, ends the process where memory of a recording is freed
    after it, and where a recording fails. So results are copied into tensors from before, gradients are computed by the
    thread that records, and a step in which the CPU waits for the GPU is not tried.
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
            self.warm += 1  # so before the `update` that follows
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
        with torch.cuda.stream(self.stream), torch.autograd.set_multithreading_enabled(False), _warnings() as warned:
            result = work(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        if self.warm == WARM_UP and any(WAITS in warning for warning in warned):
            self.recordable = False
            _log("the CPU waits for the GPU in them")
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
                with torch.autograd.set_multithreading_enabled(False):
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
            _log(str(error).partition("\n")[0] or type(error).__name__)


def _log(reason: str) -> None:
    logging.info("ConsisLoRA: steps cannot be recorded here, which makes training slower: %s", reason)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings of a block of code, once it is over, with torch's for where the CPU waits for the GPU."""
    mode, words = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield words
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    words.extend(str(warning.message) for warning in found)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all recordings: the default one cannot be recorded, and cuBLAS keeps memory for each other."""
    return torch.cuda.Stream(device)


def _end_recording() -> None:
    """Records nothing: after a failed recording, torch's random numbers stay in recording mode until one succeeds."""
    gc.collect()
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
