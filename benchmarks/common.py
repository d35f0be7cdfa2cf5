"""What the pytest-benchmark files share: layer shapes, and the check without which nothing is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_fast import backends
from resnet_fast.bench import operators, roofline

ROOMS = backends.ORDER
DTYPES = (torch.float32, torch.bfloat16)


def works(op: str, network: str = "resnet50", batch: int = 1) -> list[Any]:
    """pytest parameters: an operator at every layer shape of a network."""
    return [pytest.param(w, id=w.shape.replace(" ", "")) for w in operators.works(op, roofline.layers(network), batch)]


def run(benchmark: Any, op: str, work: operators.Work, room: str, dtype: torch.dtype) -> None:
    """Time one room at one shape, if it exists, can, and is right."""
    if backends.room(op, room) is None:
        pytest.skip(f"{op} has no {room} room")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.verdicts.clear()
    operators.check(op, work, dtype, device)
    verdict = work.verdicts[room]
    if verdict.startswith("WRONG"):
        pytest.fail(verdict)
    if verdict != "ok":
        pytest.skip(verdict)
    given = operators.cast(work.tensors, dtype, device)

    def call() -> None:
        work.call(given)
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), backends.use_backend(room):
        benchmark.pedantic(call, rounds=7, iterations=1, warmup_rounds=2)
    size = torch.finfo(dtype).bits // 8
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"GFLOP/s": work.flops / seconds / 1e9, "GB/s": work.moved * size / seconds / 1e9}
