"""BatchNorm's steps as composed operators take them: in one process bn_act's doors, over a process group its parts.

SyncBatchNorm in forward gathers each process's count, mean and variance and merges them in float64, in the order of the
ranks, so that every process has the same bits; in backward it sums the two per-channel sums dx needs. dgamma and dbeta stay
each process's own, as in torch: DistributedDataParallel averages them like every other gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import backends


def _resolve(group: str) -> distributed.ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(group)


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu(bn(x) + residual), and in training the batch's mean, biased variance and, with a group, its count."""
    if not (training and group):
        given = (x, gamma, beta, mean, var, residual, training, eps, relu)
        return *backends.run("bn_act", "fwd", *given), x.new_empty(0, dtype=torch.float64)
    mean, var, count = statistics(x, group)
    y = backends.run("bn_act", "fwd", x, gamma, beta, mean, var, residual, False, eps, relu)[0]
    return y, mean, var, count


def statistics(x: Tensor, group: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel of the batch (with a group: of every process's), and with a group the count."""
    mean, var = backends.run("bn_act", "statistics", x)
    if not group:
        return mean, var, x.new_empty(0, dtype=torch.float64)
    count = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
    mine = torch.cat([count, mean.double(), var.double()])
    process_group = _resolve(group)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather(gathered, mine, group=process_group)
    counts, means, variances = torch.stack(gathered).split([1, x.shape[1], x.shape[1]], dim=1)
    # A process whose batch is empty has no mean: whatever it sent may not count.
    means, variances = (t.where(counts > 0, 0.0) for t in (means, variances))
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    merged_var = (counts * (variances + (means - merged).square())).sum(0) / total
    return merged.to(mean.dtype), merged_var.to(var.dtype), total


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    wants: list[bool],
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgamma, dbeta, dresidual as far as wanted (empty where not)."""
    norm = (gamma, beta, mean, var)
    if not (training and group and wants[0]):
        return backends.run("bn_act", "bwd", dy, x, y, *norm, training, eps, relu, wants)
    none = x.new_empty(0)
    _, dgamma, dbeta, g = backends.run(
        "bn_act", "bwd", dy, x, y, *norm, training, eps, relu, [False, True, True, wants[3]]
    )
    sums = torch.stack([dgamma.double(), dbeta.double()])
    distributed.all_reduce(sums, group=_resolve(group))
    sums = sums.to(mean.dtype)
    # Where the residual's gradient was written it is the masked dy: no mask to find again.
    masked = (g, x, None, *norm, *sums, count, eps, False)
    plain = (dy, x, y, *norm, *sums, count, eps, relu)
    dx = backends.run("bn_act", "dx", *(masked if wants[3] else plain))
    return dx, dgamma if wants[1] else none, dbeta if wants[2] else none.clone(), g
