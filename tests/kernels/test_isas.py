"""Every instruction set: the kernels' tests once more in a process of its own each, which it starts with."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import _C, backends, exact, functional
from resnet_fast.testing import check

ISAS = ("default", "avx2", "avx512", "avx512_bf16")
HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_*.py"))
#: The executor's graphs at every size and with any threads; what else it does has no arithmetic. Not this file's processes.
SELECTED = "not every_instruction_set and (not test_network or several_sizes or threads_or_layout)"

# Without the package, which needs two seconds to import torch: the module itself knows what the processor has.
ASK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())
"""


def environment(isa: str) -> dict[str, str]:
    """This process's, with the instruction set forced, and not as one of xdist's workers."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return found | {"RESNET_FAST_ISA": isa, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def norm(z, v, training=False):
    return F.batch_norm(z, None if training else v[0], None if training else v[1], v[2], v[3], training)


#: From the public function to the kernel, and plain PyTorch; x, w and r in the dtype, vectors in float32.
CALLS = {
    "add_relu": (
        lambda x, w, r, **v: functional.add_relu(r, r.roll(1, 0)),
        lambda x, w, r, **v: F.relu(r + r.roll(1, 0)),
    ),
    "conv_bn_act": (
        lambda x, w, r, **v: functional.conv_bn_act(x, w, None, *v.values(), r, padding=1),
        lambda x, w, r, **v: F.relu(norm(F.conv2d(x, w, None, 1, 1), [*v.values()]) + r),
    ),
    "conv2d": (
        lambda x, w, r, **v: functional.conv2d(x, w, padding=1),
        lambda x, w, r, **v: F.conv2d(x, w, None, 1, 1),
    ),
    "bn_act": (
        lambda x, w, r, **v: functional.bn_act(r, None, None, v["gamma"], v["beta"], training=True),
        lambda x, w, r, **v: F.relu(norm(r, [*v.values()], training=True)),
    ),
    "max_pool2d": (
        lambda x, w, r, **v: functional.max_pool2d(r, 3, 2, 1),
        lambda x, w, r, **v: F.max_pool2d(r, 3, 2, 1),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_operators_in_this_instruction_set(op, dtype):
    """The files beside this one call the kernels alone."""

    def make():
        vectors = {name: torch.rand(33) + 0.5 for name in ("mean", "var", "gamma", "beta")}
        x, w, r = torch.randn(2, 19, 11, 9), torch.randn(33, 19, 3, 3) / 13, torch.randn(2, 33, 11, 9)
        return {"x": x.to(dtype), "w": w.to(dtype), "r": r.to(dtype)} | vectors

    with exact(), backends.use_backend("cpu"):
        check.compare(*CALLS[op], make)


@pytest.mark.skipif("RESNET_FAST_ISA" in os.environ, reason="already one of the forced runs")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, tmp_path, request):
    """Each set passes every file's tests, or says that this processor does not have it: never an illegal instruction."""
    if isa == _C.isa():
        pytest.skip(f"{isa} is what this process runs with: the tests beside this one are its tests")
    env = environment(isa)
    asked = subprocess.run([sys.executable, "-c", ASK, _C.__file__], env=env, capture_output=True, text=True)
    if asked.returncode:
        sentence = asked.stderr.strip().splitlines()[-1]
        assert "this processor does not have it" in sentence or "was built with" in sentence, asked.stderr
        pytest.skip(sentence)
    assert asked.stdout.strip() == isa
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--seed", str(request.config.option.seed), "-k", SELECTED]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *map(str, FILES)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    passed: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        if not len(case):  # neither skipped nor failed
            passed[case.get("classname").split(".")[-1]] += 1
    none = [file.stem for file in FILES if not passed[file.stem]]
    assert not none, f"no test of {none} ran with {isa}; passed: {dict(passed)}"
