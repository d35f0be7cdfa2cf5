"""Registers, memory and instructions of every CUDA kernel on every architecture it was built for, as a CSV with bars.

    python tools/cuda_resources.py [--csv benchmarks/results/cuda_resources.csv] [--check]

Reads the built module (no GPU needed) by cuobjdump, from the CUDA toolkit or Triton's wheel. The bars: no stack frame, no
local memory (so no spills), 128-bit accesses in every kernel that moves packs, registers for the blocks its launch
bounds promise.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import nvcc

FIELDS = (
    "kernel",
    "arch",
    "registers",
    "shared",
    "stack",
    "local",
    "loads_128",
    "stores_128",
    "copies_128",
    "local_accesses",
    "instructions",
)


class Missing(RuntimeError):
    """Something this needs is not here; the message says what."""


def cuobjdump() -> str:
    """cuobjdump of the toolkit, else of Triton's wheel."""
    found = shutil.which("cuobjdump")
    home = nvcc.find_nvcc()
    candidates = [Path(home).resolve().parent / "cuobjdump"] if home else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for path in [Path(found)] if found else candidates:
        if path.is_file():
            return str(path)
    raise Missing("cuobjdump is neither on the PATH nor in the CUDA toolkit nor in Triton's wheel")


def module() -> Path:
    """The built CUDA module."""
    found = sorted((Path(__file__).resolve().parents[1] / "resnet_fast").glob("_cuda*.so"))
    if not found:
        raise Missing("resnet_fast/_cuda is not built: python setup.py build_ext --inplace, with nvcc on the PATH")
    return found[-1]


def demangle(names: list[str]) -> dict[str, str]:
    """Kernel names as in the source, without parameters."""
    tool = shutil.which("c++filt")
    if tool is None:
        return {n: n for n in names}
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"rf::cuda::|\(Mask\)|\(rf::cuda::Mask\)|^void ", "", t).rsplit("(", 1)[0] for t in text]
    return dict(zip(names, short))


def _sections(text: str) -> list[tuple[str, str]]:
    """(architecture, what follows it) of a cuobjdump listing."""
    parts = re.split(r"^arch = (sm_\w+)\s*$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


def measure(built: Path) -> list[dict[str, str | int]]:
    """One row per kernel and architecture."""

    def dump(flag: str) -> str:
        return subprocess.run([cuobjdump(), flag, str(built)], capture_output=True, text=True, check=True).stdout

    rows: dict[tuple[str, str], dict[str, str | int]] = {}
    for arch, text in _sections(dump("--dump-resource-usage")):
        for name, usage in re.findall(r"Function (\w+):\s*\n\s*(.*)", text):
            numbers = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage)}
            rows[name, arch] = {
                "arch": arch,
                "registers": numbers["REG"],
                "shared": numbers["SHARED"],
                "stack": numbers["STACK"],
                "local": numbers["LOCAL"],
            }
    for arch, text in _sections(dump("--dump-sass")):
        parts = re.split(r"^\s*Function : (\w+)\s*$", text, flags=re.M)
        for name, body in zip(parts[1::2], parts[2::2]):
            ops = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, re.M))

            def count(pattern: str, ops: Counter = ops) -> int:
                return sum(n for op, n in ops.items() if re.match(pattern, op))

            rows[name, arch] |= {
                "loads_128": count(r"LDG\..*128"),
                "stores_128": count(r"STG\..*128"),
                "copies_128": count(r"LDGSTS\..*128"),
                "local_accesses": count(r"(LDL|STL)\b"),
                "instructions": sum(n for op, n in ops.items() if op != "NOP"),
            }
    names = demangle(sorted({name for name, _ in rows}))
    table = [{"kernel": names[name]} | row for (name, _), row in rows.items()]
    return sorted(table, key=lambda r: (str(r["kernel"]), int(re.sub(r"\D", "", str(r["arch"])))))


def faults(row: dict[str, str | int]) -> list[str]:
    """Which bars a kernel misses."""
    out = []
    if row["stack"] or row["local"] or row["local_accesses"]:
        out.append(f"local memory: {row['stack']} bytes of stack, {row['local_accesses']} accesses")
    packs = re.search(r"<(?:float|bf16|f16)(?:, (\d+))?", str(row["kernel"]))
    if packs and packs[1] != "1":
        if row["loads_128"] + row["copies_128"] == 0:
            out.append("no 128-bit load")
        if row["stores_128"] == 0 and "statistics" not in str(row["kernel"]) and "reduce" not in str(row["kernel"]):
            out.append("no 128-bit store")
    if str(row["kernel"]).startswith("bn_") and row["registers"] > 128:
        out.append(f"{row['registers']} registers, two blocks of 256 threads allow 128")
    return out


def main() -> int:
    """Write the table; with --check compare with the bars only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="where to write the table (default: standard output)")
    parser.add_argument("--check", action="store_true", help="write nothing, only compare with the bars")
    arguments = parser.parse_args()
    try:
        table = measure(module())
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    if not arguments.check:
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.csv, "w", newline="") if arguments.csv else sys.stdout as out:
            writer = csv.DictWriter(out, FIELDS)
            writer.writeheader()
            writer.writerows(table)
    bad = [(row, fault) for row in table for fault in faults(row)]
    for row, fault in bad:
        print(f"{row['kernel']} on {row['arch']}: {fault}", file=sys.stderr)
    print(f"{len(table)} kernels, {len(bad)} below the bars", file=sys.stderr)
    return 1 if bad or not table else 0


if __name__ == "__main__":
    sys.exit(main())
