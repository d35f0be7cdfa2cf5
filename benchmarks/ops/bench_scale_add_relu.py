"""scale_add_relu at every layer shape of ResNet-50, batch 1, per backend and dtype."""

from __future__ import annotations

import pytest

from benchmarks import common


@pytest.mark.parametrize("room", common.ROOMS)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
@pytest.mark.parametrize("work", common.works("scale_add_relu"))
def bench_scale_add_relu(benchmark, work, dtype, room) -> None:
    common.run(benchmark, "scale_add_relu", work, room, dtype)
