"""conv_bn_act against torch.nn.functional's conv2d, batch_norm, add and relu."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, refused, refused_as_eager, using
from test_conv2d import NETWORK_LAYERS, window

from resnet_fast import backends, functional
from resnet_fast.testing import check, shapes
from resnet_fast.testing.shapes import Layer


@dataclass(frozen=True)
class Case:
    layer: Layer
    n: int = 2
    training: bool = False
    bias: bool = False
    affine: bool = True
    mean: float = 0.3  # size of the known means


EVERYDAY = Layer(16, 9, 7, 24, 3, 3, padding=1, residual=True)


def plain(
    x,
    weight,
    bias,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    residual,
    training,
    act,
    stride,
    padding,
    dilation,
    groups,
):
    """The composition in plain torch."""
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, 0.1, 1e-5)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if act else y


class TestConvBnAct(Contract):
    op = "conv_bn_act"
    folded = ("bn_weight",)
    uses = ("conv2d", "bn_act")
    wants = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual")
    core = ("everyday", "1x1", "strided", "large")
    small = "small"
    cases = {  # noqa: RUF012
        "everyday": Case(EVERYDAY),
        "training": Case(EVERYDAY, training=True),
        "training, linear": Case(Layer(16, 9, 7, 24, 1, 1, relu=False), training=True, bias=True),
        "1x1": Case(Layer(16, 9, 7, 32, 1, 1)),
        "strided": Case(Layer(16, 9, 7, 24, 3, 3, stride=2, padding=1)),
        "linear": Case(Layer(16, 9, 7, 24, 1, 1, stride=2, relu=False)),
        "linear, residual": Case(Layer(16, 9, 7, 24, 3, 3, padding=1, relu=False, residual=True)),
        "bias": Case(EVERYDAY, bias=True),
        "no affine": Case(EVERYDAY, affine=False),
        "large means": Case(EVERYDAY, mean=20.0),
        "stem": Case(Layer(3, 33, 33, 64, 7, 7, stride=2, padding=3), n=1),
        "small": Case(Layer(2, 3, 4, 3, 3, 3, padding=1, residual=True), bias=True),
        "small, training": Case(Layer(2, 3, 4, 3, 3, 3, padding=1, residual=True), training=True),
        "large": Case(Layer(32, 28, 30, 48, 3, 3, padding=1, residual=True)),
        **{f"odd {layer}": Case(layer, bias=True) for layer in shapes.ODD},
        **{f"network {name}": Case(layer) for name, layer in list(NETWORK_LAYERS.items())[::2]},
    }

    def make(self, case, dtype):
        layer, k = case.layer, case.layer.K
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.randn(k, layer.C // layer.groups, layer.R, layer.S)
        return {
            "x": torch.randn(case.n, layer.C, layer.H, layer.W).to(dtype),
            "weight": (weight / weight[0].numel() ** 0.5).to(dtype),
            "bias": torch.randn(k).to(dtype) if case.bias else None,
            "running_mean": torch.randn(k, dtype=wide) * case.mean,
            "running_var": torch.rand(k, dtype=wide) + 0.5,
            "bn_weight": torch.randn(k, dtype=wide) if case.affine else None,
            "bn_bias": torch.randn(k, dtype=wide) if case.affine else None,
            "residual": torch.randn(case.n, k, layer.P, layer.Q).to(dtype) if layer.residual else None,
            "training": case.training,
            "act": "relu" if layer.relu else None,
            **window(layer),
        }

    def ours(self, running_mean, running_var, **inputs):
        with backends.exact():
            return self.call(functional.conv_bn_act, running_mean, running_var, inputs)

    def plain(self, running_mean, running_var, **inputs):
        return self.call(plain, running_mean, running_var, inputs)

    @staticmethod
    def call(function, mean, var, inputs):
        mean, var = mean.clone(), var.clone()
        y = function(running_mean=mean, running_var=var, **inputs)
        return (y, mean, var) if inputs["training"] else y

    def kink(self, running_mean, running_var, act, **inputs):
        if not act:
            return torch.ones(())
        y = self.plain(running_mean, running_var, act=None, **inputs)
        return (y[0] if isinstance(y, tuple) else y).detach()

    def test_operator_differentiated_directly(self):
        """Calling the registered operator with gradients on, not the function: its own gradient, twice."""
        x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        vectors = [torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(4)]
        operator = torch.ops.resnet_fast.conv_bn_act

        def function(x, w):
            return operator(x, w, None, *vectors, None, 1e-5, False, [1, 1], [1, 1], [1, 1], 1)

        with backends.use_backend("eager"):
            assert torch.autograd.gradcheck(function, (x, weight))
            assert torch.autograd.gradgradcheck(function, (x, weight))
            (g,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
            assert g.requires_grad

    def test_frozen_weights(self, room):
        """Frozen filters and statistics, a trained affine: only its gradients flow."""

        def make():
            return self.make(self.cases["everyday"], torch.float32)

        with using(room):
            check.compare(self.ours, self.plain, make, ("bn_weight", "bn_bias"), self.kink)

    @pytest.mark.parametrize("settings", [{"training": True}, {}], ids=["training", "evaluation"])
    def test_empty(self, settings):
        found = []
        for function in (functional.conv_bn_act, plain):
            x, weight = torch.randn(0, 4, 6, 6), torch.ones(8, 4, 3, 3, requires_grad=True)
            mean, var = torch.zeros(8), torch.ones(8)
            given = {"residual": None, "training": False, "act": "relu", **window(Layer(4, 6, 6, 8, 3, 3))} | settings
            y = function(x, weight, None, mean, var, torch.ones(8), torch.ones(8), **given)
            y.sum().backward()
            assert torch.equal(mean, torch.zeros(8)) and torch.equal(var, torch.ones(8))
            found.append((y.shape, weight.grad))
        assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])

    def test_refusals_as_eager(self):
        x, w, v = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.ones(8)
        base = {
            "running_mean": v, "running_var": v, "bn_weight": v, "bn_bias": v, "bias": None, "residual": None,
            "training": False, "act": "relu", "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
        }  # fmt: skip
        one = "Expected more than 1 value per channel when training, got input size torch.Size([1, 8, 1, 1])"
        for words, given in (
            ("(2, 5, 6, 6)", {"x": torch.randn(2, 5, 6, 6)}),
            ("running_mean", {"running_mean": None, "running_var": None}),
            ("(4,)", {"running_mean": torch.ones(4)}),
            ("(4,)", {"bn_weight": torch.ones(4)}),
            ("(2, 8, 5, 5)", {"residual": torch.randn(2, 8, 5, 5)}),
            ("stride", {"stride": 0}),
            ("int64", {"x": x.long()}),
            (one, {"x": x[:1, :, :3, :3], "training": True}),
        ):
            for weight in (w, w.clone().requires_grad_()):  # the fused operator, and the two that train
                arguments = {"x": x, "weight": weight} | base | given
                refused_as_eager(
                    lambda a=arguments: functional.conv_bn_act(**a), lambda a=arguments: plain(**a), wants=words
                )

    def test_refusals(self):
        x, w, v = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.ones(8)
        for words, kind, given in (
            ('"relu"', ValueError, {"act": "silu"}),
            ("(2, 8, 4, 1)", RuntimeError, {"residual": torch.randn(2, 8, 4, 1)}),
            ("meta", RuntimeError, {"running_var": v.to("meta")}),
            ("int64", RuntimeError, {"residual": torch.ones(2, 8, 4, 4).long()}),
        ):
            with pytest.raises(kind) as found:
                functional.conv_bn_act(
                    **{"x": x, "weight": w, "bias": None, "running_mean": v, "running_var": v} | given
                )
            refused(found.value, words)
