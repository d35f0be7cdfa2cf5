"""The chooser's measured choices and their file."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from resnet_fast import _choices, backends
from tests.chooser import X, fake_rooms, plain_environment, python, ran  # noqa: F401


def test_the_fastest_room_is_kept(monkeypatch):
    calls = fake_rooms(monkeypatch, cpu=0.005, onednn=0.0, eager=0.01)
    for _ in range(3):
        assert torch.equal(backends.run("fake", "fwd", X), X + 1)
    assert calls["cpu"] == calls["eager"] == 4 and calls["onednn"] == 6
    assert [backends._choices.get(backends.signature("fake", "fwd", (X,)))] == ["onednn"]


@pytest.mark.parametrize("parts,kept", [(0.010, "parts"), (0.0199, "room"), (0.018, "parts")])
def test_a_room_that_needs_no_measurement_stays_unless_clearly_slower(monkeypatch, parts, kept):
    seconds = {"room": 0.020, "parts": parts}
    monkeypatch.setattr(backends, "_timed", lambda call, device: (seconds[call()], None))
    assert backends.fastest(["room", "parts"], lambda name: name, (X,), rather="room") == kept
    assert backends.fastest(["room", "parts"], lambda name: name, (X,)) == "parts"


def test_a_slow_while_does_not_overturn_a_room(monkeypatch):
    """A room whose first rounds fell into a bad moment is timed again before its parts are taken for good."""
    calls = {"room": 0, "parts": 0}

    def timed(call, device):
        name = call()
        calls[name] += 1
        return (2.0 if name == "room" and calls[name] <= backends._ROUNDS + 1 else 1.0), None

    monkeypatch.setattr(backends, "_timed", timed)
    assert backends.fastest(["room", "parts"], lambda name: name, (X,), rather="room") == "room"
    assert calls["room"] == 2 * backends._ROUNDS + 1


def test_never_slower_than_eager(monkeypatch):
    fake_rooms(monkeypatch, cpu=0.01, eager=0.0)
    backends.run("fake", "fwd", X)
    assert ran(lambda: backends.run("fake", "fwd", X)) == ["eager"]


def test_a_choice_is_for_its_shape_dtype_layout_and_threads(threads):
    base = backends.signature("add_relu", "fwd", (X, X))
    others = [
        backends.signature("add_relu", "bwd", (X, X)),
        backends.signature("add_relu", "fwd", (X[:1], X[:1])),
        backends.signature("add_relu", "fwd", (X.bfloat16(), X.bfloat16())),
        backends.signature("add_relu", "fwd", (X.to(memory_format=torch.channels_last), X)),
        backends.signature("add_relu", "fwd", (X.transpose(2, 3), X)),
        backends.signature("add_relu", "fwd", (X, 1)),
    ]
    threads(torch.get_num_threads() + 1)
    others.append(backends.signature("add_relu", "fwd", (X, X)))
    assert len({base, *others}) == len(others) + 1


def test_choices_survive_the_process(cache):
    code = "from resnet_fast import _choices; _choices.put('a|b', 'eager')"
    python(code, RESNET_FAST_CACHE=str(cache))
    assert _choices.get("a|b") == "eager"
    file = _choices.path()
    assert file.parent == cache and file.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(file.read_text())) == {"format", "machine", "choices"}


def write(text, mode=0o600):
    _choices.path().parent.mkdir(parents=True, exist_ok=True)
    file = _choices.path()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(mode)
    return file


def good(choices=None):
    return json.dumps({"format": _choices.FORMAT, "machine": _choices.machine(), "choices": choices or {"k": "eager"}})


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe\x00garbage", b"null", b"[]", b"3", b'{"format": 3}', b"[" * 100_000,
        json.dumps({"format": _choices.FORMAT, "machine": "another", "choices": {"k": "eager"}}).encode(),
    ],
    ids=["empty", "truncated", "binary", "null", "list", "number", "keys missing", "deeply nested", "another machine"],
)  # fmt: skip
def test_a_corrupt_file_is_ignored_and_replaced(text):
    write(text)
    assert _choices.get("k") is None
    _choices.put("k", "eager")
    _choices.save()
    assert json.loads(_choices.path().read_text())["choices"] == {"k": "eager"}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_truncated_file_is_ignored(cut):
    write(good()[:-cut])
    assert _choices.get("k") is None


def test_foreign_entries_are_ignored(monkeypatch):
    """A choice that names no room that can run here is measured again; values of other types are dropped."""
    calls = fake_rooms(monkeypatch, cpu=0.0, eager=0.01)
    key = backends.signature("fake", "fwd", (X,))
    write(good({key: "rm -rf", "n": 3}))
    backends.run("fake", "fwd", X)
    assert calls["cpu"] >= 4 and _choices.get(key) == "cpu" and _choices.get("n") is None


@pytest.mark.parametrize("mode", [0o622, 0o620, 0o602], ids=oct)
def test_a_file_others_may_write_is_not_trusted(mode):
    file = write(good(), mode)
    assert _choices.get("k") is None
    _choices.put("mine", "cpu")
    _choices.save()
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["choices"] == {"mine": "cpu"}, "nothing of it may be merged"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system's files have no owner to check")
def test_a_foreign_owned_file_is_not_trusted(monkeypatch):
    write(good())
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert _choices.get("k") is None


def test_a_pipe_or_a_folder_in_the_files_place(monkeypatch):
    """Reading must not wait for a writer that never comes."""
    file = _choices.path()
    file.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(file, 0o600)
        reader = threading.Thread(target=lambda: _choices.get("k"), daemon=True)
        reader.start()
        reader.join(10)
        assert not reader.is_alive(), "reading the choices hangs on a named pipe"
        file.unlink()
    monkeypatch.setattr(_choices, "_known", None)
    file.mkdir()
    assert _choices.get("k") is None
    _choices.put("k", "eager")
    _choices.save()


@pytest.mark.parametrize("where", ["/proc/nowhere/at/all", "/dev/null/cache"])
def test_a_folder_that_cannot_be_made(monkeypatch, where):
    """Choices are then kept in memory, and the process ends without a word."""
    monkeypatch.setenv("RESNET_FAST_CACHE", where)
    _choices.put("k", "eager")
    _choices.save()
    assert _choices.get("k") == "eager"
    code = "from resnet_fast import _choices; _choices.put('k', 'eager'); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RESNET_FAST_CACHE": where},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done" and "Traceback" not in done.stderr


def test_a_read_only_folder(monkeypatch, cache):
    """As a user who may not write there: root may write anywhere, so the refusal is the file system's word."""
    folder = cache / "read only"
    folder.mkdir()
    folder.chmod(0o500)
    monkeypatch.setenv("RESNET_FAST_CACHE", str(folder))
    if os.access(folder, os.W_OK):

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    _choices.put("k", "eager")
    _choices.save()
    assert _choices.get("k") == "eager" and not list(folder.glob("*.json"))
    folder.chmod(0o700)


