"""The chooser: rooms asked for by name, the environment's variables."""

import os
import threading

import pytest

import resnet_fast
from resnet_fast import _choices, backends, functional
from resnet_fast.testing import rooms
from tests.chooser import X, fake_rooms, needs_module, plain_environment, python, ran  # noqa: F401


@pytest.mark.parametrize("op", rooms.operators())
def test_every_room_can_run_or_says_why_not(op):
    assert rooms.rooms(op)[0] == "eager" and rooms.cannot_run(op, "eager") is None
    for room in rooms.rooms(op):
        reason = rooms.cannot_run(op, room)
        assert reason is None or len(reason.split()) > 4, f"{op}.{room}: not a sentence: {reason!r}"


def test_a_room_the_operator_has_not():
    with (
        backends.use_backend("onednn"),
        pytest.raises(RuntimeError, match=r"'onednn' cannot run add_relu.fwd: .*no onednn room"),
    ):
        functional.add_relu(X, X)


def test_unknown_names(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"wanted one of auto, .*eager, got 'fastest'"),
        backends.use_backend("fastest"),
    ):
        pass
    monkeypatch.setenv("RESNET_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"RESNET_FAST_BACKEND: wanted one of .* got 'fastest'"):
        functional.add_relu(X, X)


def test_use_backend_nests_and_ends():
    assert backends.forced() is None
    with backends.use_backend("eager"):
        with backends.use_backend("auto"):
            assert backends.forced() is None
        assert backends.forced() == "eager"
        with pytest.raises(KeyError), backends.use_backend("cpu"):
            raise KeyError
        assert backends.forced() == "eager"
    assert backends.forced() is None


def test_use_backend_is_this_threads_own():
    seen = []
    with backends.use_backend("eager"):
        other = threading.Thread(target=lambda: seen.append(backends.forced()))
        other.start()
        other.join()
    assert seen == [None]


@needs_module
def test_backward_runs_in_the_room_asked_for_in_forward():
    x = X.clone().requires_grad_()
    with backends.use_backend("cpu"):
        y = functional.add_relu(x, X)
    seen = ran(lambda: y.sum().backward())
    assert seen == ["cpu"]


def test_public_names():
    assert resnet_fast.use_backend is backends.use_backend


@needs_module
def test_variables(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cpu")
    assert ran() == ["cpu"]
    with backends.use_backend("eager"):
        assert ran() == ["eager"]  # the context is nearer than the variable
    monkeypatch.setenv("RESNET_FAST_DISABLE", "1")
    assert ran() == ["eager"]
    with backends.use_backend("cpu"):
        assert ran() == ["cpu"]
    monkeypatch.setenv("RESNET_FAST_DISABLE", "0")
    assert ran() == ["cpu"]
    monkeypatch.setenv("RESNET_FAST_BACKEND", "")
    assert backends.forced() is None


@needs_module
def test_without_tuning_the_first_room_that_can(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_TUNE", "0")
    assert ran() == ["cpu"]
    assert ran(lambda: functional.add_relu(X.double(), X.double())) == ["eager"]
    _choices.save()
    assert not _choices.path().exists(), "nothing was measured, nothing is to be kept"


def test_exact(monkeypatch):
    assert not backends.is_exact()
    with backends.exact():
        assert backends.is_exact()
        with backends.exact(False):
            assert not backends.is_exact()
    monkeypatch.setenv("RESNET_FAST_EXACT", "1")
    assert backends.is_exact()


@needs_module
def test_an_unknown_instruction_set():
    code = """
from resnet_fast import _native
try:
    _native.isa()
except ValueError as error:
    print(error)
"""
    assert "wanted one of default, avx2, avx512, avx512_bf16" in python(code, RESNET_FAST_ISA="sse9")


@needs_module
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts a process's threads by /proc")
@pytest.mark.parametrize("count", [1, 3])
def test_set_num_threads_reaches_our_kernels(count):
    """Also in a fresh Python thread, where raw OpenMP would start as many as there are cores."""
    code = f"""
import os, threading, torch
from resnet_fast import _choices, backends, functional
torch.set_num_threads({count})
x = torch.ones(1 << 20)
def work():
    before = len(os.listdir("/proc/self/task"))
    with backends.use_backend("cpu"):
        functional.add_relu(x, x)
    print(len(os.listdir("/proc/self/task")) - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    assert python(code, OMP_NUM_THREADS="2") == str(count - 1)
