"""The package's own blocks against the same blocks written in plain torch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.nn import BasicBlock, Bottleneck, ConvBNAct, blocks
from resnet_fast.testing import check
from tests.model_law import away_from_kinks, realistic


class Plain(nn.Module):
    """A residual block as the paper draws it, on the modules of ours."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x):
        b = self.block
        y = torch.relu(b.bn1(b.conv1(x)))
        y = b.bn2(b.conv2(y))
        if isinstance(b, Bottleneck):
            y = b.bn3(b.conv3(torch.relu(y)))
        return torch.relu(y + (x if b.downsample is None else b.downsample(x)))


def projection(inplanes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


BLOCKS = {
    "basic": (lambda: BasicBlock(8, 8), (2, 8, 9, 7)),
    "basic, projection": (lambda: BasicBlock(8, 12, 2, projection(8, 12, 2)), (2, 8, 9, 7)),
    "bottleneck": (lambda: Bottleneck(16, 4), (2, 16, 7, 7)),
    "bottleneck, projection": (lambda: Bottleneck(8, 4, 2, projection(8, 16, 2)), (2, 8, 9, 9)),
    "grouped": (lambda: Bottleneck(16, 4, groups=2, base_width=64), (2, 16, 7, 7)),
    "dilated": (lambda: Bottleneck(16, 4, dilation=2), (2, 16, 9, 9)),
    "wide": (lambda: Bottleneck(16, 4, base_width=128), (2, 16, 7, 7)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_the_papers(name, training):
    """Output, statistics and every gradient in float64, by the tolerance law."""
    make, shape = BLOCKS[name]
    ours = make().double().train(training)
    plain = Plain(ours).train(training)
    wants = ["x", *(key for key, _ in ours.named_parameters())]
    counts = {key for key, b in ours.named_buffers() if not b.is_floating_point()}

    def drawn():
        realistic(ours)
        state = {key: t.detach().clone() for key, t in ours.state_dict().items() if key not in counts}
        return {"x": torch.randn(shape, dtype=torch.float64)} | state

    def result(module, prefix, x, **state):
        """The block's output and the statistics it leaves, on the given tensors."""
        state = {key: t if t.requires_grad else t.clone() for key, t in state.items()}
        y = torch.func.functional_call(module, {prefix + key: t for key, t in state.items()}, x)
        return y, *(state[key] for key, b in ours.named_buffers() if key not in counts)

    check.compare(partial(result, ours, ""), partial(result, plain, "block."), drawn, wants)
    steps = {key: int(ours.state_dict()[key]) for key in counts}
    ours(drawn()["x"])
    assert steps and {key: int(ours.state_dict()[key]) - training for key in counts} == steps


@pytest.mark.parametrize("name", ["basic", "bottleneck, projection"])
def test_gradcheck(name):
    make, shape = BLOCKS[name]
    x = torch.randn(shape, dtype=torch.float64)[:, :, :4, :4].clone().requires_grad_()
    block = away_from_kinks(make().double(), x.detach())
    assert torch.autograd.gradcheck(block, (x,))


def test_identity_keeps_the_shape_and_projection_halves_it():
    x = torch.randn(1, 64, 56, 56)
    assert BasicBlock(64, 64).eval()(x).shape == (1, 64, 56, 56)
    assert BasicBlock(64, 128, 2, projection(64, 128, 2)).eval()(x).shape == (1, 128, 28, 28)


def test_conv_bn_act():
    module = realistic(ConvBNAct(3, 8, 3, stride=2)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    residual = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    plain = copy.deepcopy(module)
    torch.testing.assert_close(module(x), torch.relu(plain.bn(plain.conv(x))))
    torch.testing.assert_close(module(x, residual), torch.relu(plain.bn(plain.conv(x)) + residual))
    torch.testing.assert_close(ConvBNAct(3, 8, act=None).double()(x).min() < 0, torch.tensor(True))
    assert "relu" in repr(module)


def test_other_norms_run_unfused():
    block = BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c))
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), Plain(block)(x))
    report = resnet_fast.explain(block)
    assert report.fused == 0 and "GroupNorm" in report.rows[0].note


def test_bad_arguments():
    with pytest.raises(ValueError, match="groups=1"):
        BasicBlock(8, 8, groups=2)
    with pytest.raises(RuntimeError, match="wants x of 8 channels"):
        BasicBlock(8, 8)(torch.randn(1, 4, 6, 6))


class End(nn.Module):
    """A network's last stage and its pool, ours or in plain torch."""

    def __init__(self, stage: nn.Sequential, plain: bool) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(Plain(block) for block in stage)) if plain else stage
        self.pool, self.plain = nn.AdaptiveAvgPool2d(1), plain

    def forward(self, x):
        return self.pool(self.stage(x)) if self.plain else blocks.pooled(x, self.stage, self.pool)


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 8), lambda: Bottleneck(16, 4)], ids=["basic", "bottleneck"])
def test_the_end_of_a_network(make, memory):
    """The last block and the pool behind it: output, statistics and every gradient in float64, by the tolerance law."""
    stage = nn.Sequential(make(), make()).double().train()
    for block in stage:
        block.memory = memory
    ours, plain, channels = End(stage, False), End(stage, True), stage[0].conv1.in_channels
    counts = {key for key, b in stage.named_buffers() if not b.is_floating_point()}

    def drawn():
        realistic(stage)
        state = {key: t.detach().clone() for key, t in stage.state_dict().items() if key not in counts}
        return {"x": torch.randn(2, channels, 5, 4, dtype=torch.float64)} | state

    def result(module, x, **state):
        state = {key: t if t.requires_grad else t.clone() for key, t in state.items()}
        inner = {key.replace(".", ".block." if module.plain else ".", 1): t for key, t in state.items()}
        y = torch.func.functional_call(module, {f"stage.{key}": t for key, t in inner.items()}, x)
        return y, *(state[key] for key, b in stage.named_buffers() if key not in counts)

    names = ["x", *(key for key, _ in stage.named_parameters())]
    check.compare(partial(result, ours), partial(result, plain), drawn, names)
    made = ours(drawn()["x"].requires_grad_()).grad_fn.name()
    assert ("BnActGlobalAvgPool2d" in made) == (memory == "default"), made


def test_the_end_leaves_what_is_not_plain_alone():
    """Hooks run, and pools to other sizes stay pools; a block asked through its stage is the same block."""
    stage, x = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)).train(), torch.randn(2, 8, 6, 6)
    for pool in (nn.AdaptiveAvgPool2d(2), nn.AvgPool2d(3), nn.Identity()):
        assert blocks.pooled(x, stage, pool).shape == pool(stage(x)).shape
    seen = []
    for module in (stage, stage[1], nn.AdaptiveAvgPool2d(1)):
        handle = module.register_forward_hook(lambda m, given, y: seen.append(tuple(y.shape)))
        blocks.pooled(x, stage, module if isinstance(module, nn.AdaptiveAvgPool2d) else nn.AdaptiveAvgPool2d(1))
        handle.remove()
    assert seen == [(2, 8, 6, 6), (2, 8, 6, 6), (2, 8, 1, 1)]
