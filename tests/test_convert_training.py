"""A converted model trains as its eager self."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from tests.converted import fused, torchvision
from tests.model_law import same_dataflow, same_numerics, same_training

pytestmark = pytest.mark.usefixtures("exact_convolutions")

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
TIMM = ("resnet18", "resnet34", "resnet50", "resnet26d", "resnet50d", "resnext50_32x4d")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_trains_as_eager(name):
    same_training(lambda: getattr(torchvision.models, name)(), fused, size=64)


@pytest.mark.parametrize("name", TIMM)
def test_timm_trains_as_eager(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    same_training(lambda: timm.create_model(name), fused, size=64)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_autocast_trains_as_eager(name):
    same_training(lambda: getattr(torchvision.models, name)(), fused, size=64, steps=1, autocast=True)


@pytest.mark.parametrize("change", ["momentum None", "no tracking", "toggled tracking", "no affine", "no bias"])
def test_norms_of_every_kind(change):
    def norm(old: nn.BatchNorm2d) -> nn.BatchNorm2d:
        settings = {
            "momentum None": {"momentum": None},
            "no tracking": {"track_running_stats": False},
            "no affine": {"affine": False},
        }
        new = nn.BatchNorm2d(old.num_features, **settings.get(change, {}))
        if change == "toggled tracking":
            new.track_running_stats = False
        if change == "no bias":
            new.bias = None
        return new

    plain = torchvision.models.resnet18(num_classes=4)
    for part in list(plain.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, norm(child))
    same_training(lambda: copy.deepcopy(plain), fused, size=64, steps=2, classes=4)


def test_frozen_norms(small):
    """Evaluation statistics under training weights, as detectors fine-tune."""

    def freeze_norms(m: nn.Module) -> nn.Module:
        for part in m.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return m

    freeze_norms(small.train())
    before = copy.deepcopy(small.bn1.state_dict())
    same_dataflow(small, fused, 64, 4, 2, 10)
    same_numerics(small, fused, 64, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), small.bn1.state_dict().values(), strict=True))


@pytest.mark.parametrize("trained", [("fc",), ("layer4", "fc"), ("bn1", "layer2.0.bn2"), ("conv1",)])
def test_subsets_of_parameters(small, trained):
    for name, p in small.named_parameters():
        p.requires_grad_(name.startswith(trained))
    plain, model = copy.deepcopy(small).double(), resnet_fast.convert(small.double())
    x = torch.randn(4, 3, 64, 64).double()
    for m in (plain, model):
        m(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-9 * b.grad.norm(), name


def test_input_gradient_and_layouts(small):
    plain, model = copy.deepcopy(small).double().eval(), resnet_fast.convert(small.double().eval())
    given = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for x in (given, given.to(memory_format=torch.channels_last)):
        grads = []
        for m in (plain, model):
            leaf = x.clone().requires_grad_()
            m(leaf).sum().backward()
            grads.append(leaf.grad)
        assert grads[1].stride() == grads[0].stride()
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9 * float(grads[0].abs().max()))


def test_no_leak_and_repeatable(small):
    model, x = resnet_fast.convert(small), torch.randn(2, 3, 64, 64)

    def step():
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        model(x).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.load_state_dict(state)
        return grads

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_double_backward(small):
    model, plain = resnet_fast.convert(copy.deepcopy(small).double()), small.double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    norms = []
    for m in (model, plain):
        loss = m(x).square().mean()
        grads = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        norms.append(torch.autograd.grad(penalty, m.conv1.weight)[0])
    assert (norms[0] - norms[1]).norm() <= 1e-8 * norms[1].norm()  # a second derivative of batch statistics


def test_checkpointing(small):
    from torch.utils.checkpoint import checkpoint

    model = resnet_fast.convert(small.double())
    x = torch.randn(2, 64, 16, 16, dtype=torch.float64, requires_grad=True)
    block, plain = model.layer1[0].eval(), resnet_fast.restore(copy.deepcopy(model.layer1[0])).eval()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    grad, x.grad = x.grad, None
    plain(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-10, atol=1e-10)
