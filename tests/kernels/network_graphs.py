"""Graphs for the tests of the C++ executor, each built twice at once by `Twin`: through `_C.Network` and in torch."""

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("resnet_fast._C", reason="the compiled module is not built")

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Twin:
    """A `_C.Network` and, value by value, the torch function that computes the same."""

    def __init__(self, dtype, channels, seed=0):
        self.dtype, self.net, self.fns, self.channels = dtype, _C.Network(DTYPES[dtype]), [], []
        self.gen = torch.Generator().manual_seed(seed)
        self._add(self.net.input(channels), channels, lambda v, x: x)

    def _add(self, value, channels, fn):
        assert value == len(self.fns)
        self.fns.append(fn)
        self.channels.append(channels)
        return value

    def rand(self, *shape):
        return torch.randn(*shape, generator=self.gen)

    def conv(
        self, x, K, kernel, stride=1, padding=None, dilation=1, groups=1, fold=True, shift=True, residual=-1, relu=False
    ):
        R, S = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (R // 2, S // 2) if padding is None else padding
        C = self.channels[x] // groups
        w = self.rand(K, C, R, S) * (2.0 / (C * R * S)) ** 0.5
        fold, shift = (self.rand(K).abs() * 0.3 + 0.8 if fold else None), (self.rand(K) * 0.1 if shift else None)
        value = self.net.conv(
            x,
            K=K,
            R=R,
            S=S,
            stride=(stride, stride),
            padding=padding,
            dilation=(dilation, dilation),
            groups=groups,
            weight_ptr=w.data_ptr(),
            fold_ptr=0 if fold is None else fold.data_ptr(),
            shift_ptr=0 if shift is None else shift.data_ptr(),
            residual=residual,
            relu=relu,
        )

        def fn(v, _):
            folded = w if fold is None else w * fold[:, None, None, None]
            y = F.conv2d(
                v[x],
                folded.to(v[x].dtype),
                None if shift is None else shift.to(v[x].dtype),
                stride,
                padding,
                dilation,
                groups,
            )
            y = y if residual < 0 else y + v[residual]
            return F.relu(y) if relu else y

        return self._add(value, K, fn)

    def linear(self, x, features, relu=False):
        w, b = self.rand(features, self.channels[x]) * self.channels[x] ** -0.5, self.rand(features) * 0.1
        value = self.net.linear(x, features, w.data_ptr(), b.data_ptr(), relu)

        def fn(v, _):
            y = F.linear(v[x].flatten(1), w.to(v[x].dtype), b.to(v[x].dtype))[:, :, None, None]
            return F.relu(y) if relu else y

        return self._add(value, features, fn)

    def max_pool(self, x, kernel=3, stride=2, padding=1, ceil_mode=False):
        value = self.net.max_pool(x, (kernel, kernel), (stride, stride), (padding, padding), ceil_mode)
        return self._add(
            value, self.channels[x], lambda v, _: F.max_pool2d(v[x], kernel, stride, padding, ceil_mode=ceil_mode)
        )

    def avg_pool(self, x, kernel=2, stride=2, padding=0, ceil_mode=True, count_include_pad=False):
        value = self.net.avg_pool(
            x, (kernel, kernel), (stride, stride), (padding, padding), ceil_mode, count_include_pad
        )
        return self._add(
            value,
            self.channels[x],
            lambda v, _: F.avg_pool2d(v[x], kernel, stride, padding, ceil_mode, count_include_pad),
        )

    def global_avg_pool(self, x):
        return self._add(self.net.global_avg_pool(x), self.channels[x], lambda v, _: v[x].mean((2, 3), keepdim=True))

    def scale(self, x, gate, residual=-1, relu=False):
        def fn(v, _):
            y = v[x] * v[gate] if residual < 0 else v[x] * v[gate] + v[residual]
            return F.relu(y) if relu else y

        return self._add(self.net.scale(x, gate, residual, relu), self.channels[x], fn)

    def add(self, x, residual, relu=False):
        return self._add(
            self.net.add(x, residual, relu),
            self.channels[x],
            lambda v, _: F.relu(v[x] + v[residual]) if relu else v[x] + v[residual],
        )

    def relu(self, x):
        return self._add(self.net.relu(x), self.channels[x], lambda v, _: F.relu(v[x]))

    def sigmoid(self, x):
        return self._add(self.net.sigmoid(x), self.channels[x], lambda v, _: torch.sigmoid(v[x]))

    def output(self, x):
        self.out = x
        self.net.output(x)
        return self

    def torch(self, x):
        values = []
        for fn in self.fns[: self.out + 1]:
            values.append(fn(values, x))
        return values[self.out]

    def plan(self, N, H, W, threads=2, exact=True, **kwargs):
        return self.net.plan(N, H, W, threads, exact, **kwargs)


def run(plan, x, dtype):
    """`x` NCHW or channels_last, of any dtype the executor reads; the output NaN-poisoned, the arena too."""
    N, K, P, Q = plan.out_shape
    y = torch.full((N, K, P, Q), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    plan.poison()
    plan.run(x.data_ptr(), int(nhwc), y.data_ptr(), DTYPES[x.dtype])
    return y


def assert_law(twin, y, x):
    """Through a whole network the largest error of a few hundred outputs is luck; the root mean square is not."""
    exact, eager = twin.torch(x.double()), twin.torch(x.to(twin.dtype)).double()
    eps = torch.finfo(twin.dtype).eps
    assert y.shape == exact.shape and y.isfinite().all()
    for name, size, factor in (("rms", lambda e: e.square().mean().sqrt(), 2), ("largest", lambda e: e.abs().max(), 4)):
        error, own = size(y.double() - exact), size(eager - exact)
        assert error <= factor * own + eps * size(exact), f"{name} error {error:.3g}, eager's own {own:.3g}"


# ---- graphs


def stem(t, width=64):
    return t.max_pool(t.conv(0, width, 7, 2, relu=True))


def basic(t, x, K, stride=1):
    skip = t.conv(x, K, 1, stride) if stride > 1 or t.channels[x] != K else x
    return t.conv(t.conv(x, K, 3, stride, relu=True), K, 3, residual=skip, relu=True)


def bottleneck(t, x, K, stride=1, groups=1, width=None):
    width = width or K
    skip = t.conv(x, 4 * K, 1, stride) if stride > 1 or t.channels[x] != 4 * K else x
    y = t.conv(t.conv(x, width, 1, relu=True), width, 3, stride, groups=groups, relu=True)
    return t.conv(y, 4 * K, 1, residual=skip, relu=True)


def head(t, x, classes=1000):
    return t.output(t.linear(t.global_avg_pool(x), classes))


def resnet18(dtype, width=64):
    t = Twin(dtype, 3)
    x = stem(t, width)
    for i, stride in enumerate((1, 2, 2, 2)):
        x = basic(t, basic(t, x, width << i, stride), width << i)
    return head(t, x)


def bottlenecks(dtype):
    t = Twin(dtype, 3)
    x = stem(t, 32)
    x = bottleneck(t, bottleneck(t, x, 16), 16)
    return head(t, bottleneck(t, bottleneck(t, x, 32, 2), 32), 500)


def resnext(dtype):
    t = Twin(dtype, 3)
    x = bottleneck(t, stem(t, 32), 32, groups=8, width=32)
    return head(t, bottleneck(t, x, 64, 2, groups=8, width=64), 500)


def squeeze_excite(dtype):
    t = Twin(dtype, 5)
    x = t.conv(0, 24, 3, relu=True)
    y = t.conv(x, 24, 3)
    gate = t.sigmoid(t.conv(t.conv(t.global_avg_pool(y), 6, 1, relu=True), 24, 1))
    y = t.scale(y, gate, residual=x, relu=True)
    gate = t.sigmoid(t.conv(t.global_avg_pool(y), 24, 1, fold=False))
    return t.output(t.conv(t.scale(y, gate), 19, 1, shift=False))


def deep_stem_avg_down(dtype):
    t = Twin(dtype, 3)
    x = t.conv(t.conv(t.conv(0, 16, 3, 2, relu=True), 16, 3, relu=True), 32, 3, relu=True)
    x = t.max_pool(x, ceil_mode=True)
    skip = t.conv(t.avg_pool(x), 64, 1)
    y = t.conv(t.conv(x, 16, 1, relu=True), 16, 3, 2, relu=True)
    x = t.conv(y, 64, 1, residual=skip, relu=True)
    return head(t, x, 500)


def odd_ends(dtype):
    """Element-wise steps, values read late, a residual that is the convolution's own input, odd channel counts."""
    t = Twin(dtype, 7)
    a = t.conv(0, 7, 3, residual=0)
    b = t.conv(a, 7, 1, residual=a, relu=True)
    c = t.add(a, b)
    d = t.relu(c)
    e = t.add(d, c, relu=True)
    t.conv(e, 3, 3)  # read by none
    f = t.avg_pool(t.add(e, b), 3, 2, 1, False, True)
    g = t.max_pool(t.conv(f, 65, (3, 1), dilation=2, padding=(2, 0)), 3, 1, 1)
    return t.output(t.max_pool(g, 2, 2, 0))


GRAPHS = {f.__name__: f for f in (resnet18, bottlenecks, resnext, squeeze_excite, deep_stem_avg_down, odd_ends)}
SMALL = {"resnet18": lambda dtype: resnet18(dtype, 16), **{k: v for k, v in GRAPHS.items() if k != "resnet18"}}
CHANNELS = {"squeeze_excite": 5, "odd_ends": 7}


def batch(name, N, H, W):
    return torch.randn(N, CHANNELS.get(name, 3), H, W)
