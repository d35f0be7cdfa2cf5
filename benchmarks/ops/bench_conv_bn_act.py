"""conv_bn_act at every layer shape of ResNet-50, batch 1, per backend and dtype."""

from __future__ import annotations

import pytest

from benchmarks import common


@pytest.mark.parametrize("room", common.ROOMS)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
@pytest.mark.parametrize("work", common.works("conv_bn_act"))
def bench_conv_bn_act(benchmark, work, dtype, room) -> None:
    common.run(benchmark, "conv_bn_act", work, room, dtype)
