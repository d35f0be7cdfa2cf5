"""The only caller of torch.library: an operator's schema, fake, autograd formula and autocast policy.

Every public operator is registered once; its implementation asks `backends` for a room on the real tensors, so one
schema and one fake serve all rooms. Backward formulas are operators themselves (a room may fuse them), without a
derivative of their own: where a graph of the gradient is wanted, the formula runs in the eager room, whose torch
operations autograd can differentiate again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resnet_fast import _plain, backends

NAMESPACE = "resnet_fast"
_lib = torch.library.Library(NAMESPACE, "DEF")


class Operator:
    """An operator as Python calls it: straight to its rooms between plain tensors, else by torch's dispatcher.

    The dispatcher's way is Python called from C++ at every step (autocast, autograd, implementation), each with arguments to
    convert. In a training step whose convolutions leave nothing in the caches those steps are not small: resnet50's at batch
    16 spent 8% of its time in the interpreter. Whoever listens there is heard: under torch.compile, a dispatch mode,
    functorch, a tracer or the profiler, and for tensors that are more than data, the overload is called.

    Args:
        name: the operator's word in `torch.ops.resnet_fast`.
        run: computes the outputs, by `backends`.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.run = run
        self.node: type[torch.autograd.Function] | None = None
        self.joining: type[torch.autograd.Function] | None = None
        self.casts: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {}

    def __call__(self, *args: Any) -> Any:
        if not _plain.is_plain(args):
            return self.overload(*args)
        device = args[0].device.type
        if self.casts and device in self.casts and torch.is_autocast_enabled(device):
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device)):
                return self._differentiable(self.casts[device](args))
        return self._differentiable(args)

    def _differentiable(self, args: Sequence[Any]) -> Any:
        if self.node is None or not torch.is_grad_enabled():
            return self.run(*args)
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return self.node.apply(*args)
        return self.run(*args)

    def with_input(self, *args: Any) -> tuple[Any, torch.Tensor]:
        """The operator's output and its first argument again, for a second reader.

        Where the operator has a formula for it (`autograd`'s `joined`), the gradients of both are joined while the
        operator's own is computed, and not by an addition of their own.
        """
        x = args[0]
        if self.joining is None or not torch.is_grad_enabled() or not x.requires_grad or not _plain.is_plain(args):
            return self(*args), x
        device = x.device.type
        if not (self.casts and device in self.casts and torch.is_autocast_enabled(device)):
            return self.joining.apply(*args)
        cast = self.casts[device](args)
        if cast[0] is not x:  # the second reader wants it as it was
            return self(*args), x
        with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device)):
            return self.joining.apply(*cast)


def _autocast_keys(device: str) -> Any:
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    return torch._C.DispatchKeySet(key)


_operators: dict[str, Operator] = {}


def define(name: str, schema: str, *, door: str = "fwd", fake: Callable[..., Any], op: str | None = None) -> Operator:
    """Register `resnet_fast::<name>` and return it.

    Args:
        name: the operator's word; backward operators end in `_backward`.
        schema: arguments and returns, in torch's schema language.
        door: the function of a room that implements it.
        fake: shapes, dtypes and strides of the outputs, as every room allocates them.
        op: the folder under `resnet_fast/ops` whose rooms implement it (default: `name`).
    """
    folder = op or name

    def call(*args: Any) -> Any:
        return backends.run(folder, door, *args)

    return compose(name, schema, run=call, fake=fake)


def compose(name: str, schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Register an operator made of several others' doors, each run in the room chosen for it; return it.

    Args:
        name, schema, fake: as in `define`.
        run: computes the outputs, by `backends.run`.
    """
    _lib.define(f"{name}{schema}")
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)
    _operators[name] = Operator(name, run)
    return _operators[name]


def autograd(
    name: str, setup: Callable[..., None], backward: Callable[..., Any], joined: Callable[..., Any] | None = None
) -> None:
    """Give an operator its gradient: `setup(ctx, inputs, output)` saves, `backward(ctx, *grads)` computes.

    Of several outputs only the first may have a gradient. The backend asked for by name in forward, and `exact`, also rule
    backward, which may run in another thread.

    Args:
        joined: `joined(ctx, gradient of the output, gradient of the first input by another way)` as `backward`, the second
            added to the first input's gradient; for operators with one output (`Operator.with_input`).
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # else zeros stand in for every output without a gradient: a block's maps
        ctx.forced, ctx.exact = backends.forced(), backends.is_exact()
        setup(ctx, inputs, output)

    def as_in_forward(ctx: Any, formula: Callable[..., Any], *grads: torch.Tensor) -> Any:
        if backends.forced() == ctx.forced and backends.is_exact() == ctx.exact:
            return formula(ctx, *grads)
        with backends.use_backend(ctx.forced or "auto"), backends.exact(ctx.exact):
            return formula(ctx, *grads)

    def run_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if grads[0] is None:  # nothing that follows depends on it
            return (None,) * len(ctx.needs_input_grad)
        return as_in_forward(ctx, backward, *grads)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", run_backward, setup_context=setup_context, lib=_lib)
    operator = _operators[name]

    def node_forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator.run(*args)
        setup_context(ctx, args, output)
        return output

    def joining_forward(ctx: Any, *args: Any) -> Any:
        return node_forward(ctx, *args), args[0]

    def joining_backward(ctx: Any, dy: torch.Tensor | None, other: torch.Tensor | None) -> Any:
        if dy is None:
            return (other, *(None,) * (len(ctx.needs_input_grad) - 1))
        return run_backward(ctx, dy) if other is None else as_in_forward(ctx, joined, dy, other)

    def node(word: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> type[torch.autograd.Function]:
        doors = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(word, (torch.autograd.Function,), doors)

    word = "".join(part.capitalize() for part in name.split("_"))
    operator.node = node(word, node_forward, run_backward)
    if joined is not None:
        operator.joining = node(f"{word}Joining", joining_forward, joining_backward)


def autocast(
    name: str, arguments: Sequence[str], devices: Sequence[str] = ("cpu", "cuda"), rounded_by_rooms: Sequence[str] = ()
) -> None:
    """Under autocast cast these arguments to its dtype, and only these: statistics and affine parameters stay float32.

    Those of `rounded_by_rooms` stay as they are on CPUs (unless the triton room is asked for by name), where the rooms round
    filters as they pack them: cast before, they and their gradients are read and written twice more each step.

    (`torch.library.register_autocast` would cast every floating tensor.)
    """
    operator = _operators[name]
    names = [a.name for a in operator.overload._schema.arguments]
    chosen = {names.index(a) for a in arguments}
    later = {names.index(a) for a in rounded_by_rooms}

    def register(device: str) -> None:
        def cast(args: Sequence[Any]) -> list[Any]:
            dtype = torch.get_autocast_dtype(device)
            now = chosen if device != "cpu" or backends.forced() == "triton" else chosen - later
            return [
                a.to(dtype) if i in now and isinstance(a, torch.Tensor) and _castable(a) else a
                for i, a in enumerate(args)
            ]

        def cast_and_call(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device)):
                return operator.overload(*cast(args))

        operator.casts[device] = cast
        _lib.impl(name, cast_and_call, "AutocastCPU" if device == "cpu" else "AutocastCUDA")

    for device in devices:
        register(device)


def _castable(t: torch.Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
