"""residual_block: the values, gradients and statistics of the block it is, in every room, and what it keeps."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from resnet_fast import _native, backends, exact, functional, use_backend
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm
from resnet_fast.ops.residual_block import cpu, parts
from resnet_fast.ops.residual_block.op import Link
from resnet_fast.testing import check

native = _native.why_not()
BACKENDS = ("auto", "cpu", "eager") if native is None else ("auto", "eager")

#: x's shape; for every link filters, size, stride, padding, dilation, groups; for the projection filters, size, stride.
CASES = {
    "identity of three": ((3, 20, 7, 6), [(5, 1, 1, 0, 1, 1), (6, 3, 1, 1, 1, 1), (20, 1, 1, 0, 1, 1)], None),
    "identity of two": ((2, 17, 9, 8), [(12, 3, 1, 1, 1, 1), (17, 3, 1, 1, 1, 1)], None),
    "one link": ((2, 16, 6, 7), [(16, 3, 1, 1, 1, 1)], None),
    "projection": ((2, 16, 7, 9), [(8, 1, 1, 0, 1, 1), (8, 3, 1, 1, 1, 1), (24, 1, 1, 0, 1, 1)], (24, 1, 1)),
    "strided projection": ((3, 16, 9, 7), [(8, 1, 1, 0, 1, 1), (8, 3, 2, 1, 1, 1), (21, 1, 1, 0, 1, 1)], (21, 1, 2)),
    "strided first link": ((2, 19, 8, 9), [(24, 3, 2, 1, 1, 1), (24, 3, 1, 1, 1, 1)], (24, 1, 2)),
    "projection of 3x3": ((2, 16, 8, 6), [(16, 1, 2, 0, 1, 1), (20, 1, 1, 0, 1, 1)], (20, 3, 2)),
    "stride that leaves pixels": ((2, 16, 9, 9), [(16, 1, 3, 0, 1, 1), (20, 3, 1, 1, 1, 1)], (20, 1, 3)),
    "dilated": ((2, 16, 11, 9), [(8, 1, 1, 0, 1, 1), (8, 3, 1, 2, 2, 1), (16, 1, 1, 0, 1, 1)], None),
    "groups": ((2, 32, 7, 7), [(32, 1, 1, 0, 1, 1), (32, 3, 1, 1, 1, 2), (32, 1, 1, 0, 1, 1)], None),
    "narrow groups": ((2, 16, 7, 7), [(16, 1, 1, 0, 1, 1), (16, 3, 1, 1, 1, 4), (16, 1, 1, 0, 1, 1)], None),
    "strided narrow groups": (
        (2, 16, 9, 7),
        [(16, 1, 1, 0, 1, 1), (16, 3, 2, 1, 1, 4), (24, 1, 1, 0, 1, 1)],
        (24, 1, 2),
    ),
    "groups of three": ((2, 12, 7, 7), [(12, 1, 1, 0, 1, 1), (12, 3, 1, 1, 1, 4), (12, 1, 1, 0, 1, 1)], None),
}


def inputs(case, dtype=torch.float32):
    (n, c, h, w), links, projection = CASES[case]
    made, channels = {"x": torch.randn(n, c, h, w).to(dtype)}, c
    path = [(str(i), *link) for i, link in enumerate(links)]
    path += [] if projection is None else [("p", *projection, 0, 1, 1)]
    for name, k, size, _, _, _, groups in path:
        of = c if name == "p" else channels
        made[f"w{name}"] = (torch.randn(k, of // groups, size, size) / (of // groups * size * size) ** 0.5).to(dtype)
        made[f"gamma{name}"] = (torch.rand(k) + 0.5).to(torch.float64 if dtype == torch.float64 else torch.float32)
        made[f"beta{name}"] = torch.randn_like(made[f"gamma{name}"])
        channels = k
    return made


def windows(case):
    _, links, projection = CASES[case]
    named = {str(i): link[2:] for i, link in enumerate(links)}
    return named if projection is None else named | {"p": (projection[2], projection[1] // 2, 1, 1)}


def ours(case, x, running=None, recompute=(), **given):
    """`recompute`: the names of links whose convolution backward computes again."""
    made = {}
    for name, (stride, padding, dilation, groups) in windows(case).items():
        statistics = (None, None) if running is None else running[name]
        bn = Norm(*statistics, given.get(f"gamma{name}"), given.get(f"beta{name}"), True, 0.3, 1e-5)
        made[name] = Link(given[f"w{name}"], bn, stride, padding, dilation, groups, name in recompute)
    projection = made.pop("p", None)
    return functional.residual_block(x, list(made.values()), projection)


def plain(case, x, running=None, **given):
    def link(h, name):
        stride, padding, dilation, groups = windows(case)[name]
        z = F.conv2d(h, given[f"w{name}"].to(h.dtype), None, stride, padding, dilation, groups)
        statistics = (None, None) if running is None else running[name]
        return F.batch_norm(z, *statistics, given.get(f"gamma{name}"), given.get(f"beta{name}"), True, 0.3, 1e-5)

    h, last = x, str(len(CASES[case][1]) - 1)
    for name in windows(case):
        if name not in (last, "p"):
            h = torch.relu(link(h, name))
    return torch.relu(link(h, last) + (link(x, "p") if CASES[case][2] else x))


def statistics(case):
    return {name: (torch.randn(k := inputs(case)[f"w{name}"].shape[0]), torch.rand(k) + 0.5) for name in windows(case)}


@pytest.mark.parametrize("backend", ("auto", "eager"))
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_plain_composition(case, backend):
    def make():
        return inputs(case, torch.float64)

    with use_backend(backend):
        check.compare(partial(ours, case), partial(plain, case), make, list(make()))


def kept_away(case, given):
    """The same input with betas that keep every ReLU's argument away from its kink, half of the channels passing."""
    for name in windows(case):
        sign = torch.where(torch.arange(given[f"beta{name}"].numel()) % 2 == 0, 1.0, -1.0)
        given[f"beta{name}"] = sign * (given[f"beta{name}"].abs() + 12)
        given[f"gamma{name}"] = given[f"gamma{name}"] * 0.5
    return given


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_float32_by_the_law(case, backend):
    def make():
        return kept_away(case, inputs(case))

    with exact(), use_backend(backend):
        with backends.record() as ran:
            refused = _refused(partial(ours, case), make())
        if refused is not None:
            assert case == "groups of three" and "narrow groups" in refused
            return
        whole = ("residual_block", "bwd", "cpu") in ran
        assert whole == (backend != "eager" and case != "groups of three" and native is None)
        check.compare(partial(ours, case), partial(plain, case), make, list(make()))


