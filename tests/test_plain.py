"""Between plain tensors operators go straight to their rooms; whatever listens to torch's dispatcher is still heard."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import _native, _plain, backends, functional
from resnet_fast.ops.conv2d import op as conv2d
from resnet_fast.testing import check

WEIGHT = torch.randn(8, 4, 3, 3)


def images(**kwargs):
    return torch.randn(2, 4, 6, 5, **kwargs).contiguous(memory_format=torch.channels_last)


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.heard.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


def test_plain_tensors_leave_the_dispatcher_out():
    x = images().requires_grad_()
    y = functional.conv2d(x, WEIGHT, None, 1, 1)
    assert y.grad_fn.name() == "Conv2dBackward" and type(y) is torch.Tensor
    with torch.no_grad():
        assert functional.conv2d(x, WEIGHT, None, 1, 1).grad_fn is None
    assert functional.conv2d(images(), WEIGHT, None, 1, 1).grad_fn is None


def test_a_dispatch_mode_hears_forward_and_backward():
    x = images().requires_grad_()
    with Listener() as listener:
        functional.conv2d(x, WEIGHT, None, 1, 1).sum().backward()
    assert {"resnet_fast::conv2d", "resnet_fast::conv2d_backward"} <= set(listener.heard)
    y = functional.conv2d(x, WEIGHT, None, 1, 1)
    with Listener() as listener:  # the forward was not listened to
        y.sum().backward()
    assert "resnet_fast::conv2d_backward" in listener.heard


def test_the_profiler_names_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.conv2d(images(), WEIGHT, None, 1, 1)
    assert any(event.key == "resnet_fast::conv2d" for event in profile.key_averages())


@pytest.mark.parametrize(
    "make",
    [
        lambda: images().as_subclass(Tagged),
        lambda: images(dtype=torch.complex64).conj().imag,
        lambda: images(device="meta"),
    ],
    ids=["subclass", "negative bit", "meta"],
)
def test_tensors_that_are_not_plain(make):
    assert not _plain.is_plain((make(),))


def test_a_negative_bit_is_resolved():
    """Its memory holds the values with the other sign."""
    x = images(dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert torch.equal(functional.conv2d(x, WEIGHT, None, 1, 1), functional.conv2d(x.clone(), WEIGHT, None, 1, 1))


def test_functorch_is_heard():
    """It cannot differentiate operators registered with torch.library, and says so itself."""
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: functional.conv2d(x, WEIGHT, None, 1, 1).sum())(images())


def test_an_output_nothing_depends_on_has_no_gradient():
    """A node behind that hands back None for its input: as torch's own operators then, no gradient."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x, weight = images().requires_grad_(), WEIGHT.clone().requires_grad_()
    Cut.apply(functional.conv2d(x, weight, None, 1, 1)).sum().backward()
    assert x.grad is None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_an_input_with_two_readers(dtype, kernel, stride):
    """The gradient of the second reader is added where the first one's is computed, within the tolerance law."""

    def make():
        weight = torch.randn(8, 4, kernel, kernel, dtype=dtype) / (4 * kernel**2) ** 0.5
        return {"x": images(dtype=dtype), "weight": weight, "shift": images(dtype=dtype)}

    def ours(x, weight, shift):
        y, again = conv2d.with_input(x, weight, None, stride, kernel // 2)
        return torch.cat([y.flatten(), (again * shift).flatten()])

    def plain(x, weight, shift):
        y = torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2)
        return torch.cat([y.flatten(), (x * shift).flatten()])

    check.compare(ours, plain, make, ("x", "weight"))
    given = make()
    x, weight = given["x"].requires_grad_(), given["weight"].requires_grad_()
    y, again = conv2d.with_input(x, weight, None, stride, kernel // 2)
    assert y.grad_fn.name() == "Conv2dJoiningBackward" and again.data_ptr() == x.data_ptr()
    for t, gradient in zip((x, weight), torch.autograd.grad(y.sum() + again.sum(), (x, weight)), strict=True):
        assert gradient.dtype == dtype and gradient.stride() == t.stride()


def test_an_input_with_two_readers_of_which_one_is_not_asked():
    weight, x = WEIGHT.clone().requires_grad_(), images().requires_grad_()
    y, again = conv2d.with_input(x, weight, None, 1, 1)
    dx, dw = torch.autograd.grad(again.sum(), (x, weight), allow_unused=True, retain_graph=True)
    assert dw is None and torch.equal(dx, torch.ones_like(x))
    alone = torch.autograd.grad(functional.conv2d(x, weight, None, 1, 1).sum(), (x, weight))
    for a, b in zip(torch.autograd.grad(y.sum(), (x, weight)), alone, strict=True):
        assert torch.equal(a, b)


def test_an_input_with_two_readers_differentiated_twice():
    x, weight = (
        images(dtype=torch.float64).requires_grad_(),
        torch.randn(3, 4, 3, 3, dtype=torch.float64).requires_grad_(),
    )

    def both(x, weight):
        y, again = conv2d.with_input(x, weight, None, 1, 1)
        return y.sin(), again * again

    assert torch.autograd.gradcheck(both, (x, weight)) and torch.autograd.gradgradcheck(both, (x, weight))


def test_an_input_with_two_readers_is_joined_only_where_it_may_be():
    """Without a gradient of x, where autocast casts it, and where the dispatcher is listened to, x itself comes back."""
    weight, x = WEIGHT.clone().requires_grad_(), images()
    assert conv2d.with_input(x, weight, None, 1, 1)[1] is x
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, again = conv2d.with_input(x, weight, None, 1, 1)
        assert y.dtype == torch.bfloat16 and again is x
        low = x.detach().bfloat16().requires_grad_()
        assert conv2d.with_input(low, weight, None, 1, 1)[0].grad_fn.name() == "Conv2dJoiningBackward"
    with Listener():
        assert conv2d.with_input(x, weight, None, 1, 1)[1] is x


@pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
def test_another_gradient_is_added_at_stride_1_only():
    shape, one = (1, 6, 6, 4, 4, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1, 1), images()
    assert "stride 1" in _native.module().conv_data_gradient_why_not(shape, 0, True)
    with pytest.raises(ValueError, match=r"stride 1 only .*, got stride 2 x 2, padding 1 x 1"):
        place = (one.data_ptr(), one.data_ptr(), one.data_ptr(), (36, 9, 3, 1), one.data_ptr())
        _native.module().conv_data_gradient(shape, 0, *place, False, 1)


def test_running_statistics_count_as_changed():
    """Written by a kernel, torch still sees that a saved tensor has changed since."""
    bn = torch.nn.BatchNorm2d(4)
    plain = copy.deepcopy(bn)
    x = images()
    version = bn.running_mean._version
    functional.bn_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, None, True, bn.momentum, bn.eps)
    assert bn.running_mean._version > version
    plain(x)
    torch.testing.assert_close(bn.running_mean, plain.running_mean)
    torch.testing.assert_close(bn.running_var, plain.running_var)


