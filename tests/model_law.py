"""The tolerance law for whole models: training steps and outputs of ours, of eager and of float64, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

FACTOR = 2.0


def realistic(model: nn.Module) -> nn.Module:
    """Norms whose scale, shift and statistics are not trivial."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.0)
                nn.init.normal_(m.bias, 0, 0.1)
            if m.running_mean is not None:
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    return model


def train_step(
    model: nn.Module, x: Tensor, target: Tensor, lr: float = 0.0, autocast: bool = False
) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one step."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = nn.functional.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), target)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {k}": p.grad.detach().clone() for k, p in model.named_parameters() if p.grad is not None}
    if lr:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=lr)
    return found | {f"buffer {k}": b.detach().clone() for k, b in model.named_buffers()}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every quantity, by its norm."""
    assert ours.keys() == exact.keys()
    found = {}
    for name, value in ours.items():
        truth = exact[name].double()
        found[name] = float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    return found


def same_training(
    make: Callable[[], nn.Module],
    change: Callable[[nn.Module], nn.Module],
    size: int,
    batch: int = 4,
    steps: int = 3,
    classes: int = 1000,
    autocast: bool = False,
) -> None:
    """Hold `steps` SGD steps and the evaluation output of change(model) to the law.

    Each step starts from the float64 model's weights: two float32 runs drift apart by chaos alone, and this is a test of
    steps, not of luck. A tensor's error may not be above twice the larger of eager's error on it and eager's rms over
    all tensors of its kind, plus one rounding: one tensor of 64 numbers may be right by luck, a network's are not.
    """
    model = realistic(make()).train()
    plain, ours = copy.deepcopy(model), change(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()
    rounding = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for step in range(steps):
        x, target = torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch,))
        truth = train_step(exact, x.double(), target, lr=0.01)
        eager = errors(train_step(plain, x, target, autocast=autocast), truth)
        mine = errors(train_step(ours, x, target, autocast=autocast), truth)
        for kind in ("loss", "gradient", "buffer"):
            names = [n for n in mine if n.startswith(kind)]
            typical = (sum(eager[n] ** 2 for n in names) / len(names)) ** 0.5
            for name in names:
                allowed = FACTOR * max(eager[name], typical) + rounding
                assert mine[name] <= allowed, (
                    f"step {step}, {name}: error {mine[name]:.2e}, eager's {eager[name]:.2e} (typical {typical:.2e})"
                )
        state = {k: v.to(model.state_dict()[k].dtype) for k, v in exact.state_dict().items()}
        plain.load_state_dict(state)
        ours.load_state_dict(state)
        exact.load_state_dict(state)
    same_evaluation(plain.eval(), ours.eval(), torch.randn(2, 3, size, size))


def same_evaluation(plain: nn.Module, ours: nn.Module, x: Tensor, factor: float = FACTOR) -> None:
    """Hold an evaluation output to the law."""
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        truth, eager, mine = exact(x.double()), plain(x), ours(x)
    assert mine.shape == eager.shape and mine.dtype == eager.dtype
    size = truth.norm()
    allowed = factor * (eager.double() - truth).norm() / size + torch.finfo(x.dtype).eps
    assert (mine.double() - truth).norm() / size <= allowed
