"""add_relu against torch.relu(x + residual)."""

import pytest
import torch
from contract import Contract, refused, refused_as_eager

from resnet_fast import backends, functional
from resnet_fast.testing import check, shapes


class TestAddRelu(Contract):
    op = "add_relu"
    wants = ("x", "residual")
    core = ("everyday", "large")
    small = "odd"
    cases = {  # noqa: RUF012
        "everyday": (2, 16, 9, 7),
        "odd": (2, 3, 3, 5),
        "one value": (1, 1, 1, 1),
        "one pixel": (3, 65, 1, 1),
        "one channel": (2, 1, 7, 9),
        "all equal": (8, 8, 8, 8),
        "two dimensions": (5, 127),
        "three dimensions": (5, 7, 3),
        "large": (2, 64, 56, 57),
        **{str(layer): (1, layer.K, layer.P, layer.Q) for layer in shapes.distinct("resnet50") if layer.residual},
    }

    def make(self, case, dtype):
        x, residual = torch.randn(2, *case).to(dtype)
        return {"x": x, "residual": residual}

    def ours(self, x, residual):
        return functional.add_relu(x, residual)

    def plain(self, x, residual):
        return torch.relu(x + residual)

    def kink(self, x, residual):
        return x + residual

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0,)])
    def test_empty(self, room, shape):
        x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape)
        with backends.use_backend(room):
            y = functional.add_relu(x, residual)
            y.sum().backward()
        assert y.shape == x.grad.shape == shape

    @pytest.mark.parametrize("a", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("b", [torch.float32, torch.bfloat16], ids=str)
    def test_mixed_dtypes(self, a, b):
        """Dtypes promote as in torch, and each gradient has its tensor's."""

        def make():
            return {"x": torch.randn(4, 8, 9, 9).to(a), "residual": torch.randn(4, 8, 9, 9).to(b)}

        check.compare(self.ours, self.plain, make, self.wants, self.kink)

    def test_same_tensor_twice(self, room):
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        with backends.use_backend(room):
            functional.add_relu(x, x).sum().backward()
        assert torch.equal(x.grad, 2.0 * (x > 0))

    def test_residual_used_again(self, room):
        """A residual block's input also feeds other branches: their gradients add up, and no buffer is shared."""
        x, r = torch.randn(2, 2, 8, 5, 5, requires_grad=True).unbind()
        leaf = x.detach().requires_grad_(), r.detach().requires_grad_()
        with backends.use_backend(room):
            y = functional.add_relu(*leaf)
            (y.sum() + 3 * leaf[1].sum() + 5 * leaf[0].sum()).backward()
        mask = ((leaf[0] + leaf[1]) > 0).float()
        assert torch.equal(leaf[0].grad, mask + 5) and torch.equal(leaf[1].grad, mask + 3)

    def test_saved_output_changed_in_place(self):
        """As in eager, changing what backward needs is an error, not a wrong gradient."""
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        y = functional.add_relu(x, torch.randn(2, 8, 5, 5))
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_nan_gradient(self, room):
        """The gradient of ReLU at NaN is 1, as torch's."""
        x = torch.tensor([[[[float("nan"), 1.0, -1.0, 0.0]]]], requires_grad=True)
        with backends.use_backend(room):
            functional.add_relu(x, torch.zeros(1, 1, 1, 4)).sum().backward()
        assert torch.equal(x.grad.flatten(), torch.tensor([1.0, 1.0, 0.0, 0.0]))

    def test_refusals(self):
        x = torch.randn(2, 3, 4, 4)
        for other, words in ((x[:, :2], "(2, 2, 4, 4)"), (x.to("meta"), "meta")):
            refused_as_eager(lambda o=other: functional.add_relu(x, o), lambda o=other: torch.relu(x + o), wants=words)
        # Eager would broadcast or count in integers; a residual block never means that.
        for a, b, words in (
            (x, x[:, :, :1], "one shape"),
            (x.int(), x.int(), "int32"),
            (x.to(torch.complex64), x, "complex64"),
        ):
            with pytest.raises(RuntimeError) as found:
                functional.add_relu(a, b)
            refused(found.value, words)
