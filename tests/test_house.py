"""The laws of the house: what depends on what, and what every operator has. Read with `ast`, so nothing is run by reading."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast import backends, functional
from resnet_fast.testing import rooms

ROOT = Path(resnet_fast.__file__).parents[1]
PACKAGE = ROOT / "resnet_fast"
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
OPERATORS = rooms.operators()
ROOMS = [(op, room) for op in OPERATORS for room in rooms.rooms(op)]
in_checkout = pytest.mark.skipif(not (ROOT / "tests").exists(), reason="an installed package has no tests beside it")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(p) for p in MODULES}


def imports(path: Path) -> set[str]:
    """The package's own modules a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in NAMES else node.module for a in node.names
            }
    return {f for f in found if f.split(".")[0] == "resnet_fast"}


def layer(module: str) -> int | None:
    """models 9 -> convert, freeze, nn 7..8 -> functional 6 -> op.py 5 -> _library 4 -> backends 3 -> rooms 2 -> _native 0."""
    parts = module.split(".")
    if module == "resnet_fast":
        return 10
    head = parts[1]
    if head in ("testing", "bench", "train", "info", "__main__"):
        return 12
    if head == "models":
        return 9
    if head in ("convert", "freeze", "tune", "_trace", "_lower", "_plan", "_graphs"):
        return 8
    if head == "nn":
        return 7
    if head == "functional":
        return 6
    if head == "ops":
        if len(parts) == 2:
            return 2  # the package itself, empty
        if parts[-1] == "op":
            return 5
        return 2  # rooms and what they share
    if head == "_library":
        return 4
    if head == "backends":
        return 3
    if head in ("_choices", "_native", "_plain"):
        return 1
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_direction(path):
    """models -> nn -> functional -> op.py -> _library -> backends -> rooms: nothing imports anything on its left."""
    mine = layer(name_of(path))
    assert mine is not None, f"{name_of(path)} has no place in the house: give it one in this test"
    for other in imports(path):
        theirs = layer(other)
        # Rooms may ask the chooser how exact to be; it does not import them (importlib does, by name, when needed).
        if mine == 2 and other == "resnet_fast.backends":
            continue
        if other == "resnet_fast" and path.name == "_native.py":
            continue  # `from resnet_fast import _C`: the compiled module, which has no .py
        assert theirs is not None and theirs <= mine, f"{name_of(path)} (layer {mine}) imports {other} (layer {theirs})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_caller_of_torch_library(path):
    """Only _library registers operators; only _native imports the compiled modules."""
    if path.name in ("_library.py",):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "library" and ast.unparse(node.value) == "torch":
            raise AssertionError(f"{path.name}:{node.lineno} uses torch.library")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", "") or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                assert "torch.library" not in whole, f"{path.name}:{node.lineno} imports torch.library"
                if path.name != "_native.py":
                    assert not re.search(r"resnet_fast\._(C|cuda)\b", whole), (
                        f"{path.name}:{node.lineno} imports {whole}"
                    )


