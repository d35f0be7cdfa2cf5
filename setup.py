"""Builds resnet_fast._C: every csrc/cpu/*.cpp once per instruction set, in parallel, then one link.
Where nvcc is (RESNET_FAST_CUDA=0 never, 1 required) also resnet_fast._cuda, from csrc/cuda, a module of its own.

Neither torch nor the network is needed. Without a compiler the build goes on and the package runs on torch alone
(`python -m resnet_fast.info` says so).
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import nvcc

CSRC = Path("csrc")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# The order is narrow to wide; a namespace of the same name holds each one's kernels (csrc/cpu/kernels.h).
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


class BuildExt(build_ext):
    """build_ext that compiles the kernels once per instruction set and all objects in parallel."""

    def build_extension(self, ext):
        if ext.name == CUDA_MODULE:
            return self.build_cuda(ext)
        have = [(f"RF_HAVE_{isa.upper()}", "1") for isa in ISAS]
        jobs = [(str(p), "main", [], have) for p in [*sorted(CSRC.glob("*.cpp")), CSRC / "cpu" / "dispatch.cpp"]]
        for isa, flags in ISAS.items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                if source.name != "dispatch.cpp":
                    jobs.append((str(source), isa, flags, [("RF_ISA", isa)]))

        def compile_one(job):
            source, folder, flags, macros = job
            out = os.path.join(self.build_temp, folder)
            newest = max(p.stat().st_mtime for p in [Path(source), *CSRC.glob("*.h"), *(CSRC / "cpu").glob("*.h")])
            done = Path(self.compiler.object_filenames([source], output_dir=out)[0])
            if not self.force and done.exists() and done.stat().st_mtime > newest:
                return str(done)
            return self.compiler.compile(
                [source], output_dir=out, macros=macros, include_dirs=ext.include_dirs, extra_postargs=FLAGS + flags
            )[0]

        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-fopenmp"], target_lang="c++")

    def build_cuda(self, ext):
        folder = Path(self.build_temp) / "cuda"
        flags = ["-std=c++17", "-O2", "-fvisibility=hidden"]
        bindings = self.compiler.compile(
            ext.sources, output_dir=str(folder), include_dirs=ext.include_dirs, extra_postargs=flags
        )
        try:
            nvcc.build(self.get_ext_fullpath(ext.name), folder, bindings[0], self.force)
        except nvcc.NvccError as error:
            raise CompileError(str(error)) from error  # fatal only where RESNET_FAST_CUDA=1


CUDA_MODULE = "resnet_fast._cuda"
cpu_sources = [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
modules = [Pybind11Extension("resnet_fast._C", sorted(str(p) for p in cpu_sources), optional=True)]
skipped = nvcc.why_not()
if skipped is None:
    optional = nvcc.wanted() != "1"
    modules.append(Pybind11Extension(CUDA_MODULE, [str(CSRC / "cuda" / "bindings.cpp")], optional=optional))
else:
    print(f"resnet_fast: the CUDA part is not built: {skipped}", file=sys.stderr)
setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})
