"""freeze: an inference plan with BatchNorm folded, weights packed once and memory planned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import _choices, _native, backends
from resnet_fast._graphs import Graphs
from resnet_fast._lower import Unsupported, lower
from resnet_fast._plan import FoldedProgram
from resnet_fast._trace import Untraceable, trace
from resnet_fast.convert import Report, Row, convert, restore


def freeze(
    model: nn.Module,
    example: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    exact: bool = False,
) -> Frozen:
    """Make an inference-only module of a model; the model stays as it was.

    Statistics are folded into the filters (in float64, rounded once), filters are packed for the kernels, and on CPUs the
    whole network runs in one call of the compiled module, in memory planned beforehand. (Where oneDNN has instructions the
    kernels do not use, AMX or what RESNET_FAST_ISA leaves out, the faster of the two runs, measured once for each shape.)
    On GPUs it runs operator by operator, bias, residual and ReLU in the convolutions' epilogues, and the shapes of
    `example` and `prepare` are captured as CUDA graphs. Later changes of the model do not reach the frozen module: freeze
    again.

    Args:
        model: any module; what is not understood runs by its own operations (`explain` says which).
        example: an input; the plan of its shape is made, and measured, now instead of at the first call; on a GPU its
            graph is captured (other shapes run without one).
        dtype: float32, bfloat16, float16 or float64; default the model's own. Inputs and outputs keep the caller's dtype.
        exact: only direct convolutions, no Winograd or Strassen (float32 errors at most three times eager's).

    Returns:
        A module that takes any batch and image size the model takes.

    Raises:
        TypeError: `model` is not a torch.nn.Module. ValueError: a dtype that is not floating.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: wanted a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"freeze: wanted a floating dtype, got {dtype}")
    own = next((p for p in model.parameters()), torch.empty(0))
    frozen = Frozen(model, dtype or own.dtype, own.device, exact)
    if example is not None:
        frozen.prepare(example)
    return frozen


class Frozen(nn.Module):
    """What `freeze` returns. Its weights are constants: no parameters, no gradients, no training mode."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, exact: bool) -> None:
        super().__init__()
        self.dtype, self.device, self.exact = dtype, device, exact
        source = restore(copy.deepcopy(model)).eval().requires_grad_(False)
        #: why the network does not run in one call, None when it does
        self.reason: str | None = None
        self.network: Any = None
        self.program: Any = None
        try:
            program = trace(source, deep=True)
        except Untraceable as error:
            self.reason = f"module by module: {error}"
            self.program = convert(source.to(dtype))
        else:
            try:
                self.network = lower(source, program, dtype, device, exact)
            except Unsupported as error:
                self.reason = f"operator by operator: {error}"
                self.program = FoldedProgram(source, program, dtype)
            else:
                if _native.outpaced(dtype):  # oneDNN may be ahead here: both are measured, shape by shape
                    self.program = FoldedProgram(source, program, dtype)
        self.graphs = Graphs(self._operators)
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for x, without gradients, in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a frozen model is for inference only and gives no gradients: use resnet_fast.convert(model) to train, "
                "or call it under torch.inference_mode()"
            )
        if x.device != self.device:
            raise RuntimeError(f"frozen on {self.device}, got an input on {x.device}")
        with torch.inference_mode():
            if self.network is not None and not self._library_is_faster(x):
                y = self.network(x)
                return y.to(x.dtype) if isinstance(y, Tensor) else y
            return self.graphs(x) if x in self.graphs else self._operators(x)

    def _operators(self, x: Tensor) -> Any:
        y = self.program(x.to(self.dtype))
        return y.to(x.dtype) if isinstance(y, Tensor) else y

    def _library_is_faster(self, x: Tensor) -> bool:
        """Whether oneDNN's convolutions, operator by operator, were measured faster on inputs like x than the one call."""
        if self.program is None or x.dim() != 4 or x.shape[0] == 0:
            return False
        key = f"frozen|{self.network.fingerprint}|{tuple(x.shape)}|{torch.get_num_threads()}|{self.exact}"
        choice = _choices.get(key)
        if choice is None:
            if not _choices.measuring():
                return False
            ways = {"network": self.network, "library": self._operators}
            choice = backends.fastest(list(ways), lambda name: ways[name](x), (x,))
            _choices.put(key, choice)
        return choice == "library"

    def prepare(self, x: Tensor) -> Frozen:
        """Make the plan of x's shape now, measuring its kernels (seconds, once per machine: the choices are kept).

        On a GPU the shape is captured as a CUDA graph as well, which holds the memory of its activations.
        """
        if self.network is not None and x.device == self.device:
            self.network.plan(x, tune=True)
        self(x.detach())
        if x.device.type == "cuda" and self.network is None:
            with torch.inference_mode():
                self.graphs.add(x)
        return self

    def train(self, mode: bool = True) -> Frozen:
        """Only evaluation mode exists.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError("a frozen model cannot be trained: train the model it came from and freeze again")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise RuntimeError(f"frozen as {self.dtype} on {self.device}; to change either, freeze the model again")
        return self

    def explain(self, x: Tensor | None = None) -> Report:
        """The plan's steps; with an input, those of its shape with the algorithm each one runs."""
        if self.network is not None and (x is None or not self._library_is_faster(x)):
            return self.network.explain(x)
        shapes = ", ".join("x".join(map(str, shape)) for shape, _ in self.graphs.captured)
        reason = self.reason if self.network is None else "operator by operator: measured faster than the one call"
        note = (reason or "") + (f"; CUDA graphs of {shapes}" if shapes else "")
        return Report([Row("", "Frozen", 0, note), *getattr(self.program, "rows", list)()])

    def extra_repr(self) -> str:
        """How it runs."""
        return f"dtype={self.dtype}, {self.reason or 'the whole network in one call'}"
