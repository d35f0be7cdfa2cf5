"""What a training step keeps for backward, against eager's: bytes of saved tensors, and what a process needs at its peak."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fast

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages autograd keeps, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize(
    ("name", "memory", "most"),
    [
        ("resnet18", "default", 0.66),
        ("resnet50", "default", 0.80),
        ("resnet18", "lean", 0.49),
        ("resnet50", "lean", 0.45),
        ("resnext50_32x4d", "lean", 0.48),
    ],
)
def test_saved_for_backward(name, memory, most):
    plain = getattr(torchvision.models, name)().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 128, 128).to(memory_format=torch.channels_last)
    model = resnet_fast.convert(copy.deepcopy(plain), memory=memory)
    assert saved_bytes(model, x) <= most * saved_bytes(plain, x)


def test_under_autocast_too():
    plain = torchvision.models.resnet50().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)
    kept = []
    for model in (plain, *(resnet_fast.convert(copy.deepcopy(plain), memory=m) for m in ("default", "lean"))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept.append(saved_bytes(model, x))
    cast = sum(2 * p.numel() for p in plain.parameters() if p.dim() > 1)  # every engine's bfloat16 weights
    eager, default, lean = (k - cast for k in kept)
    assert default <= 0.8 * eager and lean <= 0.6 * eager


def test_native_blocks_follow_memory():
    """The package's own blocks take `memory` too, give it up with restore, and say so in explain."""
    model = resnet_fast.models.resnet50()
    x = torch.randn(2, 3, 64, 64)
    default = saved_bytes(resnet_fast.convert(model), x)
    resnet_fast.convert(model, memory="lean")
    report = resnet_fast.explain(model)
    assert (
        "recomputed" in str(report) and sum(row.recomputed for row in report.rows) == 20
    )  # 16 blocks, the stem, three projections
    assert saved_bytes(model, x) < 0.7 * default
    assert copy.deepcopy(model).layer1[0].memory == "lean"
    resnet_fast.restore(model)
    assert "memory" not in vars(model.layer1[0])


def test_converting_again_changes_memory():
    model, x = resnet_fast.convert(torchvision.models.resnet18(), memory="lean"), torch.randn(2, 3, 64, 64)
    lean = saved_bytes(model, x)
    assert "recomputed" in str(resnet_fast.explain(model))
    assert saved_bytes(resnet_fast.convert(model), x) > 1.2 * lean
    assert "recomputed" not in str(resnet_fast.explain(model))


def test_unknown_memory():
    with pytest.raises(ValueError, match=r"'default' or 'lean', got 'tiny'"):
        resnet_fast.convert(torchvision.models.resnet18(), memory="tiny")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most", "lean_most"), [("resnet18", 0.70, 0.52), ("resnet50", 0.80, 0.48)])
def test_peak_of_a_process(name, most, lean_most):
    """The resident set a step adds to a process of its own, at its highest.

    Beside what is saved it has gradients, the optimiser's and the allocator's bytes, and backward's working memory, which
    all engines need: the saved bytes' ratios are bounds it can only approach (benchmarks/memory.py reports it at full size).
    """
    root = Path(resnet_fast.__file__).parents[1]
    if not (root / "benchmarks").exists():
        pytest.skip("an installed package has no benchmarks beside it")
    command = [sys.executable, "-m", "benchmarks.memory", "--model", name, "--batch", "16", "--peak"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peaks = dict(line.split() for line in done.stdout.splitlines())
    eager, default, lean = (float(peaks[engine]) for engine in ("eager", "default", "lean"))
    assert default <= most * eager and lean <= lean_most * eager, peaks
