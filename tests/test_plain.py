"""Between plain tensors operators go straight to their rooms; whatever listens to torch's dispatcher is still heard."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import _plain, backends, functional

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
    want = torch.nn.functional.conv2d(x.clone(), WEIGHT, None, 1, 1)
    torch.testing.assert_close(functional.conv2d(x, WEIGHT, None, 1, 1), want, atol=1e-4, rtol=1e-4)


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
