"""Small networks train three steps with every operator in the triton room, as they do with every operator eager."""

import copy

import pytest
import torch

from resnet_fast import backends, nn
from resnet_fast.models.cifar import CifarResNet
from resnet_fast.testing import check
from tests.model_law import away_from_kinks


class Bottlenecks(torch.nn.Module):
    """An RGB stem, max pooling, two bottlenecks (one strides and projects) and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ConvBNAct(3, 16, 7, stride=2, padding=3)
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        down = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1, stride=2, bias=False), torch.nn.BatchNorm2d(32))
        self.blocks = torch.nn.Sequential(nn.Bottleneck(16, 8, stride=2, downsample=down), nn.Bottleneck(32, 8))
        self.mean, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(32, 5)

    def forward(self, x):
        """Logits."""
        x = nn.fused.stem(x, [(self.stem.conv, self.stem.bn)], self.pool)
        return self.fc(nn.blocks.pooled(x, self.blocks, self.mean).flatten(1))


def train(model, backend, images, labels):
    """Three steps of SGD; the losses, and the operators that ran."""
    model, losses = copy.deepcopy(model).to(memory_format=torch.channels_last), []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with backends.use_backend(backend), backends.record() as events:
        for _ in range(3):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    return model, torch.stack(losses), events


NETWORKS = (
    pytest.param(lambda: CifarResNet(8, num_classes=5), id="basic", marks=pytest.mark.proof),
    pytest.param(Bottlenecks, id="bottleneck"),
)


@pytest.mark.parametrize("make", NETWORKS)
def test_training(make):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    labels = torch.tensor([1, 3])
    model = away_from_kinks(make(), images).train()  # one ReLU that rounds to its other side would hide any tolerance
    ours, losses, events = train(model, "triton", images, labels)
    theirs, expected, _ = train(model, "eager", images, labels)
    exact, truth, _ = train(model.double(), "eager", images.double(), labels)
    assert events and {room for _, _, room in events} == {"triton"}
    doors = {(op, door) for op, door, _ in events}
    inner = {("bn_act_conv2d", "fwd"), ("bn_act_conv2d", "bwd")}
    assert inner <= doors, (
        "the norms inside the blocks are prologues, and their backward is the convolutions' epilogues"
    )
    ends = {("bn_act_global_avg_pool2d", "fwd"), ("bn_act_global_avg_pool2d", "bwd")}
    assert ends <= doors, "the last block ends in the mean"
    assert torch.unique(losses).numel() == 3, "the steps change something"
    check.law(losses, expected, truth, "losses")
    # Parameters and statistics after the steps, judged together and as parts of their size.
    ours, theirs, exact = (
        [t for t in found.state_dict().values() if t.is_floating_point()] for found in (ours, theirs, exact)
    )
    sizes = [t.abs().max() for t in exact]
    check.law(*([t / size.to(t.dtype) for t, size in zip(state, sizes)] for state in (ours, theirs, exact)), "state")
