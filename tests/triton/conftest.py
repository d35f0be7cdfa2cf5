"""Engines of the Triton tests: the interpreter (a process of its own), the simulator of compiled kernels, a GPU.

Fresh outputs are poisoned with NaN. The files under interpreted/ run only in a process that has TRITON_INTERPRET=1.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore = ["interpreted"]


def pytest_collection_modifyitems(items):
    """The long half stays out of `make test`, which leaves out what is slow."""
    for item in items:
        if item.get_closest_marker("proof"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def poison():
    """Fill `torch.empty` with NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Simulator:
    """Runs the compiled sm_80 code of every launch on the CPU; fails on a race, a bad address or an uninitialised read."""

    def __init__(self, ptxsim):
        self.ptxsim, self.reports, self.order = ptxsim, [], 0

    def launch(self, kernel, grid, args, constants, warps, stages):
        fresh = [
            a for a in args.values() if isinstance(a, torch.Tensor) and a.is_floating_point() and bool(a.isnan().all())
        ]
        given = dict(args) | constants
        report = self.ptxsim.run_triton(
            kernel, grid, given, constants, num_warps=warps, num_stages=stages, uninit=fresh, order=self.order
        ).check()
        self.reports.append((kernel.fn.__name__, report))

    @contextmanager
    def running(self, order: int = 0):
        """Every launch of the Triton rooms goes through the simulator, warps scheduled by `order`."""
        from resnet_fast.ops import triton_common

        self.order, self.reports = order, []
        with triton_common.executor(self.launch):
            yield self.reports


@pytest.fixture
def order(seeded) -> int:
    """A random schedule of the warps, repeated with the test's seed."""
    return 1 + seeded % 1000


@pytest.fixture(scope="session")
def simulator():
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: an interpreted kernel has no compiled code")
    pytest.importorskip("triton", reason="triton is not installed")
    ptxsim = pytest.importorskip("ptxsim", reason="ptxsim, the simulator of compiled kernels, is not on PYTHONPATH")
    try:
        ptxsim.build.lib()
    except ptxsim.BuildError as error:
        pytest.skip(f"the simulator's engine cannot be built here: {error}")
    return Simulator(ptxsim)
