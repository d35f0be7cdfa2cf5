"""What every operator must do, in every room: one class, which each operator's test file fills with its cases."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from subsystems import Subsystems
from torch import Tensor

from resnet_fast import backends
from resnet_fast.testing import check, rooms

LOW = (torch.bfloat16, torch.float16)


def like(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # out of a larger tensor, with steps: no two neighbours are neighbours in memory
        n, c, h, w = t.shape
        big = torch.full((2 * n, c + 3, h + 2, 2 * w + 1), float("nan"), dtype=t.dtype)
        part = big[::2, 1 : c + 1, 1 : h + 1, 1::2]
        part.copy_(t)
        return part
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "batch last":
        return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "batch last")


@contextmanager
def using(room: str, must: bool = False):
    """Force a room. It may refuse with its sentence, and the test is skipped with it, unless it must take the case."""
    with backends.use_backend(room):
        try:
            yield
        except RuntimeError as error:
            refusal = str(error).startswith("resnet_fast: backend")
            if not refusal or (must and "no backward kernels" not in str(error)):
                raise
            pytest.skip(str(error))


def door(op: str, room: str, name: str) -> bool:
    """Whether a room has a door at all."""
    return backends.has_door(backends.room(op, room), name)


@pytest.mark.usefixtures("poisoned")
class Contract(Subsystems):
    """The tests every operator passes.

    A subclass gives `op`, `cases` (name: settings), `core` (names of cases no room may refuse in its main dtypes),
    `wants` (the differentiable inputs), `make`, `ours`, `plain` and, where there is a ReLU or a maximum, `kink`.
    """

    op: ClassVar[str]
    cases: ClassVar[dict[str, Any]]
    core: ClassVar[tuple[str, ...]]
    wants: ClassVar[tuple[str, ...]]
    small: ClassVar[str]  # a case small enough for finite differences
    uses: ClassVar[tuple[str, ...]] = ()  # operators that carry the gradients, where they are not the operator itself
    folded: ClassVar[tuple[str, ...]] = ()  # factors: what infinities of them give is the order of arithmetic
    kink = None

    @pytest.fixture(autouse=True)
    def one_thread(self, threads):
        """Small tensors: a second thread only waits, and on a busy machine it waits for its core."""
        threads(1)

    def make(self, case: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Fresh random inputs of a case."""
        raise NotImplementedError

    def ours(self, **inputs: Any) -> Any:
        """Our operator."""
        raise NotImplementedError

    def plain(self, **inputs: Any) -> Any:
        """The same in plain torch."""
        raise NotImplementedError

    def must(self, case: Any, room: str, *doors: str) -> bool:
        """Whether a room may not refuse a case: a core case, and it has the doors."""
        return any(case is self.cases[name] for name in self.core) and all(
            door(op, room, name) for op in self.uses or (self.op,) for name in doors
        )

    def given(self, inputs: dict[str, Any]) -> list[str]:
        """The differentiable inputs a case has."""
        return [name for name in self.wants if inputs.get(name) is not None]

    # ---- values and gradients

    def test_values(self, room, dtype, case):
        with using(room, self.must(case, room, "fwd")), torch.no_grad():
            check.compare(self.ours, self.plain, lambda: self.make(case, dtype))

    def test_gradients(self, room, dtype, case):
        wants = self.given(self.make(case, dtype))
        with using(room, self.must(case, room, "fwd", "bwd")):
            check.compare(self.ours, self.plain, lambda: self.make(case, dtype), wants, self.kink)

    def smooth(self) -> tuple[dict[str, Any], list[str]]:
        """A small float64 case whose ReLU or maximum is far from its kink, for finite differences."""
        for _ in range(200):
            inputs = self.make(self.cases[self.small], torch.float64)
            if self.kink is None or self.kink(**inputs).abs().min() > 1e-3:
                return inputs, self.given(inputs)
        raise AssertionError("no inputs away from the kink in 200 draws")

    def test_gradcheck(self):
        inputs, names = self.smooth()
        leaves = [inputs[name].requires_grad_() for name in names]

        def function(*values):
            y = self.ours(**inputs | dict(zip(names, values, strict=True)))
            return y[0] if isinstance(y, tuple) else y

        with backends.use_backend("eager"):
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)

    def test_requires_grad_subsets(self, room):
        """Every subset of the inputs gets the gradients that all of them together get; none other is touched."""
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        names = self.given(inputs)
        with using(room):
            every = check.run(self.ours, inputs, names)
            for size in range(1, len(names)):
                for some in itertools.combinations(names, size):
                    for name, got in check.run(self.ours, inputs, some).items():
                        assert torch.equal(got, every[name]), f"{some}: {name}"

    def test_no_gradient_wanted(self, room):
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        with using(room):
            y = self.ours(**inputs)
            assert not (y[0] if isinstance(y, tuple) else y).requires_grad
            inputs[self.wants[0]].requires_grad_()
            with torch.no_grad():
                y = self.ours(**inputs)
            assert not (y[0] if isinstance(y, tuple) else y).requires_grad
            with torch.inference_mode():
                self.ours(**inputs)

    # ---- layouts

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, room, layout):
        """Any layout in; channels_last out, and each gradient in the layout of its tensor where that is dense."""
        case = self.cases[self.core[0]]
        inputs = self.make(case, torch.float32)
        for name, t in inputs.items():
            if isinstance(t, Tensor) and t.dim() == 4:
                inputs[name] = like(t, layout)
        names = self.given(inputs)
        with using(room):
            check.compare(self.ours, self.plain, lambda: inputs, names, self.kink)
            for name in names:
                inputs[name] = inputs[name].detach().requires_grad_()
            y = self.ours(**inputs)
            y = y[0] if isinstance(y, tuple) else y
            assert y.is_contiguous(memory_format=torch.channels_last)
            y.sum().backward()  # an expanded dy: all strides 0
            x = inputs[self.wants[0]]
            if layout in ("contiguous", "channels_last"):
                assert x.grad.stride() == x.stride()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_of_dy(self, room, layout):
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        names = self.given(inputs)
        with using(room):
            y = self.ours(**inputs)
            dy = torch.randn_like(y[0] if isinstance(y, tuple) else y)
            dense = check.run(self.ours, inputs, names, dy)
            other = check.run(self.ours, inputs, names, like(dy, layout))
        for name in dense:
            assert torch.equal(other[name], dense[name]), name

    def test_expanded_inputs(self, room):
        """One image, expanded to a batch by a stride of 0."""
        inputs = self.make(self.cases[self.core[0]], torch.float32)
        x = inputs[self.wants[0]]
        inputs[self.wants[0]] = x[:1].expand_as(x)
        with using(room):
            check.compare(self.ours, self.plain, lambda: inputs, self.given(inputs), self.kink)

    # ---- NaN, infinities, empty batches

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "huge"])
    def test_nonfinite(self, room, dtype, value):
        """NaN, infinities and huge numbers come out where eager has them, in every input in turn; the rest by the law."""
        if value == "huge":
            value = 6e4 if dtype is torch.float16 else 1e20  # its squares are infinities
        for name in self.given(self.make(self.cases[self.core[0]], dtype)):
            # Without padding for the filters: whether 0 beyond the border times NaN is NaN, torch's own kernels disagree.
            case = self.cases[self.core[name == "weight"]]

            def drawn(case=case, name=name):
                inputs = self.make(case, dtype)
                t = inputs[name] = inputs[name].clone(memory_format=torch.preserve_format)
                t[(t.shape[0] // 2,) + (0,) * (t.dim() - 1)] = value
                return inputs

            with using(room), torch.no_grad():
                if name in self.folded and room != "eager" and abs(value) == float("inf"):
                    # An infinite factor: whether it meets inf - inf depends on where it is multiplied in. It must show,
                    # and only in its channel.
                    inputs = drawn()
                    channel = inputs[name].shape[0] // 2
                    actual = check.run(self.ours, inputs)["output 0"]
                    others = [c for c in range(actual.shape[1]) if c != channel]
                    assert not actual[:, channel].isfinite().all(), f"{value} in {name}: nothing of it is seen"
                    assert actual[:, others].isfinite().all(), f"{value} in {name}: seen in other channels"
                else:
                    check.compare(self.ours, self.plain, drawn)

    def test_nan_in_dy(self, room):
        # Convolutions without padding: whether NaN times the 0 beyond the border counts, torch's own kernels disagree.
        inputs = self.make(self.cases[self.core["weight" in self.wants]], torch.float32)
        names = self.given(inputs)
        with using(room):
            y = self.ours(**inputs)
            dy = torch.randn_like(y[0] if isinstance(y, tuple) else y)
            dy[0, 0, 0, 0], dy[-1, -1, -1, -1] = float("nan"), float("inf")
            found = check.run(self.ours, inputs, names, dy)
        expected = check.run(self.plain, inputs, names, dy)
        for name in expected:
            assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name

    # ---- repeatability

    def test_repeats(self, room):
        """Twenty repeats, the same bits, forward and backward."""
        inputs = self.make(self.cases[self.core[-1]], torch.float32)
        names = self.given(inputs)
        with using(room):
            first = check.run(self.ours, inputs)
            try:
                first |= check.run(self.ours, inputs, names)
            except RuntimeError as error:
                assert str(error).startswith("resnet_fast: backend")
                names = []
            for _ in range(20):
                again = check.run(self.ours, inputs, names)
                assert all(torch.equal(again[k], first[k]) for k in again)

    def test_threads(self, room, dtype, threads):
        """The same bits for any number of threads: a partition never changes the order of one output's arithmetic."""
        if room in ("eager", "onednn"):
            pytest.skip("torch's own kernels make no such promise")
        case = self.cases[self.core[-1]]
        inputs = self.make(case, dtype)
        with using(room, self.must(case, room, "fwd")), torch.no_grad():
            threads(1)
            one = check.run(self.ours, inputs)
            for count in (2, 3, 7, 16):
                threads(count)
                for name, got in check.run(self.ours, inputs).items():
                    assert torch.equal(got, one[name]), f"{name} with {count} threads"

    def test_python_threads(self, room):
        """Four Python threads at once, each with its own inputs."""
        case = self.cases[self.core[-1]]
        inputs = [self.make(case, torch.float32) for _ in range(4)]
        names = self.given(inputs[0])

        def both(given):
            found = check.run(self.ours, given)
            try:
                found |= check.run(self.ours, given, names)
            except RuntimeError as error:
                if not str(error).startswith("resnet_fast: backend"):
                    raise
            return found

        with using(room):
            expected = [both(i) for i in inputs]
        found: list[Any] = [None] * 4

        def work(i):
            try:
                with backends.use_backend(room):
                    for _ in range(5):
                        found[i] = both(inputs[i])
            except BaseException as error:
                found[i] = error

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join(120)
            assert not w.is_alive(), "a thread hangs"
        for got, want in zip(found, expected, strict=True):
            if isinstance(got, BaseException):
                raise got
            for name in want:
                assert torch.equal(got[name], want[name]), name

    def test_forked_worker(self, room, threads):
        """A DataLoader worker is forked after this process has run parallel regions, and must not hang."""
        threads(2)
        case = self.cases[self.core[-1]]
        inputs = self.make(case, torch.float32)
        with using(room), torch.no_grad():
            expected = check.run(self.ours, inputs)["output 0"]
            loader = torch.utils.data.DataLoader(_Forked(self, room, inputs), num_workers=1, timeout=60)
            (got,) = list(loader)
        assert torch.equal(got[0], expected)


class _Forked(torch.utils.data.Dataset):
    """One item: the operator's output, computed in the worker."""

    def __init__(self, contract: Contract, room: str, inputs: dict[str, Any]) -> None:
        self.contract, self.room, self.inputs = contract, room, inputs

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        with backends.use_backend(self.room), torch.no_grad():
            return check.run(self.contract.ours, self.inputs)["output 0"]


def outcome(function, *args: Any, **kwargs: Any) -> BaseException | Any:
    """What a call returns or raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def refused_as_eager(ours, plain, *, wants: str) -> None:
    """Both raise; a handler written for eager's exception catches ours, and our sentence has these words."""
    mine, theirs = outcome(ours), outcome(plain)
    assert isinstance(theirs, Exception), f"eager does not refuse this: {theirs}"
    assert isinstance(mine, type(theirs)), f"eager raises {type(theirs).__name__}, ours: {type(mine).__name__}: {mine}"
    refused(mine, wants)


def refused(error: Any, wants: str) -> None:
    """An exception whose sentence says what came and what was wanted."""
    assert isinstance(error, Exception), f"not refused: {error}"
    assert wants in str(error), f"the message wants {wants!r}: {error}"


assert rooms.operators(), "no operator was found"
