"""tune: choices made ahead of time, and a model that comes out as it went in."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import _choices, _native, backends

compiled = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


def network() -> nn.Module:
    """A stem, a block and what has a state beside its parameters: dropout's generator, running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        resnet_fast.nn.ConvBNAct(3, 16, 3, padding=1), resnet_fast.nn.BasicBlock(16, 16), nn.Dropout(0.5)
    )


@compiled
@pytest.mark.parametrize("training", [True, False])
def test_choices_are_kept_and_the_model_is_as_it_was(cache, monkeypatch, training):
    monkeypatch.setenv("RESNET_FAST_TUNE", "0")  # an explicit tune() measures all the same
    model = network().train(training)
    model[0].conv.weight.grad = torch.ones_like(model[0].conv.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, state = torch.randn(2, 3, 8, 8), torch.random.get_rng_state()
    found = resnet_fast.tune(model, x)
    assert found > 0 and resnet_fast.tune(model, x) == 0, "the second time everything is known"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    grads = [p.grad for p in model.parameters()]
    assert torch.equal(grads[0], torch.ones_like(grads[0])) and all(g is None for g in grads[1:])
    kept = json.loads(_choices.path().read_text())["choices"]
    assert len(kept) == found
    assert any("|bwd|" in key for key in kept) == training, "in training the gradient's choices too"


@compiled
def test_a_run_after_it_measures_nothing(cache, monkeypatch):
    model, x = network().train(), torch.randn(2, 3, 8, 8)
    resnet_fast.tune(model, x)
    monkeypatch.setattr(backends, "_tune", lambda *a: pytest.fail(f"measured again: {a[:2]}"))
    model(x).sum().backward()


@compiled
def test_a_frozen_model(cache):
    frozen, x = resnet_fast.freeze(network().eval()), torch.randn(2, 3, 8, 8)
    assert resnet_fast.tune(frozen, x) == 1, "the plan of the whole network is one choice"
    assert resnet_fast.tune(frozen, x) == 0
    with pytest.raises(ValueError, match="frozen model, which has no gradients"):
        resnet_fast.tune(frozen, x, backward=True)


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"wanted a torch.nn.Module, got str"):
        resnet_fast.tune("resnet50", torch.zeros(1))
    with pytest.raises(ValueError, match="requiring gradients"):
        resnet_fast.tune(nn.ReLU(), torch.zeros(1), backward=True)


def test_buffers_come_back_when_the_model_fails(monkeypatch):
    class Fails(nn.Module):
        """Moves its running mean, then raises."""

        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            self.bn(x)
            raise RuntimeError("no more")

    model = Fails().train()
    with pytest.raises(RuntimeError, match="no more"):
        resnet_fast.tune(model, torch.randn(2, 3, 4, 4))
    assert model.bn.running_mean.abs().sum() == 0 and model.bn.num_batches_tracked == 0
    assert not _choices._insisting
