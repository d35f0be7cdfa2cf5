"""CUDA graphs of a frozen model: one per input shape, replayed in one launch instead of a launch per kernel.

At small batches a GPU waits for Python: a ResNet-50 is about sixty kernels of a few microseconds each, and every operator
costs as much again before its kernel starts. A graph has all of that behind it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: Graphs kept at most; each holds the activations of its shape.
MOST = 8


@dataclass
class Captured:
    """A graph, the tensor it reads and what it wrote."""

    x: Tensor
    out: Any
    replay: Callable[[], None]
    done: Any = None  # event after the last replay's outputs were copied


def capture(run: Callable[[Tensor], Any], x: Tensor) -> Captured:
    """Record run(x) as a CUDA graph, after two runs outside it which compile, choose and allocate."""
    with torch.cuda.device(x.device):  # a capture is of the current device's stream
        static = x.detach().clone(memory_format=torch.preserve_format)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):
                run(static)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run(static)
        return Captured(static, out, graph.replay, torch.cuda.Event())


class Graphs:
    """The captured shapes of one function.

    Args:
        run: what to capture; reads its argument only and does not wait for the device.
    """

    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        self.run = run
        self.captured: OrderedDict[tuple, Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Graphs belong to this process and this model: a copy captures its own."""
        return {"run": self.run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["run"])

    @staticmethod
    def key(x: Tensor) -> tuple:
        """What a graph is good for."""
        return tuple(x.shape), x.dtype

    def add(self, x: Tensor) -> None:
        """Capture x's shape, unless it was before; the oldest of too many is dropped."""
        with self._lock:
            if self.key(x) in self.captured:
                return
            self.captured[self.key(x)] = capture(self.run, x)
            while len(self.captured) > MOST:
                self.captured.popitem(last=False)

    def __contains__(self, x: Tensor) -> bool:
        return self.key(x) in self.captured

    def __call__(self, x: Tensor) -> Any:
        """run(x) by its graph, on the current stream; the outputs are the caller's own."""
        with self._lock:
            found = self.captured[self.key(x)]
            if found.done is not None:  # another stream may still be in this graph's memory
                torch.cuda.current_stream(x.device).wait_event(found.done)
            found.x.copy_(x)
            found.replay()
            out = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, found.out)
            if found.done is not None:
                found.done.record(torch.cuda.current_stream(x.device))
            return out
