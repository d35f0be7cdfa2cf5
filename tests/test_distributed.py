"""SyncBatchNorm and DistributedDataParallel: two gloo processes against one process on the joined batch, spawned once."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.testing import check
from tests.model_law import away_from_kinks

distributed = pytest.importorskip("torch.distributed", reason="torch was built without distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

WORLD = 2
SIZE = 20


class Block(nn.Module):
    """A bottleneck in plain torch, for convert to find."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 2 * planes, 1, bias=False), nn.BatchNorm2d(2 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, 2 * planes, 1, stride), nn.BatchNorm2d(2 * planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + self.downsample(x))


class Tiny(nn.Module):
    """A stem, two blocks, a head: every kind of chain once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(16, 8, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


#: name: images of the two processes, dtype, synchronised, memory, norms frozen
CASES = {
    "default, unequal": ((3, 5), torch.float64, "before", "default", False),
    "converted first": ((2, 2), torch.float64, "after", "default", False),
    "lean, unequal": ((5, 2), torch.float64, "before", "lean", False),
    "nothing in one process": ((4, 0), torch.float64, "before", "default", False),
    "one image, 1x1 maps": ((1, 1), torch.float64, "before", "lean", False),
    "float32 kernels": ((3, 5), torch.float32, "before", "default", False),
    "float32 kernels, lean": ((4, 3), torch.float32, "before", "lean", False),
    "frozen norms": ((3, 5), torch.float64, None, "default", True),
    "own statistics": ((4, 4), torch.float64, None, "default", False),
}


def loss_of(out: Tensor, target: Tensor, total: int) -> Tensor:
    """A share of the joined batch's mean; DistributedDataParallel averages, so a process counts WORLD times."""
    return nn.functional.cross_entropy(out, target, reduction="sum") / total


def step(model: nn.Module, x: Tensor, target: Tensor, total: int, weight: float = 1.0) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = loss_of(model(x), target, total) * weight
    loss.backward()
    inner = getattr(model, "module", model)
    found = {f"gradient of {k}": p.grad for k, p in inner.named_parameters()}
    found |= {f"buffer {k}": b.clone() for k, b in inner.named_buffers()}
    return found | {"gradient of x": x.grad / weight, "loss": loss.detach() / weight}


def prepare(model: nn.Module, dtype: torch.dtype, sync: str | None, memory: str, frozen: bool) -> nn.Module:
    model = copy.deepcopy(model).to(dtype).train()
    if sync == "before":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = resnet_fast.convert(model, memory=memory)
    assert resnet_fast.explain(model).fused == 10  # the stem's two and four in each block
    if frozen:
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
    return model


def worker(rank: int, folder: str) -> None:
    """One process: every case in turn, results into a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    given = torch.load(f"{folder}/given")
    found = {}
    for name, (images, dtype, sync, memory, frozen) in CASES.items():
        model = Tiny()
        model.load_state_dict(given["weights"])
        model = prepare(model, dtype, sync, memory, frozen)
        if sync != "before":
            model = nn.parallel.DistributedDataParallel(model)
        if sync == "after":
            nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
        first = sum(images[:rank])
        mine = slice(first, first + images[rank])
        x, target = given[name]
        with resnet_fast.exact():
            found[name] = step(model, x[mine].to(dtype), target[mine], sum(images), WORLD)
        if sync == "before":  # DistributedDataParallel refuses SyncBatchNorm on a CPU: its mean by hand
            for key in (k for k in found[name] if k.startswith("gradient of ") and k != "gradient of x"):
                distributed.all_reduce(found[name][key])
                found[name][key] /= WORLD
    found["end"] = end({k: v[3 * rank : 3 * rank + 3 + rank] if v.dim() == 4 else v for k, v in given["end"].items()},
                       resnet_fast.functional.bn_act_global_avg_pool2d, group=distributed.group.WORLD)  # fmt: skip
    found["torch refuses"] = refusal(rank)
    torch.save(found, f"{folder}/found{rank}")
    distributed.destroy_process_group()


def end(given: dict[str, Tensor], function: Callable[..., Tensor], **more: object) -> dict[str, Tensor]:
    """The end of a network in training: the output, all gradients, the running statistics."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in ("x", "weight", "bias", "residual")}
    running = {k: given[k].clone() for k in ("running_mean", "running_var")}
    y = function(**leaves, **running, training=True, **more)
    (y * given["dy"]).sum().backward()
    return {"y": y.detach(), **{f"gradient of {k}": v.grad for k, v in leaves.items()}, **running}


def plain_end(x, weight, bias, residual, running_mean, running_var, training) -> Tensor:
    """The same in torch."""
    y = nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training)
    return torch.relu(y + residual).mean((2, 3), keepdim=True)


def refusal(rank: int) -> str:
    """What torch's own SyncBatchNorm says on a CPU."""
    try:
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(torch.initial_seed() % 2**31)
    model = away_from_kinks(Tiny(), torch.randn(8, 3, SIZE, SIZE))
    given: dict = {"weights": model.state_dict()}
    for name, (images, *_) in CASES.items():
        size = 4 if "1x1" in name else SIZE
        given[name] = torch.randn(sum(images), 3, size, size).double(), torch.randint(0, 5, (sum(images),))
    # Far from ReLU's kink: where one pixel rounds to its other side, a gradient is chance.
    normed = nn.functional.batch_norm(x := torch.randn(7, 40, 5, 4), None, None, training=True)
    heaps = (torch.randint(0, 2, x.shape) * 2 - 1) * (1 + torch.rand(x.shape))
    weight, bias = torch.rand(40) + 0.5, torch.randn(40)
    residual = heaps - normed * weight[:, None, None] - bias[:, None, None]
    given["end"] = {
        "x": x, "weight": weight, "bias": bias, "residual": residual, "dy": torch.randn(7, 40, 1, 1),
        "running_mean": torch.randn(40), "running_var": torch.rand(40),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="resnet_fast-distributed-") as folder:
        torch.save(given, f"{folder}/given")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            torch.multiprocessing.spawn(worker, (folder,), WORLD)
        finally:
            os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        return model, given, [torch.load(Path(folder) / f"found{rank}") for rank in range(WORLD)]


