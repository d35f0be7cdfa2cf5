"""Inference: frozen networks beside eager channels_last, on photographs."""

from __future__ import annotations

import pytest

from benchmarks.models import common


@pytest.mark.parametrize("engine", ("resnet_fast", "eager"))
@pytest.mark.parametrize("batch", (1, 16))
@pytest.mark.parametrize("model", ("resnet18", "resnet50"))
def bench_infer(benchmark, model, batch, engine) -> None:
    common.run(benchmark, "infer", model, batch, engine)
