"""The build of the CUDA part: finding nvcc, architectures, what the module needs to load, and the table of resources."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast import _native

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import cuda_resources  # noqa: E402
import nvcc  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"


@pytest.fixture
def fresh(monkeypatch):
    """The environment without CUDA variables, and nothing remembered of an earlier one."""
    for name in ("CUDA_HOME", "CUDA_PATH", "RESNET_FAST_CUDA", "RESNET_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    nvcc.find_nvcc.cache_clear()
    yield monkeypatch
    nvcc.find_nvcc.cache_clear()


def test_required_without_nvcc_is_an_error(fresh):
    fresh.setenv("CUDA_HOME", "/nowhere")
    assert nvcc.why_not() == "no nvcc in /nowhere/bin"
    fresh.setenv("RESNET_FAST_CUDA", "1")
    with pytest.raises(nvcc.NvccError, match="RESNET_FAST_CUDA=1 wants nvcc, and none was found in /nowhere/bin"):
        nvcc.why_not()


def test_never_and_nonsense(fresh):
    fresh.setenv("RESNET_FAST_CUDA", "0")
    assert nvcc.why_not() == "RESNET_FAST_CUDA=0"
    fresh.setenv("RESNET_FAST_CUDA", "yes")
    with pytest.raises(nvcc.NvccError, match="got 'yes'"):
        nvcc.why_not()


def test_the_wheels_nvcc_is_found(fresh, tmp_path):
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.touch()
    fresh.setenv("PATH", "")
    fresh.setattr(nvcc.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    assert nvcc.find_nvcc() == str(tool)


def test_architectures(fresh):
    fresh.setattr(nvcc, "_supported", lambda: frozenset({"80", "86", "90"}))
    fresh.setattr(nvcc, "_nvcc", lambda: "nvcc")
    assert nvcc.archs() == [("80", False), ("90", True)], "an older nvcc builds what it knows, and PTX for the rest"
    fresh.setenv("RESNET_FAST_CUDA_ARCHS", "8.6;90+PTX")
    assert nvcc.archs() == [("86", False), ("90", True)]
    wanted = "arch=compute_86,code=sm_86", "arch=compute_90,code=[sm_90,compute_90]"
    assert tuple(nvcc.arch_flags(nvcc.archs())[1::2]) == wanted
    for bad, message in (("75", "from 80 on"), ("ampere", "from 80 on"), ("120", "does not know compute_120")):
        fresh.setenv("RESNET_FAST_CUDA_ARCHS", bad)
        with pytest.raises(nvcc.NvccError, match=message):
            nvcc.archs()


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_module_needs_no_cuda_library():
    """Nothing of CUDA is mapped after loading it alone: cudart is inside, the driver is found when it is called."""
    built = sorted((ROOT / "resnet_fast").glob("_cuda*.so"))
    if not built:
        pytest.skip("the CUDA part is not built")
    maps = python(
        f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(built[-1])!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(open('/proc/self/maps').read())"
    )
    assert "_cuda" in maps and not re.search(r"libcuda|libcudart|libtorch", maps)


def test_a_broken_cuda_part_does_not_hurt():
    said = python(
        "import sys; sys.modules['resnet_fast._cuda'] = None\n"
        "import torch, resnet_fast.functional as F; from resnet_fast import _native\n"
        "assert F.add_relu(torch.ones(2, 2), torch.ones(2, 2)).sum() == 8\n"
        "print(_native.cuda_why_not())"
    )
    assert "resnet_fast._cuda is not there" in said


def test_the_package_imports_it_lazily():
    assert python("import sys, resnet_fast.functional; print('resnet_fast._cuda' in sys.modules)").strip() == "False"
    assert _native.cuda_why_not() is None or len(_native.cuda_why_not()) > 20


def test_the_table_has_every_kernel_and_keeps_the_bars():
    with open(TABLE, newline="") as f:
        rows = [{k: v if k in ("kernel", "arch") else int(v) for k, v in row.items()} for row in csv.DictReader(f)]
    sources = "".join(p.read_text() for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    declared = set(re.findall(r"__global__ .*?(\w+)\(\w+Args", sources))
    assert declared and {r["kernel"].split("<")[0] for r in rows} == declared
    archs = {"sm_80", "sm_90", "sm_100", "sm_120"}
    for kernel in {r["kernel"] for r in rows}:
        assert {r["arch"] for r in rows if r["kernel"] == kernel} == archs
    assert not [fault for r in rows for fault in cuda_resources.faults(r)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "16 bytes of stack"),
        ({"local_accesses": 3}, "3 accesses"),
        ({"loads_128": 0}, "no 128-bit load"),
        ({"stores_128": 0}, "no 128-bit store"),
        ({"registers": 140}, "140 registers"),
    ],
)
def test_the_bars_can_be_missed(change, message):
    good = {"kernel": "bn_apply<float, 4>", "arch": "sm_80", "registers": 90, "shared": 0, "stack": 0, "local": 0}
    good |= {"loads_128": 8, "stores_128": 4, "copies_128": 0, "local_accesses": 0, "instructions": 100}
    assert cuda_resources.faults(good) == []
    assert any(message in fault for fault in cuda_resources.faults(good | change))


@pytest.mark.proof
def test_the_table_is_what_the_module_holds():
    """The committed table against the built module, for the architectures both have."""
    try:
        measured = cuda_resources.measure(cuda_resources.module())
    except cuda_resources.Missing as missing:
        pytest.skip(str(missing))
    assert not [fault for row in measured for fault in cuda_resources.faults(row)]
    with open(TABLE, newline="") as f:
        kernels = {row["kernel"] for row in csv.DictReader(f)}
    assert {str(row["kernel"]) for row in measured} == kernels