def _refused(function, given):
    """The sentence of a room that was asked for by name and cannot, None where it can."""
    given = {k: t.requires_grad_() for k, t in given.items()}
    try:
        function(**given).sum().backward()
    except RuntimeError as error:
        assert str(error).startswith("resnet_fast: backend")
        return str(error)


@pytest.mark.parametrize("case", ["identity of three", "strided projection", "strided first link", "projection"])
def test_autocast_by_the_law(case):
    """bfloat16 between float32 filters and vectors, as torch's autocast; Winograd has a bound of its own."""

    def make():
        given = kept_away(case, inputs(case))
        return given | {"x": given["x"].bfloat16()}

    def under(function, **given):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given["x"].dtype != torch.float64):
            return function(case, **given)

    with exact():
        check.compare(partial(under, ours), partial(under, plain), make, list(make()))


@pytest.mark.parametrize("case", ["identity of three", "projection", "strided first link"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_subsets_of_gradients(case, backend):
    """Whatever is asked for is what all together give."""
    given = inputs(case)
    names = list(given)
    subsets = [[name] for name in names] + [names[1:4], names[-3:], names[::2], ["x", names[-1]]]

    def gradients(wanted):
        fresh = {k: v.clone().requires_grad_(k in wanted) for k, v in given.items()}
        return torch.autograd.grad(ours(case, **fresh).square().sum(), [fresh[k] for k in wanted])

    with use_backend(backend):
        whole = dict(zip(names, gradients(names)))
        for wanted in subsets:
            for name, grad in zip(wanted, gradients(wanted)):
                assert torch.equal(grad, whole[name]), (wanted, name)


@pytest.mark.parametrize("case", ["identity of two", "strided projection"])
def test_running_statistics_move(case):
    given, moved = inputs(case), statistics(case)
    wanted = {name: tuple(t.clone() for t in pair) for name, pair in moved.items()}
    versions = {name: [t._version for t in pair] for name, pair in moved.items()}
    y = ours(case, running=moved, **given)
    torch.testing.assert_close(y, plain(case, running=wanted, **given))
    for name, pair in moved.items():
        for got, want, version in zip(pair, wanted[name], versions[name]):
            torch.testing.assert_close(got, want)
            assert got._version > version


#: Many chunks of rows, the last of them ragged; rows short enough to be added in groups, and longer ones.
WIDTHS = {"short rows": (64, 32), "long rows": (160, 96), "seven products for eight": (256, 128)}


@pytest.mark.skipif(native is not None, reason=f"the compiled module is not there: {native}")
@pytest.mark.parametrize("offset", [0.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_statistics_inside_a_convolution_change_no_bit(width, dtype, offset):
    """A norm's sums taken by the convolution before it, its values made by the one behind: what passes of their own give."""
    c, k = WIDTHS[width]
    x = (torch.randn(3, c, 29, 32) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    tensors = []
    for of, to, size in ((c, k, 1), (k, k, 3), (k, c, 1)):
        tensors += [torch.randn(to, of, size, size) / (of * size * size) ** 0.5, torch.rand(to) + 0.5, torch.randn(to)]
    sizes = [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    given = (*tensors, None, None, None, [1e-5] * 3, sizes, [False] * 3)
    with use_backend("cpu"):
        whole, apart = cpu.fwd(x, *given), parts.forward(x, *given)
        assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))
        dy, wants = torch.randn_like(whole[0]), [True] * 10 + [False] * 3
        whole, apart = cpu.bwd(dy, x, *whole, *given, wants), parts.backward(dy, x, *whole, *given, wants)
        assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))


def ends(case):
    """The links whose output need not be kept."""
    return str(len(CASES[case][1]) - 1), *(() if CASES[case][2] is None else ("p",))


def saved_values(case, recompute, given):
    """Values of the maps a block keeps for backward."""
    maps = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: maps.append(t) or t, lambda t: t):
        y = ours(case, recompute=recompute, **{k: v.detach().clone().requires_grad_() for k, v in given.items()})
    return sum(t.numel() for t in maps if t.dim() == 4), y.numel()


def gradients(case, recompute, given, wanted):
    fresh = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in given.items()}
    return torch.autograd.grad(ours(case, recompute=recompute, **fresh).square().sum(), [fresh[k] for k in wanted])


