"""Finds nvcc and builds resnet_fast._cuda with it: csrc/cuda/*.cu for several architectures, in parallel, one link.

Used by setup.py and by tools/cuda_resources.py; needs neither torch nor a GPU nor a driver.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SOURCES = Path("csrc") / "cuda"
#: One binary a generation (8.0 also runs on 8.6 and 8.9, 10.0 on 10.3, 12.0 on 12.1), and PTX of the last for what comes.
DEFAULT_ARCHS = "80;90;100;120+PTX"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class NvccError(RuntimeError):
    """nvcc is missing or refused; the message says what was wanted."""


def wanted() -> str:
    """RESNET_FAST_CUDA: "0" never build the CUDA part, "1" it is required, "" build it where nvcc is."""
    value = os.environ.get("RESNET_FAST_CUDA", "")
    if value not in ("", "0", "1"):
        raise NvccError(f"RESNET_FAST_CUDA: wanted 0 (never), 1 (required) or unset (where nvcc is), got {value!r}")
    return value


@cache
def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of the PATH, else of NVIDIA's compiler wheel (nvidia-cuda-nvcc)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.is_file() else None  # a wrong CUDA_HOME is not silently replaced by another toolkit
    found = shutil.which("nvcc")
    if found:
        return found
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    wheels = sorted([*site.glob("cu*/bin/nvcc"), *site.glob("cuda_nvcc/bin/nvcc")])
    return str(wheels[-1]) if wheels else None


def why_not() -> str | None:
    """Why the CUDA part is not built, None when it is.

    Raises:
        NvccError: it is required and cannot be.
    """
    value = wanted()
    if value == "0":
        return "RESNET_FAST_CUDA=0"
    if find_nvcc() is not None:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    where = f"{home}/bin" if home else "CUDA_HOME, the PATH or the wheel nvidia-cuda-nvcc"
    if value == "1":
        raise NvccError(f"RESNET_FAST_CUDA=1 wants nvcc, and none was found in {where}")
    return f"no nvcc in {where}"


@cache
def _supported() -> frozenset[str]:
    listed = subprocess.run([_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"compute_(\d+)", listed))


def _nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise NvccError("nvcc was not found in CUDA_HOME, the PATH or the wheel nvidia-cuda-nvcc")
    return nvcc


def archs() -> list[tuple[str, bool]]:
    """Architectures to build, as (number, with PTX), from RESNET_FAST_CUDA_ARCHS such as "80;90+PTX".

    Of the default list those this nvcc knows; an architecture asked for by name that it does not know is an error.
    """
    text = os.environ.get("RESNET_FAST_CUDA_ARCHS", "")
    out = []
    for item in re.split(r"[;,\s]+", (text or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", item)
        if not match or int(match[1] + match[2]) < 80:
            raise NvccError(f"RESNET_FAST_CUDA_ARCHS: wanted numbers from 80 on such as 80;90+PTX, got {text!r}")
        number = match[1] + match[2]
        if number in _supported():
            out.append((number, bool(match[3])))
        elif text:
            raise NvccError(
                f"{_nvcc()} does not know compute_{number}; it knows {', '.join(sorted(_supported(), key=int))}"
            )
    if not text and out and not any(ptx for _, ptx in out):
        out[-1] = (out[-1][0], True)
    if not out:
        raise NvccError(f"{_nvcc()} knows none of {DEFAULT_ARCHS}")
    return out


def arch_flags(which: list[tuple[str, bool]]) -> list[str]:
    """-gencode flags."""
    flags = []
    for number, ptx in which:
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def sources() -> list[Path]:
    """The CUDA files; bindings.cpp is the C++ compiler's."""
    return sorted(SOURCES.glob("*.cu"))


def newest_header() -> float:
    """When the last header changed that an object depends on."""
    return max(
        p.stat().st_mtime
        for p in [*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h"), *SOURCES.parent.glob("*.h"), Path(__file__)]
    )


def run(command: list[str]) -> str:
    """Run nvcc; its own words on failure."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NvccError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(target: str, folder: Path, bindings: str, force: bool = False) -> None:
    """Compile what changed, MAX_JOBS files at a time, and link `target`.

    cudart is linked in statically: importing the module then needs no CUDA library, and it works beside whichever one
    torch brings.

    Args:
        target: the module's path.
        folder: where objects are kept between builds.
        bindings: the object of bindings.cpp.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *arch_flags(archs())]
    stamp = folder / "flags"
    same = stamp.exists() and stamp.read_text() == shlex.join(flags)
    header = newest_header()

    def one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        if force or not same or not out.exists() or out.stat().st_mtime < max(header, source.stat().st_mtime):
            run([_nvcc(), *flags, "-c", str(source), "-o", str(out)])
        return str(out)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(one, sources()))
    stamp.write_text(shlex.join(flags))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    run([_nvcc(), "-shared", "-cudart", "static", *arch_flags(archs())[:2], *objects, bindings, "-o", f"{target}.new"])
    os.replace(f"{target}.new", target)  # a process that has the old one loaded keeps it
