"""What a converted module runs instead of its own forward: its dataflow with the chains fused, as plain data.

Modules are named by path and looked up at every call, so replacing `model.fc` or loading a state_dict works as ever.
A program is true only for what it was traced from: `why_not` compares the modules it bypasses and the plain settings
of its owner at every call, and the owner's own forward runs when they have changed. It pickles and copies as data.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import functional
from resnet_fast.nn import fused

Path = tuple[str, ...]


class Ref(int):
    """The number of a value in a program."""


def resolve(root: nn.Module, path: Path) -> nn.Module:
    """The submodule at a path."""
    for name in path:
        child = root._modules.get(name)  # what getattr finds, without its detour through Python
        root = getattr(root, name) if child is None else child
    return root


@dataclass
class ConvBNAct:
    """act(bn(conv(x)) + residual), or act(bn(x) + residual) without a conv."""

    conv: Path | None
    bn: Path
    act: str | None
    x: Ref
    residual: Ref | None
    out: Ref

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run on the module's own parameters."""
        residual = None if self.residual is None else values[self.residual]
        bn = resolve(root, self.bn)
        if self.conv is None:
            return fused.bn_act(values[self.x], bn, residual, self.act)
        return fused.conv_bn_act(values[self.x], resolve(root, self.conv), bn, residual, self.act)

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        return [self.x] if self.residual is None else [self.x, self.residual]


@dataclass
class Chain:
    """Several ConvBNAct in a row, of which only the last's output is read elsewhere: a residual block's main path."""

    links: list[ConvBNAct]
    out: Ref
    #: whether the last convolution's output may be computed again in backward instead of kept
    lean: bool = False
    #: what made the last link's residual of the chain's own input, where nothing else reads it
    projection: ConvBNAct | None = None

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run on the module's own parameters."""
        x, last = values[self.links[0].x], self.links[-1]
        pairs = [(resolve(root, link.conv), resolve(root, link.bn)) for link in self.links]
        if self.projection is not None:
            projection = resolve(root, self.projection.conv), resolve(root, self.projection.bn)
            return fused.block(x, pairs, projection, self.lean)
        if last.residual == self.links[0].x and last.act == "relu":
            return fused.block(x, pairs, None, self.lean)
        return fused.chain(x, pairs, None if last.residual is None else values[last.residual], last.act, self.lean)

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        last = self.links[-1].residual
        return [self.links[0].x] if last is None or self.projection is not None else [self.links[0].x, last]


@dataclass
class Stem:
    """ConvBNAct links in a row and the max pool behind them, whose input nothing else reads."""

    links: list[ConvBNAct]
    pool: Path
    out: Ref
    lean: bool = False

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run on the module's own parameters."""
        pairs = [(resolve(root, link.conv), resolve(root, link.bn)) for link in self.links]
        return fused.stem(values[self.links[0].x], pairs, resolve(root, self.pool), self.lean)

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        return [self.links[0].x]


@dataclass
class AddReLU:
    """relu(x + residual)."""

    x: Ref
    residual: Ref
    out: Ref

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run; whatever is not two equal tensors keeps torch's meaning."""
        x, residual = values[self.x], values[self.residual]
        if x.shape != residual.shape:
            return (x + residual).relu()
        return functional.add_relu(x, residual)

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        return [self.x, self.residual]


@dataclass
class ScaleAddReLU:
    """relu(a * b + residual), where one factor may be a squeeze-and-excite gate's: a number per image and channel."""

    a: Ref
    b: Ref
    residual: Ref
    out: Ref

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run; whatever is not a map, a gate's output and a shortcut keeps torch's meaning."""
        x, scale, residual = values[self.a], values[self.b], values[self.residual]
        if x.dim() == scale.dim() and x.numel() < scale.numel():
            x, scale = scale, x
        if x.dim() == 4 and residual.shape == x.shape and scale.shape == (*x.shape[:2], 1, 1):
            return functional.scale_add_relu(x, scale, residual)
        return (x * scale + residual).relu()

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        return [self.a, self.b, self.residual]


@dataclass
class MaxPool:
    """Max pooling with one byte per output kept for backward."""

    pool: Path
    x: Ref
    out: Ref

    def run(self, root: nn.Module, values: list[Any]) -> Tensor:
        """Run on the module's own settings."""
        return fused.max_pool(values[self.x], resolve(root, self.pool))

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        return [self.x]


