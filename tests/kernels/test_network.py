"""The C++ executor of frozen networks against the same graphs in torch, in float64.

The tolerance law: the executor's rms error against float64 is at most twice eager's own in the same dtype, plus one rounding.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from tests.kernels.network_graphs import _C, DTYPES, SMALL, Twin, assert_law, batch, resnet18, run


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
