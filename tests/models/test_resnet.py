"""The ImageNet family against torchvision: parameters, state_dicts, seeds, outputs, arguments."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from resnet_fast import models
from resnet_fast.models.resnet import ARCHITECTURES
from tests.model_law import away_from_kinks

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

SMALL = ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"]


def reference(name: str, **options) -> nn.Module:
    return getattr(torchvision.models, name)(**options)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def outputs_within_law(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Error against float64 at most twice eager's own plus one rounding.

    Eager's own is that of its worse layout: contiguous and channels_last norms sum in different orders.
    """
    with torch.no_grad():
        y = ours.eval()(x)
        layouts = (torch.contiguous_format, torch.channels_last)
        eager = [theirs.eval().to(memory_format=f)(x.contiguous(memory_format=f)) for f in layouts]
        exact = copy.deepcopy(theirs).double()(x.double())
    error, own = relative(y, exact), max(relative(e, exact) for e in eager)
    assert error <= 2 * own + torch.finfo(y.dtype).eps, f"error {error:.2e}, eager's own {own:.2e}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = models.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES[name].parameters


def test_parameter_counts_of_the_papers() -> None:
    counts = {name: row.parameters for name, row in ARCHITECTURES.items()}
    assert counts["resnet18"] == 11_689_512
    assert counts["resnet34"] == 21_797_672
    assert counts["resnet50"] == 25_557_032
    assert counts["resnet101"] == 44_549_160
    assert counts["resnet152"] == 60_192_808


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_state_dict_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = models.create_model(name).state_dict(), reference(name).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]


@pytest.mark.parametrize("name", SMALL)
def test_one_seed_gives_both_packages_the_same_weights(name: str) -> None:
    torch.manual_seed(5)
    ours = models.create_model(name, zero_init_residual=True).state_dict()
    torch.manual_seed(5)
    theirs = reference(name, zero_init_residual=True).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", SMALL)
def test_strict_state_dict_both_ways_and_equal_outputs(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = reference(name), models.create_model(name)
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96)
    outputs_within_law(ours, theirs, x)
    back = reference(name)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in ours.state_dict().items())


def test_training_step_matches_torchvision() -> None:
    """Gradients and running statistics of one step."""
    x, target = torch.randn(4, 3, 64, 64), torch.randint(0, 7, (4,))
    theirs = away_from_kinks(reference("resnet18", num_classes=7), x)
    ours = models.resnet18(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(theirs).double()
    for model, given in ((ours, x), (theirs, x), (last, x), (exact, x.double())):
        if model is last:
            given = given.to(memory_format=torch.channels_last)
        nn.functional.cross_entropy(model.train()(given), target).backward()

    def results(model: nn.Module) -> torch.Tensor:
        grads = [p.grad.flatten().double() for p in model.parameters()]
        buffers = [b.flatten().double() for b in model.buffers() if b.is_floating_point()]
        return torch.cat([*grads, *buffers])

    error, *own = (relative(results(model), results(exact)) for model in (ours, theirs, last))
    assert error <= 2 * max(own) + torch.finfo(torch.float32).eps, f"error {error:.2e}, eager's own {own}"
    assert ours.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("dilate", [(False, True, True), (True, True, True)])
def test_replace_stride_with_dilation(dilate: tuple[bool, ...]) -> None:
    torch.manual_seed(2)
    theirs = reference("resnet50", replace_stride_with_dilation=list(dilate), num_classes=3).eval()
    ours = models.resnet50(replace_stride_with_dilation=dilate, num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    convs = zip(*([m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)), strict=True)
    assert all((a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding) for a, b in convs)
    x = torch.randn(1, 3, 65, 64)
    outputs_within_law(ours, theirs, x)


def test_norm_layer() -> None:
    torch.manual_seed(3)
    norm = partial(nn.GroupNorm, 8)
    theirs = reference("resnet18", norm_layer=norm, num_classes=5).eval()
    ours = models.resnet18(norm_layer=norm, num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    outputs_within_law(ours, theirs, x)
    affine_free = models.resnet18(norm_layer=partial(nn.BatchNorm2d, affine=False), zero_init_residual=True)
    assert affine_free.bn1.weight is None


def test_zero_init_residual_makes_blocks_identities() -> None:
    model = models.resnet18(zero_init_residual=True).eval()
    x = torch.rand(1, 64, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.layer1(x), x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.ResNet(models.resnet.BasicBlock, (2, 2, 2)), "four stages"),
        (lambda: models.resnet18(replace_stride_with_dilation=[True]), "three booleans"),
        (lambda: models.resnet18(groups=2), "groups"),
        (lambda: models.resnext50_32x4d(groups=16), "by its name groups is 32"),
        (lambda: models.wide_resnet50_2(width_per_group=64), "by its name width_per_group is 128"),
    ],
)
def test_what_is_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_options_a_name_leaves_open() -> None:
    with torch.device("meta"):
        model = models.resnet50(groups=2)
    assert model.layer1[0].conv2.groups == 2