def test_the_environment_is_asked_at_every_call(monkeypatch):
    functional.conv2d(images(), WEIGHT, None, 1, 1)
    monkeypatch.setenv("RESNET_FAST_BACKEND", "eager")
    with backends.record() as events:
        functional.conv2d(images(), WEIGHT, None, 1, 1)
    assert [room for _, _, room in events] == ["eager"]
    monkeypatch.setenv("RESNET_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        functional.conv2d(images(), WEIGHT, None, 1, 1)


def test_a_recalled_room_is_asked_again_where_tensors_differ():
    """What is recalled holds for this dtype, layout and shape; another one is chosen for itself."""
    with backends.record() as events:
        for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float64):
            functional.conv2d(images().to(dtype), WEIGHT.to(dtype), None, 1, 1)
    rooms = [room for _, _, room in events]
    assert rooms[1] == rooms[4] == "eager", rooms  # no other room takes float64 on a CPU
    assert len(rooms) == 5


def test_what_is_recalled_does_not_grow_for_ever(monkeypatch):
    """Images of ever new sizes."""
    monkeypatch.setattr(backends, "_MOST_REMEMBERED", 4)
    with torch.no_grad():
        for size in range(5, 15):
            functional.bn_act_conv2d(torch.randn(1, 4, size, size), torch.zeros(4), torch.ones(4), None, None, WEIGHT)
            assert len(backends._remembered) <= 4
