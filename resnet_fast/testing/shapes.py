"""Real layer shapes of the ResNet families, derived from the models' table, and odd ones; tests and benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from resnet_fast.models.resnet import ARCHITECTURES
from resnet_fast.nn import Bottleneck


@dataclass(frozen=True)
class Layer:
    """A convolution with the norm, residual and ReLU behind it: x (N, C, H, W), filters (K, C / groups, R, S)."""

    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    relu: bool = True
    residual: bool = False

    @property
    def P(self) -> int:
        """Output height."""
        return output_size(self.H, self.R, self.stride, self.padding, self.dilation)

    @property
    def Q(self) -> int:
        """Output width."""
        return output_size(self.W, self.S, self.stride, self.padding, self.dilation)

    def flops(self, n: int = 1) -> int:
        """Floating point operations of the convolution for a batch of n: two per multiply and add."""
        return 2 * n * self.P * self.Q * self.K * self.R * self.S * self.C // self.groups

    def parameters(self, bias: bool = False) -> int:
        """R S C / groups weights per filter, and a bias each where there is one."""
        return self.K * (self.R * self.S * self.C // self.groups + bias)

    def smaller(self, channels: int = 32, size: int = 9) -> Layer:
        """The same kind of layer, cut down so that a test of it takes milliseconds."""
        fraction = max(1, min(self.C, self.K) // channels)
        groups = self.groups if self.groups == 1 else max(1, min(self.groups, channels // 4))
        c, k = (max(groups, v // fraction // groups * groups) if v > 3 else v for v in (self.C, self.K))
        return replace(self, C=c, K=k, groups=groups, H=min(self.H, size), W=min(self.W, size))

    def __str__(self) -> str:
        tail = f"s{self.stride}" + (f"g{self.groups}" if self.groups > 1 else "") + ("+r" if self.residual else "")
        return f"{self.C}x{self.H}x{self.W}-{self.K}x{self.R}x{self.S}-{tail}" + ("" if self.relu else "-linear")


def output_size(n: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """floor((n + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def layers(network: str, size: int = 224) -> list[Layer]:
    """Every convolution of a network in the order it runs, for images of `size` x `size`."""
    block, blocks, groups, base_width = ARCHITECTURES[network][:4]
    bottleneck = block is Bottleneck
    found = [Layer(3, size, size, 64, 7, 7, stride=2, padding=3)]
    size = output_size(found[0].P, 3, 2, 1)  # the stem's max pool
    channels = 64
    for stage, count in enumerate(blocks):
        planes = 64 << stage
        out = planes * 4 if bottleneck else planes
        for place in range(count):
            stride = 2 if stage and not place else 1
            new = output_size(size, 1, stride)
            if bottleneck:
                width = planes * base_width // 64 * groups
                found += [
                    Layer(channels, size, size, width, 1, 1),
                    Layer(width, size, size, width, 3, 3, stride=stride, padding=1, groups=groups),
                    Layer(width, new, new, out, 1, 1, residual=True),
                ]
            else:
                found += [
                    Layer(channels, size, size, out, 3, 3, stride=stride, padding=1),
                    Layer(out, new, new, out, 3, 3, padding=1, residual=True),
                ]
            if stride != 1 or channels != out:
                found.append(Layer(channels, size, size, out, 1, 1, stride=stride, relu=False))
            channels, size = out, new
    return found


def distinct(*networks: str, size: int = 224) -> list[Layer]:
    """The different layers of some networks (default: all), first come first."""
    return list(dict.fromkeys(layer for name in networks or ARCHITECTURES for layer in layers(name, size)))


#: Convolutions no network here has, each for a reason: channels that fill no vector, sides that divide by nothing.
ODD = [
    Layer(1, 7, 5, 1, 3, 3, padding=1),
    Layer(3, 5, 7, 5, 3, 3, padding=1, residual=True),
    Layer(5, 9, 6, 65, 3, 3, stride=2, padding=1),
    Layer(65, 6, 5, 127, 1, 1, residual=True),
    Layer(127, 4, 3, 3, 1, 1, stride=2, relu=False),
    Layer(8, 8, 8, 8, 3, 3, padding=1, residual=True),
    Layer(6, 11, 8, 9, 2, 2, stride=3, padding=1, groups=3),
    Layer(7, 9, 9, 7, 3, 3, padding=1, groups=7),
    Layer(4, 9, 10, 6, 3, 3, padding=2, dilation=2),
    Layer(3, 6, 6, 4, 1, 5, padding=2),
    Layer(16, 1, 1, 16, 3, 3, padding=1, residual=True),
    Layer(2, 5, 5, 3, 3, 3, padding=3),
]
