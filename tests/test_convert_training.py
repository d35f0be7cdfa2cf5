"""A converted model trains as its eager self."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fast
from tests.converted import fused, torchvision
from tests.model_law import (
    FACTOR,
    away_from_kinks,
    errors,
    realistic,
    same_course,
    same_dataflow,
    same_numerics,
    same_training,
)

pytestmark = pytest.mark.usefixtures("exact_convolutions")

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
TIMM = ("resnet18", "resnet34", "resnet50", "resnet26d", "resnet50d", "resnext50_32x4d")


#: A float64 step of these moves gigabytes of weights and gradients, which is where their time goes, not in arithmetic.
GIANTS = ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_trains_as_eager(name):
    same_training(lambda: getattr(torchvision.models, name)(), fused, size=64, steps=1 if name in GIANTS else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", GIANTS)
def test_giants_train_three_steps_as_eager(name):
    same_training(lambda: getattr(torchvision.models, name)(), fused, size=64)


@pytest.mark.parametrize("name", TIMM)
def test_timm_trains_as_eager(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    same_training(lambda: timm.create_model(name), fused, size=64)


@pytest.mark.parametrize("memory", ["default", pytest.param("lean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_five_steps_by_the_law(autocast, memory):
    """Rounding after rounding: the fifth step's loss, gradients and statistics are as near float64's as eager's."""
    model = realistic(torchvision.models.resnet18(num_classes=10)).train()
    same_numerics(model, lambda m: resnet_fast.convert(m, memory=memory), 64, 4, 10, autocast, steps=5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_five_steps_in_float64(name):
    same_course(getattr(torchvision.models, name)(num_classes=10).train(), fused, 64, 2, 5, 10)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_five_steps_of_every_network(name, autocast):
    model = realistic(getattr(torchvision.models, name)(num_classes=10)).train()
    same_numerics(model, fused, 64, 4, 10, autocast, steps=5)
    if not autocast:
        same_course(model, fused, 64, 4, 5, 10)


def test_lean_trains_as_eager():
    """Every torchvision block kind, its convolution outputs computed again."""
    for name in ("resnet18", "resnext50_32x4d"):
        model = realistic(getattr(torchvision.models, name)(num_classes=10)).train()
        same_dataflow(model, lambda m: resnet_fast.convert(m, memory="lean"), 64, 2, 2, 10)


def test_bottlenecks_under_autocast():
    same_numerics(torchvision.models.resnet50(num_classes=10), fused, 64, 4, 10, autocast=True)


@pytest.mark.parametrize(("name", "memory"), [("seresnet18", "default"), ("seresnet50", "lean"), ("resnet26d", "lean")])
def test_squeeze_and_excite_and_deep_stems(name, memory):
    """Their convolutions and norms run fused, what is between the last norm and the addition as it is."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = realistic(timm.create_model(name, num_classes=10)).train()
    report = resnet_fast.explain(resnet_fast.convert(copy.deepcopy(model), memory=memory))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert report.fused >= norms, report
    same_dataflow(model, lambda m: resnet_fast.convert(m, memory=memory), 64, 2, 2, 10)


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


def every_subset(model: nn.Module, change, size: int) -> None:
    """Each parameter alone, all but it, none, with and without the input: the gradients eager has, and no others."""
    plain = copy.deepcopy(model).double().train()
    ours = change(copy.deepcopy(plain))
    names = [name for name, _ in plain.named_parameters()]
    subsets = [set(names)] + [{n} for n in names] + [set(names) - {n} for n in names[:4]] + [set()]
    x, largest = torch.randn(2, 3, size, size).double(), 0.0
    for wanted in subsets:
        for with_input in (False, True):
            found = []
            for m in (plain, ours):
                for name, p in m.named_parameters():
                    p.requires_grad_(name in wanted)
                    p.grad = None
                leaf = x.clone().requires_grad_(with_input)
                loss = m(leaf).square().mean()
                assert loss.requires_grad == bool(wanted or with_input)
                if loss.requires_grad:
                    loss.backward()
                found.append({n: p.grad for n, p in m.named_parameters()} | {"x": leaf.grad})
            if wanted == set(names):
                largest = max(float(g.norm()) for g in found[0].values() if g is not None)
            for name, want in found[0].items():
                got = found[1][name]
                assert (got is None) == (want is None), f"{name}, of {wanted}"
                if want is not None:
                    assert (got - want).norm() <= 1e-9 * max(float(want.norm()), 1e-3 * largest), f"{name}, of {wanted}"


@pytest.mark.parametrize("memory", ["default", "lean"])
def test_every_subset_of_parameters_and_input(memory):
    """A network of one stem and two bottlenecks with projections has every kind of chain."""
    from tests.test_distributed import Tiny

    model = realistic(Tiny())
    every_subset(model, lambda m: resnet_fast.convert(m, memory=memory), 12)


@pytest.mark.parametrize("trained", [("fc",), ("layer4", "fc"), ("bn1", "layer2.0.bn2")])
def test_parts_of_a_network_trained(small, trained):
    for name, p in small.named_parameters():
        p.requires_grad_(name.startswith(trained))
    same_dataflow(small, fused, 64, 4, 2, 10)


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
        # In float64 only the dataflow can differ: nine digits, as everywhere (model_law).
        assert (grads[1] - grads[0]).abs().max() <= 1e-9 * grads[0].abs().max()


@pytest.mark.parametrize("memory", ["default", "lean"])
def test_repeats_bit_for_bit(small, memory):
    model, x = resnet_fast.convert(small, memory=memory), torch.randn(2, 3, 64, 64)

    def step():
        state = copy.deepcopy(model.state_dict())
        model.zero_grad()
        model(x).square().mean().backward()
        found = [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]
        model.load_state_dict(state)
        return found

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_deterministic_mode(small):
    """Nothing of ours is refused by it, and the gradients are the same."""
    model, x = resnet_fast.convert(small.eval(), memory="lean"), torch.randn(2, 3, 64, 64)
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def live_bytes() -> tuple[int, int]:
    """Tensors alive in this process, and their bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return len(tensors), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident() -> int:
    """Bytes of this process in memory; 0 where there is no /proc, and then only tensors are counted."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def no_leak(steps: int, warm: int) -> None:
    """Steps of SGD with momentum: neither tensors nor the resident set may grow after the first few."""
    from tests.test_distributed import Tiny

    for memory in ("default", "lean"):
        model = resnet_fast.convert(Tiny(), memory=memory)
        optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        start = None
        for i in range(steps):
            if i == warm:
                start = *live_bytes(), resident()
            x = torch.randn(4, 3, 24, 24)
            loss = model(x).square().mean()
            if i % 7 == 3:
                del loss  # a forward without a backward
                continue
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            del loss
        end = *live_bytes(), resident()
        assert end[0] <= start[0] and end[1] <= start[1], f"{memory}: {start[0]} tensors became {end[0]}"
        # A leak of one of a step's saved maps is 18 KB a step, of all of them 200.
        assert end[2] - start[2] <= max(3e6, 4e3 * (steps - warm)), f"{memory}: {end[2] - start[2]} bytes more"


def test_no_leak():
    no_leak(60, 20)


@pytest.mark.slow
def test_no_leak_in_500_steps():
    no_leak(500, 50)


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_nonfinite_inputs_as_eager(small, value, memory):
    """A NaN or infinity in one image: the same outputs and gradients are not finite, in training and evaluation."""
    x = torch.randn(2, 3, 64, 64)
    x[0, 1, 20, 20] = value
    for training in (True, False):
        plain = copy.deepcopy(small).train(training)
        ours = resnet_fast.convert(copy.deepcopy(plain), memory=memory)
        found = []
        for m in (ours, plain):
            leaf = x.clone().requires_grad_()
            out = m(leaf)
            out.sum().backward()
            found.append([out, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
        for mine, eager in zip(*found, strict=True):
            assert torch.equal(mine.isfinite(), eager.isfinite())


def test_backward_frees_as_it_goes(small):
    """Halfway through backward the blocks behind have given back what they kept."""
    model, x = resnet_fast.convert(small), torch.randn(8, 3, 64, 64)
    kept: dict[int, weakref.ref] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[len(kept)] = weakref.ref(t)
        return t

    def alive() -> int:  # parameters stay in any case
        return sum(r() is not None and not isinstance(r(), torch.nn.Parameter) for r in list(kept.values()))

    half: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))))
        y.register_hook(lambda g: half.append(alive()))
        out = model.layer4(model.layer3(y)).mean()
    before = alive()
    out.backward()
    assert half[0] <= 0.75 * before, (half, before)


def test_lean_refuses_a_gradient_of_a_gradient(small):
    model = resnet_fast.convert(small.double(), memory="lean")
    loss = model(torch.randn(2, 3, 64, 64).double()).square().mean()
    with pytest.raises(RuntimeError, match='memory="default"'):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


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


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(small, reentrant, memory):
    """torch.utils.checkpoint around a block: the gradients without it, bit for bit. Where its first run has no gradients
    the evaluation folds convolution and norm, and rounds otherwise: there by the law, away from the kinks."""
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 64, 16, 16)
    plain = away_from_kinks(small.layer2[0], x).eval()
    eager, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    block = resnet_fast.convert(small, memory=memory).layer2[0]

    def gradients(module, run):
        given = x.to(next(module.parameters()).dtype, copy=True).requires_grad_()
        run(given).square().sum().backward()
        found = {"gradient of x": given.grad} | {f"gradient of {k}": p.grad for k, p in module.named_parameters()}
        module.zero_grad(set_to_none=True)
        return found

    found = gradients(block, lambda given: checkpoint(block, given, use_reentrant=reentrant))
    if not reentrant:
        without = gradients(block, block)
        assert all(torch.equal(found[k], without[k]) for k in without)
    truth = gradients(exact, exact)
    own, mine = errors(gradients(eager, eager), truth), errors(found, truth)
    typical = sum(e * e for e in own.values()) ** 0.5 / len(own) ** 0.5
    for name, error in mine.items():
        assert error <= FACTOR * max(own[name], typical) + torch.finfo(torch.float32).eps, name
