"""The benchmark's table of a frozen network's steps."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.bench import __main__ as bench
from tests.chooser import needs_module

pytest.importorskip("torchvision", reason="torchvision is not installed")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_module
def test_op_network(capsys):
    """Every step of the frozen network has a line; the stem's convolution and pool are one."""
    code = bench.main(
        ["op", "network", "--model", "resnet18", "--size", "64", "--rounds", "1", "--dtype", "float32,bfloat16"]
    )
    out = capsys.readouterr().out
    assert code == 0 and out.count(": ok") == 2
    for text in out.split("frozen resnet18")[1:]:
        lines = [line.split("  ")[0] for line in text.splitlines()]
        assert lines.count("conv1, max_pool") == 1 and lines.count("all") == 1
        assert sum(line.startswith("layer") and "." in line for line in lines) == 19
