"""bn_act against torch.nn.functional.batch_norm, add and relu."""

import itertools
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import LOW, Contract, outcome, refused, refused_as_eager, using

from resnet_fast import backends, functional
from resnet_fast.testing import check, rooms


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    training: bool = True
    relu: bool = True
    residual: bool = False
    weight: bool = True
    bias: bool = True
    running: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 0.5  # of the activations, whose standard deviation is about 1


def plain(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, act):
    """The composition in plain torch; statistics are returned so that they are compared too."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if act else y


class TestBnAct(Contract):
    op = "bn_act"
    wants = ("x", "weight", "bias", "residual")
    core = ("residual", "training", "evaluation", "linear", "evaluation, residual", "large")
    folded = ("weight",)
    small = "small"
    cases = {  # noqa: RUF012
        "training": Case((4, 16, 9, 7)),
        "residual": Case((4, 16, 9, 7), residual=True),
        "linear": Case((4, 16, 9, 7), relu=False),
        "linear, residual": Case((4, 16, 9, 7), relu=False, residual=True),
        "evaluation": Case((4, 16, 9, 7), training=False),
        "evaluation, residual": Case((4, 16, 9, 7), training=False, residual=True),
        "evaluation, linear": Case((4, 16, 9, 7), training=False, relu=False),
        "no affine": Case((4, 16, 9, 7), weight=False, bias=False),
        "weight, no bias": Case((4, 16, 9, 7), bias=False),
        "bias, no weight": Case((4, 16, 9, 7), weight=False, residual=True),
        "evaluation, no affine": Case((4, 16, 9, 7), training=False, weight=False, bias=False),
        "no running statistics": Case((4, 16, 9, 7), running=False),
        "momentum 0": Case((4, 16, 9, 7), momentum=0.0),
        "momentum 1": Case((4, 16, 9, 7), momentum=1.0),
        "eps 0 in evaluation": Case((4, 16, 9, 7), training=False, eps=0.0),
        "large eps": Case((4, 16, 9, 7), eps=0.1),
        "small": Case((3, 3, 2, 3), residual=True),
        "two values per channel": Case((2, 3, 1, 1)),
        "one channel": Case((3, 1, 9, 7), residual=True),
        "3 channels": Case((3, 3, 9, 7)),
        "5 channels": Case((3, 5, 9, 7), residual=True),
        "65 channels": Case((3, 65, 9, 7)),
        "127 channels": Case((3, 127, 5, 5), residual=True),
        "one image": Case((1, 8, 5, 5)),
        "one pixel": Case((33, 24, 1, 1), residual=True),
        "all equal": Case((8, 8, 8, 8)),
        "many pixels": Case((1, 4, 120, 101)),
        "many images": Case((70000, 2, 1, 1)),
        "2048 channels": Case((2, 2048, 7, 7), residual=True),
        "large": Case((3, 64, 31, 28), residual=True),
    }

    def make(self, case, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        c = case.shape[1]
        spread = torch.rand(c, 1, 1) + 0.5
        x = torch.randn(case.shape) * spread + case.mean * torch.randn(c, 1, 1)
        if x[:, 0].numel() == 2:  # two values per channel: apart, or the variance is anything down to 0
            x[1] = x[0] + 1 + torch.rand(c, 1, 1)
        weight = torch.randn(c) + 0.3  # some negative
        if c > 2:
            weight[1] = 0.0
        return {
            "x": x.to(dtype),
            "running_mean": torch.randn(c, dtype=wide) * 0.3 if case.running else None,
            "running_var": torch.rand(c, dtype=wide) + 0.5 if case.running else None,
            "weight": weight.to(wide) if case.weight else None,
            "bias": torch.randn(c, dtype=wide) if case.bias else None,
            "residual": torch.randn(case.shape).to(dtype) if case.residual else None,
            "training": case.training,
            "momentum": case.momentum,
            "eps": case.eps,
            "act": "relu" if case.relu else None,
        }

    def ours(self, running_mean, running_var, **inputs):
        return self.call(functional.bn_act, running_mean, running_var, inputs)

    def plain(self, running_mean, running_var, **inputs):
        return self.call(plain, running_mean, running_var, inputs)

    @staticmethod
    def call(function, mean, var, inputs):
        """The output and, in training, the running statistics it left behind (in copies: inputs are used again)."""
        mean, var = (None if t is None else t.clone() for t in (mean, var))
        y = function(running_mean=mean, running_var=var, **inputs)
        return (y, mean, var) if inputs["training"] and mean is not None else y

    def kink(self, running_mean, running_var, act, **inputs):
        if not act:
            return torch.ones(())
        y = self.plain(running_mean, running_var, act=None, **inputs)
        return (y[0] if isinstance(y, tuple) else y).detach()

    # ---- statistics

    @pytest.mark.parametrize("ratio", [1e3, 1e4])
    @pytest.mark.parametrize("shape", [(8, 5, 16, 16), (2, 64, 28, 28), (1, 3, 1, 1000), (64, 16, 1, 1)], ids=str)
    def test_variance_of_a_large_mean(self, room, ratio, shape):
        """E[x^2] - E[x]^2 in float32 would lose every digit of the variance where mean / std is 1e4."""
        self.check_statistics(room, lambda: torch.randn(shape) + ratio * (torch.rand(shape[1]).view(-1, 1, 1) + 0.5))

    @pytest.mark.parametrize("size", [1e-18, 1e15])
    def test_variance_of_extreme_sizes(self, room, size):
        """Squares that nearly leave float32's range."""
        self.check_statistics(room, lambda: torch.randn(4, 8, 12, 12) * size)

    def check_statistics(self, room, draw):
        """The running statistics after one batch with momentum 1, by the law; eager's variance from the better format.

        (Where means are large torch keeps six digits of the variance in NCHW, four to five in channels_last.)
        """

        def statistics(function, t):
            mean, var = torch.zeros(2, t.shape[1], dtype=t.dtype).unbind()
            function(t, mean, var, None, None, None, True, 1.0, 1e-5, None)
            return mean, var

        found = []
        for _ in range(check.MOST_SAMPLES):
            x = draw()
            with using(room, must=True):
                ours = statistics(functional.bn_act, x)
            last = statistics(plain, x.contiguous(memory_format=torch.channels_last))
            better = last if room == "eager" else statistics(plain, x)
            found.append((ours, (last[0], better[1]), statistics(plain, x.double())))
        for i, what in enumerate(("mean", "variance")):
            check.law(*([pair[i] for pair in pairs] for pairs in zip(*found, strict=True)), what=what)

    @pytest.mark.parametrize("value", [1e20, 1e30])
    def test_huge_inputs(self, room, value):
        """One huge value among ordinary ones, in training: eager's classes of numbers."""
        x = torch.randn(4, 3, 8, 8)
        x[1, 1, 2, 3] = value
        with using(room, must=True):
            y = functional.bn_act(x, None, None, training=True)
        expected = plain(x, None, None, None, None, None, True, 0.1, 1e-5, "relu")
        assert torch.equal(y.isfinite(), expected.isfinite())
        torch.testing.assert_close(y[:, [0, 2]], expected[:, [0, 2]])

    def test_constant_channels(self, room):
        """No spread: variance 0 (not below), y is the bias, gradients are finite."""
        x = torch.full((4, 8, 5, 5), 3.0, requires_grad=True)
        mean, var, bias = torch.zeros(8), torch.ones(8), torch.rand(8)
        with using(room):
            y = functional.bn_act(x, mean, var, torch.ones(8), bias, training=True, momentum=1.0)
            assert torch.equal(mean, torch.full((8,), 3.0)) and torch.equal(var, torch.zeros(8))
            y.sum().backward()
        want = plain(x, mean.clone(), var.clone(), torch.ones(8), bias, None, True, 1.0, 1e-5, "relu")
        check.law(y, want, bias.double().view(-1, 1, 1).expand_as(y))
        assert x.grad.isfinite().all()

    def test_running_statistics_over_steps(self, room):
        """Five steps: the statistics a module would have."""
        c, momentum = 2048, 0.3
        running = [
            [torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype)]
            for dtype in (torch.float32,) * 2 + (torch.float64,)
        ]
        for _ in range(5):
            x = torch.randn(3, c, 6, 6) * 2 + 1
            with using(room, must=True):
                functional.bn_act(x, *running[0], training=True, momentum=momentum)
            F.batch_norm(x.contiguous(memory_format=torch.channels_last), *running[1], training=True, momentum=momentum)
            F.batch_norm(x.double(), *running[2], training=True, momentum=momentum)
        for i, what in enumerate(("mean", "variance")):
            check.law(*(found[i] for found in running), what=what)

    def test_evaluation_leaves_statistics_alone(self, room):
        mean, var = torch.randn(8), torch.rand(8) + 0.5
        before = mean.clone(), var.clone()
        with using(room, must=True):
            functional.bn_act(torch.randn(2, 8, 5, 5), mean, var)
        assert torch.equal(mean, before[0]) and torch.equal(var, before[1])

    # ---- dtypes

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("training", [True, False])
    def test_all_low_precision(self, dtype, training):
        """model.to(bfloat16): parameters and statistics in it too."""

        def make():
            inputs = self.make(Case((4, 16, 9, 7), training=training), dtype)
            return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

        # float16 squares and sums: its running variance is compared by the same law.
        check.compare(self.ours, self.plain, make, ("x", "weight", "bias"), self.kink)

    @pytest.mark.parametrize(
        "x, vectors, residual",
        [(*LOW[:1], torch.float32, torch.float32), (torch.float32, torch.float32, torch.bfloat16),
         (torch.float16, torch.float32, torch.float32), (torch.float32, torch.float32, torch.float64)],
        ids=str,
    )  # fmt: skip
    def test_mixed_dtypes(self, x, vectors, residual):
        """A residual of another dtype promotes the output; every gradient has its tensor's dtype."""

        def make():
            inputs = self.make(Case((4, 16, 9, 7), residual=True), torch.float32)
            return inputs | {"x": inputs["x"].to(x), "residual": inputs["residual"].to(residual)}

        check.compare(self.ours, self.plain, make, self.wants, self.kink)

    @pytest.mark.parametrize(
        "x, vectors", list(itertools.product((torch.float32, torch.float64), (torch.bfloat16, torch.float32)))
    )
    def test_refused_dtypes(self, x, vectors):
        """Parameters less precise than x, where eager refuses them."""
        inputs = self.make(Case((2, 8, 4, 4)), torch.float32)
        inputs = {k: v.to(x if k == "x" else vectors) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with backends.use_backend("eager"):
            theirs, mine = outcome(self.plain, **inputs), outcome(self.ours, **inputs)
        assert isinstance(mine, Exception) == isinstance(theirs, Exception)
        if isinstance(theirs, Exception):
            assert isinstance(mine, type(theirs))

    # ---- empty batches

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(0, 4, 5, 5), (3, 4, 0, 5), (3, 4, 5, 0)], ids=str)
    def test_empty(self, room, shape, training):
        """Eager's outcome, forward and backward; statistics untouched."""
        found = []
        for function in (functional.bn_act, plain):
            leaves = torch.randn(shape), torch.rand(4), torch.rand(4), torch.randn(shape)
            x, weight, bias, residual = (t.requires_grad_() for t in leaves)
            mean, var = torch.zeros(4), torch.ones(4)
            with backends.use_backend("auto" if room == "eager" else room):
                y = outcome(function, x, mean, var, weight, bias, residual, training, 0.1, 1e-5, "relu")
                if isinstance(y, RuntimeError) and str(y).startswith("resnet_fast: backend"):
                    pytest.skip(str(y))
                y.sum().backward()
            assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))
            found.append((y.shape, y.dtype, x.grad.shape, weight.grad, bias.grad, residual.grad.shape))
        mine, theirs = found
        assert mine[:3] == theirs[:3] and mine[5] == theirs[5]
        assert torch.equal(mine[3], theirs[3]) and torch.equal(mine[4], theirs[4])

    # ---- autograd around it

    def test_frozen_statistics(self, room):
        """Frozen BatchNorm: known statistics, weights that train."""
        make = lambda: self.make(Case((4, 16, 9, 7), training=False, residual=True), torch.float32)
        with using(room):
            check.compare(self.ours, self.plain, make, self.wants, self.kink)

    def test_two_forwards_before_one_backward(self, room):
        """The second forward moves the running statistics; the first one's backward does not need them."""

        def both(function, a, b, weight):
            statistics = weight.new_zeros(4), weight.new_ones(4)
            ya, yb = (function(x, *statistics, weight, None, None, True, 0.1, 1e-5, "relu") for x in (a, b))
            return torch.cat((2 * ya, yb))

        def make():
            return {"a": torch.randn(3, 4, 5, 5), "b": torch.randn(3, 4, 5, 5), "weight": torch.rand(4)}

        def kink(a, b, weight):
            return torch.cat([F.batch_norm(x, None, None, weight, training=True) for x in (a, b)])

        with using(room):
            check.compare(partial(both, functional.bn_act), partial(both, plain), make, ["a", "b", "weight"], kink)

    def test_saved_tensors_changed_in_place(self):
        """x, weight and, with known statistics, these: changed between forward and backward, eager raises; so do we."""
        for name, training in (("x", True), ("weight", True), ("running_mean", False), ("running_var", False)):
            inputs = self.make(Case((4, 16, 9, 7), training=training), torch.float32)
            inputs["bias"].requires_grad_()
            inputs["weight"] = inputs["weight"].requires_grad_() * 1
            inputs["x"] = inputs["x"].requires_grad_() * 1
            y = functional.bn_act(**inputs)
            with torch.no_grad():
                inputs[name].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_residual_used_again(self, room):
        x, residual = torch.randn(2, 4, 8, 5, 5).unbind()
        residual.requires_grad_()
        for relu in ("relu", None):
            with using(room):
                y = functional.bn_act(x, None, None, None, None, residual, True, act=relu)
                (g,) = torch.autograd.grad(y.sum() + 3 * residual.sum(), residual)
            expected = 3 + ((y > 0).float() if relu else torch.ones_like(y))
            assert torch.equal(g, expected)

    def test_checkpoint(self, room):
        """Activation checkpointing recomputes the forward: the same gradients."""
        x = torch.randn(4, 8, 6, 6, requires_grad=True)
        mean, var = torch.zeros(8), torch.ones(8)
        call = partial(functional.bn_act, x, mean, var, training=True)
        with using(room):
            again = torch.utils.checkpoint.checkpoint(call, use_reentrant=False)
            (kept, recomputed) = (torch.autograd.grad(y.square().sum(), x)[0] for y in (call(), again))
        assert torch.equal(kept, recomputed)

    # ---- refusals

    def test_refusals_as_eager(self):
        x, v = torch.randn(2, 4, 5, 5), torch.ones(4)
        one = torch.randn(1, 4, 1, 1)
        t = {"training": True}
        for words, args, settings in (
            (
                "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])",
                (one, v, v),
                t,
            ),
            ("eps", (x, v, v), t | {"eps": 0.0}),
            ("eps", (x, v, v), t | {"eps": -1.0}),
            ("eps", (x, v, v), {"eps": -1.0}),
            ("running_mean", (x, None, None), {}),
            ("running_mean", (x, None, v), t),
            ("(4,)", (x, torch.ones(5), v), {}),
            ("(5,)", (x, v, v, torch.ones(5)), {}),
            ("(3,)", (x, v, v, v, torch.ones(3)), t),
            ("int64", (x.long(), v, v), {}),
            ("complex64", (x.to(torch.complex64), v, v), {}),
            ("meta", (x.to("meta"), v, v), {}),
            ("meta", (x, v, v, v.to("meta")), {}),
            ("momentum", (x, v.clone(), v.clone()), t | {"momentum": None}),
        ):
            refused_as_eager(
                lambda a=args, s=settings: functional.bn_act(*a, **s),
                lambda a=args, s=settings: F.batch_norm(*a, **s),
                wants=words,
            )

    def test_refusals(self):
        """What eager would take and a residual block never means."""
        x, v = torch.randn(2, 4, 5, 5), torch.ones(4)
        for words, kind, args in (
            ("(4, 5, 5)", RuntimeError, {"x": x[0]}),
            ('"relu"', ValueError, {"act": "gelu"}),
            ("(2, 4, 5, 1)", RuntimeError, {"residual": x[..., :1]}),
            ("int64", RuntimeError, {"residual": x.long()}),
            ("meta", RuntimeError, {"residual": x.to("meta")}),
            ("(4, 1)", RuntimeError, {"weight": v[:, None]}),
        ):
            with pytest.raises(kind) as found:
                functional.bn_act(**{"x": x, "running_mean": v, "running_var": v} | args)
            refused(found.value, words)

    def test_a_room_refuses_with_a_sentence(self):
        """float64 has no kernel: the cpu room says so when it is asked for by name."""
        missing = rooms.cannot_run(self.op, "cpu")
        if missing:
            pytest.skip(f"the cpu room cannot run here: {missing}")
        with (
            backends.use_backend("cpu"),
            pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run bn_act.fwd: .*float64"),
        ):
            functional.bn_act(torch.randn(2, 4, 5, 5).double(), None, None, training=True)
