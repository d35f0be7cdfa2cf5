"""max_pool2d against torch.nn.functional.max_pool2d."""

import torch
import torch.nn.functional as F
from contract import Contract, outcome, refused, refused_as_eager, using
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resnet_fast import backends, functional
from resnet_fast.testing import rooms

ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class TestMaxPool2d(Contract):
    op = "max_pool2d"
    wants = ("x",)
    core = ("stem", "2x2", "large")
    small = "small"
    cases = {  # noqa: RUF012
        "stem": ((2, 16, 13, 11), (3, 2, 1)),
        "2x2": ((2, 16, 8, 8), (2,)),
        "overlapping": ((2, 8, 7, 9), (3, 1, 1)),
        "not square": ((2, 8, 9, 12), ((3, 2), (2, 3), (1, 0))),
        "dilated": ((2, 8, 12, 11), (3, 2, 1, 2)),
        "ceil": ((2, 8, 8, 9), (3, 2, 0, 1, True)),
        "ceil, padded": ((2, 8, 9, 10), (3, 3, 1, 1, True)),
        "steps over columns": ((2, 8, 9, 9), (2, 3)),
        "whole image": ((2, 8, 7, 7), (7,)),
        "255 places": ((1, 2, 18, 16), ((17, 15), 1)),
        "more than 255 places": ((1, 2, 17, 17), (16, 1)),
        "one pixel": ((3, 65, 1, 1), (1,)),
        "one channel": ((2, 1, 9, 7), (3, 2, 1)),
        "127 channels": ((1, 127, 5, 6), (3, 2, 1)),
        "all equal": ((8, 8, 8, 8), (3, 2, 1)),
        "small": ((2, 3, 5, 4), (3, 2, 1)),
        "large": ((2, 64, 37, 56), (3, 2, 1)),
    }

    def make(self, case, dtype):
        shape, window = case
        return {"x": torch.randn(shape).to(dtype), **dict(zip(ARGUMENTS, window, strict=False))}

    def ours(self, **inputs):
        return functional.max_pool2d(**inputs)

    def plain(self, **inputs):
        return F.max_pool2d(inputs.pop("x"), **inputs)

    def kink(self, x, **_):
        """How far apart the values are: finite differences may not change which is the largest."""
        values = x.flatten().sort().values
        return values.diff().min().expand_as(x.new_empty(1)) if x.numel() < 500 else torch.ones(())

    def smooth(self):
        inputs = self.make(self.cases[self.small], torch.float64)
        x = inputs["x"]
        inputs["x"] = torch.randperm(x.numel()).double().view_as(x) / 10
        return inputs, ["x"]

    def test_exact(self, room, dtype, case):
        """A maximum rounds nothing: the very numbers of eager, ties (many in small integers) broken as it breaks them."""
        inputs = self.make(case, dtype)
        for x in (inputs["x"], torch.randint(-2, 3, inputs["x"].shape).to(dtype)):
            grads, values = [], []
            for function, forced in ((self.ours, room), (self.plain, "auto")):
                leaf = x.clone().requires_grad_()
                with using(forced, forced == room and self.must(case, room, "fwd", "bwd")):
                    y = function(**inputs | {"x": leaf})
                    torch.manual_seed(0)
                    dy = torch.randint(-3, 4, y.shape).to(dtype)
                    grads.append(torch.autograd.grad(y, leaf, dy)[0])
                values.append(y)
            assert torch.equal(*values) and torch.equal(*grads)

    def test_nan_takes_the_gradient(self, room):
        """A NaN in a window is its maximum, and the first of several."""
        x = torch.randn(1, 2, 6, 6)
        x[0, 0, 1, 1] = x[0, 0, 1, 2] = x[0, 1, 5, 5] = float("nan")
        grads = []
        for function, forced in ((functional.max_pool2d, room), (F.max_pool2d, "auto")):
            leaf = x.clone().requires_grad_()
            with using(forced, forced == room):
                y = function(leaf, 3, 2, 1)
                grads.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        assert torch.equal(*grads)

    def test_minus_infinity_everywhere(self, room):
        x = torch.full((1, 3, 6, 6), -float("inf"))
        grads = []
        for function, forced in ((functional.max_pool2d, room), (F.max_pool2d, "auto")):
            leaf = x.clone().requires_grad_()
            with using(forced, forced == room):
                y = function(leaf, 3, 2, 1)
                assert (y == -float("inf")).all()
                grads.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        assert torch.equal(*grads)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_window(self, data):
        draw = data.draw
        shape = [draw(st.integers(1, m)) for m in (3, 9, 14, 14)]
        kernel = [draw(st.integers(1, 4)) for _ in range(2)]
        stride = [draw(st.integers(1, 4)) for _ in range(2)]
        padding = [draw(st.integers(0, k // 2)) for k in kernel]
        dilation = [draw(st.integers(1, 2)) for _ in range(2)]
        ceil_mode = draw(st.booleans())
        # A window with no place inside the image has no maximum; torch writes its gradient out of bounds.
        assume(all(shape[2 + i] > (kernel[i] - 1) * dilation[i] for i in (0, 1)))
        x = torch.randn(shape)
        window = (kernel, stride, padding, dilation, ceil_mode)
        expected = x.clone().requires_grad_()
        y = F.max_pool2d(expected, *window)
        dy = torch.randn_like(y)
        y.backward(dy)
        for room in rooms.rooms(self.op):
            if rooms.cannot_run(self.op, room):
                continue
            leaf = x.clone().requires_grad_()
            with backends.use_backend(room):
                try:
                    got = functional.max_pool2d(leaf, *window)
                    got.backward(dy)
                except RuntimeError as error:
                    if str(error).startswith("resnet_fast: backend"):
                        continue
                    raise
            assert torch.equal(got, y)
            assert torch.equal(leaf.grad, expected.grad)

    def test_saves_one_byte_per_output(self):
        """What backward keeps: the places of the maxima, as bytes."""
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = functional.max_pool2d(torch.randn(2, 8, 12, 12, requires_grad=True), 3, 2, 1)
        assert sum(t.numel() * t.element_size() for t in kept) == y.numel()

    def test_empty(self, room):
        with using("auto"):
            x = torch.randn(0, 3, 8, 8, requires_grad=True)
            y = functional.max_pool2d(x, 3, 2, 1)
            y.sum().backward()
        assert y.shape == (0, 3, 4, 4) and x.grad.shape == x.shape

    def test_refusals_as_eager(self):
        x = torch.randn(2, 3, 7, 7, requires_grad=True)
        for words, args in (
            ("kernel (0, 0)", (x, 0)),
            ("stride (0, 0)", (x, 2, 0)),
            ("(2, 2)", (x, 3, 1, 2)),
            ("(-1, -1)", (x, 3, 1, -1)),
            ("empty", (x, 9)),
            ("empty", (x[:, :0], 2)),
            ("dilation (0, 0)", (x, 2, 1, 0, 0)),
            ("(2, 2, 2)", (x, (2, 2, 2))),
            ("2.5", (x, 2.5)),
            ("(7, 7)", (x[0, 0], 2)),
            ("(1, 2, 3, 7, 7)", (x[None], 2)),
            ("complex64", (x.to(torch.complex64), 2)),
        ):
            refused_as_eager(lambda a=args: functional.max_pool2d(*a), lambda a=args: F.max_pool2d(*a), wants=words)

    def test_refusals(self):
        """Eager pools integers and images without a batch; here they are a mistake."""
        x = torch.randn(2, 3, 7, 7)
        for words, given_x in (("int64", x.long()), ("(3, 7, 7)", x[0])):
            mine = outcome(functional.max_pool2d, given_x, 2)
            assert isinstance(mine, RuntimeError)
            refused(mine, words)
