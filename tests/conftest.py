"""Fixtures for every test: a cache folder of its own, fresh random inputs that can be repeated, poisoned memory."""

from __future__ import annotations

import os
import random
import tempfile
import zlib

import pytest
import torch

from resnet_fast import _choices, backends
from resnet_fast.testing import rooms

_folder = tempfile.TemporaryDirectory(prefix="resnet_fast-tests-")
os.environ.setdefault("RESNET_FAST_TUNE", "0")  # the rooms' order decides, not this machine's noise
os.environ["RESNET_FAST_CACHE"] = _folder.name  # before any test, and for the processes tests start
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run's random inputs (default: fresh ones)")


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config):
    return f"random inputs: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def seeded(request):
    """Inputs differ from run to run; a failing test prints how to get its own again, alone or in any order."""
    seed = zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    print(f"inputs of this test: --seed {request.config.option.seed}")
    return seed


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder for this test alone, with nothing known yet."""
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_choices, "_known", None)
    monkeypatch.setattr(_choices, "_fresh", {})
    return tmp_path


@pytest.fixture
def poisoned():
    """Every torch.empty comes filled with NaN (integers: their largest), so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def threads():
    """Set torch's thread count in a test; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def exact_convolutions():
    """The general law is for direct convolutions; Winograd's own bound is tested with the kernels."""
    with backends.exact():
        yield


@pytest.fixture
def small():
    """torchvision's resnet18 with norms that are not trivial."""
    from tests.model_law import realistic

    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return realistic(torchvision.models.resnet18(num_classes=10))


def pytest_generate_tests(metafunc):
    """Operator tests (classes with `op`) run over every room that can run here (test_backends.py
    reads the others' sentences), each in its main dtypes, and over the class's cases."""
    op = getattr(metafunc.cls, "op", None)
    if op is None:
        return
    names = [room for room in rooms.rooms(op) if rooms.cannot_run(op, room) is None]
    cases = getattr(metafunc.cls, "cases", {})
    pairs = [(room, dtype) for room in names for dtype in rooms.MAIN_DTYPES[room]]
    wanted = metafunc.fixturenames
    if {"room", "dtype", "case"} <= set(wanted):
        # Beside float32 and bfloat16 the eager room is torch itself: the core cases are enough of it.
        every = [
            (room, dtype, name)
            for room, dtype in pairs
            for name in cases
            if dtype in SHARED or room != "eager" or name in metafunc.cls.core
        ]
        ids = [f"{room}-{str(dtype)[6:]}-{name}" for room, dtype, name in every]
        metafunc.parametrize("room, dtype, case", [(r, d, cases[n]) for r, d, n in every], ids=ids)
    elif "room" in wanted and "dtype" in wanted:
        metafunc.parametrize("room, dtype", pairs, ids=[f"{r}-{str(d)[6:]}" for r, d in pairs])
    elif "room" in wanted:
        metafunc.parametrize("room", names)


#: The dtypes every room has.
SHARED = (torch.float32, torch.bfloat16)
