"""A frozen model's CUDA graphs, with a stand-in for the capture: which shapes, whose memory, what a copy keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import resnet_fast
from resnet_fast import _graphs


@pytest.fixture
def captures(monkeypatch):
    """Graphs that recompute into their own output, as a replay does; the list of shapes captured."""
    shapes = []

    def capture(run, x):
        static = x.clone()
        out = run(static)
        shapes.append(tuple(x.shape))
        return _graphs.Captured(static, out, lambda: out.copy_(run(static)))

    monkeypatch.setattr(_graphs, "capture", capture)
    return shapes


def test_a_shape_is_captured_once_and_replayed(captures):
    graphs = _graphs.Graphs(lambda x: x * 2)
    x = torch.randn(2, 3)
    assert x not in graphs
    graphs.add(x)
    graphs.add(torch.randn(2, 3))
    assert captures == [(2, 3)] and x in graphs
    assert torch.randn(3, 3) not in graphs and x.double() not in graphs
    first, second = graphs(x), graphs(x + 1)
    assert torch.equal(first, x * 2) and torch.equal(second, (x + 1) * 2), "an output is not the next one's memory"


def test_the_oldest_of_too_many_goes(captures, monkeypatch):
    monkeypatch.setattr(_graphs, "MOST", 2)
    graphs = _graphs.Graphs(lambda x: x + 1)
    for n in (1, 2, 3):
        graphs.add(torch.zeros(n))
    assert torch.zeros(1) not in graphs and torch.zeros(2) in graphs and torch.zeros(3) in graphs


def test_copies_capture_their_own(captures):
    frozen = resnet_fast.freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), dtype=torch.float64)
    assert frozen.reason is not None, "float64 runs operator by operator, as everything does on a GPU"
    x = torch.randn(1, 3, 5, 5)
    plain = frozen(x)
    frozen.graphs.add(x)
    assert torch.equal(frozen(x), plain) and captures == [(1, 3, 5, 5)]
    assert "CUDA graphs of 1x3x5x5" in str(frozen.explain())
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert x not in twin.graphs and twin.graphs.run.__self__ is twin
        assert torch.equal(twin(x), plain)


def test_another_shape_runs_without_a_graph(captures):
    frozen = resnet_fast.freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), dtype=torch.float64)
    frozen.graphs.add(torch.zeros(1, 3, 5, 5))
    assert frozen(torch.zeros(2, 3, 7, 7)).shape == (2, 4, 5, 5) and len(captures) == 1
