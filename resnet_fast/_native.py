"""The only importer of the compiled module: what it is called, whether it is there, and why not."""

from __future__ import annotations

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
