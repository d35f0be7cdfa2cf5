"""Worked examples: the arithmetic of convolutions and residual blocks that every textbook does by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import backends, functional, nn
from resnet_fast.testing import rooms, shapes

#: The 6x6 image of the classic lecture, and its two filters: a diagonal and a column.
IMAGE = torch.tensor(
    [
        [1, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 1, 0],
    ],
    dtype=torch.float32,
).view(1, 1, 6, 6)
FILTERS = torch.tensor(
    [
        [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
        [[-1, 1, -1], [-1, 1, -1], [-1, 1, -1]],
    ],
    dtype=torch.float32,
).view(2, 1, 3, 3)
DIAGONAL = torch.tensor([[3, -1, -3, -1], [-3, 1, 0, -3], [-3, -3, 0, 1], [3, -2, -2, -1]], dtype=torch.float32)
COLUMN = torch.tensor([[-1, -1, -1, -1], [-1, -1, -2, 1], [-1, -1, -2, 1], [-1, 0, -4, 3]], dtype=torch.float32)

ROOMS = [room for room in rooms.rooms("conv2d") if rooms.cannot_run("conv2d", room) is None]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "any kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_the_6x6_image(room, dtype, exact):
    """Two 3x3 filters over a 6x6 image: two 4x4 maps at stride 1, 2x2 maps at stride 2."""
    with backends.use_backend(room), backends.exact(exact):
        maps = functional.conv2d(IMAGE.to(dtype), FILTERS.to(dtype)).float()
        strided = functional.conv2d(IMAGE.to(dtype), FILTERS.to(dtype), stride=2).float()
    # Winograd's interpolation points are fractions: its whole numbers come out rounded.
    near = 0 if exact else 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(maps[0, 0], DIAGONAL, rtol=0, atol=near)
    torch.testing.assert_close(maps[0, 1], COLUMN, rtol=0, atol=near)
    torch.testing.assert_close(strided[0, 0], torch.tensor([[3.0, -3.0], [-3.0, 0.0]]), rtol=0, atol=near)
    torch.testing.assert_close(strided[0], maps[0, :, ::2, ::2], rtol=0, atol=near)


def test_the_6x6_image_by_hand():
    """The definition itself, nine products at a time."""
    for place, (p, q) in enumerate(itertools.product(range(4), range(4))):
        patch = IMAGE[0, 0, p : p + 3, q : q + 3]
        assert (patch * FILTERS[0, 0]).sum() == DIAGONAL.flatten()[place]
        assert (patch * FILTERS[1, 0]).sum() == COLUMN.flatten()[place]


def test_output_size():
    """n_out = floor((n_in + 2p - k) / s) + 1, and with dilation d a filter of d (k - 1) + 1 places."""
    checked = 0
    for n, k, s, p, d in itertools.product(range(1, 12), range(1, 6), range(1, 4), range(0, 4), range(1, 3)):
        size = (n + 2 * p - d * (k - 1) - 1) // s + 1
        assert shapes.output_size(n, k, s, p, d) == size
        x, w = torch.zeros(1, 1, n, 30, device="meta"), torch.zeros(1, 1, k, 1, device="meta")
        given = {"stride": (s, 1), "padding": (p, 0), "dilation": (d, 1)}
        if n + 2 * p < d * (k - 1) + 1:
            with pytest.raises(RuntimeError, match="smaller than the filter"):
                functional.conv2d(x, w, **given)
            continue
        assert functional.conv2d(x, w, **given).shape == F.conv2d(x, w, **given).shape == (1, 1, size, 30)
        checked += 1
    assert checked > 1000


@pytest.mark.parametrize("f, d1, k", [(3, 3, 64), (7, 3, 64), (1, 256, 64), (3, 64, 128), (5, 10, 20)])
def test_parameters_of_a_convolution(f, d1, k):
    """K filters of F x F x D1 weights, and K biases."""
    layer = nn.ConvBNAct(d1, k, f, bias=True)
    assert layer.conv.weight.numel() == f * f * d1 * k
    assert sum(p.numel() for p in layer.conv.parameters()) == f * f * d1 * k + k
    assert shapes.Layer(d1, 9, 9, k, f, f).parameters(bias=True) == f * f * d1 * k + k
    assert sum(p.numel() for p in layer.bn.parameters()) == 2 * k


def test_blocks():
    """An identity block leaves the shape; a projection block halves the image and doubles the channels."""
    x = torch.randn(1, 64, 56, 56)
    assert nn.BasicBlock(64, 64)(x).shape == x.shape
    down = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1, 2, bias=False), torch.nn.BatchNorm2d(128))
    assert nn.BasicBlock(64, 128, 2, down)(x).shape == (1, 128, 28, 28)
    assert nn.Bottleneck(256, 64)(torch.randn(1, 256, 7, 7)).shape == (1, 256, 7, 7)
    down = torch.nn.Sequential(torch.nn.Conv2d(256, 512, 1, 2, bias=False), torch.nn.BatchNorm2d(512))
    assert nn.Bottleneck(256, 128, 2, down)(torch.randn(1, 256, 8, 8)).shape == (1, 512, 4, 4)


def test_identity_block_of_zero_weights():
    """y = relu(F(x) + x): with F = 0 a block passes what is positive, the reason depth does no harm."""
    block = nn.BasicBlock(8, 8).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 8, 5, 5)
    assert torch.equal(block(x), x)


#: torchvision's counts with 1,000 classes.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_network(name):
    """Counted from the layers' shapes alone: filters, two vectors a norm, and the linear layer."""
    layers = shapes.layers(name)
    convolutions = sum(layer.parameters() for layer in layers)
    norms = sum(2 * layer.K for layer in layers)
    channels = 2048 if name in ("resnet50", "resnet101", "resnet152") else 512
    assert convolutions + norms + channels * 1000 + 1000 == PARAMETERS[name]
    assert 1 + sum(layer.R == 3 for layer in layers) + sum(layer.R == 1 and layer.relu for layer in layers) + 1 == int(
        name.removeprefix("resnet")
    )  # the name counts the weighted layers, shortcuts apart


def test_flops_of_resnet50():
    """About 4.1 billion multiplications and additions for a 224 x 224 image, as is reported everywhere."""
    macs = sum(layer.flops() for layer in shapes.layers("resnet50")) / 2
    assert 4.05e9 < macs < 4.15e9


def test_layer_shapes_are_the_models():
    """The shapes tests and benchmarks use are those a network of this package really runs."""
    from resnet_fast.models import resnet

    for name in ("resnet18", "resnet50", "resnext50_32x4d"):
        seen = []
        model = getattr(resnet, name)().to("meta").eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                seen.append(
                    (module.in_channels, module.out_channels, *module.kernel_size, module.stride[0], module.groups)
                )
        expected = [(v.C, v.K, v.R, v.S, v.stride, v.groups) for v in shapes.layers(name)]
        assert sorted(seen) == sorted(expected)
