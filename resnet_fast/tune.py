"""tune: every choice a model's shapes need, measured ahead of time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resnet_fast import _choices
from resnet_fast.freeze import Frozen


def tune(model: nn.Module, example: Tensor | tuple, *, backward: bool | None = None) -> int:
    """Measure now what would be measured at the first call: which kernel is fastest for each shape of this model.

    Runs the model on the example, forward and, in training mode, backward, with measuring on (also where
    RESNET_FAST_TUNE=0 is set) and keeps the choices in this machine's file (`RESNET_FAST_CACHE`): later runs, and other
    processes, start at full speed and their first step takes as long as any other. Choices known already are not
    measured again. Choices depend on shape, dtype, memory format, autocast and the number of threads: tune under the
    same ones you will run with, once for every batch and image size.

    The model comes out as it was: running statistics and other buffers, gradients and the random generators are put
    back. Hooks run as in any call.

    Args:
        model: a converted, frozen or any other module with resnet_fast's operators, on the device it will run on.
        example: an input like those to come (a tuple: several positional ones); its values do not matter.
        backward: whether to run the gradient as well; default: where the model is in training mode and has parameters
            that require gradients. A frozen model has none.

    Returns:
        How many choices were measured; 0 where all were known, or where there was nothing to choose.

    Raises:
        TypeError: `model` is not a torch.nn.Module. ValueError: backward of a frozen model, or of a model whose output
            depends on nothing that requires gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: wanted a torch.nn.Module, got {type(model).__name__}")
    inputs = example if isinstance(example, tuple) else (example,)
    frozen = isinstance(model, Frozen)
    if frozen and backward:
        raise ValueError("tune: wanted backward=False or None for a frozen model, which has no gradients, got True")
    before = _choices.count()
    with _choices.tuning():
        if frozen:
            model.prepare(*inputs)
        else:
            _run(model, inputs, backward)
    found = _choices.count() - before
    _choices.save()
    return found


def _run(model: nn.Module, inputs: tuple, backward: bool | None) -> None:
    """Forward, and backward where wanted, leaving no trace in the model."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    leaves += [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    wanted = backward if backward is not None else model.training and bool(leaves)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    cards = {t.device.index for t in [*leaves, *(b for b, _ in buffers)] if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(cards)), torch.set_grad_enabled(wanted):
        try:
            out = model(*inputs)
            if wanted:
                _differentiate(out, leaves)
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _differentiate(out: object, leaves: list[Tensor]) -> None:
    """Gradients of all outputs together; not accumulated into `.grad`."""
    ends = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not ends:
        raise ValueError("tune: wanted an output that depends on something requiring gradients, or backward=False")
    torch.autograd.grad(ends, leaves, [torch.ones_like(t) for t in ends], allow_unused=True)
