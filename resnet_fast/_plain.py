"""Whether anything besides this package has a say in a call: then it must go by torch's dispatcher.

Whoever listens there is heard: torch.compile, a dispatch or function mode, functorch, a tracer, the profiler, and tensors
that are more than data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: Dispatch keys of a tensor for which the dispatcher does nothing that `_library.Operator` does not do itself.
_TENSOR = {"CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"}
#: Dispatch keys every thread has; a mode (fake tensors, tracing, functorch) adds its own.
_THREAD = {"BackendSelect", "ADInplaceOrView"}
_answers: dict[tuple[bool, int], bool] = {}


def is_plain(args: Sequence[Any]) -> bool:
    """Whether thread and tensors are such that the dispatcher would only call autocast, autograd and an implementation."""
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_function_stack() or not _known(True, torch._C._dispatch_tls_local_include_set()):
        return False
    keys = None  # of all tensors together
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            own = torch._C._dispatch_keys(a)
            keys = own if keys is None else keys | own
        elif isinstance(a, torch.Tensor):
            return False
    return keys is None or _known(False, keys)


def _known(thread: bool, keys: Any) -> bool:
    """Whether a thread's or tensor's dispatch keys are the plain ones; answers are kept."""
    code = (thread, keys.raw_repr())
    answer = _answers.get(code)
    if answer is None:
        names = {name.strip() for name in str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(",")}
        answer = _answers[code] = names <= (_THREAD if thread else _TENSOR)
    return answer