def test_four_processes_at_once(cache):
    """Each measures and keeps choices of its own on a cold cache: none is lost, nothing is torn."""
    code = """
import os, torch
from resnet_fast import _choices, functional
for i in range(25):
    _choices.put(f"{os.getpid()}|{i}", "eager")
    _choices.save()
functional.add_relu(torch.ones(3, 5), torch.ones(3, 5))
"""
    env = os.environ | {"RESNET_FAST_CACHE": str(cache)}
    workers = [subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE) for _ in range(4)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    kept = json.loads(_choices.path().read_text())["choices"]
    assert sum(key.startswith(tuple(f"{w.pid}|" for w in workers)) for key in kept) == 100
    assert not list(cache.glob("*.tmp"))


def test_many_threads_measure_once(monkeypatch):
    """Threads that meet the same new shape all get right results."""
    fake_rooms(monkeypatch, cpu=0.0, eager=0.002)
    results = [None] * 8

    def work(i):
        results[i] = backends.run("fake", "fwd", X + i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert all(torch.equal(r, X + i + 1) for i, r in enumerate(results))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
def test_fork_while_another_thread_measures(monkeypatch):
    """A child forked in the middle of a measurement inherits locks nobody will release; it must not wait for them."""
    fake_rooms(monkeypatch, cpu=0.0, eager=0.05)
    other = threading.Thread(target=lambda: backends.run("fake", "fwd", X))
    other.start()
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        backends.run("fake", "fwd", X[:1])
        os._exit(0)
    other.join()
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert status == 0


def test_import_costs_no_choice_file(cache):
    python("import resnet_fast", RESNET_FAST_CACHE=str(cache))
    assert not list(cache.iterdir())
