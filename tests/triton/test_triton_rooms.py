"""When the Triton rooms can run, and what they say when they cannot; importing them needs no triton."""

import subprocess
import sys

import pytest
import torch

from resnet_fast import backends
from resnet_fast.ops import triton_common as rooms

OPS = ("add_relu", "bn_act", "conv2d", "conv_bn_act", "max_pool2d")
CODE = """
import sys
sys.modules["triton"] = None
import torch, resnet_fast.functional
from resnet_fast import backends
for op in {ops}:
    assert backends.room(op, "triton") is not None, op
x = torch.zeros(1, 2, 3, 3)
assert backends.why_not("add_relu", "triton", "fwd", (x, x)) == "triton is not installed (pip install triton)"
"""


def test_import_needs_no_triton():
    subprocess.run([sys.executable, "-c", CODE.format(ops=OPS)], check=True, timeout=300)


def reason(*tensors):
    """Why add_relu's room refuses."""
    return backends.why_not("add_relu", "triton", "fwd", tensors)


@pytest.mark.skipif(rooms.missing() is not None, reason="triton is not installed")
def test_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 3, 3)
    assert "CUDA tensors" in reason(x, x) and "cpu" in reason(x, x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(x, x) is None
    assert "float64" in reason(x.double(), x.double())
    assert "empty" in reason(x[:0], x[:0])
    monkeypatch.delenv("TRITON_INTERPRET")
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="CUDA tensors"):
        torch.ops.resnet_fast.add_relu(x, x)


@pytest.mark.skipif(rooms.missing() is not None, reason="triton is not installed")
def test_convolution_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight = torch.zeros(1, 8, 9, 9), torch.zeros(4, 8, 3, 3)
    window = ([1, 1], [1, 1], [1, 1], 1)

    def why(x, weight):
        return backends.why_not("conv2d", "triton", "fwd", (x, weight, None, *window))

    assert why(x, weight) is None
    assert "one dtype" in why(x.bfloat16(), weight)
    huge = torch.empty(1, dtype=torch.bfloat16).expand(
        1, 8, 16500, 16500
    )  # 2^31 elements in one image: no memory needed
    assert "32-bit offsets" in why(huge, weight.bfloat16())
    many = torch.empty(1, dtype=torch.bfloat16).expand(3000, 8, 300, 300)  # 2^31 elements in all: addresses are 64-bit
    assert why(many, weight.bfloat16()) is None


def test_precision_follows_torch(monkeypatch):
    from resnet_fast.ops.conv2d.triton import precision

    x = torch.zeros(1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert precision(x) == "ieee"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert precision(x) == "tf32"
    if hasattr(torch.backends.cudnn, "conv"):  # not monkeypatch: it is no attribute of an instance
        try:
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            assert precision(x) == "ieee"
        finally:
            torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert precision(x.half()) == "ieee"  # 16-bit products are exact, whatever the flag


def test_chunks_cover_all_rows_with_32_bit_offsets():
    """Index arithmetic beyond 2^31 elements, without the memory."""
    for m, c in ((1, 1), (392, 2048), (10**6, 64), (2**31, 64), (2**33, 3)):
        block_r, block_c = rooms.rows_tile(c)
        rows = rooms.chunk_rows(m, c, block_r, block_c, torch.device("cpu"))
        assert rows % block_r == 0 and rows > 0
        assert (rows + block_r) * c < 2**31 + block_r * c
        assert -(-m // rows) * rows >= m
