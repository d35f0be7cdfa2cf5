"""What the tests of the chooser share: a clean environment, fresh processes, an operator whose rooms are made up."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from resnet_fast import _native, backends, functional

X = torch.randn(2, 8, 6, 6)
VARIABLES = ("BACKEND", "DISABLE", "TUNE", "EXACT")
needs_module = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, cache):
    """No variable of the caller's shell, and nothing measured yet."""
    for name in VARIABLES:
        monkeypatch.delenv(f"RESNET_FAST_{name}", raising=False)


def ran(function=lambda: functional.add_relu(X, X)):
    """The rooms that ran during a call."""
    with backends.record() as events:
        function()
    return [room for _, _, room in events]


def python(code, **environment):
    """A fresh process; its output."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith("RESNET_FAST_") or k == "RESNET_FAST_CACHE"
    } | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_rooms(monkeypatch, **seconds):
    """An operator "fake" whose rooms take so long, and count their calls."""
    calls = dict.fromkeys(seconds, 0)

    def make(name, pause):
        def fwd(x):
            calls[name] += 1
            time.sleep(pause)
            return x + 1

        return SimpleNamespace(why_not=lambda door, *args: None, fwd=fwd)

    for name in backends.ORDER:
        module = make(name, seconds[name]) if name in seconds else None
        monkeypatch.setitem(backends._rooms, ("fake", name), module)
    return calls
