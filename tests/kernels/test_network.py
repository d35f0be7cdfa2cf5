"""The C++ executor of frozen networks against the same graphs in torch, in float64.

Every graph is built twice at once by `Twin`: through `_C.Network` and as torch functions. The tolerance law: the
executor's rms error against float64 is at most twice eager's own in the same dtype, plus one rounding.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("resnet_fast._C")

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


# ---- tests


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_graphs_at_several_sizes_after_one_build(name, dtype):
    twin = SMALL[name](dtype)
    for N, H, W in ((1, 64, 64), (5, 47, 33), (2, 32, 96)):
        x = batch(name, N, H, W).to(dtype)
        plan = twin.plan(N, H, W)
        assert_law(twin, run(plan, x, dtype), x)
        assert_law(twin, run(plan, x.contiguous(memory_format=torch.channels_last), dtype), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resnet18_at_full_size(dtype):
    twin = resnet18(dtype)
    x = torch.randn(2, 3, 224, 224).to(dtype)
    assert_law(twin, run(twin.plan(2, 224, 224), x, dtype), x)


def test_inexact_error_of_the_logits_is_at_most_three_times_eagers():
    twin = resnet18(torch.float32)
    x = torch.randn(4, 3, 160, 160)
    y, exact, eager = (
        run(twin.plan(4, 160, 160, exact=False), x, torch.float32).double(),
        twin.torch(x.double()),
        twin.torch(x),
    )
    rms = lambda e: e.square().mean().sqrt()
    assert rms(y - exact) <= 3 * rms(eager.double() - exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_of_the_other_dtype(dtype):
    twin = SMALL["bottlenecks"](dtype)
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    x = torch.randn(3, 3, 40, 40).to(torch.bfloat16)  # exact in both
    plan = twin.plan(3, 40, 40)
    expected = run(plan, x.to(dtype), dtype)
    assert torch.equal(run(plan, x.to(other), dtype), expected)
    assert torch.equal(run(plan, x.to(other).contiguous(memory_format=torch.channels_last), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_threads_or_layout(name, exact, dtype):
    twin = SMALL[name](dtype)
    x = batch(name, 3, 65, 50).to(dtype)
    expected = run(twin.plan(3, 65, 50, 1, exact), x, dtype)
    for threads in (2, 3, 7):
        plan = twin.plan(3, 65, 50, threads, exact)
        assert torch.equal(run(plan, x, dtype), expected)
        assert torch.equal(run(plan, x.contiguous(memory_format=torch.channels_last), dtype), expected)


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_images_per_pass(name):
    twin = SMALL[name](torch.float32)
    N = 7
    x = batch(name, N, 48, 48)
    plan = twin.plan(N, 48, 48)
    expected, values = run(plan, x, torch.float32), list(plan.choices())
    algorithms = {v: {k: c[k] for k in c if k != "images"} for v, c in plan.choices().items()}
    rng = torch.Generator().manual_seed(3)
    for _ in range(8):
        images = torch.randint(1, N + 1, (len(values),), generator=rng).sort().values.tolist()
        choices = {v: {**algorithms[v], "images": n} for v, n in zip(values, images, strict=True)}
        assert torch.equal(run(twin.plan(N, 48, 48, choices=choices), x, torch.float32), expected), choices


def test_choices_survive_json_and_are_obeyed():
    twin = SMALL["bottlenecks"](torch.float32)
    tuned = twin.plan(4, 64, 64, tune=1)
    again = twin.plan(4, 64, 64, choices=json.loads(json.dumps(tuned.choices())))
    assert again.choices() == tuned.choices()
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(run(again, x, torch.float32), run(tuned, x, torch.float32))
    assert_law(twin, run(tuned, x, torch.float32), x)
    assert twin.plan(4, 64, 64, choices={1: {"images": 2}}).describe()[1]["images"] == 2


def test_concurrent_calls_share_a_plan():
    twin = SMALL["resnet18"](torch.float32)
    plan = twin.plan(2, 64, 64)
    xs = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    expected = [run(plan, x, torch.float32) for x in xs]
    ys = [[torch.full_like(expected[i], float("nan")) for _ in range(25)] for i in range(4)]

    def call(i):
        for y in ys[i]:
            plan.run(xs[i].data_ptr(), 0, y.data_ptr())

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(y, expected[i]) for i in range(4) for y in ys[i])


def test_nan_and_infinity_pass_through():
    twin = Twin(torch.float32, 3)
    twin.output(twin.max_pool(twin.conv(0, 8, 3, relu=True)))
    x = torch.randn(1, 3, 16, 16)
    x[0, 0, 3, 4], x[0, 1, 12, 12] = float("nan"), float("inf")
    y, eager = run(twin.plan(1, 16, 16), x, torch.float32), twin.torch(x)
    assert torch.equal(y.isnan(), eager.isnan()) and torch.equal(y.isinf(), eager.isinf())
    assert y.isnan().any()


def test_memory_is_reused_and_weights_are_shared():
    twin = resnet18(torch.float32)
    one, four = twin.plan(1, 64, 64), twin.plan(4, 64, 64)
    held = twin.net.packed_bytes
    assert held > 0 and twin.net.weight_bytes > 4 * 11_000_000
    values = sum(4 * r["shape"][0] * r["shape"][1] * r["shape"][2] * r["shape"][3] for r in four.describe())
    assert one.arena_bytes > 0 and four.arena_bytes < values
    third = twin.plan(4, 64, 64)
    assert twin.net.packed_bytes == held
    del one, four, third
    assert twin.net.packed_bytes == 0


def test_a_plan_outlives_its_network_and_its_weights():
    twin = SMALL["bottlenecks"](torch.float32)
    x = torch.randn(1, 3, 32, 32)
    plan = twin.plan(1, 32, 32)
    expected = run(plan, x, torch.float32)
    del twin.net
    assert torch.equal(run(plan, x, torch.float32), expected)


def test_describe_profile():
    twin = resnet18(torch.float32)
    plan = twin.plan(1, 224, 224)
    rows = plan.describe()
    assert sum(r["flops"] for r in rows) == pytest.approx(3.63e9, rel=0.01)
    assert all(r["ms"] is None for r in rows)
    x, y = torch.randn(1, 3, 224, 224), torch.empty(1, 1000)
    plan.profile(x.data_ptr(), 0, y.data_ptr(), repeats=3)
    rows = plan.describe()
    assert rows[1]["fused"] and rows[1]["algorithm"] and rows[0]["ms"] is None
    assert all(r["ms"] >= r["ms_least"] > 0 for r in rows[2:])


def test_errors_say_what_was_wanted():
    def fails(match, call):
        with pytest.raises(ValueError, match=match):
            call()

    net, w = _C.Network(0), torch.zeros(8, 3, 3, 3)
    conv = lambda x=0, **kw: net.conv(x, **{"K": 8, "R": 3, "S": 3, "weight_ptr": w.data_ptr(), **kw})
    fails("dtype", lambda: _C.Network(2))
    fails("at least one channel", lambda: net.input(0))
    fails("no value 0", lambda: conv())
    net.input(3)
    fails("one input", lambda: net.input(3))
    fails("no value 7", lambda: conv(7))
    fails("no value -1", lambda: net.relu(-1))
    fails("groups", lambda: conv(groups=2))
    fails("stride", lambda: conv(stride=(0, 1)))
    fails("padding", lambda: conv(padding=(-1, 0)))
    fails("weight is null", lambda: conv(weight_ptr=0))
    fails("residual has 3 channels", lambda: conv(residual=0))
    fails("half the kernel", lambda: net.max_pool(0, (3, 3), (2, 2), (2, 2)))
    fails("no output", lambda: net.plan(1, 8, 8, 1))
    fails("no network", lambda: net.output(0))
    y = conv()
    fails("gate has 8 channels", lambda: net.scale(0, y))
    fails("residual 8", lambda: net.add(0, y))
    net.output(y)
    fails("one output", lambda: net.output(y))
    fails("smaller than the kernel", lambda: net.plan(1, 2, 8, 1))
    fails("at least one image", lambda: net.plan(0, 8, 8, 1))
    fails("threads", lambda: net.plan(1, 8, 8, 0))
    fails("tune", lambda: net.plan(1, 8, 8, 1, tune=3))
    fails("cannot be addressed", lambda: net.plan(1 << 40, 1 << 20, 8, 1))
    fails("is called 'magic'", lambda: net.plan(1, 8, 8, 1, choices={y: {"algorithm": "magic"}}))
    fails("no value 9", lambda: net.plan(1, 8, 8, 1, choices={9: {}}))
    fails("no field", lambda: net.plan(1, 8, 8, 1, choices={y: {"colour": 1}}))
    fails("input has no algorithm", lambda: net.plan(1, 8, 8, 1, choices={0: {"algorithm": "direct"}}))
    plan = net.plan(1, 8, 8, 1)
    fails("no longer change", lambda: net.relu(y))
    fails("null", lambda: plan.run(0, 0, 0))
    fails("x_layout", lambda: plan.run(1, 2, 1))
    net = _C.Network(0)
    net.input(3)
    net.output(net.linear(0, 8, w.data_ptr()))
    fails("pool it first", lambda: net.plan(1, 2, 2, 1))


def in_process(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


def test_fewer_threads_than_asked_for_do_not_hang():
    """OMP_THREAD_LIMIT gives a team of one; its barrier must not wait for the others."""
    done = in_process(
        """
import torch
from resnet_fast import _C
n, w, x, y = _C.Network(0), torch.zeros(8, 8, 1, 1), torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4)
n.input(8)
n.output(n.relu(n.relu(n.conv(0, K=8, R=1, S=1, weight_ptr=w.data_ptr()))))
n.plan(1, 4, 4, 4).run(x.data_ptr(), 0, y.data_ptr())
assert (y == 0).all()
""",
        OMP_THREAD_LIMIT="1",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    args = ["-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "several_sizes"]
    done = in_process(f"import pytest, sys; sys.exit(pytest.main({args!r}))", RESNET_FAST_ISA=isa)
    if "this processor does not have it" in done.stdout + done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stdout[-2000:]