def test_import_without_triton_and_the_compiled_module():
    """Cold: neither is there, and the package imports, computes and says why nothing faster runs."""
    code = """
import sys
for name in ("triton", "resnet_fast._C", "resnet_fast._cuda"):
    sys.modules[name] = None  # importing it is an ImportError
import resnet_fast, torch
from resnet_fast import _native
assert "reinstall" in _native.why_not() and _native.isa() is None, _native.why_not()
x = torch.randn(2, 4, 6, 6, requires_grad=True)
w = torch.randn(4, 4, 3, 3)
ones = torch.ones(4)
y = resnet_fast.functional.conv_bn_act(x, w, None, ones, ones, padding=1, residual=x)
y.sum().backward()
with torch.no_grad():
    z = resnet_fast.functional.conv_bn_act(x, w, None, ones, ones, padding=1, residual=x)
    def eager(*given):
        x, w, ones = given
        norm = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(x, w, padding=1), ones, ones)
        return torch.relu(norm + x)
    truth = eager(x.double(), w.double(), ones.double())
    allowed = 2 * (eager(x, w, ones) - truth).norm() + torch.finfo(torch.float32).eps * truth.norm()
    assert all((out - truth).norm() <= allowed for out in (y, z))
with resnet_fast.use_backend("cpu"):
    try:
        resnet_fast.functional.add_relu(x, x)
    except RuntimeError as error:
        assert "_C is not there" in str(error), error
    else:
        raise SystemExit("the cpu room ran without its module")
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "fine", done.stderr


def test_import_reads_no_optional_package():
    """What benchmarks and tests want is not loaded by importing the package."""
    code = "import sys, torch; before = set(sys.modules); import resnet_fast; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    unwanted = {"torchvision", "timm", "matplotlib", "rich", "sklearn", "pytest", "triton", "hypothesis"}
    assert done.returncode == 0 and not loaded & unwanted, loaded & unwanted
    assert "torch.utils.cpp_extension" not in done.stdout, "nothing is compiled at import"


# ---- what an operator has


@in_checkout
@pytest.mark.parametrize("op", OPERATORS)
def test_an_operators_files(op):
    folder = PACKAGE / "ops" / op
    for name in ("__init__.py", "op.py", "eager.py", "README.md"):
        assert (folder / name).exists(), f"{op} has no {name}"
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists(), f"{op} has no test of its stem"


@in_checkout
@pytest.mark.parametrize("op", OPERATORS)
def test_an_operators_benchmark(op):
    assert (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").exists(), f"{op} has no benchmark of its stem"


#: Operators that share a kernel family's files: both convolutions run csrc's conv*.
STEMS = {"conv2d": "conv", "conv_bn_act": "conv", "max_pool2d": "max_pool", "bn_act_max_pool2d/cuda": "max_pool"}


@in_checkout
@pytest.mark.parametrize("op, room", [pair for pair in ROOMS if pair[1] in ("cpu", "cuda")])
def test_compiled_twins(op, room):
    """A cpu room has its C++ page, a cuda room its CUDA page, and both the args struct they share."""
    stem = STEMS.get(f"{op}/{room}", STEMS.get(op, op))
    assert (ROOT / "csrc" / f"{stem}.h").exists(), f"csrc/{stem}.h"
    suffix = "cpp" if room == "cpu" else "cu"
    assert list((ROOT / "csrc" / room).glob(f"{stem}*.{suffix}")), f"csrc/{room}/{stem}*.{suffix}"


@pytest.mark.parametrize("op, room", ROOMS)
def test_the_same_doors(op, room):
    """Every room has eager's doors with eager's parameters (more of its own may follow, with defaults)."""
    try:
        module = backends.room(op, room)
    except ImportError as error:
        pytest.skip(f"{op}.{room} cannot be imported here: {error}")
    eager = backends.room(op, "eager")
    assert inspect.signature(module.why_not).parameters["door"]
    assert module.fwd, f"{op}.{room} has no forward"
    for door in ("fwd", "bwd", "statistics", "dx"):
        if not backends.has_door(module, door):
            continue
        assert backends.has_door(eager, door), f"{op}.{room} has {door}, the specification has not"
        ours, theirs = (list(inspect.signature(getattr(m, door)).parameters) for m in (module, eager))
        more = list(inspect.signature(getattr(module, door)).parameters.values())[len(theirs) :]
        assert all(p.default is not p.empty for p in more), f"{op}.{room}.{door} wants more than eager's: {more}"
        assert ours[: len(theirs)] == theirs, f"{op}.{room}.{door}{ours}, eager's is {theirs}"
        assert inspect.getdoc(getattr(module, door)), f"{op}.{room}.{door} has no docstring"


PARTS = ("Shape:", "Maths:", "Cost:", "Raises:", "Source:")


@pytest.mark.parametrize("name", functional.__all__)
def test_public_docstrings(name):
    """A sentence, then Shape, Maths, Cost, Raises, Source, in this order and none empty."""
    lines = inspect.getdoc(getattr(functional, name)).splitlines()
    assert lines[0].endswith("."), "the first line is a sentence"
    at = [lines.index(part) for part in PARTS]
    assert at == sorted(at), f"{name}: the parts are out of order"
    for start, end in zip(at, [*at[1:], len(lines)]):
        assert any(line.strip() for line in lines[start + 1 : end]), f"{name}: {lines[start]} is empty"


@pytest.mark.parametrize("name", functional.__all__)
def test_public_type_hints(name):
    function = getattr(functional, name)
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_public_names():
    """Pinned: users import these."""
    names = """add_relu bn_act bn_act_conv2d bn_act_global_avg_pool2d bn_act_max_pool2d conv2d conv_bn_act max_pool2d
    recomputed_conv_bn_act residual_block scale_add_relu"""
    assert set(functional.__all__) == set(names.split())
    wanted = {"convert", "exact", "explain", "freeze", "functional", "nn", "restore", "tune", "use_backend"}
    assert wanted <= set(resnet_fast.__all__)
    assert all(hasattr(resnet_fast, name) for name in resnet_fast.__all__)
    assert {"ConvBNAct", "BasicBlock", "Bottleneck"} <= set(resnet_fast.nn.__all__)
    models = importlib.import_module("resnet_fast.models")
    for name in (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
        "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
    ):  # fmt: skip
        assert callable(getattr(models, name)), name
    for name in ("info", "bench"):
        assert importlib.util.find_spec(f"resnet_fast.{name}"), f"python -m resnet_fast.{name}"


def test_public_parameters():
    """Pinned: argument names and order of the operators are torch's."""
    expected = {
        "add_relu": "x residual",
        "bn_act": "x running_mean running_var weight bias residual training momentum eps act group",
        "bn_act_conv2d": "z running_mean running_var bn_weight bn_bias weight bias training momentum eps stride padding "
        "dilation groups group",
        "bn_act_global_avg_pool2d": "x running_mean running_var weight bias residual training momentum eps group",
        "bn_act_max_pool2d": "x running_mean running_var weight bias kernel_size stride padding dilation ceil_mode "
        "training momentum eps group",
        "conv2d": "x weight bias stride padding dilation groups",
        "conv_bn_act": "x weight bias running_mean running_var bn_weight bn_bias residual training momentum eps act "
        "stride padding dilation groups group",
        "max_pool2d": "x kernel_size stride padding dilation ceil_mode",
        "recomputed_conv_bn_act": "x weight bias bn residual act stride padding dilation groups before pool",
        "residual_block": "x links projection",
        "scale_add_relu": "x scale residual",
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(functional, name)).parameters) == parameters.split()


