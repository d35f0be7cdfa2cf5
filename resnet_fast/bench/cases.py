"""What is benchmarked: a network, a batch of photographs, and the float64 results all engines are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Images of an inference batch that are also computed in float64.
CHECKED = 4


class BenchError(RuntimeError):
    """Something the user can put right; printed without a traceback."""


@dataclass(frozen=True)
class Case:
    """One row group of a report: the same work for every engine."""

    mode: str
    model: str
    batch: int
    size: int = 224
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    data: str = "photos"
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.mode} {self.model} batch {self.batch} {self.dtype}"


def network(name: str) -> nn.Module:
    """A torchvision network, or timm's as timm/NAME, in plain modules.

    Raises:
        BenchError: the package that has it is not installed, or does not have it.
    """
    package, _, short = name.rpartition("/")
    try:
        if package == "timm":
            import timm

            return timm.create_model(short, pretrained=False)
        if package:
            raise BenchError(f"--model {name}: wanted a torchvision name (resnet50) or timm/NAME")
        import torchvision

        return torchvision.models.get_model(short, weights=None)
    except ImportError as error:
        raise BenchError(
            f"--model {name}: {error.name} is not installed; pip install 'resnet_fast[bench,test]'"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise BenchError(f"--model {name}: {error}") from error


def photographs(count: int, size: int, seed: int = 0) -> Tensor:
    """Scikit-learn's two sample photographs, preprocessed as for ImageNet.

    The first two images are the standard ones (shorter side to size * 256 / 224, centre crop); the rest are random
    resized crops and flips as in training, so that a batch has no two equal images.

    Raises:
        BenchError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise BenchError(
            "--data photos wants scikit-learn (pip install 'resnet_fast[bench]'); or --data random"
        ) from error
    whole = [
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(seed)
    shorter = round(size * 256 / 224)
    images = []
    for i in range(count):
        photo = whole[i % len(whole)]
        height, width = photo.shape[2:]
        if i < len(whole) and not seed:
            scale = shorter / min(height, width)
            photo = _resize(photo, round(height * scale), round(width * scale))
            top, left = (photo.shape[2] - size) // 2, (photo.shape[3] - size) // 2
            image = photo[:, :, top : top + size, left : left + size]
        else:
            part, y, x, flip = torch.rand(4, generator=generator).tolist()
            side = round(min(height, width) * (0.5 + 0.5 * part))
            top, left = round(y * (height - side)), round(x * (width - side))
            image = _resize(photo[:, :, top : top + side, left : left + side], size, size)
            image = image.flip(3) if flip < 0.5 else image
        images.append(image)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.cat(images) - mean) / std


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)


def images(data: str, count: int, size: int, seed: int = 0) -> Tensor:
    """A batch of photographs ("photos") or normal noise ("random")."""
    if data == "photos":
        return photographs(count, size, seed)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1 + seed))


def calibrated(name: str, data: str, size: int) -> nn.Module:
    """A network of seeded random weights whose BatchNorm statistics are those of the images, in evaluation mode.

    Pretrained weights are not downloaded. Norms get scales and shifts that are not trivial, and their running statistics
    from three passes in training mode, so that activations have the ranges of a trained network's.
    """
    torch.manual_seed(0)
    model = network(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # a plain average over the passes
    with torch.no_grad():
        for seed in (10, 11, 12):
            model.train()(images(data, 4, size, seed))
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()
    return model.eval()


def step(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """One training step without the optimiser: gradients cleared, forward, loss, backward. Returns the loss."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x).float() if dtype == torch.bfloat16 else model(x), target)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model as one vector in float64."""
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def exact_step(model: nn.Module, x: Tensor, target: Tensor, device: str) -> Tensor:
    """Loss and gradients in float64, computed on the case's device while its memory lasts, else on the CPU.

    By the sizes of its tensors (not measured) a batch of 128 through ResNet-50 keeps some 35 GB.
    """
    if device != "cpu":
        try:
            loss = step(model.to(device), x.to(device), target.to(device), torch.float64)
            return torch.cat([loss.view(1).cpu(), gradients(model)])
        except torch.OutOfMemoryError:
            model.to("cpu")
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # the engines' processes want the memory
    loss = step(model, x, target, torch.float64)
    return torch.cat([loss.view(1), gradients(model)])


def prepare(case: Case, folder: Path) -> Path:
    """Write a case's weights, images and float64 results to a file every worker reads."""
    model = calibrated(case.model, case.data, case.size)
    x = images(case.data, case.batch, case.size)
    classes = 1000
    target = torch.randint(0, classes, (case.batch,), generator=torch.Generator().manual_seed(2))
    content: dict[str, Any] = {"case": asdict(case), "state": model.state_dict(), "x": x, "target": target}
    exact = network(case.model).double()
    exact.load_state_dict(model.state_dict())
    if case.mode == "infer":
        with torch.inference_mode():
            content["exact"] = exact.eval()(x[:CHECKED].double())
    else:
        content["exact"] = exact_step(exact.train(), x.double(), target, case.device)
    path = folder / (str(case).replace(" ", "-").replace("/", "-") + ".pt")
    torch.save(content, path)
    return path


def load(path: Path) -> tuple[Case, dict[str, Any]]:
    """What `prepare` wrote."""
    content = torch.load(path, weights_only=True)
    return Case(**content["case"]), content
