"""convert, restore, explain: a model's own modules, run by fused operators."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_fast import _native, backends, functional  # noqa: F401  (functional registers the operators)
from resnet_fast._trace import Untraceable, trace, transparent
from resnet_fast.nn import BasicBlock, Bottleneck, ConvBNAct
from resnet_fast.nn.program import Call, Chain, Program, Stem, fused_count, recomputed_count

Model = TypeVar("Model", bound=nn.Module)
_NATIVE = (BasicBlock, Bottleneck, ConvBNAct)
_KEY = "_resnet_fast_programs"
#: What may be kept for backward.
MEMORY = ("default", "lean")


class Fused:
    """Mixed into a converted module's class: its forward runs the module's program while that is the same computation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The program of the present mode, or the class's own forward."""
        program = self.__dict__[_KEY].get(self.training)
        if program is None or len(args) != 1 or kwargs or program.why_not(self) is not None:
            return super().forward(*args, **kwargs)
        return program.run(self, args[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (
            _revive,
            (type(self).__mro__[2],),
            self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__,
        )


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class a module of class `original` gets: a subclass, so isinstance, methods and properties stay."""
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "__qualname__": original.__qualname__}
    return type(original.__name__, (Fused, original), body)


def _revive(original: type[nn.Module]) -> nn.Module:
    """Unpickling and deepcopy: an empty module of the fused class; its state follows."""
    kind = _fused_class(original)
    return kind.__new__(kind)


def is_converted(module: nn.Module) -> bool:
    """Whether convert() has changed this very module."""
    return isinstance(module, Fused)


def convert(model: Model, *, memory: str = "default", verbose: bool = False) -> Model:
    """Make a ResNet run on fused operators, in place.

    Every module of the tree whose forward `torch.fx` can show is searched for chains convolution - BatchNorm - (residual
    addition) - ReLU; a module with such chains gets a subclass of its own class whose forward runs them fused. Chains are
    found by dataflow, so torchvision's, timm's and any other blocks of this pattern are taken alike.

    Parameters, buffers, state_dict keys, hooks, training mode, copying and pickling stay what they were. Hooks on a
    bypassed submodule, a replaced or parametrized one and the like make the module's own forward run. SyncBatchNorm is
    fused like BatchNorm, on CPUs too (where torch's own refuses to synchronise), before or after its conversion.

    Args:
        model: any module; a module that is shared or not understood is left as it is. Converting again changes `memory`.
        memory: what training keeps for backward. "default": the convolutions' outputs, without the normalised maps and
            the stem's pooled one, which are computed again (resnet18 keeps 0.66 of eager's bytes, resnet50 0.79).
            "lean": neither the outputs of the stem's convolution, of blocks' last 1x1 convolutions and of their projections
            (0.48 and 0.43), for the time of computing these again; gradients of gradients are refused where a stem is
            computed again. The kernels' own memory in this process then keeps nothing to spare (up to 24 MB, which spare
            a step mapping pages anew).
        verbose: print the report of `explain`.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module. ValueError: an unknown `memory`.
    """
    if memory not in MEMORY:
        raise ValueError(f"convert: wanted memory {' or '.join(map(repr, MEMORY))}, got {memory!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: wanted a torch.nn.Module, got {type(model).__name__}")
    for _, module in _candidates(model):
        programs = _programs(module)
        if not isinstance(programs, str):
            module.__dict__[_KEY] = programs
            module.__class__ = _fused_class(type(module))
    for module in model.modules():
        _set_memory(module, memory)
    if _native.why_not() is None:
        _native.module().keep_spare(memory != "lean")
    if verbose:
        print(explain(model))
    return model


def _set_memory(module: nn.Module, memory: str) -> None:
    """What a converted or native module keeps for backward from now on."""
    if is_converted(module):
        for program in module.__dict__[_KEY].values():
            for step in program.steps:
                if isinstance(step, Chain | Stem):
                    step.lean = memory == "lean"
    elif isinstance(module, BasicBlock | Bottleneck):
        module.__dict__.pop("memory", None)
        if memory != "default":
            module.memory = memory


def restore(model: Model) -> Model:
    """Undo convert(): every module gets its own class back, bitwise the eager model again; returns the model."""
    for module in model.modules():
        if is_converted(module):
            module.__class__ = type(module).__mro__[2]
            del module.__dict__[_KEY]
        _set_memory(module, "default")
    return model


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that may hold chains of their own, outermost first; transparent containers are their owner's."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, owned: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        plain = type(module).__module__.startswith("torch.nn.modules") and not transparent(module)
        through = transparent(module) and owned
        traceable = False
        if not plain and not through and not is_converted(module) and not isinstance(module, _NATIVE):
            found.append((name, module))
            traceable = not isinstance(_programs(module), str)
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            visit(path, child, traceable or is_converted(module) or isinstance(module, _NATIVE) or (through and owned))

    visit("", model, False)
    return found


def _programs(module: nn.Module) -> dict[bool, Program] | str:
    """A module's programs for evaluation and training, or why it has none."""
    mode = module.training
    programs: dict[bool, Program] = {}
    try:
        for training in (False, True):
            module.training = training
            programs[training] = trace(module)
    except Untraceable as error:
        return str(error)
    finally:
        module.training = mode
    if not any(not isinstance(step, Call) for step in programs[False].steps):
        return "no convolution, BatchNorm and ReLU in a row"
    return programs


@dataclass
class Row:
    """One module of a report."""

    name: str
    kind: str
    fused: int
    note: str
    #: convolutions computed again in backward, with memory "lean"
    recomputed: int = 0
    ran: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What runs fused and what does not; prints as a table."""

    rows: list[Row]

    @property
    def fused(self) -> int:
        """Chains that run fused."""
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        from tabulate import tabulate

        header = ["module", "class", "fused", "left as it is, and why"]
        lean = any(row.recomputed for row in self.rows)
        if lean:
            header.insert(3, "recomputed")
        with_rooms = any(row.ran for row in self.rows)
        if with_rooms:
            header.append("ran")
        lines = []
        for row in self.rows:
            line = [row.name or "(model)", row.kind, row.fused or "no", *([row.recomputed] if lean else []), row.note]
            if with_rooms:
                line.append(", ".join(f"{room} x{n}" if n > 1 else room for room, n in row.ran.items()))
            lines.append(line)
        return tabulate(lines, header)


def explain(model: nn.Module, x: Tensor | None = None) -> Report:
    """Say, module by module, what runs fused, what does not and why.

    Args:
        model: a model, converted or not.
        x: with an input the model is run once in its present mode, without gradients and without moving its running
            statistics, and the report says which room ran each operator.

    Returns:
        A report; print it for a table. A frozen model's report has its steps.
    """
    if hasattr(model, "explain"):
        return model.explain(x)
    rows: list[Row] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_converted(module):
            program = module.__dict__[_KEY].get(module.training) or next(iter(module.__dict__[_KEY].values()))
            count = fused_count(program.steps)
            reason = program.why_not(module)
            again = 0 if reason else recomputed_count(module, program.steps)
            rows.append(Row(name, kind, 0 if reason else count, reason or "; ".join(program.left), again))
        elif isinstance(module, _NATIVE):
            rows.append(_native_row(name, module))
    known = {id(model.get_submodule(row.name)) for row in rows}
    for name, module in _candidates(model):
        if id(module) not in known and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            reason = _programs(module)
            note = reason if isinstance(reason, str) else "not converted; convert(model) would fuse it"
            rows.append(Row(name, type(module).__name__, 0, note))
    report = Report(sorted(rows, key=lambda row: row.name))
    if x is not None:
        _run_and_note(model, x, report)
    return report


def _native_row(name: str, module: nn.Module) -> Row:
    from resnet_fast.nn import fused

    pairs = (
        [("conv", "bn")]
        if isinstance(module, ConvBNAct)
        else [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
    )
    reasons = {c: fused.why_not_fused(getattr(module, c), getattr(module, b)) for c, b in pairs}
    note = "; ".join(f"{c}: {r}" for c, r in reasons.items() if r)
    ends = [getattr(module, pairs[-1][0])]
    if isinstance(getattr(module, "downsample", None), nn.Sequential):
        ends += module.downsample[:1]
    lean = getattr(module, "memory", "default") == "lean" and not note
    again = sum(map(fused.recomputes, ends)) if lean else 0
    return Row(name, type(module).__name__, sum(r is None for r in reasons.values()), note, again)


def _run_and_note(model: nn.Module, x: Tensor, report: Report) -> None:
    """Run once with every reported module's forward marked, and give each row the rooms that ran inside it."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rows = {id(model.get_submodule(row.name)): row for row in report.rows}
    stack: list[tuple[Row, int]] = []

    def mark(module: nn.Module, row: Row, events: list) -> None:
        inner = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if stack:
                _note(stack[-1][0], events[stack[-1][1] :])
            stack.append((row, len(events)))
            result = inner(module, *args, **kwargs)
            _note(row, events[stack.pop()[1] :])
            if stack:
                stack[-1] = (stack[-1][0], len(events))
            return result

        module.__dict__["forward"] = forward

    marked = [m for m in model.modules() if id(m) in rows]
    try:
        with backends.record() as events, torch.no_grad():
            for module in marked:
                mark(module, rows[id(module)], events)
            model(x)
    finally:
        for module in marked:
            module.__dict__.pop("forward", None)
        with torch.no_grad():
            for name, t in model.state_dict().items():
                t.copy_(state[name])


def _note(row: Row, events: list[tuple[str, str, str]]) -> None:
    for op, _, room in events:
        label = f"{op}: {room}"
        row.ran[label] = row.ran.get(label, 0) + 1
