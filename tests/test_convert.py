"""convert, restore, explain: the same model, faster."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import resnet_fast
from tests.converted import CHAINS, fused, note, run, torchvision
from tests.model_law import same_dataflow, same_evaluation, same_numerics

pytestmark = pytest.mark.usefixtures("exact_convolutions")


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_fused(name):
    report = resnet_fast.explain(resnet_fast.convert(getattr(torchvision.models, name)()))
    assert report.fused == CHAINS[name]
    assert not any(row.note for row in report.rows)


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


def test_compiles_whole(small):
    def compiled(model):
        model = fused(model)
        model.compile(fullgraph=True, backend="aot_eager")
        return model

    torch._dynamo.reset()
    same_numerics(small, compiled, 64, 2, 10)
    torch._dynamo.reset()
    same_dataflow(small, compiled, 64, 2, 1, 10)


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
