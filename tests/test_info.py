"""python -m resnet_fast.info."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from resnet_fast import _native, backends, info

ROOT = Path(__file__).parents[1]


def test_it_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for words in (
        torch.__version__,
        "compiled module",
        "Operators on cpu, bfloat16",
        "Measured choices",
        *info.VARIABLES,
    ):
        assert words in text


def test_every_public_operator_is_asked_for_both_directions() -> None:
    doors = {call[:2] for call in info.example_calls("cpu", torch.float32)}
    for op in ("add_relu", "bn_act", "conv2d", "max_pool2d"):
        assert {(op, "fwd"), (op, "bwd")} <= doors
    assert ("conv_bn_act", "fwd") in doors


def test_asking_leaves_the_chooser_as_it_was() -> None:
    run = backends.run
    info.example_calls("cpu", torch.bfloat16)
    assert backends.run is run
    assert backends.forced() is None


def test_eager_is_always_able_and_reasons_are_numbered() -> None:
    rows, reasons = info.rooms("cpu", torch.float16)
    column = 2 + backends.ORDER.index("eager")
    assert all(row[column] == "yes" for row in rows)
    numbers = {int(n) for row in rows for cell in row for n in re.findall(r"^no \((\d+)\)$", str(cell))}
    assert numbers == set(range(1, len(reasons) + 1))


def test_a_forced_backend_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_DISABLE", "1")
    rows, _ = info.rooms("cpu", torch.float32)
    assert {row[-1] for row in rows} == {"eager"}
    monkeypatch.setenv("RESNET_FAST_DISABLE", "0")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cuda")
    rows, _ = info.rooms("cpu", torch.float32)
    assert {row[-1] for row in rows} == {"error: cuda was asked for"}


def test_every_variable_of_the_sources_is_listed() -> None:
    sources = [
        *ROOT.glob("resnet_fast/**/*.py"),
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("tools/*.py"),
        ROOT / "setup.py",
    ]
    used = {name for path in sources for name in re.findall(r"RESNET_FAST_[A-Z_]+", path.read_text())}
    assert used == set(info.VARIABLES)


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is on the PATH"
)
def test_the_compiled_module_is_there():
    """It is optional to the installation: where its compilation fails, all the rest would merely be skipped or slow."""
    assert _native.why_not() is None, _native.why_not()