@dataclass
class Call:
    """Anything else the forward did: a module, a function, a method or an attribute."""

    kind: str
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    out: Ref

    def run(self, root: nn.Module, values: list[Any]) -> Any:
        """Do it."""
        if self.kind == "get_attr":
            return resolve(root, self.target)
        args = _fill(self.args, values)
        kwargs = _fill(self.kwargs, values)
        if self.kind == "call_module":
            return resolve(root, self.target)(*args, **kwargs)
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def reads(self) -> list[Ref]:
        """The values this step uses."""
        found: list[Ref] = []
        _visit((self.args, self.kwargs), found.append)
        return found


Step = ConvBNAct | Chain | Stem | AddReLU | ScaleAddReLU | MaxPool | Call


def chained(steps: list[Step], output: Any) -> list[Step]:
    """Join convolutions with norms that follow each other and are read by nothing else, and the pool behind them."""
    readers = Counter(ref for step in steps for ref in step.reads())
    _visit(output, lambda ref: readers.update([ref]))
    joined: dict[Ref, list[ConvBNAct]] = {}  # a chain that may go on, by the value it ends in
    place: list[Step | None] = list(steps)
    for i, step in enumerate(steps):
        if isinstance(step, MaxPool) and step.x in joined:
            links = joined.pop(step.x)
            for link in links:
                place[steps.index(link)] = None
            place[i] = Stem(links, step.pool, step.out)
        if not isinstance(step, ConvBNAct) or step.conv is None:
            continue
        links = [*joined.pop(step.x, []), step]
        for link in links[:-1]:
            place[steps.index(link)] = None
        place[i] = Chain(links, step.out) if len(links) > 1 else step
        if step.act == "relu" and step.residual is None and readers[step.out] == 1:
            joined[step.out] = links
    return scaled(projected([step for step in place if step is not None], readers), output)


def projected(steps: list[Step], readers: Counter[Ref]) -> list[Step]:
    """Join a chain with the convolution and norm of its own input that is its shortcut, in whichever order they are added."""
    made = {step.out: step for step in steps if readers[step.out] == 1}
    place: list[Step | None] = list(steps)

    def join(i: int, main: Chain, projection: ConvBNAct, out: Ref) -> None:
        last = replace(main.links[-1], act="relu", residual=projection.out, out=out)
        place[i] = Chain([*main.links[:-1], last], out, main.lean, replace(projection, act=None, residual=None))

    for i, step in enumerate(steps):
        ends = step.links[-1] if isinstance(step, Chain) else step
        if not isinstance(ends, ConvBNAct) or ends.act != "relu" or ends.residual not in made:
            continue
        other = made[ends.residual]
        if isinstance(step, Chain) and _is_projection(other, step.links[0].x):
            join(i, step, other, step.out)
        elif isinstance(other, Chain) and _is_projection(replace(ends, act=None, residual=None), other.links[0].x):
            if other.links[-1].act is not None or other.links[-1].residual is not None:
                continue
            join(i, other, ends, step.out)
        else:
            continue
        place[steps.index(other)] = None
    return [step for step in place if step is not None]


def _is_projection(step: Step, x: Ref) -> bool:
    made = isinstance(step, ConvBNAct) and step.conv is not None
    return made and step.act is None and step.residual is None and step.x == x


def scaled(steps: list[Step], output: Any) -> list[Step]:
    """Join a product of two values with the addition and ReLU that alone read it."""
    readers = Counter(ref for step in steps for ref in step.reads())
    _visit(output, lambda ref: readers.update([ref]))
    products = {step.out: step for step in steps if _is_product(step) and readers[step.out] == 1}
    place: list[Step | None] = list(steps)
    for i, step in enumerate(steps):
        if not isinstance(step, AddReLU) or step.x == step.residual:
            continue
        for one, other in ((step.x, step.residual), (step.residual, step.x)):
            if one in products:
                place[i] = ScaleAddReLU(*products[one].args, other, step.out)
                place[steps.index(products[one])] = None
                break
    return [step for step in place if step is not None]


