"""What a network must compute and move, counted layer by layer, and what this machine can do, measured.

Counting rules (elements; each tensor once per pass over it; max pooling and the classifier, under 3 % of a network, are
left out). I, O: the inputs and outputs of all convolutions; R: the outputs a residual is added to; L: those a ReLU follows.

    inference  eager      I + O convolutions, 2 O norms, 2 L ReLUs, 3 R additions
               fused      I + O convolutions with norm and ReLU inside, R residuals read
    training   eager      3 (I + O) convolutions (forward, data and weight gradient), 3 O norms (statistics; normalise),
                          2 L ReLUs, 3 R additions, backward 5 O norms (reduce 2, apply 3), 3 L ReLUs
               fused      3 (I + O) convolutions, statistics in their epilogue, 2 O normalise-add-ReLU, 5 O its backward
                          (the mask recomputed), 2 R: residual read, its gradient written
               prologue   as fused, but an output no residual is added to is normalised when the next convolution and
                          its weight gradient read it, 2 (O - R) less, and what the norm's backward sums is summed where
                          the gradient is written, (O - R) less
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fast.bench import cases
from resnet_fast.bench.cases import Case


@dataclass(frozen=True)
class Layer:
    """One convolution with what follows it; sizes per image, in the words of the README (C H W in, K P Q out)."""

    name: str
    C: int
    H: int
    W: int
    K: int
    P: int
    Q: int
    R: int
    S: int
    stride: int
    padding: int
    dilation: int
    groups: int
    residual: bool
    relu: bool

    @property
    def flops(self) -> int:
        """Of the direct convolution: two per multiplication and addition."""
        return 2 * self.P * self.Q * self.K * self.R * self.S * self.C // self.groups

    @property
    def inputs(self) -> int:
        """Elements read."""
        return self.C * self.H * self.W

    @property
    def outputs(self) -> int:
        """Elements written."""
        return self.K * self.P * self.Q

    @property
    def weights(self) -> int:
        """Elements of the filters."""
        return self.K * self.R * self.S * self.C // self.groups

    @property
    def shape(self) -> str:
        """For tables: input, filter, stride."""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.H}x{self.W}x{self.C} -> {self.K}, {self.R}x{self.S}/{self.stride}{groups}"


def layers(name: str, size: int = 224) -> list[Layer]:
    """A network's convolutions in the order they run, seen on the meta device: nothing is computed."""
    with torch.device("meta"):
        model = cases.network(name).eval()
        x = torch.empty(1, 3, size, size)
    # A block adds its shortcut to the output of its last convolution.
    last = set()
    for block_name, block in model.named_modules():
        if hasattr(block, "downsample"):
            convs = [n for n, m in block.named_children() if isinstance(m, nn.Conv2d)]
            last.add(f"{block_name}.{max(convs)}")
    found: list[Layer] = []

    def note(layer_name: str):
        def hook(conv: nn.Conv2d, given: tuple[Tensor, ...], y: Tensor) -> None:
            _, c, h, w = given[0].shape
            _, k, p, q = y.shape
            where = (conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)
            relu = "downsample" not in layer_name
            found.append(Layer(layer_name, c, h, w, k, p, q, *conv.kernel_size, *where, layer_name in last, relu))

        return hook

    for layer_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(layer_name))
    model(x)
    return found


def elements(found: list[Layer]) -> dict[str, int]:
    """Elements moved per image, by the rules in this module's head."""
    i, o = sum(a.inputs for a in found), sum(a.outputs for a in found)
    r = sum(a.outputs for a in found if a.residual)
    relu = sum(a.outputs for a in found if a.relu)
    fused = 3 * (i + o) + 7 * o + 2 * r
    return {
        "infer eager": i + o + 2 * o + 2 * relu + 3 * r,
        "infer fused": i + o + r,
        "train eager": 3 * (i + o) + 8 * o + 5 * relu + 3 * r,
        "train fused": fused,
        "train prologue": fused - 3 * (o - r),
    }


@dataclass(frozen=True)
class Machine:
    """Measured rates of a device: GFLOP/s by dtype, GB/s, and how they were measured."""

    gflops: dict[str, float]
    gbytes: float
    how: str

    def floor(self, case: Case, found: list[Layer]) -> float:
        """Seconds a case needs at least at these rates: per layer the longer of computing and moving, each tensor once.

        Direct convolutions are counted; Winograd multiplies up to four times less, and tensors that stay in cache between
        layers do not move, so more than 100 % of this roofline is possible. Training: three times the flops.
        """
        rate, size = self.gflops[case.dtype] * 1e9, torch.finfo(getattr(torch, case.dtype)).bits // 8
        passes = 1 if case.mode == "infer" else 3
        seconds = 0.0
        for a in found:
            moved = a.inputs + a.outputs * (1 + a.residual)
            if case.mode == "train":
                moved = 3 * (a.inputs + a.outputs) + 7 * a.outputs + 2 * a.outputs * a.residual
            bytes_moved = size * (case.batch * moved + passes * a.weights)
            seconds += max(passes * case.batch * a.flops / rate, bytes_moved / (self.gbytes * 1e9))
        return seconds


def _best(call, device: str, seconds: float = 0.4) -> float:
    def once() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def measure(device: str, dtypes: list[str], threads: int) -> Machine:
    """Measure this machine: the best rate of a few matrix products and convolutions, and of a large copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n = 8192 if device == "cuda" else 1024
        batch = 64 if device == "cuda" else 4
        gflops = {}
        for name in dtypes:
            dtype = getattr(torch, name)
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            x = torch.randn(batch, 128, 28, 28, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
            conv = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device, dtype).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                product = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)
                convolution = 2 * batch * 784 * 128 * 9 * 128 / _best(lambda conv=conv, x=x: conv(x), device)
            gflops[name] = max(product, convolution) / 1e9
        size = 2**28 if device == "cuda" else 2**26
        source = torch.zeros(size, device=device)
        target = torch.empty_like(source).fill_(0)
        copy = 8 * size / _best(lambda: target.copy_(source), device)
        read = 4 * size / _best(lambda: source.sum(), device)
    finally:
        torch.set_num_threads(before)
    how = (
        f"GFLOP/s: the best of a {n}x{n}x{n} torch.mm and a 3x3 convolution of {batch}x28x28x128; GB/s: the better of a "
        f"{4 * size >> 20} MiB copy (read + write) and a sum of it (read)"
    )
    return Machine(gflops, max(copy, read) / 1e9, how)
