"""convert, restore, explain: the same model, faster."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import resnet_fast
from tests.model_law import realistic, same_dataflow, same_evaluation, same_numerics, same_training

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
TIMM = ("resnet18", "resnet34", "resnet50", "resnet26d", "resnet50d", "resnext50_32x4d")
#: chains a converted model must run fused: convolutions with their norms, and the stem's pooling
CHAINS = {"resnet18": 21, "resnet34": 37, "resnet50": 54, "resnet101": 105, "resnet152": 156}


def fused(model: nn.Module) -> nn.Module:
    model = resnet_fast.convert(model)
    assert resnet_fast.explain(model).fused > 0
    return model


@pytest.fixture(autouse=True)
def exact_convolutions():
    """The general law is for direct convolutions; Winograd's own bound is tested with the kernels."""
    with resnet_fast.exact():
        yield


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


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_fused(name):
    report = resnet_fast.explain(resnet_fast.convert(getattr(torchvision.models, name)()))
    assert report.fused == CHAINS[name]
    assert not any(row.note for row in report.rows)


@pytest.fixture
def small():
    return realistic(torchvision.models.resnet18(num_classes=10))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_keeps_parameters_keys_class_and_mode(small):
    before = {k: v.data_ptr() for k, v in small.state_dict().items()}
    kinds = [type(m) for m in small.modules()]
    converted = resnet_fast.convert(small.eval())
    assert converted is small and not converted.training
    assert {k: v.data_ptr() for k, v in converted.state_dict().items()} == before
    assert all(isinstance(m, kind) for m, kind in zip(converted.modules(), kinds, strict=True))


def test_restore_is_bitwise(small):
    x, plain = torch.randn(2, 3, 64, 64), copy.deepcopy(small)
    kinds = [type(m) for m in small.modules()]
    attributes = [set(vars(m)) for m in small.modules()]
    restored = resnet_fast.restore(resnet_fast.convert(small))
    assert [type(m) for m in restored.modules()] == kinds
    assert [set(vars(m)) for m in restored.modules()] == attributes
    assert torch.equal(run(restored.train(), x), run(plain.train(), x))
    assert torch.equal(run(restored.eval(), x), run(plain.eval(), x))


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_stay_fused(small, way):
    model, x = resnet_fast.convert(small.eval()), torch.randn(2, 3, 64, 64)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert resnet_fast.explain(other).fused == resnet_fast.explain(model).fused == CHAINS["resnet18"]
    assert torch.equal(run(other, x), run(model, x))
    with torch.no_grad():  # a copy of its own: new weights count, and only there
        before = run(model, x)
        other.layer1[0].conv1.weight.mul_(2)
        other.bn1.bias.add_(1)
    assert torch.equal(run(model, x), before)
    same_evaluation(resnet_fast.restore(copy.deepcopy(other)), other, x)


def test_state_dict_both_ways(small):
    plain, file = copy.deepcopy(small), io.BytesIO()
    model = resnet_fast.convert(torchvision.models.resnet18(num_classes=10))
    model.load_state_dict(plain.state_dict(), strict=True)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = torchvision.models.resnet18(num_classes=10)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), plain.state_dict().values()))
    same_evaluation(plain.eval(), model.eval(), torch.randn(2, 3, 64, 64))


def test_new_weights_are_used(small):
    """After an optimiser step, .data edits, an EMA swap and load_state_dict there is nothing stale."""
    model, x = resnet_fast.convert(small.eval()), torch.randn(2, 3, 64, 64)
    run(model, x)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()
    model.layer2[0].conv1.weight.data.mul_(1.5)
    ema = torch.optim.swa_utils.AveragedModel(model)
    model.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in ema.module.state_dict().items()})
    same_evaluation(resnet_fast.restore(copy.deepcopy(model)), model, x)
    same_evaluation(resnet_fast.restore(copy.deepcopy(ema.module)), ema.module, x)


def test_a_new_head_is_used(small):
    model = resnet_fast.convert(small)
    model.fc = nn.Linear(512, 7)
    assert run(model.eval(), torch.randn(2, 3, 64, 64)).shape == (2, 7)


def note(model: nn.Module, name: str) -> str:
    return next(row.note for row in resnet_fast.explain(model).rows if row.name == name)


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
    torch.testing.assert_close(run(model, x), want, rtol=1e-4, atol=1e-4)


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
    plain, model = copy.deepcopy(small).eval(), resnet_fast.convert(small.eval())
    for x in (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)):
        grads = []
        for m in (plain, model):
            leaf = x.clone().requires_grad_()
            m(leaf).sum().backward()
            grads.append(leaf.grad)
        assert grads[1].stride() == grads[0].stride()
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))


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


def test_compiles_whole(small):
    model, x = resnet_fast.convert(small), torch.randn(2, 3, 64, 64)
    want = [g.clone() for g in torch.autograd.grad(model(x).square().mean(), list(model.parameters()))]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6))


def test_checkpointing(small):
    from torch.utils.checkpoint import checkpoint

    model, x = resnet_fast.convert(small), torch.randn(2, 64, 16, 16, requires_grad=True)
    block, plain = model.layer1[0].eval(), resnet_fast.restore(copy.deepcopy(model.layer1[0])).eval()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    grad, x.grad = x.grad, None
    plain(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-4)


def test_explain_leaves_the_model_alone(small):
    model, x = resnet_fast.convert(small), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    report = resnet_fast.explain(model, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.training and "forward" not in vars(model.layer1[0])
    text = str(report)
    assert "layer1.0" in text and "bn_act" in text
    assert any("cpu" in label or "eager" in label for row in report.rows for label in row.ran)


def test_explain_before_convert_says_what_would_happen(small):
    assert "would fuse" in note(small, "layer1.0")


def test_bad_input():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        resnet_fast.convert("resnet18")
    model = resnet_fast.convert(torchvision.models.resnet18())
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(2, 4, 64, 64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))


def test_converting_twice_changes_nothing(small):
    model = resnet_fast.convert(resnet_fast.convert(small))
    assert resnet_fast.explain(model).fused == CHAINS["resnet18"]
    resnet_fast.restore(model)
    assert type(model) is torchvision.models.ResNet
