"""One engine in a process of its own: it has its own thread pool, its own peak memory, and its own crash.

Talks JSON lines: first what it computed, then for every number of seconds on stdin the times of its calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

#: Calls before anything is timed: layouts settle, caches and clocks fill.
WARM_CALLS = 2


def _peak_memory_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _reset_peak_memory(device: str) -> None:
    """Forget the peak of compiling and packing: what counts is what a call needs."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: give freed pages back before counting
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:  # not Linux: the peak is the process's
        return


def times(call: Any, seconds: float, device: str) -> list[float]:
    """Seconds of each call, for about `seconds`; on a GPU between events, read when all are done."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    if device == "cuda":
        import torch

        marks = []
        while not marks or time.perf_counter() < end:
            marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            marks[-1][0].record()
            call()
            marks[-1][1].record()
            if len(marks) % 16 == 0:  # the host must not run seconds ahead of the card
                marks[-1][1].synchronize()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in marks]
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def main(engine: str, path: Path) -> None:
    """Serve one engine of the case in `path` until stdin ends; results go beside the case."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        warnings.filterwarnings("ignore")
        import torch

        from resnet_fast.bench import cases, engines

        case, content = cases.load(path)
        torch.set_num_threads(case.threads)
        if case.exact:
            os.environ["RESNET_FAST_EXACT"] = "1"
        model = cases.network(case.model)
        model.load_state_dict(content["state"])
        start = time.perf_counter()
        call = engines.build(engine, case, model, content["x"], content["target"])
        result = call()
        if case.mode == "train":
            result = torch.cat([result.view(1).double().cpu(), cases.gradients(model)])
        if case.device == "cuda":
            torch.cuda.synchronize()
        setup = time.perf_counter() - start
        torch.save(result.detach().cpu().double(), f"{path}.{engine}")
        del content, model, result
        for _ in range(WARM_CALLS):
            call()
        _reset_peak_memory(case.device)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        say(failed=f"{type(error).__name__}: {lines[0]}", detail="\n".join(lines))
        return
    say(ready=True, setup=setup)
    for line in sys.stdin:
        try:
            found = times(call, float(line), case.device)
        except Exception as error:
            say(failed=f"{type(error).__name__}: {error}")
            return
        say(median=statistics.median(found), calls=len(found), memory=_peak_memory_mib(case.device))
    out.flush()
    # Freeing gigabytes and ending a compiler's processes in order would take five seconds, with nothing left to keep.
    os._exit(0)
