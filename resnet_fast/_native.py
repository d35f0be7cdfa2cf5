"""The only importer of the compiled module: what it is called, whether it is there, and why not."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

_module: ModuleType | None = None
_reason: str | None = None

try:
    from resnet_fast import _C as _module  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _reason = f"the compiled module resnet_fast._C is not there ({error}); reinstall with a C++17 compiler on the PATH"

#: dtypes the kernels take, as the integers of csrc/types.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def why_not() -> str | None:
    """None when the compiled module can be used, else the sentence a user should read."""
    return _reason


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it could not be imported; the message says why.
    """
    if _module is None:
        raise RuntimeError(_reason)
    return _module


def isa() -> str | None:
    """The instruction set the CPU kernels run with (`RESNET_FAST_ISA` forces one), None without the module."""
    return None if _module is None else _module.isa()


@functools.cache
def _processor() -> set[str]:
    """What /proc/cpuinfo says this processor can; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo") as f:
            line = next((line for line in f if line.startswith(("flags", "Features"))), ":")
    except OSError:
        line = ":"
    return set(line.split(":", 1)[1].split())


def outpaced(dtype: torch.dtype) -> bool:
    """Whether a library may have instructions on this machine that these kernels do not use.

    Matrix tiles (AMX) for bfloat16, what RESNET_FAST_ISA leaves out, and everything where only the portable baseline runs.
    """
    mine = isa()
    if mine in (None, "default"):
        return True
    wanted = {"avx512f"} | ({"avx512_bf16", "amx_bf16"} if dtype == torch.bfloat16 else set())
    have = {"avx512": {"avx512f"}, "avx512_bf16": {"avx512f", "avx512_bf16"}}.get(mine, set())
    return bool(wanted & _processor() - have)


#: dtypes the CUDA kernels take, as the integers of csrc/cuda/kernels.h
CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _cuda() -> tuple[ModuleType | None, str | None]:
    """The CUDA module and why it is not there; imported on first use, so that a broken one never hurts the CPU part."""
    try:
        from resnet_fast import _cuda as built  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the compiled module resnet_fast._cuda is not there ({error}); reinstall with nvcc on the PATH"
    return built, None


def cuda_why_not() -> str | None:
    """None when the CUDA kernels can run on some card of this machine, else the sentence a user should read."""
    built, reason = _cuda()
    if built is None:
        return reason
    if not torch.cuda.is_available():
        why = built.why_no_device() or "torch was built without CUDA"
        return f"the CUDA kernels are built, but torch finds no card here ({why})"
    return None


def cuda_module() -> ModuleType:
    """The compiled CUDA module.

    Raises:
        RuntimeError: it could not be imported; the message says why.
    """
    built, reason = _cuda()
    if built is None:
        raise RuntimeError(reason)
    return built