@pytest.mark.skipif(native is not None, reason=f"the compiled module is not there: {native}")
@pytest.mark.parametrize("case", [case for case in CASES if case != "groups of three"])
def test_what_is_computed_again_has_the_bits_of_what_is_kept(case):
    """Every combination of ends; of the maps kept theirs are gone."""
    given, found, kept = inputs(case), {}, {}
    with use_backend("cpu"):
        for size in range(len(ends(case)) + 1):
            for recompute in itertools.combinations(ends(case), size):
                found[recompute] = gradients(case, recompute, given, list(given))
                kept[recompute], values = saved_values(case, recompute, given)
                kept[recompute] += size * values
    for recompute, results in found.items():
        assert all(torch.equal(a, b) for a, b in zip(results, found[()], strict=True)), recompute
        assert kept[recompute] == kept[()]


@pytest.mark.parametrize("case", ["identity of three", "strided projection", "one link", "groups of three"])
def test_computed_again_by_its_parts(case):
    """Torch's norm rounds otherwise by known statistics, as which backward has them: by the law, not to the bit."""

    def make():
        return kept_away(case, inputs(case))

    with exact(), use_backend("auto" if case == "groups of three" else "eager"):
        check.compare(partial(ours, case, recompute=ends(case)), partial(plain, case), make, list(make()))


