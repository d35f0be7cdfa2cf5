"""bn_act_global_avg_pool2d at every layer shape of ResNet-50, batch 1, per backend and dtype."""

from __future__ import annotations

import pytest

from benchmarks import common


@pytest.mark.parametrize("room", common.ROOMS)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
@pytest.mark.parametrize("work", common.works("bn_act_global_avg_pool2d"))
def bench_bn_act_global_avg_pool2d(benchmark, work, dtype, room) -> None:
    common.run(benchmark, "bn_act_global_avg_pool2d", work, room, dtype)
