"""The tolerance law for whole models: training steps and outputs of ours, of eager and of float64, side by side."""

from __future__ import annotations

import copy
import statistics
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
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.1)
            if m.running_mean is not None:
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    return model


def away_from_kinks(model: nn.Module, x: Tensor) -> nn.Module:
    """Norms that keep every ReLU's input about six standard deviations from 0, and statistics that fit inputs like x.

    One activation that rounds to the other side of 0 changes whole gradients by a thousand times the rounding, in
    eager as in ours, and then errors say nothing. Here channels are on or off for good: a third of those of the norms
    named bn1 (no residual is added behind them) are off, all others on.
    """
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine and m.bias is not None:
            with torch.no_grad():
                m.weight.uniform_(0.25, 0.35)
                m.bias.fill_(2.0)
                if name.endswith("bn1"):
                    m.bias[torch.rand_like(m.bias) < 1 / 3] = -2.0
    fitted = copy.deepcopy(model).train()
    for m in fitted.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
    with torch.no_grad():
        fitted(x)
    model.load_state_dict(fitted.state_dict())
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.num_batches_tracked is not None:
            m.num_batches_tracked.zero_()
    return model


def train_step(
    model: nn.Module, x: Tensor, target: Tensor, lr: float = 0.0, autocast: bool = False
) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one step. The gradients are the model's own, which keeps none: a copy of them costs
    the widest networks more than their backward."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = nn.functional.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), target)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {k}": p.grad.detach() for k, p in model.named_parameters() if p.grad is not None}
    if lr:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=lr)
    model.zero_grad(set_to_none=True)
    return found | {f"buffer {k}": b.detach().clone() for k, b in model.named_buffers()}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every quantity, by its norm.

    A gradient may be zero but for rounding (of a shift that the next norm takes out again): none is measured against
    less than a hundredth of what is usual, value by value, among the gradients of as many dimensions.
    """
    assert ours.keys() == exact.keys()
    usual: dict[int, list[float]] = {}
    for name, truth in exact.items():
        if name.startswith("gradient"):
            usual.setdefault(truth.dim(), []).append(float(truth.double().square().mean().sqrt()))
    found = {}
    for name, value in ours.items():
        truth = exact[name].double()
        least = 1e-30
        if name.startswith("gradient"):
            least = 0.01 * statistics.median(usual[truth.dim()]) * truth.numel() ** 0.5
        found[name] = float(torch.dist(value.double(), truth) / truth.norm().clamp_min(least))
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
    """Hold SGD steps and the evaluation output of change(model) to the model in eager.

    First in float64, where nothing but the dataflow can differ: `steps` steps, loss, gradients, statistics and weights
    to nine digits. Then in float32 (or under autocast), by the tolerance law.
    """
    model = realistic(make()).train()
    same_dataflow(model, change, size, batch, steps, classes)
    same_numerics(model, change, size, batch, classes, autocast)
    plain, ours = copy.deepcopy(model).eval(), change(copy.deepcopy(model)).eval()
    if not autocast:
        same_evaluation(plain, ours, torch.randn(2, 3, size, size))


def same_dataflow(model: nn.Module, change: Callable, size: int, batch: int, steps: int, classes: int) -> None:
    """Steps in float64 that must agree to nine digits (deep networks of few values lose some of the sixteen)."""
    plain, ours = copy.deepcopy(model).double(), change(copy.deepcopy(model).double())
    for step in range(steps):
        agree(*_steps((plain, ours), size, batch, classes), least=1e-6, where=f"step {step + 1}")
        if step < steps - 1:  # the next step is a test of a step, not of accumulated chaos
            ours.load_state_dict(plain.state_dict())


def same_course(model: nn.Module, change: Callable, size: int, batch: int, steps: int, classes: int) -> None:
    """SGD steps in float64, none put right in between; the last must agree to nine digits. Away from the kinks, or a
    step's last digit becomes the next one's first; gradients are then often 0 but for rounding."""
    model = away_from_kinks(copy.deepcopy(model).double(), torch.randn(batch, 3, size, size).double())
    plain, ours = model, change(copy.deepcopy(model))
    for _ in range(steps):
        truth, mine = _steps((plain, ours), size, batch, classes)
    agree(truth, mine, least=1e-3, where=f"step {steps}")


def _steps(models: tuple[nn.Module, ...], size: int, batch: int, classes: int) -> list[dict[str, Tensor]]:
    x, target = torch.randn(batch, 3, size, size).double(), torch.randint(0, classes, (batch,))
    return [
        train_step(m, x, target, lr=0.01) | {f"weight {k}": p.detach() for k, p in m.named_parameters()} for m in models
    ]


def agree(truth: dict[str, Tensor], mine: dict[str, Tensor], least: float, where: str) -> None:
    """Nine digits of every norm; gradients smaller than `least` of the largest one are measured against that."""
    assert truth.keys() == mine.keys()
    floor = least * max(float(v.norm()) for k, v in truth.items() if k.startswith("gradient"))
    for name, value in truth.items():
        scale = max(float(value.double().norm()), floor if name.startswith("gradient") else 1e-30)
        error = float(torch.dist(mine[name].double(), value.double())) / scale
        assert error <= 1e-9, f"{where}, {name}: relative difference {error:.2e} in float64"


def same_numerics(
    model: nn.Module,
    change: Callable,
    size: int,
    batch: int,
    classes: int,
    autocast: bool = False,
    trials: int = 4,
    steps: int = 1,
) -> None:
    """The first and the last of `steps` steps in float32 or under autocast by the tolerance law.

    A tensor's error may not be above twice the larger of eager's error on it and eager's rms over all tensors of its
    kind, plus one rounding. The ReLUs are kept away from their kinks where the norms can be set; the stem's pooling
    still chooses between neighbours a rounding apart, and then the error before it is a thousand times its usual size,
    ours or eager's: so a tensor may be outside in some trials of fresh inputs, by chance, but not in all.
    """
    model = away_from_kinks(copy.deepcopy(model), torch.randn(batch, 3, size, size))
    rounding = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    outside: dict[str, str] | None = None
    for _ in range(trials):
        plain, ours, exact = copy.deepcopy(model), change(copy.deepcopy(model)), copy.deepcopy(model).double()
        found: dict[str, str] = {}
        for step in range(steps):
            x, target = torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch,))
            truth = train_step(exact, x.double(), target, lr=0.01)
            eager = errors(train_step(plain, x, target, lr=0.01, autocast=autocast), truth)
            mine = errors(train_step(ours, x, target, lr=0.01, autocast=autocast), truth)
            if step in (0, steps - 1):
                found |= _outside(mine, eager, rounding, f"step {step + 1}, ")
        outside = found if outside is None else {k: v for k, v in found.items() if k in outside}
        if not outside:
            return
    raise AssertionError(f"outside the law in {trials} of {trials} trials: " + "; ".join(list(outside.values())[:5]))


def _outside(mine: dict[str, float], eager: dict[str, float], rounding: float, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in ("loss", "gradient", "buffer"):
        names = [n for n in mine if n.startswith(kind)]
        typical = (sum(eager[n] ** 2 for n in names) / max(1, len(names))) ** 0.5
        for name in names:
            if not mine[name] <= FACTOR * max(eager[name], typical) + rounding:
                what = f"{where}{name}"
                found[what] = f"{what}: error {mine[name]:.2e}, eager's {eager[name]:.2e} (typical {typical:.2e})"
    return found


def same_evaluation(plain: nn.Module, ours: nn.Module, x: Tensor, factor: float = FACTOR, values: int = 400) -> None:
    """Hold an evaluation's outputs to the law: those of x, or of as many draws like it as make `values` of them.

    Eager's error of a few outputs is a draw itself: of eight, less than half its usual size in one of some hundred.
    """
    exact, errors, sizes = copy.deepcopy(plain).double(), [0.0, 0.0], 0.0
    for draw in range(1 + values // max(1, ours(x).numel())):
        given = x if draw == 0 else torch.randn_like(x)
        with torch.no_grad():
            truth, eager, mine = exact(given.double()), plain(given), ours(given)
        assert mine.shape == eager.shape and mine.dtype == eager.dtype
        sizes += float(truth.square().sum())
        for i, y in enumerate((mine, eager)):
            errors[i] += float((y.double() - truth).square().sum())
        found, allowed = errors[0] ** 0.5, factor * errors[1] ** 0.5 + torch.finfo(x.dtype).eps * sizes**0.5
        if found <= allowed:
            return
    raise AssertionError(f"outside the law: error {found:.3e}, allowed {allowed:.3e} over {draw + 1} draws")
