"""A fused network learns what eager learns: the curves of one seed stay nearer to each other than those of two seeds."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
convergence = pytest.importorskip("benchmarks.convergence", reason="an installed package has no benchmarks beside it")


def test_fused_and_eager_part_less_than_two_seeds():
    data = convergence.digits(600)
    curves = {(e, s): convergence.train(e, s, 2, data) for s in (0, 1) for e in ("eager", "fused")}
    own, seeds = convergence.gaps(curves, "fused")
    assert own < seeds
    for curve in curves.values():
        assert curve[-1][0] < 0.8 * curve[0][0], "nothing was learnt"
