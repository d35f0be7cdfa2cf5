"""The part of the operators' contract that is about torch's own subsystems: opcheck, meta, compile, autocast, func."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.testing import check


class Subsystems:
    """A base of `Contract`, whose attributes and methods (`op`, `cases`, `make`, `ours`...) these tests use."""

    def test_opcheck(self):
        """Schema, fake and autograd registration agree with what the operator does."""
        calls = []
        packet = getattr(torch.ops.resnet_fast, self.op)
        mine = [packet, getattr(torch.ops.resnet_fast, f"{self.op}_backward", None)]

        class Spy(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.overloadpacket in mine:
                    calls.append((function, args))
                return function(*args, **(kwargs or {}))

        inputs = self.make(self.cases[self.core[0]], torch.float32)
        leaves = {k: v.requires_grad_() if k in self.given(inputs) else v for k, v in inputs.items()}
        with backends.use_backend("eager"):
            with Spy():
                y = self.ours(**leaves)
                (y[0] if isinstance(y, tuple) else y).square().sum().backward()
                with torch.no_grad():
                    self.ours(**inputs)
            assert any(function.overloadpacket is packet for function, _ in calls), "the operator was not called"
            for function, args in calls[:3]:
                fresh = [_fresh(a, function) for a in args]
                torch.library.opcheck(function, fresh)

    def test_meta(self):
        """Meta tensors go through the fake, and it tells shape, dtype and strides as the operator gives them."""
        for dtype, case in itertools.product((torch.float32, torch.bfloat16), self.cases.values()):
            inputs = self.make(case, dtype)
            meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
            with torch.no_grad(), backends.use_backend("eager"):
                real, fake = self.ours(**inputs), self.ours(**meta)
            for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        """torch.compile takes forward and backward as one graph."""
        torch.use_deterministic_algorithms(False)
        torch._dynamo.reset()
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        names = self.given(inputs)
        with backends.use_backend("eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(self.ours, fullgraph=True, backend=compiler)
            check.compare(compiled, self.plain, lambda: inputs, names, self.kink)

    # Without bfloat16 activations under float16 autocast: no recipe mixes the two.
    @pytest.mark.parametrize(
        "given, dtype",
        [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
        ids=str,
    )
    def test_autocast(self, given, dtype):
        """The output's dtype and every gradient's are eager's; so are the values."""

        def autocast(function):
            def call(**inputs):
                with torch.autocast("cpu", dtype):
                    return function(**inputs)

            return call

        def make():
            inputs = self.make(self.cases[self.core[0]], torch.float32)
            x = self.wants[0]
            return inputs | {x: inputs[x].to(given)}

        names = self.given(make())
        for training in (False, True):
            check.compare(autocast(self.ours), autocast(self.plain), make, names if training else (), self.kink)

    def test_func_transforms_refused(self):
        """torch.func cannot differentiate operators of torch.library.register_autograd: an error, never a wrong number."""
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        x = self.wants[0]

        def total(t):
            y = self.ours(**inputs | {x: t})
            return (y[0] if isinstance(y, tuple) else y).square().sum()

        with backends.use_backend("eager"), pytest.raises(RuntimeError, match="functorch"):
            torch.func.grad(total)(inputs[x])


def _fresh(a: Any, function: Any) -> Any:
    """An argument for opcheck: a leaf that requires a gradient where the operator has one."""
    if not isinstance(a, Tensor):
        return a
    backward = function.overloadpacket._qualified_op_name.endswith("_backward")
    return a.detach().clone(memory_format=torch.preserve_format).requires_grad_(a.requires_grad and not backward)