def _is_product(step: Step) -> bool:
    named = isinstance(step, Call) and (step.kind, step.target) in _PRODUCTS
    return named and len(step.args) == 2 and not step.kwargs and all(isinstance(a, Ref) for a in step.args)


#: In-place ones are left alone: what they write may be read elsewhere under its old name.
_PRODUCTS = {("call_function", operator.mul), ("call_function", torch.mul), ("call_method", "mul")}


def fused_count(steps: list[Step]) -> int:
    """How many of a program's steps run fused, every link of a chain counted."""
    counts = {
        Chain: lambda s: len(s.links) + (s.projection is not None),
        Stem: lambda s: len(s.links) + 1,
        Call: lambda s: 0,
    }
    return sum(counts.get(type(step), lambda s: 1)(step) for step in steps)


def recomputed_count(root: nn.Module, steps: list[Step]) -> int:
    """How many convolutions of a program are computed again in backward."""
    lean = [step for step in steps if isinstance(step, Chain | Stem) and step.lean]
    ends = [step.links[-1] for step in lean] + [s.projection for s in lean if isinstance(s, Chain) and s.projection]
    return sum(fused.recomputes(resolve(root, link.conv)) for link in ends)


def _fill(data: Any, values: list[Any]) -> Any:
    if isinstance(data, Ref):
        return values[data]
    if isinstance(data, tuple | list):
        return type(data)([_fill(d, values) for d in data])
    if isinstance(data, dict):
        return {k: _fill(v, values) for k, v in data.items()}
    return data


def _visit(data: Any, found: Callable[[Ref], Any]) -> None:
    if isinstance(data, Ref):
        found(data)
    elif isinstance(data, tuple | list):
        for d in data:
            _visit(d, found)
    elif isinstance(data, dict):
        for d in data.values():
            _visit(d, found)


def settings(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes, which its forward may branch on (the training flag has a program each)."""
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ("training", "call_super_init")}


@dataclass
class Program:
    """Steps in order, the value returned, and what must still hold for them to be the module's forward."""

    steps: list[Step]
    size: int
    output: Any
    settings: dict[str, Any]
    #: modules whose forward is bypassed, with their class
    bypassed: list[tuple[Path, type[nn.Module]]]
    #: inlined containers, with their children's names
    containers: list[tuple[Path, type[nn.Module], tuple[str, ...]]]
    #: chains that were left as they are, with the reason
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept: list[Ref] = []
        _visit(self.output, kept.append)
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for ref in step.reads():
                last[ref] = i
        #: values no later step reads, by step
        self.dead = [[r for r, at in last.items() if at == i and r not in kept] for i in range(len(self.steps))]

    def why_not(self, root: nn.Module) -> str | None:
        """Why the owner's own forward must run, None when the program is still the same computation."""
        if settings(root) != self.settings:
            return "its attributes changed since convert()"
        for path, kind in self.bypassed:
            module = resolve(root, path)
            norm = kind in (nn.BatchNorm2d, nn.SyncBatchNorm)  # either for the other: the computation is the same
            reason = fused.why_not_norm(module) if norm else fused.why_not_plain(module, kind)
            if reason is not None:
                return f"{'.'.join(path)}: {reason}"
        for path, kind, children in self.containers:
            container = resolve(root, path)
            if tuple(container._modules) != children:
                return f"{'.'.join(path)}: its modules changed since convert()"
            reason = fused.why_not_plain(container, kind)
            if reason is not None:
                return f"{'.'.join(path)}: {reason}"
        return None

    def run(self, root: nn.Module, x: Any) -> Any:
        """Run every step, dropping values as soon as nothing reads them."""
        values: list[Any] = [None] * self.size
        values[0] = x
        del x
        for step, dead in zip(self.steps, self.dead):
            values[step.out] = step.run(root, values)
            for ref in dead:
                values[ref] = None
        return self.result(values)

    def result(self, values: list[Any]) -> Any:
        """What the forward returns, from the values of its steps."""
        return _fill(self.output, values)
