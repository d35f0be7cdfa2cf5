"""Tiles of the Triton convolutions: which are sensible for a problem, and which is fastest on the card at hand.

The table comes from compiled code (registers, spills, instructions per matrix instruction for sm_80, 90, 100); 256 x 128
has fewer instructions still on sm_100, but its fused epilogue spills. The order is a heuristic. On a GPU the first tiles
are timed at first sight of a problem and the fastest is kept with the other measured choices; with RESNET_FAST_TUNE=0,
under graph capture and without a GPU it is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fast import _choices
from resnet_fast.ops import triton_common as rooms


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N x BLOCK_K of the GEMM, warps, pipeline stages, and parts a split GEMM_K has."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    split: int = 1

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages} split {self.split}"


_forced: Tile | None = None
_every = False
_architecture: int | None = None
_way: str | None = None
#: An A100's, for the order of candidates: flops per second and multiprocessor, bytes per second.
PEAK_16, PEAK_IEEE, BANDWIDTH = 2.9e12, 0.18e12, 2e12
NEAR = 1.15  # times within so much of each other are equal: the model knows no better
LAUNCH = 3e-6  # seconds until a kernel behind another one runs at full speed: a guess
_CANDIDATES = 3  # timed per problem: compiling a tile takes seconds


@contextmanager
def use(tile: Tile) -> Iterator[None]:
    """Run every convolution of this process with this very tile; for tests and tables."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


@contextmanager
def every_candidate() -> Iterator[None]:
    """Run every convolution of this process once with each candidate: to compile, count or warm up all of them."""
    global _every
    before, _every = _every, True
    try:
        yield
    finally:
        _every = before


@contextmanager
def way(name: str) -> Iterator[None]:
    """Take this way wherever `pick` has it; for tests and tables."""
    global _way
    before, _way = _way, name
    try:
        yield
    finally:
        _way = before


@contextmanager
def architecture(name: int) -> Iterator[None]:
    """Choose tiles as for a card of this architecture (80, 90, ...; see `architecture_of`), whatever card is here."""
    global _architecture
    before, _architecture = _architecture, name
    try:
        yield
    finally:
        _architecture = before


