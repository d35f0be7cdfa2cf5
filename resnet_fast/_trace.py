"""From a module's forward to a Program: torch.fx shows the dataflow, chains are found in it, nothing is guessed.

A chain is recognised by what flows where, never by attribute names: a pre-activation block has a ResNet block's
names and another meaning.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from resnet_fast.nn import fused
from resnet_fast.nn.program import AddReLU, Call, ConvBNAct, MaxPool, Path, Program, Ref, Step, chained, settings

_ADDS = {operator.add, operator.iadd, torch.add}
_INPLACE_ADDS = {operator.iadd}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_}


class Untraceable(Exception):
    """The forward cannot be shown as a dataflow; the message says why."""


class _Tracer(fx.Tracer):
    """Looks through plain containers; with `deep` also through every module that is not torch's own."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.containers: list[tuple[Path, type[nn.Module], tuple[str, ...]]] = []

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if transparent(module):
            self.containers.append((path_of(qualified_name), type(module), tuple(module._modules)))
            return False
        return not self.deep or super().is_leaf_module(module, qualified_name)


def transparent(module: nn.Module) -> bool:
    """A Sequential whose forward is Sequential's and which has no hooks: its children may be seen as its owner's."""
    is_sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_sequential and fused.why_not_plain(module, type(module)) is None


def path_of(target: str) -> Path:
    """A dotted name as a path."""
    return tuple(target.split("."))


def trace(module: nn.Module, *, deep: bool = False) -> Program:
    """The program of a module's forward in its present mode.

    Raises:
        Untraceable: its forward takes several inputs, branches on values, or has no fx form.
    """
    forward = type(module).forward
    wanted = [p for p in list(inspect.signature(forward).parameters.values())[1:] if p.default is p.empty]
    if len(wanted) != 1 or wanted[0].kind not in (wanted[0].POSITIONAL_ONLY, wanted[0].POSITIONAL_OR_KEYWORD):
        raise Untraceable("its forward does not take exactly one input")
    defaults = {
        name: p.default
        for name, p in inspect.signature(forward).parameters.items()
        if p.default is not p.empty and name != "self"
    }
    tracer = _Tracer(deep)
    before = settings(module)
    try:
        graph = tracer.trace(module, concrete_args=defaults or None)
    except Exception as error:  # a forward may do anything at all with a proxy
        raise Untraceable(
            f"torch.fx cannot trace its forward ({type(error).__name__}: {error})".split("\n")[0]
        ) from error
    finally:
        for name, value in before.items():  # a forward that counts its calls must not count this one
            setattr(module, name, value)
    return _Fuser(module, graph, tracer.containers, chains=not deep).program(before)


