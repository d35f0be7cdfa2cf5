"""add_relu at every layer shape of ResNet-50, batch 1, per backend and dtype."""

from __future__ import annotations

import pytest

from benchmarks import common


@pytest.mark.parametrize("room", common.ROOMS)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
@pytest.mark.parametrize("work", common.works("add_relu"))
def bench_add_relu(benchmark, work, dtype, room) -> None:
    common.run(benchmark, "add_relu", work, room, dtype)
