"""One operator over every layer shape of a network: each backend's rate, against this machine's, checked first."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from resnet_fast import backends, functional
from resnet_fast.bench import report, roofline, worker
from resnet_fast.bench.cases import BenchError
from resnet_fast.bench.timer import LAW, WINOGRAD_LAW, relative

OPERATORS = (
    "conv2d", "conv_bn_act", "bn_act", "add_relu", "scale_add_relu", "max_pool2d", "bn_act_max_pool2d",
    "bn_act_global_avg_pool2d",
)  # fmt: skip


@dataclass
class Work:
    """An operator at one shape: how to call it on tensors of any dtype, what it computes and moves."""

    shape: str
    names: list[str]
    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Tensor]], Tensor]
    flops: int
    moved: int
    place: tuple[int, int, int, int] = (1, 0, 1, 1)
    times: dict[str, list[float]] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def works(op: str, layers: list[roofline.Layer], batch: int, seed: int = 0) -> Iterator[Work]:
    """An operator's distinct shapes in a network, in order; tensors are float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    shapes: dict[Any, Work] = {}
    last = next((a for a in reversed(layers) if a.residual), None)
    for a in layers:
        if op in ("conv2d", "conv_bn_act"):
            key, tail = a.shape, " +" if a.residual and op == "conv_bn_act" else ""
        elif op == "bn_act" or (op in ("add_relu", "scale_add_relu") and a.residual):
            key, tail = f"{a.P}x{a.Q}x{a.K}", " +" if a.residual and op == "bn_act" else ""
        elif op == "bn_act_global_avg_pool2d" and a is last:
            key, tail = f"{a.P}x{a.Q}x{a.K}", " +"
        elif op.endswith("max_pool2d") and a is layers[0]:
            key, tail = f"{a.P}x{a.Q}x{a.K}, 3x3/2", ""
        else:
            continue
        key += tail
        if key in shapes:
            shapes[key].names.append(a.name)
            continue
        outputs, inputs = batch * a.outputs, batch * a.inputs
        y = normal(batch, a.K, a.P, a.Q)
        vectors = {"mean": normal(a.K), "var": normal(a.K).square() + 0.5, "gamma": normal(a.K), "beta": normal(a.K)}
        place = {"stride": a.stride, "padding": a.padding, "dilation": a.dilation, "groups": a.groups}
        if op in ("conv2d", "conv_bn_act"):
            weight = normal(a.K, a.C // a.groups, a.R, a.S) * (a.R * a.S * a.C / a.groups) ** -0.5
            tensors = {"x": normal(batch, a.C, a.H, a.W), "w": weight}
            flops, moved = batch * a.flops, inputs + outputs + a.weights
            if op == "conv2d":
                work = Work(
                    key, [a.name], tensors, lambda t, p=place: functional.conv2d(t["x"], t["w"], **p), flops, moved
                )
            else:
                tensors |= vectors | ({"residual": y} if tail else {})
                work = Work(
                    key, [a.name], tensors, lambda t, p=place: _conv_bn_act(t, p), flops, moved + bool(tail) * outputs
                )
        elif op == "bn_act":
            tensors = {"x": y, **vectors} | ({"residual": normal(*y.shape)} if tail else {})
            work = Work(key, [a.name], tensors, _bn_act, 0, (3 + bool(tail)) * outputs)
        elif op == "add_relu":
            tensors = {"x": y, "residual": normal(*y.shape)}
            work = Work(key, [a.name], tensors, lambda t: functional.add_relu(t["x"], t["residual"]), 0, 3 * outputs)
        elif op == "scale_add_relu":
            tensors = {"x": y, "scale": normal(batch, a.K, 1, 1).sigmoid(), "residual": normal(*y.shape)}
            work = Work(key, [a.name], tensors, _scale_add_relu, 0, 3 * outputs)
        elif op == "bn_act_global_avg_pool2d":
            tensors = {"x": y, **vectors, "residual": normal(*y.shape)}
            work = Work(key, [a.name], tensors, _bn_act_global_avg_pool2d, 0, 3 * outputs)
        elif op == "bn_act_max_pool2d":
            work = Work(key, [a.name], {"x": y, **vectors}, _bn_act_max_pool2d, 0, outputs * 9 // 4)
        else:
            work = Work(key, [a.name], {"x": y}, lambda t: functional.max_pool2d(t["x"], 3, 2, 1), 0, outputs * 5 // 4)
        work.place = (a.stride, a.padding, a.dilation, a.groups)
        shapes[key] = work
    return iter(shapes.values())


def _conv_bn_act(t: dict[str, Tensor], place: dict[str, int]) -> Tensor:
    given = (t["x"], t["w"], None, t["mean"], t["var"], t["gamma"], t["beta"], t.get("residual"))
    return functional.conv_bn_act(*given, **place)


def _bn_act(t: dict[str, Tensor]) -> Tensor:
    statistics_ = (t["mean"].clone(), t["var"].clone())
    return functional.bn_act(t["x"], *statistics_, t["gamma"], t["beta"], t.get("residual"), training=True)


def _bn_act_max_pool2d(t: dict[str, Tensor]) -> Tensor:
    statistics_ = (t["mean"].clone(), t["var"].clone())
    return functional.bn_act_max_pool2d(t["x"], *statistics_, t["gamma"], t["beta"], 3, 2, 1, training=True)


def _scale_add_relu(t: dict[str, Tensor]) -> Tensor:
    return functional.scale_add_relu(t["x"], t["scale"], t["residual"])


def _bn_act_global_avg_pool2d(t: dict[str, Tensor]) -> Tensor:
    given = (t["x"], t["mean"].clone(), t["var"].clone(), t["gamma"], t["beta"], t["residual"])
    return functional.bn_act_global_avg_pool2d(*given, training=True)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Activations and filters in a dtype, vectors in float32 (float64 with float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {k: t.to(device, dtype if t.dim() == 4 else wide) for k, t in tensors.items()}


def check(op: str, work: Work, dtype: torch.dtype, device: str) -> None:
    """Ask every backend and hold what it computes to the law; what cannot run or is wrong gets no time."""
    given = cast(work.tensors, dtype, device)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        with backends.use_backend("eager"):
            exact = work.call(cast({k: t.double() for k, t in given.items()}, torch.float64, device))
        for name in backends.ORDER:
            if backends.room(op, name) is None:
                continue
            try:
                with backends.use_backend(name):
                    found[name] = work.call(given)
            except RuntimeError as error:
                work.verdicts[name] = str(error)
        own = max(relative(y, exact) for y in (found["eager"], _contiguous(op, work, given)))
    winograd = dtype == torch.float32 and op.startswith("conv") and not backends.is_exact()
    for name, y in found.items():
        allowed = (WINOGRAD_LAW if winograd and name == "cpu" else LAW) * own + torch.finfo(dtype).eps / 2
        error = relative(y, exact)
        work.verdicts[name] = "ok" if error <= allowed else f"WRONG: error {error:.1e}, allowed {allowed:.1e}"


def _contiguous(op: str, work: Work, given: dict[str, Tensor]) -> Tensor:
    """Eager's convolutions in its other memory format, whose sums run in another order; the law allows for the worse."""
    if not op.startswith("conv"):
        with backends.use_backend("eager"):
            return work.call(given)
    t = {k: v.contiguous() for k, v in given.items()}
    y = torch.nn.functional.conv2d(t["x"], t["w"], None, *work.place)
    if op == "conv2d":
        return y
    y = torch.nn.functional.batch_norm(y, t["mean"], t["var"], t["gamma"], t["beta"])
    return torch.relu(y + t["residual"] if "residual" in t else y)


def measure(work: Work, dtype: torch.dtype, device: str, rounds: int, seconds: float) -> None:
    """Time the backends that are right, in turns."""
    given = cast(work.tensors, dtype, device)
    right = [name for name, verdict in work.verdicts.items() if verdict == "ok"]
    with torch.no_grad():
        for _ in range(rounds):
            for name in right:
                with backends.use_backend(name):
                    work.call(given)
                    found = worker.times(lambda: work.call(given), seconds, device)
                work.times.setdefault(name, []).append(statistics.median(found))


def row(work: Work, room: str, dtype: torch.dtype, machine: roofline.Machine) -> list[str]:
    """A backend's line of the table, when it was timed."""
    size, rate = torch.finfo(dtype).bits // 8, machine.gflops[str(dtype)[6:]]
    seconds = statistics.median(work.times[room])
    floor = max(work.flops / rate, work.moved * size / machine.gbytes) / 1e9
    gflops = f"{work.flops / seconds / 1e9:.0f}" if work.flops else ""
    ratio = statistics.median(a / b for a, b in zip(work.times["eager"], work.times[room], strict=True))
    gbytes = f"{work.moved * size / seconds / 1e9:.1f}"
    return [f"{1e6 * seconds:.0f}", gflops, gbytes, f"{100 * floor / seconds:.0f}", f"{ratio:.2f}", ""]


def table(
    op: str, found: list[Work], dtype: torch.dtype, machine: roofline.Machine, device: str, rounds: int, seconds: float
) -> tuple[str, int]:
    """Check and time an operator's shapes.

    Returns:
        The table with the reasons of backends that cannot, and how many results were outside the law.
    """
    lines, reasons = [], []
    for work in found:
        check(op, work, dtype, device)
        measure(work, dtype, device, rounds, seconds)
        for room, verdict in work.verdicts.items():
            head = [work.shape, str(len(work.names)), room]
            if room in work.times:
                lines.append(head + row(work, room, dtype, machine))
                continue
            if not verdict.startswith("WRONG"):
                reasons += [] if verdict in reasons else [verdict]
                verdict = f"({reasons.index(verdict) + 1})"
            lines.append([*head, *[""] * 5, verdict])
    header = ["shape (+: residual)", "times", "backend", "us", "GFLOP/s", "GB/s", "% roof", "x eager", "note"]
    align = ["left", "right", "left", *["right"] * 5, "left"]
    text = tabulate(lines, header, disable_numparse=True, colalign=align)
    text += "".join(f"\n({n}) {reason}" for n, reason in enumerate(reasons, 1))
    return text, sum(line[-1].startswith("WRONG") for line in lines)


def main(args: argparse.Namespace, device: str) -> int:
    """Print the table of an operator for each network, batch and dtype.

    Returns:
        1 when a backend computed something outside the law, else 0.
    """
    if args.csv or args.json:
        raise BenchError("op prints a table; --csv and --json are for infer, train and suite")
    torch.set_num_threads(args.threads)
    machine = roofline.measure(device, args.dtype, args.threads)
    print(f"{report.device_name(device)}, {args.threads} threads, {machine.gbytes:.1f} GB/s ({machine.how})")
    wrong = 0
    for name, batch, dtype in itertools.product(args.model, args.batch, args.dtype):
        found = list(works(args.operator, roofline.layers(name, args.size), batch))
        given = (getattr(torch, dtype), machine, device, args.rounds, args.seconds / 10)
        text, outside = table(args.operator, found, *given)
        wrong += outside
        print(
            f"\n{args.operator}, {name}, batch {batch}, {dtype}; machine: {machine.gflops[dtype]:.0f} GFLOP/s\n\n{text}"
        )
    print(LEGEND)
    return int(wrong > 0)


LEGEND = """
x eager: median over interleaved rounds. % roof: the longer of computing the direct convolution and moving every tensor
once at this machine's rates, over the time; Winograd, Strassen and caches can beat it. Times include packing the filters, which a
frozen network does once. Only results within the law are timed (benchmarks/README.md has it)."""
