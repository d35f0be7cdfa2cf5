"""The bytes the launches of whole networks must move, against the floor of their fusion; no kernel runs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from resnet_fast.bench.gpu_traffic import network


@pytest.mark.parametrize(
    "name, training, most",
    [
        ("resnet50", False, 1.05),
        ("resnet50", True, 1.06),  # partial sums of weight gradients; strided data gradients read dy per residue class
        ("resnet18", False, 1.07),  # of which the stem's padded copy of the image: 1.06
        ("resnet18", True, 1.13),
    ],
)
def test_networks(name, training, most):
    traffic = network(name, 32, 224, torch.bfloat16, training)
    least, ours = traffic.total()
    assert least <= ours <= most * least, f"{name}: {ours / least:.3f} times the floor"
    assert len(traffic.rows) >= {"resnet18": 21, "resnet50": 54}[name]


def test_nothing_but_the_stem_exceeds_the_floor_in_inference():
    rows = network("resnet50", 32, 224, torch.bfloat16, False).rows
    assert sum(ours > 1.01 * least for _, least, ours in rows) == 1
