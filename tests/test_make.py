"""`make gpu` without a card: what it would run, on stand-ins for Python, the card's tools and their faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="an installed package has no Makefile beside it"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


def make_gpu(folder: Path, tests: str = "exit 0", **limits: int) -> tuple[int, list[str], float]:
    """The exit status, what was called, and the seconds of `make gpu` in a folder of stand-ins."""
    shutil.copy(ROOT / "Makefile", folder)
    log = folder / "log"
    for name in ("csrc", "tools", "bin", ".venv-test/bin", ".venv-bench/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml"):
        (folder / name).touch()
    scripts = {
        ".venv-test/bin/python": f'echo "tests $*" >> {log}\n{tests}',
        ".venv-bench/bin/python": f'echo "bench $*" >> {log}',
        "bin/nvidia-smi": "echo NVIDIA H100 80GB HBM3",
        "bin/compute-sanitizer": f'echo "sanitizer $*" >> {log}',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    time.sleep(0.01)
    for name in (".venv-test/.done", ".venv-bench/.done"):
        (folder / name).touch()
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment = {k: v for k, v in environment.items() if k not in ("MAKEFLAGS", "PYTEST_ARGS", "BENCH_ARGS")}
    command = ["make", "gpu", *(f"{name}={value}" for name, value in limits.items())]
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines(), time.monotonic() - start


def test_everything_runs_and_is_named_after_the_card(tmp_path):
    status, called, _ = make_gpu(tmp_path)
    assert status == 0
    assert "-m gpu" in called[0] and called[0].startswith("tests")
    assert called[1].startswith("bench -m resnet_fast.bench --device cuda")
    assert called[2].endswith("--csv benchmarks/results/cuda-timing-nvidia-h100-80gb-hbm3.csv")
    assert [line.split()[0] for line in called[3:]] == ["sanitizer", "sanitizer"]


def test_a_red_test_does_not_cost_the_figures(tmp_path):
    status, called, _ = make_gpu(tmp_path, "exit 1")
    assert status != 0 and sum(line.startswith("bench") for line in called) == 2


def test_tests_that_hang_do_not_cost_the_figures(tmp_path):
    status, called, seconds = make_gpu(tmp_path, "exec sleep 50", GPU_TESTS=1)
    assert status != 0 and sum(line.startswith("bench") for line in called) == 2 and seconds < 40


def test_it_ends(tmp_path):
    """Whatever hangs, the whole ends at its limit, which leaves the benchmark's own after the tests'."""
    status, _, seconds = make_gpu(tmp_path, "exec sleep 50", GPU_LIMIT=1)
    assert status != 0 and seconds < 40
    text = (ROOT / "Makefile").read_text()
    limits = {
        name: int(line.split("?=")[1])
        for line in text.splitlines()
        if "?=" in line and (name := line.split("?=")[0].strip()).startswith("GPU_")
    }
    at_most = float(text.split("--at-most ")[1].split()[0])
    assert limits["GPU_TESTS"] + 60 * at_most < limits["GPU_LIMIT"] <= 540
