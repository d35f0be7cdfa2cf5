"""The 6n + 2 networks: the paper's sizes, both shortcuts, the plain twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_fast import models
from resnet_fast.models.cifar import PadShortcut
from tests.model_law import away_from_kinks, errors


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_parameters_of_the_papers_table_6(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert round(count(models.create_model(name)) / 1e6, 1 if name == "resnet110" else 2) == millions


def test_parameters_of_the_deepest() -> None:
    with torch.device("meta"):
        assert count(models.resnet1202()) == 19_421_274


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_a_plain_twin_has_the_residual_nets_layers(depth: int) -> None:
    with torch.device("meta"):
        plain, residual = models.create_model(f"plain{depth}"), models.create_model(f"resnet{depth}")
    shapes = [[p.shape for p in m.parameters()] for m in (plain, residual)]
    assert shapes[0] == shapes[1]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in plain.modules()) == depth


def test_option_b_adds_two_projections() -> None:
    with torch.device("meta"):
        a, b = models.resnet20(), models.resnet20(shortcut="B")
    assert count(b) - count(a) == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def test_option_a_keeps_every_other_pixel_and_pads_with_zeros() -> None:
    x = torch.randn(2, 3, 5, 6)
    y = PadShortcut(3, 7, 2)(x)
    assert y.shape == (2, 7, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


class Specification(nn.Module):
    """The residual network over the same modules, written out in plain torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.m
        x = torch.relu(m.bn1(m.conv1(x)))
        for block in (*m.layer1, *m.layer2, *m.layer3):
            shortcut = x if block.downsample is None else block.downsample(x)
            y = torch.relu(block.bn1(block.conv1(x)))
            x = torch.relu(block.bn2(block.conv2(y)) + shortcut)
        return m.fc(x.mean((2, 3)))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_against_plain_torch(shortcut: str, training: bool) -> None:
    x = torch.randn(4, 3, 32, 32)
    model = away_from_kinks(models.resnet20(shortcut=shortcut), x).train(training)
    last = x.to(memory_format=torch.channels_last)
    runs = []
    for run, given in (
        (copy.deepcopy(model), x),
        (Specification(copy.deepcopy(model)), x),
        (Specification(copy.deepcopy(model).to(memory_format=torch.channels_last)), last),
        (Specification(copy.deepcopy(model).double()), x.double()),
    ):
        y = run(given)
        y.square().sum().backward()
        runs.append({"output": y.detach()} | {f"gradient {i}": p.grad for i, p in enumerate(run.parameters())})
    ours, *eager, exact = runs
    own = [errors(run, exact) for run in eager]
    for name, error in errors(ours, exact).items():
        typical = [(sum(e**2 for e in o.values()) / len(o)) ** 0.5 for o in own]
        allowed = 2 * max(*typical, *(o[name] for o in own)) + torch.finfo(torch.float32).eps
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_a_plain_net_trains() -> None:
    torch.manual_seed(0)
    model = models.plain20()
    x, target = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("depth", [7, 18, 21])
def test_depths_that_are_not_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match="6n"):
        models.CifarResNet(depth)


def test_unknown_shortcut() -> None:
    with pytest.raises(ValueError, match="wanted shortcut"):
        models.resnet20(shortcut="C")