def scales_of(truth: dict[str, Tensor]) -> dict[str, float]:
    """Each quantity's norm; gradients that are 0 but for rounding count as a hundredth of a typical one."""
    gradients = [float(v.norm()) for k, v in truth.items() if k.startswith("gradient")]
    typical = (sum(g**2 for g in gradients) / len(gradients)) ** 0.5
    return {
        k: max(float(v.double().norm()), 0.01 * typical if k.startswith("gradient") else 1e-6) for k, v in truth.items()
    }


def law(
    plain: nn.Module, x: Tensor, target: Tensor, truth: dict[str, Tensor], scales: dict[str, float]
) -> dict[str, float]:
    """What the tolerance law allows float32 in one process: twice the error of eager's worse layout plus one rounding."""
    allowed = dict.fromkeys(truth, 0.0)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(plain).float().to(memory_format=layout)
        eager = step(model, x.float(), target, len(x))
        error = {k: float((eager[k].double() - v.double()).norm()) / scales[k] for k, v in truth.items()}
        typical = (sum(e**2 for e in error.values()) / len(error)) ** 0.5
        for k, e in error.items():
            allowed[k] = max(allowed[k], 2 * max(e, typical) + torch.finfo(torch.float32).eps)
    return allowed


@pytest.mark.parametrize("name", [n for n in CASES if n != "own statistics"])
def test_two_processes_are_one_on_the_joined_batch(results, name):
    """Loss, every gradient, the input's too, and every running statistic, in both processes."""
    model, given, found = results
    images, dtype, _, _, frozen = CASES[name]
    plain = copy.deepcopy(model).double().train()
    if frozen:
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    truth = step(copy.deepcopy(plain), *given[name], sum(images))
    scales = scales_of(truth)
    allowed = dict.fromkeys(truth, 1e-9) if dtype == torch.float64 else law(plain, *given[name], truth, scales)
    for rank in range(WORLD):
        first = sum(images[:rank])
        mine = {"gradient of x": truth["gradient of x"][first : first + images[rank]]}
        for key, got in found[rank][name].items():
            if key == "loss":
                continue  # each has its share
            want = mine.get(key, truth[key])
            error = float((got.double() - want.double()).norm())
            assert error <= allowed[key] * scales[key], f"{name}, rank {rank}: {key}: {error / scales[key]:.2e}"
    total = sum(found[rank][name]["loss"].double() for rank in range(WORLD))
    assert abs(total - truth["loss"].double()) <= allowed["loss"] * scales["loss"]


def test_without_synchronisation_each_process_has_its_own_statistics(results):
    """DistributedDataParallel alone: the mean of both halves' gradients, buffers each process's own."""
    model, given, found = results
    name = "own statistics"
    images, *_ = CASES[name]
    x, target = given[name]
    halves = []
    for rank in range(WORLD):
        mine = slice(rank * images[0], rank * images[0] + images[rank])
        halves.append(step(copy.deepcopy(model).double().train(), x[mine], target[mine], sum(images), WORLD))
    for rank in range(WORLD):
        scales = scales_of(halves[rank])
        for key, got in found[rank][name].items():
            if key.startswith("gradient") and key != "gradient of x":
                want = sum(half[key] for half in halves) / WORLD
            else:
                want = halves[rank][key]
            error = float((got.double() - want.double()).norm())
            assert error <= 1e-9 * scales[key], f"rank {rank}: {key}: {error / scales[key]:.2e}"


def test_all_processes_have_the_same_bits(results):
    """Statistics are merged in the order of the ranks, so that the replicas' buffers never part."""
    _, _, found = results
    for name in CASES:
        if name != "own statistics":
            buffers = [key for key in found[0][name] if key.startswith("buffer")]
            assert buffers and all(torch.equal(found[0][name][k], found[1][name][k]) for k in buffers), name


def test_torch_itself_refuses_cpu_tensors(results):
    """Where this ends, the README's remark that ours takes them can go."""
    assert all("SyncBatchNorm expected input tensor to be on GPU" in found["torch refuses"] for found in results[2])


def test_the_end_of_a_network_over_two_processes(results):
    """bn_act_global_avg_pool2d with a group: the joined batch's output and gradients, by the tolerance law."""
    _, given, (one, two) = results
    ours = {k: torch.cat([one["end"][k], two["end"][k]]) for k in ("y", "gradient of x", "gradient of residual")}
    ours |= {k: one["end"][k] + two["end"][k] for k in ("gradient of weight", "gradient of bias")}  # each its own sums
    for name in ("running_mean", "running_var"):
        assert torch.equal(one["end"][name], two["end"][name])
        ours[name] = one["end"][name]
    eager, truth = end(given["end"], plain_end), end({k: v.double() for k, v in given["end"].items()}, plain_end)
    assert ours.keys() == truth.keys()
    sizes = {k: v.abs().max() for k, v in truth.items()}  # of the vectors there are few values: judged together
    check.law(*([found[k] / sizes[k].to(found[k].dtype) for k in sizes] for found in (ours, eager, truth)))
