"""What a training step keeps for backward, against eager's."""

from __future__ import annotations

import copy

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


@pytest.mark.parametrize(("name", "most"), [("resnet18", 0.70), ("resnet50", 0.80)])
def test_saved_for_backward(name, most):
    plain = getattr(torchvision.models, name)().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 128, 128).to(memory_format=torch.channels_last)
    model = resnet_fast.convert(copy.deepcopy(plain))
    assert saved_bytes(model, x) <= most * saved_bytes(plain, x)