def test_operators_are_registered():
    """Every operator is torch.ops.resnet_fast.<its word>, with a schema, a fake and an autograd formula."""
    for op in OPERATORS:
        overload = getattr(torch.ops.resnet_fast, op).default
        assert not overload._schema.is_mutable, f"{op} changes an argument"
        for key in ("CompositeExplicitAutograd", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{op}", key), (
                f"{op} has no {key} kernel"
            )


# ---- files


@in_checkout
def test_kernel_and_python_files_are_short():
    """400 lines at most: what is longer is two things."""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    sources += [p for folder in ("resnet_fast", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 400}
    assert sources and not long, long


@in_checkout
def test_kernel_files_have_a_header():
    """A kernel's page begins by saying what it is."""
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
        assert path.read_text().startswith("//"), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path}: no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            if any("jit" in d for d in decorators):  # a kernel's words stand in its file's header
                continue
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@in_checkout
def test_variables_are_in_the_readme():
    """Every RESNET_FAST_* a user can set is told of."""
    readme = (ROOT / "README.md").read_text()
    sources = [*MODULES, ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    used = {v for p in sources for v in re.findall(r"\bRESNET_FAST_[A-Z]+\b", p.read_text())}
    assert used and not {v for v in used if v not in readme}, {v for v in used if v not in readme}


@in_checkout
def test_setup_needs_no_torch():
    """Building needs neither torch nor the network."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    top = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in top for a in n.names} | {getattr(n, "module", None) or "" for n in top}
    modules = {name.split(".")[0] for name in modules}
    assert not modules & {"torch", "urllib", "requests", "socket", "http"}, modules


@in_checkout
def test_no_march_native():
    """A wheel runs on another machine than the one that built it."""
    text = (ROOT / "setup.py").read_text()
    assert "-march=native" not in re.sub(r"#.*", "", text) and "-ffast-math" not in text


@in_checkout
@pytest.mark.skipif(os.name != "posix", reason="a shell's view")
def test_repository_holds_no_large_files():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    sizes = {f: (ROOT / f).stat().st_size for f in done.stdout.split("\0") if f and (ROOT / f).is_file()}
    assert sizes and not {f: n for f, n in sizes.items() if n > 2_000_000}