@pytest.mark.parametrize("recompute", [("2",), ("2", "p")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets_of_gradients_of_what_is_computed_again(backend, recompute):
    case = "strided projection"
    given = inputs(case)
    with use_backend(backend):
        whole = dict(zip(given, gradients(case, recompute, given, list(given))))
        for wanted in [[name] for name in given] + [["w2", "gammap"], ["x", "w2"], ["wp", "beta2"]]:
            for name, grad in zip(wanted, gradients(case, recompute, given, wanted), strict=True):
                assert torch.equal(grad, whole[name]), (wanted, name)


@pytest.mark.parametrize("case", ["identity of three", "strided projection"])
def test_an_empty_batch_is_eagers(case):
    given = {k: v.requires_grad_() for k, v in inputs(case).items()}
    moved = statistics(case)
    before = {name: [t.clone() for t in pair] for name, pair in moved.items()}
    empty = given | {"x": given["x"].detach()[:0].requires_grad_()}
    y, want = ours(case, running=moved, **empty), plain(case, **empty)
    assert y.shape == want.shape
    got = torch.autograd.grad(y.sum(), list(empty.values()))
    for a, b in zip(got, torch.autograd.grad(want.sum(), list(empty.values())), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    assert all(torch.equal(a, b) for name, pair in moved.items() for a, b in zip(pair, before[name]))


def test_bits_do_not_depend_on_threads(threads):
    case = "strided projection"
    given = inputs(case)
    found = []
    for count in (1, 2, 3):
        threads(count)
        fresh = {k: v.clone().requires_grad_() for k, v in given.items()}
        y = ours(case, **fresh)
        y.square().sum().backward()
        found.append([y, *(t.grad for t in fresh.values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["identity of three", "strided projection", "identity of two"])
def test_what_is_not_finite_goes_where_torch_sends_it(case, value):
    given = inputs(case)
    given["x"][1, 2, 3, 4] = value
    got, want = ours(case, **given), plain(case, **given)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    given = inputs(case)
    fresh = [{k: v.clone().requires_grad_() for k, v in given.items()} for _ in range(2)]
    results = [ours(case, **fresh[0]), plain(case, **fresh[1])]
    dy = torch.randn_like(results[0])
    dy[0, 0, 0, 0] = value
    for y in results:
        y.backward(dy)
    for name in given:
        assert torch.equal(fresh[0][name].grad.isfinite(), fresh[1][name].grad.isfinite()), name


def test_gradcheck_twice():
    CASES["tiny"] = ((2, 2, 3, 3), [(2, 1, 1, 0, 1, 1), (3, 3, 2, 1, 1, 1)], (3, 1, 2))
    try:
        given = {k: v.requires_grad_() for k, v in kept_away("tiny", inputs("tiny", torch.float64)).items()}

        def function(*tensors):
            return ours("tiny", **dict(zip(given, tensors)))

        assert torch.autograd.gradcheck(function, tuple(given.values()))
        assert torch.autograd.gradgradcheck(function, tuple(given.values()))
    finally:
        del CASES["tiny"]


@pytest.mark.parametrize("case", ["identity of three", "strided projection"])
def test_keeps_the_outputs_of_convolutions_only(case):
    given = {k: v.requires_grad_() for k, v in inputs(case).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(case, **given)
    maps = [t for t in kept if t.dim() == 4 and t.numel() and all(t is not v for v in given.values())]
    links = len(windows(case))
    assert len(maps) == links + 1 and any(t.data_ptr() == y.data_ptr() for t in maps)


def test_opcheck():
    given = inputs("strided projection")
    tensors = [given[k].requires_grad_() for k in given if k != "x"]
    sizes = [s for w in windows("strided projection").values() for s in (w[0], w[0], w[1], w[1], w[2], w[2], w[3])]
    op = torch.ops.resnet_fast.residual_block.default
    x = given["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    for recompute in ([False] * 4, [False, False, True, True]):
        torch.library.opcheck(op, (x, *tensors, [1e-5] * 4, sizes, recompute))


def test_affine_free_norms_and_layouts():
    case = "projection"
    given = {k: v for k, v in inputs(case).items() if not k.startswith(("gamma", "beta"))}
    want = plain(case, **given)
    for x in (given["x"], given["x"].contiguous(memory_format=torch.channels_last), given["x"].mT.contiguous().mT):
        torch.testing.assert_close(ours(case, **(given | {"x": x})), want)


def test_bad_input():
    given = inputs("identity of two")
    with pytest.raises(RuntimeError, match=r"residual_block.*17"):
        ours("identity of two", **(given | {"x": torch.randn(2, 16, 9, 8)}))
    with pytest.raises(RuntimeError, match="shortcut of the output's shape"):
        ours("identity of two", **(given | {"w1": torch.randn(18, 12, 3, 3), "gamma1": None, "beta1": None}))
    with pytest.raises(RuntimeError, match="one dtype"):
        ours("identity of two", **(given | {"x": given["x"].bfloat16()}))
    with pytest.raises(RuntimeError, match="one value per channel"):
        ours("identity of two", **(given | {"gamma1": torch.ones(3)}))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours("one link", **(inputs("one link") | {"x": torch.randn(1, 16, 1, 1)}))
    bn = Norm(torch.zeros(17), torch.ones(17), None, None, False, 0.1, 1e-5)
    with pytest.raises(ValueError, match="training=False"):
        functional.residual_block(given["x"], [Link(given["w0"], bn)])
    with pytest.raises(ValueError, match="recompute of the last link or the projection"):
        ours("identity of two", recompute=("0",), **given)
    with pytest.raises(ValueError, match="one to three links, got 0"):
        functional.residual_block(given["x"], [])
    with pytest.raises(ValueError, match="numbers"):
        functional.residual_block(given["x"], [Link(given["w0"], bn._replace(training=True), padding="same")])


def test_outputs_without_a_gradient_cost_none():
    """By torch's dispatcher too, as the profiler calls it: no zeros stand in for the gradients of what is kept."""
    given = {k: v.requires_grad_() for k, v in inputs("projection").items()}
    with torch.profiler.profile(record_shapes=True) as profile:
        ours("projection", **given).backward(torch.ones(2, 24, 7, 9))
    events = profile.key_averages(group_by_input_shape=True)
    assert any(e.key == "resnet_fast::residual_block_backward" for e in events)
    assert not [e for e in events if e.key == "aten::zero_" and e.input_shapes and len(e.input_shapes[0]) == 4]
