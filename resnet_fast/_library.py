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

from resnet_fast import backends

NAMESPACE = "resnet_fast"
_lib = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str, *, door: str = "fwd", fake: Callable[..., Any], op: str | None = None) -> Callable:
    """Register `resnet_fast::<name>` and return its overload.

    Args:
        name: the operator's word; backward operators end in `_backward`.
        schema: arguments and returns, in torch's schema language.
        door: the function of a room that implements it.
        fake: shapes, dtypes and strides of the outputs, as every room allocates them.
        op: the folder under `resnet_fast/ops` whose rooms implement it (default: `name`).
    """
    folder = op or name
    _lib.define(f"{name}{schema}")

    def call(*args: Any) -> Any:
        return backends.run(folder, door, *args)

    _lib.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def compose(name: str, schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable:
    """Register an operator made of several others' doors, each run in the room chosen for it; return its overload.

    Args:
        name, schema, fake: as in `define`.
        run: computes the outputs, by `backends.run`.
    """
    _lib.define(f"{name}{schema}")
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def autograd(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an operator its gradient: `setup(ctx, inputs, output)` saves, `backward(ctx, *grads)` computes.

    The backend asked for by name in forward, and `exact`, also rule backward, which may run in another thread.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.forced, ctx.exact = backends.forced(), backends.is_exact()
        setup(ctx, inputs, output)

    def run_backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with backends.use_backend(ctx.forced or "auto"), backends.exact(ctx.exact):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", run_backward, setup_context=setup_context, lib=_lib)


def autocast(
    name: str, arguments: Sequence[str], devices: Sequence[str] = ("cpu", "cuda"), rounded_by_rooms: Sequence[str] = ()
) -> None:
    """Under autocast cast these arguments to its dtype, and only these: statistics and affine parameters stay float32.

    Those of `rounded_by_rooms` stay as they are on CPUs (unless the triton room is asked for by name), where the rooms round
    filters as they pack them: cast before, they and their gradients are read and written twice more each step.

    (`torch.library.register_autocast` would cast every floating tensor.)
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [a.name for a in overload._schema.arguments]
    chosen = {names.index(a) for a in arguments}
    later = {names.index(a) for a in rounded_by_rooms}

    def register(device: str) -> None:
        key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
        keys = torch._C.DispatchKeySet(key)

        def cast_and_call(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            now = chosen if device != "cpu" or backends.forced() == "triton" else chosen - later
            cast = [
                a.to(dtype) if i in now and isinstance(a, torch.Tensor) and _castable(a) else a
                for i, a in enumerate(args)
            ]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*cast)

        _lib.impl(name, cast_and_call, "AutocastCPU" if device == "cpu" else "AutocastCUDA")

    for device in devices:
        register(device)


def _castable(t: torch.Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
