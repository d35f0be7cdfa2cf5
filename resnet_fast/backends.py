"""The only chooser: which room runs an operator, for which reason, measured when there is a choice.

An operator's *rooms* are the modules `resnet_fast/ops/<op>/<room>.py`. Each has the same doors as the eager room, and
`why_not(door, *args)`, which returns None when the room can take these very tensors and otherwise says why it cannot.

The automatic choice, in this order:

1. a backend asked for by name (`use_backend`, else `RESNET_FAST_BACKEND`): that room, or an error with its sentence;
2. `RESNET_FAST_DISABLE=1`: eager;
3. the only room that can;
4. the choice measured before for this operator, shape, dtype, layout, device and thread count;
5. with `RESNET_FAST_TUNE=0`: the first room of `ORDER` that can; otherwise every room that can is timed on the tensors
   at hand, eager among them, and the fastest is kept.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from resnet_fast import _choices

log = logging.getLogger("resnet_fast")

#: Rooms by rank: without a measurement the first that can is taken.
ORDER = ("cuda", "cudnn", "triton", "cpu", "onednn", "eager")
#: Names a user may ask for.
BACKENDS = ("auto", *ORDER)
_ROUNDS = 3
_CLEARLY = 0.95
_MOST_REMEMBERED = 10_000

_local = threading.local()
_set_variables = getattr(os.environ, "_data", None)  # os.environ would encode a name, fail and catch to say no
_remembered: dict[tuple[Any, ...], str] = {}  # what was chosen for `_quick`'s key, once measured
_remembered_at: tuple[object, int] = (None, -1)  # the state of `_choices` it belongs to
_rooms: dict[tuple[str, str], ModuleType | None] = {}
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's
_tune_lock = threading.Lock()


def room(op: str, name: str) -> ModuleType | None:
    """The module `resnet_fast.ops.<op>.<name>`, imported on first use, or None where the operator has no such room."""
    key = (op, name)
    if key not in _rooms:
        path = f"resnet_fast.ops.{op}.{name}"
        _rooms[key] = importlib.import_module(path) if importlib.util.find_spec(path) else None
    return _rooms[key]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator in this thread by one backend while the context lasts.

    Args:
        name: "auto" (the measured choice), "eager", "cpu", "onednn", "cudnn", "triton" or "cuda". An operator that has no such
            room, or whose room cannot take the tensors, raises; nothing falls back silently.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(name, "use_backend")
    before = getattr(_local, "forced", None)
    _local.forced = name
    try:
        yield
    finally:
        _local.forced = before


@contextmanager
def exact(enabled: bool = True) -> Iterator[None]:
    """Allow only direct convolutions in this thread while the context lasts (`RESNET_FAST_EXACT=1`: always).

    Winograd convolutions need up to four times fewer multiplications and lose about two bits (F(4x4) in float32: three
    to five times eager's rms error in one layer, less over a network); Strassen's seven products for eight, 1x1
    convolutions in float32, lose a bit where channels differ much in size. With `exact` every operator obeys the
    package's general law, twice eager's error.
    """
    before = getattr(_local, "exact", None)
    _local.exact = enabled
    try:
        yield
    finally:
        _local.exact = before


def is_exact() -> bool:
    """Whether Winograd and Strassen are forbidden in this thread."""
    enabled = getattr(_local, "exact", None)
    return _variable(_EXACT, "0") not in ("", "0") if enabled is None else enabled


class _NormalisedNext:
    """The context of `normalised_next`."""

    def __enter__(self) -> None:
        self.before, _local.normalised_next = is_normalised_next(), True

    def __exit__(self, *error: object) -> None:
        _local.normalised_next = self.before


def normalised_next(by_batch: bool = True) -> AbstractContextManager:
    """Say that this thread's convolutions are followed by a norm with their batch's statistics while the context lasts.

    A room whose kernels can take the statistics while they write the output then does so, and they travel with the
    tensor (`triton_common.keep_statistics`): the norm need not read it for them. Nothing is said while torch.compile traces:
    a compiled graph runs its operators without their callers.
    """
    return nullcontext() if not by_batch or torch.compiler.is_compiling() else _NormalisedNext()


def is_normalised_next() -> bool:
    """Whether the statistics of a convolution's output are wanted next."""
    return getattr(_local, "normalised_next", False)


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: wanted one of {', '.join(BACKENDS)}, got {name!r}")


def forced() -> str | None:
    """The backend asked for by name in this thread, None when the choice is automatic."""
    name = getattr(_local, "forced", None)
    if name is None:
        if _variable(_DISABLE, "0") not in ("", "0"):
            return "eager"
        name = _variable(_BACKEND, "auto") or "auto"
        if name == "auto":
            return None
        _check_name(name, "RESNET_FAST_BACKEND")
    return None if name == "auto" else name


class _Variable(str):
    """A name in the environment, and how os.environ keeps it."""

    def __init__(self, name: str) -> None:
        self.key = os.environ.encodekey(name) if hasattr(os.environ, "encodekey") else name


_BACKEND, _DISABLE, _EXACT = (_Variable(f"RESNET_FAST_{name}") for name in ("BACKEND", "DISABLE", "EXACT"))


def _variable(name: _Variable, default: str) -> str:
    """A variable of the environment as it is now; they are read several times an operator, and seldom set."""
    if _set_variables is not None and name.key not in _set_variables:
        return default
    return os.environ.get(name, default)


def why_not(op: str, name: str, door: str, args: tuple[Any, ...]) -> str | None:
    """Why room `name` cannot run this call, None when it can."""
    module = room(op, name)
    if module is None:
        return f"{op} has no {name} room"
    if not has_door(module, door):
        return f"the {name} room of {op} has no {door} door"
    return module.why_not(door, *args)


def has_door(module: ModuleType | None, door: str) -> bool:
    """Whether a room (None: there is none) has a door of its own: a function it defines, not one it imports."""
    found = getattr(module, door, None)
    owner = getattr(found, "__module__", None) or ""
    return callable(found) and (not owner.startswith("resnet_fast.") or owner == getattr(module, "__name__", None))


def run(op: str, door: str, *args: Any) -> Any:
    """Run a door of an operator in the room chosen for these tensors."""
    name = forced()
    if name is not None:
        reason = why_not(op, name, door, args)
        if reason is not None:
            raise RuntimeError(f"resnet_fast: backend {name!r} cannot run {op}.{door}: {reason}")
        return _call(op, name, door, args)
    quick = _quick(op, door, args)
    known = _recall(quick)
    if known is not None:
        return _call(op, known, door, args)
    key = signature(op, door, args)
    choice = _choices.get(key)
    if choice in ORDER and why_not(op, choice, door, args) is None:
        if choice != "cudnn":  # which torch.backends.cudnn.enabled can forbid at any time
            _remember(quick, choice)
        return _call(op, choice, door, args)
    able = [name for name in ORDER if why_not(op, name, door, args) is None]
    if len(able) == 1:
        return _call(op, able[0], door, args)
    if not _choices.measuring() or _capturing(args):
        return _call(op, able[0], door, args)
    return _tune(op, door, args, able, key)


def run_whole(op: str, door: str, parts: Callable[[], Any], *args: Any) -> Any:
    """Run a door of a composed operator in one room where one has it whole, else by `parts()`, other operators' doors.

    Where both are possible the faster is measured once, as everywhere; without a measurement it is the parts, or the room
    where it says so (`whole_unmeasured(door)`), which then also stays where the parts are not clearly faster. (The eager
    room is the specification; its parts have eager rooms of their own.)
    """
    name = forced()
    rooms, quick = (ORDER, _quick(op, door, args)) if name is None else ((name,), None)
    known = None if quick is None else _recall(quick)
    if known is not None:
        return parts() if known == "parts" else _call(op, known, door, args)
    able = [r for r in rooms if r != "eager" and why_not(op, r, door, args) is None]
    if not able:
        if quick is not None:
            _remember(quick, "parts")
        return parts()
    if name is not None:
        return _call(op, name, door, args)
    key = signature(op, door, args)
    choice = _choices.get(key)
    if choice is not None:
        _remember(quick, choice if choice in able else "parts")
    if choice is None and _choices.measuring() and not _capturing(args):
        parts()  # once before the clock: what its own operators choose is measured then

        def call(name: str) -> Any:
            return parts() if name == "parts" else _call(op, name, door, args)

        choice = fastest([*able, "parts"], call, args, rather=_unmeasured(op, door, able))
        log.debug("%s -> %s", key, choice)
        _choices.put(key, choice)
    if choice is None:
        choice = _unmeasured(op, door, able)
    return _call(op, choice, door, args) if choice in able else parts()


def _unmeasured(op: str, door: str, able: list[str]) -> str | None:
    """The room that has the door whole and says that it needs no measurement, if one does."""
    return next((r for r in able if getattr(room(op, r), "whole_unmeasured", lambda door: False)(door)), None)


def _quick(op: str, door: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a choice and a room's `why_not` depend on, as `signature`, of parts that need no formatting."""
    about: list[Any] = [op, door, is_exact(), is_normalised_next(), torch.get_num_threads()]
    for a in args:
        if isinstance(a, torch.Tensor):
            about += (a.dtype, a.shape, a.stride(), a.device)
        else:
            about.append(tuple(a) if isinstance(a, list) else a)
    return tuple(about)


def _recall(quick: tuple[Any, ...]) -> str | None:
    """The room remembered for this key, None where there is none or something was measured or forgotten since."""
    global _remembered_at
    known, changes = _choices.state()
    if known is not _remembered_at[0] or changes != _remembered_at[1]:
        forget()
        _remembered_at = known, changes
    return _remembered.get(quick)


def _remember(quick: tuple[Any, ...], choice: str) -> None:
    if len(_remembered) >= _MOST_REMEMBERED:  # images of ever new sizes: what is used comes back by itself
        forget()
    _remembered[quick] = choice


def forget() -> None:
    """Ask every room again what it can take: what it depends on besides the tensors has changed."""
    _remembered.clear()


def fastest(names: list[str], call: Callable[[str], Any], args: tuple[Any, ...], *, rather: str | None = None) -> str:
    """The name whose call is fastest, interleaved, after one call each that warms up; `args`: tensors that tell the device.

    `rather` stays unless another clearly is faster: what it saves between its parts, an interpreter that finds its caches
    cold, costs little in a loop that does nothing else, and two clocks of the same kernels differ by a few percent. Another
    is clearly faster if it is in twice as many rounds: a core lent elsewhere for a while slows down one of them.
    """
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    best = dict.fromkeys(names, float("inf"))
    for turn in range(2 * _ROUNDS + 1):
        for name in names:
            seconds, _ = _timed(lambda name=name: call(name), device)
            if turn:
                best[name] = min(best[name], seconds)
        winner = min(names, key=best.get)
        if turn == _ROUNDS and (rather is None or best[winner] > _CLEARLY * best[rather]):
            break
    return rather if rather is not None and best[winner] > _CLEARLY * best[rather] else winner


def _call(op: str, name: str, door: str, args: tuple[Any, ...]) -> Any:
    events = getattr(_local, "events", None)
    if events is not None:
        events.append((op, door, name))
    return getattr(room(op, name), door)(*args)


def _capturing(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.is_cuda for a in args) and torch.cuda.is_current_stream_capturing()


def signature(op: str, door: str, args: tuple[Any, ...]) -> str:
    """What a choice depends on: the operator, every tensor's shape, dtype and layout, the other arguments, the threads."""
    parts = [op, door]
    for a in args:
        if isinstance(a, torch.Tensor):
            last = a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last)
            parts.append(f"{str(a.dtype)[6:]}{list(a.shape)}{'l' if last else 'c' if a.is_contiguous() else 's'}")
        else:
            parts.append(str(a))
    how = f"{'|exact' if is_exact() else ''}{'|normalised next' if is_normalised_next() else ''}"
    return f"{'|'.join(parts)}|{torch.get_num_threads()}{how}"


def _tune(op: str, door: str, args: tuple[Any, ...], able: list[str], key: str) -> Any:
    """Time the rooms on these tensors, interleaved, keep the fastest; its last result is the call's result."""
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
    with _tune_lock:
        results: dict[str, Any] = {}
        best = dict.fromkeys(able, float("inf"))
        for turn in range(_ROUNDS + 1):  # the first turn warms up
            for name in able:
                results[name] = None  # one result alive at a time: outputs are as large as activations
                seconds, results[name] = _timed(lambda name=name: getattr(room(op, name), door)(*args), device)
                if turn:
                    best[name] = min(best[name], seconds)
                if len(able) > 1 and name != min(best, key=best.get):
                    results[name] = None
        winner = min(able, key=lambda name: best[name])
        log.debug("%s -> %s (%s)", key, winner, ", ".join(f"{n} {1e6 * t:.0f} us" for n, t in best.items()))
        _choices.put(key, winner)
    if results[winner] is None:
        return _call(op, winner, door, args)
    events = getattr(_local, "events", None)
    if events is not None:
        events.append((op, door, winner))
    return results[winner]


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result
    _give_back_free_memory()
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def _give_back_free_memory() -> None:
    """So that a timed call pays for fresh pages as it does in a training step, where outputs stay alive until backward.

    Called again and again a library's convolution writes to the same pages: 64 to 256 channels at 56x56 in bfloat16 took
    4.8 ms, and 11 with its output on fresh ones. The C++ rooms keep memory of their own (csrc/buffers.h).
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _after_fork() -> None:
    """A lock that another thread held at the fork is never released in the child."""
    global _tune_lock
    _tune_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def record() -> Iterator[list[tuple[str, str, str]]]:
    """Collect (operator, door, room) of every call this thread makes while the context lasts."""
    before = getattr(_local, "events", None)
    _local.events = []
    try:
        yield _local.events
    finally:
        _local.events = before
