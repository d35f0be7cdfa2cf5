"""The bytes the launches of whole networks must move, against the floor of their fusion; no kernel runs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from resnet_fast import nn
from resnet_fast.bench.gpu_traffic import Traffic, eager, network


@pytest.mark.parametrize(
    "name, training, prologue, batch, most",
    [
        ("resnet50", False, False, 32, 1.05),
        ("resnet50", True, False, 32, 1.05),
        ("resnet50", True, True, 32, 1.05),
        ("resnet18", False, False, 32, 1.01),
        # What is above the floor is the weight gradients' partial sums, whose bytes depend on the card and not on the batch.
        ("resnet18", True, False, 32, 1.05),
        ("resnet18", True, True, 32, 1.05),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_networks(name, training, prologue, batch, most, dtype):
    if dtype == torch.float32:  # the last stage's sums are split among programs there, in inference too
        most = 1.05
    traffic = network(name, batch, 224, dtype, training, prologue)
    least, ours = traffic.total()
    assert least <= ours <= most * least, f"{name}: {ours / least:.3f} times the floor"
    assert len(traffic.rows) >= {"resnet18": 20, "resnet50": 53}[name]


def test_nothing_exceeds_the_floor_in_inference():
    rows = network("resnet50", 32, 224, torch.bfloat16, False).rows
    assert rows and all(ours <= 1.01 * least for _, least, ours in rows)


def test_what_fusion_saves():
    """Statistics in the convolutions' epilogues and no map in the stem; then no normalised activation inside a block."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    fused = network("resnet50", 32, 224, torch.bfloat16, True)
    prologue = network("resnet50", 32, 224, torch.bfloat16, True, prologue=True)
    least = eager("resnet50", 32, 224, torch.bfloat16, True)
    assert fused.total()[1] < least / 1.35 and prologue.total()[1] < least / 1.55
    doors = [door for door, _, _ in prologue.rows]
    for door in ("bn_act_conv2d.fwd", "bn_act_conv2d.bwd"):
        assert doors.count(door) == 32 and door not in [r[0] for r in fused.rows]


@pytest.mark.parametrize("training", [True, False])
def test_the_norms_backward_moves_eight_maps(training):
    """Of a 3x3 layer: dout and z for the filters, dout and z for dy, which is written, then dy and z for dz, written, too. By
    its parts they are eleven: y written and read, and dy and z read once more. With known statistics five: dy is not written.
    """
    from resnet_fast.bench.gpu_resources import record
    from resnet_fast.ops.bn_act_conv2d import triton
    from resnet_fast.ops.conv2d.triton_tiles import way

    z, weight = torch.empty(32, 64, 56, 56, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
    z = z.bfloat16().to(memory_format=torch.channels_last)
    vectors, window = [torch.empty(64, device="meta")] * 4, ([1, 1], [1, 1], [1, 1], 1)
    given = (z, z, *vectors, weight.bfloat16(), False, training, 1e-5, *window)
    for name, more in (("prologue", 0), ("stored", 2)):
        with way(name):
            launches = record(lambda: triton.bwd(*given, [True] * 4 + [False]))
        maps = sum(x.traffic for x in launches) / (2 * z.numel())
        assert (8 if training else 5) + more <= maps <= (8 if training else 5) + more + 0.5, maps  # partial sums


def test_stem_of_inference_writes_no_map():
    """One operator from the image to the pooled map, whose bytes are all there is (and filters, prepared)."""
    rows = network("resnet18", 32, 224, torch.bfloat16, False).rows
    image, out = 2 * 32 * 3 * 224 * 224, 2 * 32 * 64 * 56 * 56
    assert rows[0][0] == "recomputed_conv_bn_act.fwd" and rows[0][2] <= 1.01 * (image + out)
    assert "max_pool2d.fwd" not in [door for door, _, _ in rows]


def test_statistics_travel_with_the_stems_output():
    """The stem in training: no pass over its map but the pool's own, forward; two of x backward."""
    with torch.device("meta"):
        stem, pool = nn.ConvBNAct(3, 64, 7, stride=2, padding=3).train().bfloat16(), torch.nn.MaxPool2d(3, 2, 1)
        images = torch.empty(8, 3, 64, 64, dtype=torch.bfloat16)
    with Traffic() as traffic:
        nn.fused.stem(images, [(stem.conv, stem.bn)], pool).sum().backward()
    found = {door: (least, ours) for door, least, ours in traffic.rows}
    assert list(found) == [
        "conv2d.fwd", "bn_act.statistics", "bn_act_max_pool2d.fwd", "bn_act_max_pool2d.bwd", "conv2d.bwd",
    ]  # fmt: skip
    map_ = 2 * 8 * 64 * 32 * 32
    assert found["bn_act.statistics"][1] == 0
    assert found["bn_act_max_pool2d.fwd"][1] < 1.5 * map_ and found["bn_act_max_pool2d.bwd"][1] < 4 * map_
    least, ours = found["bn_act_max_pool2d.bwd"]
    assert ours <= 1.1 * least


def test_the_last_block_writes_no_map():
    """In training the network's end is one operator each way: 2 and 6 passes over its 7x7 map, and no gradient of it."""
    rows = {door: ours for door, _, ours in network("resnet18", 32, 224, torch.bfloat16, True).rows}
    map_ = 2 * 32 * 512 * 7 * 7
    assert 2 * map_ < rows["bn_act_global_avg_pool2d.fwd"] < 2.1 * map_
    assert 6 * map_ < rows["bn_act_global_avg_pool2d.bwd"] < 6.4 * map_


def test_eager_is_counted_by_passes():
    """One BatchNorm in training: x for the statistics, x and y to normalise (and its few vectors)."""
    from resnet_fast.bench.gpu_traffic import EagerTraffic

    with torch.device("meta"):
        bn, x = torch.nn.BatchNorm2d(4), torch.empty(8, 4, 32, 32)
    with EagerTraffic() as traffic:
        bn.train()(x)
    map_ = 4 * x.numel()
    assert 3 * map_ <= traffic.total <= 3 * map_ + 200
