"""Interleaved timing: every engine in its own process, rounds A B C, A B C, ..., medians of rounds with their spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_fast.bench import cases, engines
from resnet_fast.bench.cases import Case

#: Seconds an engine may take to get ready, and to answer a round beyond its own time.
SETUP_LIMIT, ROUND_LIMIT = 900.0, 300.0
#: Rounds a case gets however late it is.
MIN_ROUNDS = 3

#: The package's law: error against float64 at most twice eager's own plus one rounding. Winograd convolutions, which
#: float32 networks may use, are held to three times eager's.
LAW, WINOGRAD_LAW = 2.0, 3.0


@dataclass
class Result:
    """One engine's row."""

    engine: str
    failed: str | None = None
    setup: float = 0.0
    medians: list[float] = field(default_factory=list)
    memory: float = 0.0
    error: float = float("nan")
    allowed: float = float("nan")
    against_eager: float = float("nan")
    top5: float | None = None
    ratio: tuple[float, float, float] | None = None
    peer_ratio: tuple[float, float, float] | None = None

    @property
    def correct(self) -> bool:
        """Whether the law holds; without it no ratio is given."""
        return self.failed is None and self.error <= self.allowed

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Median, least and largest of the rounds' medians."""
        return statistics.median(self.medians), min(self.medians), max(self.medians)


class Worker:
    """The parent's end of one engine's process."""

    def __init__(self, engine: str, path: Path, case: Case) -> None:
        command = [sys.executable, "-m", "resnet_fast.bench", "worker", "--engine", engine, "--case", str(path)]
        environment = dict(os.environ, OMP_NUM_THREADS=str(case.threads))
        # A worker imports the very package this process runs, wherever it was started.
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.log = open(f"{path}.{engine}.log", "w+")  # noqa: SIM115 (closed with the process)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment)

    def ask(self, seconds: float | None, limit: float) -> dict[str, Any]:
        """The next message, after asking for a round; a worker that died or took too long has failed."""
        late = threading.Timer(limit, self.process.kill)
        late.start()
        try:
            if seconds is not None:
                self.process.stdin.write(f"{seconds}\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            expired = not late.is_alive()
            late.cancel()
        if line:
            return json.loads(line)
        if expired:
            return {"failed": f"no answer in {limit:.0f} s"}
        self.log.seek(0)
        last = self.log.read().strip().splitlines()[-1:] or ["nothing on stderr"]
        return {"failed": f"exit status {self.process.wait()}: {last[0]}"}

    def close(self) -> None:
        """End the process."""
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def measure(
    case: Case,
    names: list[str],
    rounds: int,
    seconds: float,
    folder: Path,
    progress: Callable[[str], None] = lambda text: None,
    deadline: float = float("inf"),
    end: float = float("inf"),
) -> list[Result]:
    """Run every engine of a case.

    Args:
        case: the work.
        names: the engines; this package's own is made ready alone, so that nothing disturbs its measurements, the others
            together.
        rounds, seconds: how often each engine has its turn, and how long a turn is (one call at least).
        folder: for the case's files.
        progress: called with a text whenever a step is done (one per engine, then one per engine and round).
        deadline: of `time.perf_counter`; rounds beyond `MIN_ROUNDS` are left out after it.
        end: of `time.perf_counter`; an engine that is not ready by then is ended and counts as failed, for kernels that
            compile at first sight may take longer than everything else together.

    Returns:
        A result per engine; failed ones carry the reason.
    """
    path = cases.prepare(case, folder)
    results = {name: Result(name) for name in names}
    workers: dict[str, Worker] = {}
    first = [n for n in names if n in engines.OWN]
    try:
        for group in ([[n] for n in first], [[n for n in names if n not in first]]):
            for together in group:
                if time.perf_counter() > end:
                    for name in together:
                        results[name].failed = "left out: no time was left to make it ready"
                        progress(f"{case}: {name} left out")
                    continue
                for name in together:
                    workers[name] = Worker(name, path, case)
                for name in together:
                    # Those made ready together may all be waiting in their pipes: a second is enough for an answer.
                    left = max(end - time.perf_counter(), 1.0)
                    answer = workers[name].ask(None, min(SETUP_LIMIT, left))
                    results[name].failed = answer.get("failed")
                    results[name].setup = answer.get("setup", 0.0)
                    progress(f"{case}: {name} {'failed' if results[name].failed else 'ready'}")
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in names:
                result = results[name]
                if result.failed is None:
                    answer = workers[name].ask(seconds, ROUND_LIMIT + seconds)
                    result.failed = answer.get("failed")
                    if result.failed is None:
                        result.medians.append(answer["median"])
                        result.memory = answer["memory"]
                progress(f"{case}: round {turn + 1} of {rounds}, {name}")
    finally:
        for worker in workers.values():
            worker.close()
    judge(case, results, path)
    compare(results)
    for file in folder.glob(f"{path.name}*"):
        file.unlink()
    return list(results.values())


def judge(case: Case, results: dict[str, Result], path: Path) -> None:
    """Errors against float64, what the law allows, and the agreement with eager."""
    _, content = cases.load(path)
    exact = content["exact"].double()
    found = {n: torch.load(f"{path}.{n}", weights_only=True) for n, r in results.items() if r.failed is None}
    errors = {n: relative(y[: len(exact)], exact) for n, y in found.items()}
    yardstick = max((errors[n] for n in (engines.BASE, "eager_nchw") if n in errors), default=float("nan"))
    rounding = torch.finfo(getattr(torch, case.dtype)).eps / 2
    for name, y in found.items():
        result = results[name]
        winograd = name in engines.OWN and case.dtype == "float32" and not case.exact
        result.error = errors[name]
        result.allowed = (WINOGRAD_LAW if winograd else LAW) * yardstick + rounding
        if engines.BASE in found and case.mode == "infer":
            result.against_eager = relative(y, found[engines.BASE])
            result.top5 = top5_agreement(y, found[engines.BASE])


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error relative to the root mean square of the exact result; infinite where y is not finite."""
    error = ((y.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if error == error else float("inf")


def top5_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of the five largest logits two results have in common, over all images."""
    k = min(5, a.shape[1])
    mine, theirs = a.topk(k).indices, b.topk(k).indices
    return (mine[:, :, None] == theirs[:, None, :]).any(2).double().mean().item()


def compare(results: dict[str, Result]) -> None:
    """Ratios to eager channels_last and to the fastest correct peer, round by round; none for a result that is wrong."""
    base = results.get(engines.BASE)
    peers = [r for n, r in results.items() if n not in engines.OWN and r.correct]
    best = min(peers, key=lambda r: r.seconds[0], default=None)
    for result in results.values():
        if result.correct:
            result.ratio = ratios(base, result) if base is not None and base.correct else None
            result.peer_ratio = ratios(best, result) if best is not None else None


def ratios(slow: Result, fast: Result) -> tuple[float, float, float]:
    """Median, least and largest of how many times faster one was in each round."""
    found = [a / b for a, b in zip(slow.medians, fast.medians, strict=False)]
    return statistics.median(found), min(found), max(found)
