"""Runs the cuda rooms on the CPU: every launch goes to a simulator instead of a card.

The rooms, the bindings and the launchers are the real ones. Only the last step differs: the launch hook of
resnet_fast._cuda hands over kernel, grid, block, shared bytes and arguments, and ptxsim executes nvcc's PTX of the same
sources with them. It reports races, accesses outside tensors, reads of uninitialised memory, and counts bytes.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast import _native
from resnet_fast.ops import cuda_room

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
sys.path.insert(0, str(ROOT / "tools"))
import nvcc  # noqa: E402

EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


@cache
def demangle(name: str) -> str:
    """A C++ name in the words of the source."""
    abi = ctypes.CDLL("libstdc++.so.6")
    abi.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = abi.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    assert status.value == 0, f"{name} is no C++ name"
    return ctypes.string_at(text).decode()


def same_kernel(signature: str, called: str) -> bool:
    """Whether the hook's name is this signature's; only a template's name comes with its parameters."""
    return signature.rstrip(")") == called.rstrip(")") or signature.split("(")[0] == called


@cache
def compiled(source: Path, defines: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """The kernels of one file by their demangled signature: (PTX, entry)."""
    import ptxsim

    text = ptxsim.compile_cuda(source, defines)
    return {demangle(f.name): (text, f.name) for f in ptxsim.program(text).m.funcs.values() if f.entry}


@cache
def find_kernel(hooked: str, defines: tuple[str, ...]) -> tuple[str, str, str]:
    """(signature, PTX, entry) of the kernel a launch hook names; compiles only the file it is in."""
    called = re.fullmatch(r"rf::cuda::Kernel<&\(?(.*?)\)?>", demangle(hooked))[1]
    bare = re.search(r"cuda::(\w+)(<|\(|$)", called)[1]
    (source,) = [p for p in SOURCES.glob("*.cu") if re.search(rf"__global__ .*\b{bare}\(", p.read_text())]
    found = compiled(source, defines)
    (name,) = [n for n in found if same_kernel(n, called)]
    return name, *found[name]


class Created(TorchDispatchMode):
    """Keeps every tensor made while it lasts: launches name tensors by address, and temporaries must stay alive."""

    def __init__(self):
        super().__init__()
        self.tensors: dict[int, torch.Tensor] = {}
        self.inputs: set[int] = set()  # no kernel may write these
        self.unwritten: set[int] = set()  # made by torch.empty and not touched by a kernel yet
        self.missing: dict[int, int] = {}  # bytes the kernel that wrote it left out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel():
                self.tensors.setdefault(t.data_ptr(), t)
                if func in EMPTY:
                    self.unwritten.add(t.data_ptr())
                    poison(t)
        return out

    def add(self, values) -> None:
        """Take note of tensors that were there before."""
        for t in tree_leaves(values):
            if isinstance(t, torch.Tensor) and t.numel():
                self.tensors.setdefault(t.data_ptr(), t)


def poison(t: torch.Tensor) -> None:
    """Fill a fresh tensor with what a forgotten write cannot hide in."""
    t.fill_(float("nan") if t.is_floating_point() else 0xA5)


@dataclass
class Ran:
    """One launch: its name, geometry and the simulator's report."""

    name: str
    grid: int
    block: int
    shared: int
    cooperative: bool
    report: object


@dataclass
class Simulator:
    """A card of `sms` multiprocessors: `run(function, *args)` runs a room's function, `ran` lists its launches."""

    sms: int = 3
    shared_per_block: int = 163 * 1024
    shared_per_sm: int = 164 * 1024
    defines: tuple[str, ...] = ()
    order: int = 5
    check: bool = True
    options: dict = field(default_factory=dict)
    ran: list[Ran] = field(default_factory=list)

    def run(self, function, *args, **kwargs):
        self.ran.clear()
        self.created = Created()
        self.created.add((args, kwargs))
        self.created.inputs = set(self.created.tensors)
        card = (self.sms, self.shared_per_block, self.shared_per_sm)
        call = cuda_room.call

        def note_and_call(name, *given):
            self.created.add(given)  # what a registered operator makes, the mode does not see
            return call(name, *given)

        _native.cuda_module().hook_launches(self._launch, *card)
        cuda_room.call = note_and_call
        try:
            with self.created:
                out = function(*args, **kwargs)
        finally:
            cuda_room.call = call
            _native.cuda_module().hook_launches(None)
        for t in tree_leaves(out) if self.check else ():
            if isinstance(t, torch.Tensor) and t.numel():
                assert t.data_ptr() not in self.created.unwritten, f"an output {tuple(t.shape)} was never written"
                missing = self.created.missing.get(t.data_ptr(), 0)
                assert missing == 0, f"{missing} bytes of an output {tuple(t.shape)} were not written"
        return out

    def fits_single(self, x) -> bool:
        """Whether bn_act's one-pass kernel takes x on this card."""
        module = _native.cuda_module()
        module.hook_launches(self._launch, self.sms, self.shared_per_block, self.shared_per_sm)
        try:
            return module.bn_act_fits_single(-1, 0, _native.CUDA_DTYPES[x.dtype], cuda_room.rows(x), x.shape[1])
        finally:
            module.hook_launches(None)

    def _launch(self, kernel, grid, block, shared, cooperative, arguments) -> None:
        import ptxsim

        with torch.utils._python_dispatch._disable_current_modes():
            name, text, entry = find_kernel(kernel, self.defines)
            tensors, items = {}, {}
            for at in range(0, len(arguments), 8):
                (word,) = struct.unpack_from("<Q", arguments, at)
                if word in self.created.tensors:
                    tensors[at] = self.created.tensors[word]
                    items[at] = ("P", tensors[at])
                else:  # numbers; as an address it would lie outside every tensor, which is an error
                    items[at] = ("Q", word)
            fresh = [t for t in tensors.values() if t.data_ptr() in self.created.unwritten]
            options = {"order": self.order, "coresident": cooperative} | self.options
            packed = ptxsim.Packed(len(arguments), items)
            report = ptxsim.launch(text, entry, grid, block, [packed], shared, uninit=fresh, **options)
            self.ran.append(Ran(name, grid, block, shared, cooperative, report))
            if not self.check:
                return
            report.check()
            written = {int(k.rsplit("+", 1)[1]): v["written"] for k, v in report.tensors.items() if k.startswith("arg")}
            for at, t in tensors.items():
                address = t.data_ptr()
                if address in self.created.unwritten:
                    if written[at]:  # in part: scratch may be larger than this launch needs, the rest stays poisoned
                        self.created.unwritten.discard(address)
                        self.created.missing[address] = t.numel() * t.element_size() - written[at]
                else:
                    assert not written[at] or address not in self.created.inputs, (
                        f"{name}: wrote the input at byte {at}"
                    )

    @property
    def bytes(self) -> tuple[int, int]:
        """Compulsory bytes read and written, all launches together."""
        counters = [r.report.counters for r in self.ran]
        return sum(c["distinct_read_bytes"] for c in counters), sum(c["distinct_write_bytes"] for c in counters)

    def names(self) -> list[str]:
        """The kernels that ran, without namespaces and arguments."""
        return [r.name.split("(")[0].split("::")[2].split("<")[0] for r in self.ran]


@pytest.fixture(scope="session")
def simulated():
    """Skip with a reason where kernels cannot be executed without a card."""
    if nvcc.find_nvcc() is None:
        pytest.skip("nvcc is not here: no PTX to execute")
    ptxsim = pytest.importorskip("ptxsim", reason="the PTX simulator is not on PYTHONPATH")
    built, reason = _native._cuda()
    if built is None:
        pytest.skip(reason)
    try:
        ptxsim.build.lib()
    except ptxsim.BuildError as error:
        pytest.skip(f"the PTX simulator cannot be built here: {error}")
    os.environ.setdefault("PATH", os.defpath)
    return ptxsim


@pytest.fixture
def card(simulated, monkeypatch):
    """A simulated card, with the rooms' launches going to it."""
    monkeypatch.setattr(cuda_room, "target", lambda x: (-1, 0))
    return Simulator()
