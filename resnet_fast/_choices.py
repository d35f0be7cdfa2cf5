"""Measured choices, kept between runs: one JSON file per machine and software, safe against races and garbage.

The file is a convenience: whatever is wrong with it (truncated, foreign-owned, writable by others, read-only home) it
is ignored, choices are then measured again and kept in memory only.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import platform
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from resnet_fast import _native

FORMAT = 8
_lock = threading.RLock()
_known: dict[str, str] | None = None
_fresh: dict[str, str] = {}
_state = 0
_insisting = 0  # how many `tuning` contexts are open


@contextmanager
def tuning() -> Iterator[None]:
    """Measure whatever is not known yet while the context lasts, RESNET_FAST_TUNE=0 or not.

    Of the whole process, not of this thread: autograd runs the backward of a GPU's operators in a thread of its own.
    """
    global _insisting
    with _lock:
        _insisting += 1
    try:
        yield
    finally:
        with _lock:
            _insisting -= 1


def measuring() -> bool:
    """Whether a choice that is not known is to be measured now (RESNET_FAST_TUNE=0: never, but inside `tuning`)."""
    return _insisting > 0 or os.environ.get("RESNET_FAST_TUNE", "1") != "0"


@functools.cache
def machine() -> str:
    """The processor or card and the software the choices were measured with."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {_native.isa()}, {card}, torch {torch.__version__}"


def path() -> Path:
    """The file of this machine's choices, in `RESNET_FAST_CACHE` or the user's cache folder."""
    folder = os.environ.get("RESNET_FAST_CACHE")
    if not folder:
        import platformdirs

        folder = platformdirs.user_cache_dir("resnet_fast")
    return Path(folder) / f"choices-{hashlib.sha256(machine().encode()).hexdigest()[:16]}.json"


def _trusted(file: Path) -> bool:
    info = file.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a named pipe would wait for ever
        return False
    if not hasattr(os, "getuid"):
        return True
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(file: Path) -> dict[str, str]:
    try:
        if not _trusted(file):
            return {}
        data = json.loads(file.read_text())
        if data["format"] != FORMAT or data["machine"] != machine():
            return {}
        return {k: v for k, v in data["choices"].items() if isinstance(k, str) and isinstance(v, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def get(key: str) -> str | None:
    """The choice measured for this key, if any."""
    global _known
    if _known is None:
        with _lock:
            if _known is None:
                _known = _read(path())
    return _known.get(key)


def state() -> tuple[object, int]:
    """Two things of which one is another (not the same object, or number) after any change of what is known."""
    return _known, _state


def count() -> int:
    """How many choices are known."""
    get("")
    return len(_known)  # type: ignore[arg-type]


def put(key: str, choice: str) -> None:
    """Keep a choice in memory now, and in the file when the process ends (or `save` is called)."""
    global _state
    with _lock:
        _state += 1
        get(key)
        _known[key] = _fresh[key] = choice  # type: ignore[index]


def clear() -> None:
    """Forget every choice in memory; the file stays."""
    global _known, _state
    with _lock:
        _state += 1
        _known = {}
        _fresh.clear()


def save() -> None:
    """Merge this process's new choices into the file; atomic, and silent where the folder cannot be written."""
    with _lock:
        if not _fresh:
            return
        from filelock import FileLock, Timeout

        file = path()
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(f"{file}.lock", timeout=5):
                choices = _read(file) | _fresh
                temporary = file.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps({"format": FORMAT, "machine": machine(), "choices": choices}, indent=0))
                temporary.chmod(0o600)
                temporary.replace(file)
            _fresh.clear()
        except (OSError, Timeout):
            return


def _after_fork() -> None:
    """A lock that another thread held at the fork is never released in the child."""
    global _lock
    _lock = threading.RLock()


atexit.register(save)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
