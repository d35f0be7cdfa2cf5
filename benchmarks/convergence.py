"""python -m benchmarks.convergence: a residual network learns scikit-learn's digits, fused and in eager, three seeds each.

The same seed gives both engines the same weights and batches; float32 roundings part their curves. The question is whether
they part more than those of two seeds do. Writes a CSV (engine, seed, epoch, losses, accuracy) and a picture of the curves.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fast

RESULTS = Path(__file__).parent / "results" / "convergence-digits"
ENGINES = ("eager", "fused", "lean")
COLUMNS = ("engine", "seed", "epoch", "train_loss", "test_loss", "test_accuracy")
Curve = list[tuple[float, float, float]]


def digits(count: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits, 8x8 scaled up to 16x16: training images and labels, test images and labels (every fifth)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)[:count]
    y = torch.tensor(data.target)[:count]
    test = torch.arange(len(y)) % 5 == 4
    x = x.contiguous(memory_format=torch.channels_last)
    return x[~test], y[~test], x[test], y[test]


def network(engine: str) -> nn.Module:
    """Torchvision's ResNet with one basic block a stage, in eager or converted."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=torch.channels_last)
    if engine == "eager":
        return model
    return resnet_fast.convert(model, memory="lean" if engine == "lean" else "default")


def train(engine: str, seed: int, epochs: int, data: tuple[Tensor, ...], batch: int = 64, lr: float = 0.02) -> Curve:
    """SGD with momentum; after every epoch its mean training loss, the test loss and the test accuracy."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data
    model = network(engine)
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    curve: Curve = []
    for _ in range(epochs):
        order, losses = torch.randperm(len(y)), []
        for some in order[: len(y) // batch * batch].view(-1, batch):
            loss = nn.functional.cross_entropy(model.train()(x[some]), y[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            out = model.eval()(test_x)
        accuracy = float((out.argmax(1) == test_y).float().mean())
        curve.append((statistics.mean(losses), float(nn.functional.cross_entropy(out, test_y)), accuracy))
    return curve


def gap(a: Curve, b: Curve) -> float:
    """The mean over epochs of how far two training losses are apart."""
    return statistics.mean(abs(p[0] - q[0]) for p, q in zip(a, b, strict=True))


def gaps(curves: dict[tuple[str, int], Curve], engine: str) -> tuple[float, float]:
    """Between `engine` and eager at the same seed, and between eager's seeds: means over all pairs."""
    seeds = sorted({seed for _, seed in curves})
    engines = statistics.mean(gap(curves[engine, seed], curves["eager", seed]) for seed in seeds)
    pairs = itertools.combinations(seeds, 2)
    return engines, statistics.mean(gap(curves["eager", a], curves["eager", b]) for a, b in pairs)


def draw(curves: dict[tuple[str, int], Curve], path: Path) -> None:
    """Training loss and test accuracy over the epochs, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"eager": ("black", "-"), "fused": ("tab:red", "--"), "lean": ("tab:blue", ":")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for (engine, seed), curve in curves.items():
        color, line = styles[engine]
        epochs = range(1, len(curve) + 1)
        for axis, column in zip(axes, (0, 2), strict=True):
            label = engine if seed == min(s for _, s in curves) else None
            axis.plot(epochs, [point[column] for point in curve], line, color=color, linewidth=1.2, label=label)
    for axis, title in zip(axes, ("training loss", "test accuracy"), strict=True):
        axis.set(xlabel="epoch", title=f"{title}, scikit-learn digits, float32")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train, write, print the gaps.

    Returns:
        0 when every engine's gap to eager is smaller than the gap between seeds.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="path without suffix")
    args = parser.parse_args()
    data = digits()
    curves = {(e, s): train(e, s, args.epochs, data) for s in args.seeds for e in ENGINES}
    with open(args.out.with_suffix(".csv"), "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (engine, seed), curve in curves.items():
            writer.writerows([engine, seed, i, *(f"{v:.6g}" for v in point)] for i, point in enumerate(curve, 1))
    draw(curves, args.out.with_suffix(".png"))
    right = True
    for engine in ENGINES[1:]:
        own, seeds = gaps(curves, engine)
        accuracy = {e: statistics.mean(curves[e, s][-1][2] for s in args.seeds) for e in ("eager", engine)}
        print(
            f"{engine}: training losses {own:.4f} apart from eager's, eager's seeds {seeds:.4f} from each other; "
            f"test accuracy {accuracy[engine]:.4f}, eager {accuracy['eager']:.4f}"
        )
        right &= own < seeds
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
