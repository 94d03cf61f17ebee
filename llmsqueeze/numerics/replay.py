"""Many small kernels launched as one: CUDA graphs of functions that are called again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A recorded call: the graph, what it reads and what it leaves.
_Recording = tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]


class Replayed:
    """A function of tensors that is all small kernels: on a GPU recorded once for every set of shapes.

    Launching a kernel takes the host longer than many of them run; a CUDA graph launches all at
    once. function(*tensors, *constants) returns a tuple of tensors, waits for nothing on the host and
    changes none of its arguments. Results stay valid until the next call.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._recorded: dict[Any, _Recording] = {}

    def __call__(self, tensors: list[Tensor], *constants: Any) -> tuple[Tensor, ...]:
        if not tensors[0].is_cuda:
            return self._function(*tensors, *constants)
        key = (*((t.shape, t.dtype, t.device) for t in tensors), *constants)
        if key not in self._recorded:
            self._recorded[key] = self._record(tensors, constants)
        graph, inputs, results = self._recorded[key]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return results

    def _record(self, tensors: list[Tensor], constants: tuple[Any, ...]) -> _Recording:
        inputs = [t.contiguous().clone() for t in tensors]
        side = torch.cuda.Stream(tensors[0].device)
        side.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(side):  # libraries allocate their workspaces at the first call
            self._function(*inputs, *constants)
        torch.cuda.current_stream(tensors[0].device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread records: one that reads or hashes files meanwhile is none of its concern.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._function(*inputs, *constants)
        return graph, inputs, results
