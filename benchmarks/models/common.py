"""A whole network in this process: held to the law against float64 first, then timed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.bench import cases, engines, timer


def run(benchmark: Any, mode: str, model: str, batch: int, engine: str) -> None:
    """Time one engine; `python -m resnet_fast.bench` compares them in turns and in processes of their own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = cases.Case(mode, model, batch, device=device, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = cases.prepare(case, Path(folder))
        _, content = cases.load(path)
        results = {}
        for name in ("eager", "eager_nchw", engine):
            network = cases.network(model)
            network.load_state_dict(content["state"])
            call = engines.build(name, case, network, content["x"], content["target"])
            y = call()
            if mode == "train":
                y = torch.cat([y.view(1).double().cpu(), cases.gradients(network)])
            torch.save(y.detach().double().cpu(), f"{path}.{name}")
            results[name] = timer.Result(name)
        timer.judge(case, results, path)
    if not results[engine].correct:
        pytest.fail(f"error {results[engine].error:.1e}, the law allows {results[engine].allowed:.1e}")

    def timed() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info["img/s"] = batch / benchmark.stats.stats.median
