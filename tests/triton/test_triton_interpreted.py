"""Runs the files under interpreted/ in a process of their own: TRITON_INTERPRET counts when a kernel is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(p.name for p in (HERE / "interpreted").glob("test_*.py"))


def run(file: str, marks: str) -> None:
    """One file's tests of these marks, all of which must pass."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / "interpreted" / file),
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marks,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    if done.returncode == 5:
        pytest.skip(f"{file} has no tests marked {marks!r}")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 0
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file):
    run(file, "not proof")


@pytest.mark.proof
@pytest.mark.parametrize("file", FILES)
def test_interpreted_proof(file):
    run(file, "proof")