class _Fuser:
    """Finds the chains of one graph."""

    def __init__(self, root: nn.Module, graph: fx.Graph, containers: list, chains: bool) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.calls = Counter(id(self.module(n)) for n in self.nodes if n.op == "call_module")
        self.containers = containers
        self.chains = chains
        self.left: list[str] = []
        self.bypassed: list[fx.Node] = []
        self.inside: set[fx.Node] = set()  # nodes a chain has swallowed
        self.ends: dict[fx.Node, tuple] = {}  # last node of a chain -> what to make of it

    def module(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.root.get_submodule(node.target)
        return None

    def plain(self, node: Any, kind: type[nn.Module]) -> bool:
        module = self.module(node)
        return module is not None and fused.why_not_plain(module, kind) is None

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        return module is not None and fused.why_not_norm(module) is None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELUS
        return self.plain(node, nn.ReLU) or (node.op == "call_method" and node.target in ("relu", "relu_"))

    def is_add(self, node: fx.Node) -> bool:
        by_function = node.op == "call_function" and node.target in _ADDS
        by_method = node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__")
        two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
        return (by_function or by_method) and two

    def next(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The one reader of a value behind identities, and the identities; None when it has several readers."""
        between: list[fx.Node] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self.plain(user, nn.Identity):
                return user, between
            between.append(user)
            node = user
        return None, between

    def before(self, node: Any) -> tuple[Any, list[fx.Node]]:
        """The value behind identities that only this chain reads."""
        between: list[fx.Node] = []
        while self.plain(node, nn.Identity) and len(node.users) == 1:
            between.append(node)
            node = node.args[0]
        return node, between

    def program(self, state: dict[str, Any]) -> Program:
        # Backwards: of two norms that meet in an addition the later one takes it, the earlier one is its residual.
        for node in reversed(self.nodes):
            if self.is_norm(node):
                self.norm(node)
        for node in self.nodes:
            if node not in self.inside and self.is_add(node):
                relu, between = self.next(node)
                if relu is not None and self.is_relu(relu) and not self.clobbers(node, node.args[0]):
                    self.take(relu, [node, *between], ("add_relu", *node.args))
            elif self.plain(node, nn.MaxPool2d) and not self.module(node).return_indices and len(node.args) == 1:
                self.bypassed.append(node)
                self.ends[node] = ("max_pool", node, node.args[0])
        return self.build(state)

    def norm(self, bn: fx.Node) -> None:
        """The chain around one BatchNorm."""
        name = bn.target
        if self.calls[id(self.module(bn))] > 1:
            self.left.append(f"{name}: called more than once in one forward")
            return
        conv, swallowed = self.before(bn.args[0])
        if not self.plain(conv, nn.Conv2d):
            conv_module = self.module(conv)
            if conv_module is not None and isinstance(conv_module, nn.modules.conv._ConvNd):
                self.left.append(f"{conv.target}: {fused.why_not_plain(conv_module, nn.Conv2d)}")
            conv, swallowed = None, []
        elif len(conv.users) != 1:
            self.left.append(f"{conv.target}: its output is also used without {name}")
            conv, swallowed = None, []
        elif self.calls[id(self.module(conv))] > 1:
            self.left.append(f"{conv.target}: called more than once in one forward")
            conv, swallowed = None, []
        elif self.module(conv).padding_mode != "zeros":
            self.left.append(f"{conv.target}: padding_mode {self.module(conv).padding_mode!r} is not fused")
            conv, swallowed = None, []
        chain = [*swallowed, *([conv] if conv is not None else []), bn]
        end, act, residual = bn, None, None
        user, between = self.next(bn)
        if user is not None and self.is_add(user) and user not in self.inside:
            other = user.args[1] if self.behind(user.args[0], bn) else user.args[0]
            if user.args[0] is not user.args[1] and not self.clobbers(user, other) and self.early(other, user):
                end, residual, chain = user, other, [*chain, *between, user]
                user, between = self.next(end)
        if user is not None and self.is_relu(user):
            end, act, chain = user, "relu", [*chain, *between, user]
        if conv is None and end is bn:
            self.left.append(f"{name}: neither a convolution before it nor a ReLU behind it")
            return
        x = (conv or bn).args[0]
        self.take(end, chain, ("conv_bn_act", conv, bn, act, x, residual))

    def behind(self, node: Any, bn: fx.Node) -> bool:
        return node is bn or (self.plain(node, nn.Identity) and self.behind(node.args[0], bn))

    def early(self, value: fx.Node, at: fx.Node) -> bool:
        return self.position[value] < self.position[at]

    def clobbers(self, add: fx.Node, other: fx.Node) -> bool:
        """An in-place addition into a value that others read too: fusing it would leave that value as it was."""
        inplace = add.target in _INPLACE_ADDS or add.target in ("add_", "__iadd__")
        return inplace and add.args[0] is other and len(other.users) > 1

    def take(self, end: fx.Node, chain: list[fx.Node], what: tuple) -> None:
        self.ends[end] = what
        self.inside.update(n for n in [*chain, end] if n is not end)
        self.inside.add(end)
        self.bypassed += [n for n in dict.fromkeys([*chain, end]) if n.op == "call_module"]

    def build(self, state: dict[str, Any]) -> Program:
        refs: dict[fx.Node, Ref] = {}
        steps: list[Step] = []
        output: Any = None

        def ref(node: fx.Node) -> Ref:
            return refs[node]

        def data(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return refs[argument]
            if isinstance(argument, tuple | list):
                return type(argument)([data(a) for a in argument])
            if isinstance(argument, dict):
                return {k: data(v) for k, v in argument.items()}
            return argument

        for node in self.nodes:
            if node.op == "output":
                output = data(node.args[0])
                continue
            if node.op == "placeholder":
                # Arguments with defaults were given their defaults; only the first is an input.
                refs[node] = Ref(0)
                continue
            if node not in self.ends and node in self.inside:
                continue
            if node.op == "call_function" and node.target is torch._assert:
                continue
            if node not in self.ends and not node.users and node.op == "call_function" and node.target is getattr:
                continue
            out = refs[node] = Ref(len(refs))
            what = self.ends.get(node)
            if what is None:
                target = path_of(node.target) if node.op in ("call_module", "get_attr") else node.target
                steps.append(Call(node.op, target, data(node.args), data(node.kwargs), out))
            elif what[0] == "conv_bn_act":
                _, conv, bn, act, x, residual = what
                conv_path = None if conv is None else path_of(conv.target)
                rest = None if residual is None else ref(residual)
                steps.append(ConvBNAct(conv_path, path_of(bn.target), act, ref(x), rest, out))
            elif what[0] == "add_relu":
                steps.append(AddReLU(ref(what[1]), ref(what[2]), out))
            else:
                steps.append(MaxPool(path_of(what[1].target), ref(what[2]), out))
        if self.chains:
            steps = chained(steps, output)
        bypassed = [(path_of(n.target), type(self.module(n))) for n in self.bypassed]
        return Program(steps, len(refs), output, state, bypassed, self.containers, self.left)
