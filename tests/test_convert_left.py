"""What convert leaves alone, what it follows, and what only looks like a chain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import resnet_fast
from resnet_fast.testing import check
from tests.converted import CHAINS, fused, note, run
from tests.model_law import realistic, same_evaluation

pytestmark = pytest.mark.usefixtures("exact_convolutions")


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_inner_modules_run(small, when):
    seen: list[torch.Size] = []
    if when == "before":
        small.layer1[0].conv2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model = resnet_fast.convert(small.eval())
    if when == "after":
        model.layer1[0].conv2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    x = torch.randn(2, 3, 64, 64)
    run(model, x)
    assert seen == [(2, 64, 16, 16)]
    assert "hooks" in note(model, "layer1.0")
    assert resnet_fast.explain(model).fused >= CHAINS["resnet18"] - 3


def test_backward_hooks_and_global_hooks_run(small):
    model, x, seen = resnet_fast.convert(small), torch.randn(2, 3, 64, 64), []
    model.layer1[0].conv2.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append("global") if isinstance(m, nn.Conv2d) else None
    )
    try:
        model(x).sum().backward()
    finally:
        handle.remove()
    assert "backward" in seen
    assert seen.count("global") == 20  # every convolution's forward ran


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batchnorm(small, when):
    plain = copy.deepcopy(small).eval()
    if when == "before":
        model = resnet_fast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(small))
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fast.convert(small))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 20
    same_evaluation(plain, model.eval(), torch.randn(2, 3, 64, 64))


def test_parametrised_and_pruned_convolutions(small):
    nn.utils.parametrizations.spectral_norm(small.layer1[0].conv1)
    prune.random_unstructured(small.layer2[0].conv2, "weight", amount=0.5)
    nn.utils.parametrizations.weight_norm(small.layer3[0].conv1)
    x = torch.randn(2, 3, 64, 64)
    want = run(small.eval(), x)
    model = resnet_fast.convert(small)
    assert note(model, "layer1.0") and note(model, "layer2.0") and note(model, "layer3.0")
    got = run(model, x)
    exact = run(resnet_fast.restore(model).double(), x.double())  # weight_norm cannot be copied: the model itself
    check.law(got, want, exact)


class Odd(nn.Module):
    """Patterns that must not be fused as they look."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2, self.shared = (nn.BatchNorm2d(8) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.conv1(x)
        b = self.relu(self.bn1(a)) + a.mean()  # a is used without its norm
        c = self.relu(self.bn2(b))  # pre-activation: no convolution before it
        d = self.shared(self.conv2(c)) + self.shared(self.conv3(c))  # one norm, two convolutions
        return self.relu(d) + b


def test_what_only_looks_like_a_chain():
    model = realistic(Odd())
    converted = fused(copy.deepcopy(model))
    assert "also used" in note(converted, "") and "more than once" in note(converted, "")
    x = torch.randn(4, 8, 9, 9)
    for training in (True, False):
        ours, plain = converted.train(training), model.train(training)
        torch.testing.assert_close(run(ours, x), run(plain, x))
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = resnet_fast.nn.BasicBlock(8, 8)

    def forward(self, x):
        return self.block(self.block(x))


def test_a_block_called_twice():
    model = realistic(Twice())
    with resnet_fast.use_backend("eager"):
        plain = copy.deepcopy(model)
    converted, x = resnet_fast.convert(model), torch.randn(4, 8, 9, 9)
    out = run(converted.train(), x)
    with resnet_fast.use_backend("eager"):
        torch.testing.assert_close(out, run(plain.train(), x))
    assert int(converted.block.bn1.num_batches_tracked) == 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else x


def test_a_forward_that_cannot_be_traced_keeps_its_parts_fused():
    model = resnet_fast.convert(Branches())
    assert "cannot trace" in note(model, "")
    assert next(row for row in resnet_fast.explain(model).rows if row.name == "body").fused == 1


def test_changed_settings_are_followed():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = resnet_fast.convert(timm.create_model("resnet18", num_classes=10, drop_rate=0.0)).train()
    x = torch.randn(2, 3, 64, 64)
    model.set_grad_checkpointing(True)
    assert "changed" in note(model, "")
    model(x).sum().backward()
    model.set_grad_checkpointing(False)
    assert note(model, "") == ""
    assert model.eval().forward_features(x).shape == (2, 512, 2, 2)