def architecture_of(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 80 without a card, 0 for AMD's."""
    if _architecture is not None:
        return _architecture
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gemm_tiles(
    m: int, n: int, k: int, channels: int, bytes_: int, ieee: bool, sm: int, groups: int, arch: int,
    fits: Callable[[Tile], bool] = lambda tile: True,
) -> list[Tile]:  # fmt: skip
    """Candidates for GEMM_M x GEMM_N x GEMM_K with `channels` summed per tap, best guess first.

    Args:
        fits: whether the kernel has registers for a tile.
    """
    if ieee:  # no matrix instructions: registers are the limit
        base = [Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2)]
    elif bytes_ == 4:
        base = [Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(128, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3)]
        if arch >= 100:  # the two in the middle spill a few registers there
            base = [base[0], base[-1]]
    else:
        base = [
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 4, 3),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 64, 4, 3),
            Tile(128, 32, 64, 4, 3),
        ]
        if arch == 80:  # elsewhere 128 x 128 sums spill in four warps
            base.insert(1, Tile(128, 128, 32, 4, 4))
    widest = max(16, min(rooms.next_power_of_2(n), 128))
    base = list(filter(fits, base))
    fitting = [_fit(t, n, channels, bytes_) for t in base if t.n <= widest] or [_fit(base[-1], n, channels, bytes_)]
    best: dict[Tile, float] = {}
    for t in dict.fromkeys(fitting):
        programs = -(-m // t.m) * -(-n // t.n) * groups
        # A split leaves each part eight iterations at least; its float32 parts are written and read.
        costs = {
            split: _seconds_at_best(programs * split, t, k / split, bytes_, ieee, sm)
            + (split > 1) * (LAUNCH + split * m * n * groups * 8 / BANDWIDTH)
            for split in (1, 2, 3, 4, 6, 8)
            if split == 1 or k // (split * t.k) >= 8
        }
        split = _fewest_parts(costs)
        best[replace(t, split=split)] = costs[split]
    return sorted(best, key=best.get)[:_CANDIDATES]


def _fewest_parts(costs: dict[int, float]) -> int:
    """The smallest split whose time is near the best: the model knows no better, and parts are bytes."""
    least = min(costs.values())
    return min(split for split, cost in costs.items() if cost <= NEAR * least)


def _seconds_at_best(programs: int, t: Tile, depth: float, bytes_: int, ieee: bool, sm: int) -> float:
    """A model's time: waves of programs, each as long as its tile is large; small tiles load more per product."""
    flops = PEAK_IEEE if ieee else PEAK_16 if bytes_ == 2 else PEAK_16 / 2
    return -(-programs // sm) * 2 * t.m * t.n * depth * (1 + 24 / t.m + 24 / t.n) / flops


def _fit(t: Tile, n: int, channels: int, bytes_: int) -> Tile:
    """Shrink BLOCK_N to the columns and BLOCK_K to what divides the channels (a masked block where nothing does)."""
    smallest = 16 if bytes_ == 2 else 8
    k = t.k
    while k > smallest and channels % k:
        k //= 2
    if channels % k:
        k = max(smallest, min(t.k, rooms.next_power_of_2(channels)))
    return Tile(t.m, max(16, min(t.n, rooms.next_power_of_2(n))), k, t.warps, t.stages, t.split)


def wgrad_tiles(
    k: int, n: int, pixels: int, parts: int, taps: int, bytes_: int, ieee: bool, sm: int, arch: int,
    prologue: bool = False,
) -> list[Tile]:  # fmt: skip
    """Candidates for dw: k filters x n columns per tap (or row), `parts` of those (taps / TAPS times groups)."""
    if ieee:
        base = [Tile(32, 32, 16, 4, 2)]
    elif bytes_ == 4:
        wide = 64 if taps == 1 else 32  # three float32 sums of 64 x 64 spill on sm_100
        base = [Tile(64, wide, 32, 4, 2), Tile(32, 32, 32, 4, 2)]
    elif taps == 3 and prologue and 80 <= arch < 90:
        # Three sums of 64 x 64 and three tiles on their way through registers, 64 deep, are too much: 32 to 64 bytes spill.
        base = [Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3), Tile(64, 32, 64, 4, 3)]
    elif taps == 3:
        base = [Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)]  # the last: half the parts
    else:
        base = [Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)]
        if arch < 100:  # spills there
            base.append(Tile(64, 128, 64, 4, 3))
    best: dict[Tile, float] = {}
    for t in base:
        block_m = max(16, min(t.m, rooms.next_power_of_2(k)))
        block_n = max(16, min(t.n, rooms.next_power_of_2(n)))
        warps = t.warps if block_m * block_n > 4096 else 4
        t = Tile(block_m, block_n, t.k, warps, t.stages)
        programs = -(-k // block_m) * -(-n // block_n) * parts
        costs = {}
        for split in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            if split == 1 or pixels // (split * t.k) >= 8:
                # TAPS taps share a program, hence the products of each count so often.
                costs[split] = _seconds_at_best(programs * split, t, taps * pixels / split, bytes_, ieee, sm)
                costs[split] += (split > 1) * (LAUNCH + split * k * n * parts * taps * 8 / BANDWIDTH)
        split = _fewest_parts(costs)
        best.setdefault(replace(t, split=split), costs[split])
    # Of tiles whose times are near the best, those of fewer parts first, for the same reason.
    near = NEAR * min(best.values())
    return sorted(best, key=lambda t: (best[t] > near, t.split if best[t] <= near else best[t]))[:_CANDIDATES]


def choose(key: str, tiles: list[Tile], run: Callable[[Tile], None], device: torch.device) -> None:
    """Run the problem with its best tile; at first sight on a GPU that is found by timing the candidates."""
    if _forced is not None:
        run(_forced)
        return
    if _every:
        for tile in tiles:
            run(tile)
        return
    by_name = {str(t): t for t in tiles}
    run(by_name[_fastest(f"triton tile|{key}", list(by_name), lambda name: run(by_name[name]), device)])


def pick(key: str, ways: dict[str, Callable[[], Tensor]], device: torch.device) -> Tensor:
    """Compute something in the fastest of several ways, found as tiles are; without a measurement in the first."""
    if _way in ways:
        return ways[_way]()
    return ways[_fastest(f"triton way|{key}", list(ways), lambda name: ways[name](), device)]()


def _fastest(key: str, names: list[str], run: Callable[[str], object], device: torch.device) -> str:
    if len(names) == 1 or device.type != "cuda":
        return names[0]
    known = _choices.get(key)
    if known in names:
        return known
    if not _choices.measuring() or torch.cuda.is_current_stream_capturing():
        return names[0]
    best = min(names, key=lambda name: _seconds(run, name))
    _choices.put(key, best)
    return best


def _seconds(run: Callable[[str], object], name: str) -> float:
    from triton.runtime.errors import OutOfResources

    try:
        run(name)  # compiles
    except OutOfResources:  # a card with less shared memory than the table was made for
        return float("inf")
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(name)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
