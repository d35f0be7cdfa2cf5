"""bn_act_max_pool2d against batch_norm, relu and max_pool2d."""

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, outcome, refused, using

from resnet_fast import functional
from resnet_fast.testing import check

WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def draw(*shape, dtype):
    return torch.randn(shape).to(dtype)


class TestBnActMaxPool2d(Contract):
    op = "bn_act_max_pool2d"
    wants = ("x", "weight", "bias")
    core = ("stem", "65 channels", "evaluation", "large")
    small = "small"
    folded = ("weight",)
    #: shape, window, training, affine
    cases = {  # noqa: RUF012
        "stem": ((3, 16, 13, 11), (3, 2, 1), True, True),
        "65 channels": ((2, 65, 9, 8), (3, 2, 1), True, True),
        "one channel": ((3, 1, 9, 9), (3, 2, 1), True, True),
        "2x2": ((2, 16, 8, 8), (2,), True, True),
        "overlapping": ((2, 8, 7, 9), (3, 1, 1), True, True),
        "not square": ((2, 8, 9, 12), ((3, 2), (2, 3), (1, 0)), True, True),
        "dilated": ((2, 8, 12, 11), (3, 2, 1, 2), True, True),
        "ceil": ((2, 8, 9, 10), (3, 3, 1, 1, True), True, True),
        "steps over columns": ((2, 8, 9, 9), (2, 3), True, True),
        "no affine": ((3, 8, 9, 9), (3, 2, 1), True, False),
        "evaluation": ((3, 16, 9, 9), (3, 2, 1), False, True),
        "evaluation, no affine": ((3, 16, 9, 9), (3, 2, 1), False, False),
        "all equal": ((8, 8, 8, 8), (3, 2, 1), True, True),
        "small": ((2, 2, 4, 5), (2,), True, True),
        "large": ((2, 64, 37, 56), (3, 2, 1), True, True),
    }

    def make(self, case, dtype):
        shape, window, training, affine = case
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        c = shape[1]
        return {
            "x": draw(*shape, dtype=dtype) * 2 + 0.5,
            "running_mean": draw(c, dtype=wide),
            "running_var": torch.rand(c, dtype=wide) + 0.5,
            "weight": draw(c, dtype=wide) if affine else None,
            "bias": draw(c, dtype=wide) if affine else None,
            "training": training,
            **dict(zip(WINDOW, window, strict=False)),
        }

    def ours(self, **inputs):
        inputs = {k: v.clone() if k.startswith("running") else v for k, v in inputs.items()}
        return functional.bn_act_max_pool2d(**inputs)

    def normalised(self, x, running_mean, running_var, weight, bias, training, **_):
        vectors = (running_mean.clone(), running_var.clone(), weight, bias)
        if x.dtype in (torch.bfloat16, torch.float16):
            vectors = tuple(None if v is None else v.float() for v in vectors)
        return F.batch_norm(x, *vectors, training)

    def plain(self, **inputs):
        window = {k: inputs[k] for k in WINDOW if k in inputs}
        return F.max_pool2d(torch.relu(self.normalised(**inputs)), **window)

    def kink(self, **inputs):
        """The largest of each window before the ReLU. (Two that tie but for rounding are one window in a million.)"""
        return F.max_pool2d(self.normalised(**inputs), **{k: inputs[k] for k in WINDOW if k in inputs})

    def test_saves_no_map(self):
        """What backward keeps of the size of a map is x; a byte an output beside it."""
        inputs = self.make(((2, 16, 12, 12), (3, 2, 1), True, True), torch.float32)
        inputs["x"].requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = self.ours(**inputs)
        images = {t.data_ptr(): t for t in kept if t.dim() == 4}
        assert inputs["x"].data_ptr() in images and len(images) == 2
        assert sum(t.element_size() * t.numel() for t in images.values()) == 4 * inputs["x"].numel() + y.numel()

    def test_ties_and_dead_windows(self, room):
        """Many equal values: the first of the largest has the gradient, and windows of nothing but zeros give none."""
        x = torch.randint(-3, 3, (2, 16, 9, 9)).float()
        inputs = self.make(self.cases["evaluation, no affine"], torch.float32) | {"x": x}
        inputs |= {"running_mean": torch.zeros(16), "running_var": torch.ones(16) - 1e-5}
        (_, ours), (_, eager), (_, exact) = self.three(
            room, inputs, lambda y: torch.arange(1.0, y.numel() + 1).view_as(y)
        )
        check.law(ours, eager, exact)
        assert torch.equal(ours == 0, eager == 0)

    def test_nan_takes_the_gradient(self, room):
        inputs = self.make(self.cases["evaluation"], torch.float32)
        inputs["x"][0, 0, 3, 3] = inputs["x"][1, 2, 8, 8] = float("nan")
        (mine, ours), (theirs, eager), (_, exact) = self.three(room, inputs, torch.ones_like)
        assert torch.equal(mine.isnan(), theirs.isnan())
        check.law(ours, eager, exact)

    def three(self, room, inputs, seed):
        """y and x's gradient for dy = seed(y): ours, eager's and float64's."""
        found = []
        for function, forced, wide in (
            (self.ours, room, False),
            (self.plain, "auto", False),
            (self.plain, "auto", True),
        ):
            given = {k: v.double() if wide and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            given["x"] = leaf = given["x"].clone().requires_grad_()
            with using(forced, forced == room):
                y = function(**given)
                found.append((y.detach(), torch.autograd.grad(y, leaf, seed(y))[0]))
        return found

    def test_running_statistics(self, room):
        found = []
        for _ in range(check.MOST_SAMPLES):
            inputs = self.make(self.cases["stem"], torch.float32)
            running = [inputs[k] for k in ("running_mean", "running_var")]
            mine, theirs, exact = (
                [t.clone() for t in running],
                [t.clone() for t in running],
                [t.double() for t in running],
            )
            with using(room):
                functional.bn_act_max_pool2d(inputs["x"], *mine, None, None, 3, training=True, momentum=0.3)
            F.batch_norm(
                inputs["x"].contiguous(memory_format=torch.channels_last), *theirs, training=True, momentum=0.3
            )
            F.batch_norm(inputs["x"].double(), *exact, training=True, momentum=0.3)
            found.append((mine, theirs, exact))
        for i, what in enumerate(("mean", "variance")):
            check.law(*([pair[i] for pair in pairs] for pairs in zip(*found, strict=True)), what=what)

    def test_empty(self):
        x = torch.randn(0, 3, 8, 8, requires_grad=True)
        y = functional.bn_act_max_pool2d(x, torch.zeros(3), torch.ones(3), None, None, 3, 2, 1, training=True)
        y.sum().backward()
        assert y.shape == (0, 3, 4, 4) and x.grad.shape == x.shape

    def test_refusals(self):
        x, ones = torch.randn(2, 3, 7, 7), torch.ones(3)
        for kind, words, call in (
            (ValueError, "254 places", lambda: functional.bn_act_max_pool2d(x, ones, ones, None, None, (17, 15))),
            (RuntimeError, "(3, 7, 7)", lambda: functional.bn_act_max_pool2d(x[0], ones, ones, None, None, 2)),
            (RuntimeError, "(2,)", lambda: functional.bn_act_max_pool2d(x, ones, ones, ones[:2], None, 2)),
            (RuntimeError, "half the kernel", lambda: functional.bn_act_max_pool2d(x, ones, ones, None, None, 2, 2, 2)),
            (ValueError, "eps", lambda: functional.bn_act_max_pool2d(x, ones, ones, None, None, 2, training=True, eps=0)),
            (ValueError, "1 value", lambda: functional.bn_act_max_pool2d(
                x[:1, :, :1, :1], ones, ones, None, None, 1, training=True)),
        ):  # fmt: skip
            mine = outcome(call)
            assert isinstance(mine, kind), mine
            refused(mine, words)


@pytest.mark.parametrize("training", [True, False])
def test_bitwise_the_two_operators_in_float32(training):
    """The C++ room's forward rounds exactly what bn_act and max_pool2d round."""
    x = torch.randn(2, 24, 15, 14)
    mean, var, gamma, beta = torch.randn(24), torch.rand(24) + 0.5, torch.randn(24), torch.randn(24)
    fused = functional.bn_act_max_pool2d(x, mean.clone(), var.clone(), gamma, beta, 3, 2, 1, training=training)
    y = functional.bn_act(x, mean.clone(), var.clone(), gamma, beta, training=training)
    assert torch.equal(fused, functional.max_pool2d(y, 3, 2, 1))
