"""scale_add_relu against torch.relu(x * scale + residual)."""

import pytest
import torch
from contract import Contract, refused, refused_as_eager

from resnet_fast import backends, functional
from resnet_fast.testing import check, shapes


class TestScaleAddRelu(Contract):
    op = "scale_add_relu"
    wants = ("x", "scale", "residual")
    core = ("everyday", "large")
    small = "odd"
    uses = ("scale_add_relu", "add_relu")
    cases = {  # noqa: RUF012
        "everyday": (2, 16, 9, 7),
        "odd": (2, 3, 3, 5),
        "one value": (1, 1, 1, 1),
        "one pixel": (3, 65, 1, 1),
        "one channel": (2, 1, 7, 9),
        "all equal": (8, 8, 8, 8),
        "large": (2, 64, 56, 57),
        **{str(layer): (1, layer.K, layer.P, layer.Q) for layer in shapes.distinct("resnet50")[-1:]},
    }

    def make(self, case, dtype):
        x, residual = torch.randn(2, *case).to(dtype)
        return {"x": x, "scale": torch.randn(*case[:2], 1, 1).sigmoid().to(dtype), "residual": residual}

    def ours(self, x, scale, residual):
        return functional.scale_add_relu(x, scale, residual)

    def plain(self, x, scale, residual):
        return torch.relu(x * scale + residual)

    def kink(self, x, scale, residual):
        return x * scale + residual

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
    def test_empty(self, room, shape):
        x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape)
        scale = torch.rand(*shape[:2], 1, 1, requires_grad=True)
        with backends.use_backend(room):
            y = functional.scale_add_relu(x, scale, residual)
            y.sum().backward()
        assert y.shape == x.grad.shape == shape and torch.equal(scale.grad, torch.zeros_like(scale))

    @pytest.mark.parametrize("a", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("b", [torch.float32, torch.bfloat16], ids=str)
    def test_mixed_dtypes(self, a, b):
        """Dtypes promote as in torch, and each gradient has its tensor's."""

        def make():
            x, residual = torch.randn(4, 8, 9, 9).to(a), torch.randn(4, 8, 9, 9).to(b)
            return {"x": x, "scale": torch.rand(4, 8, 1, 1).to(b), "residual": residual}

        check.compare(self.ours, self.plain, make, self.wants, self.kink)

    def test_saves_no_product(self):
        """What backward keeps of the size of a map: x, which the factors' gradient needs, and y, whose sign is the mask."""
        inputs = {k: v.requires_grad_() for k, v in self.make((2, 8, 5, 5), torch.float32).items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = self.ours(**inputs)
        maps = {t.data_ptr() for t in kept if t.shape == y.shape}
        assert maps == {inputs["x"].data_ptr(), y.data_ptr()}

    def test_refusals(self):
        x, scale = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 1, 1)
        for given, words in (((x, scale, x[:, :2]), "(2, 2, 4, 4)"), ((x, scale.to("meta"), x), "meta")):
            refused_as_eager(lambda g=given: functional.scale_add_relu(*g), lambda g=given: self.plain(*g), wants=words)
        # Eager would broadcast or count in integers; a squeeze-and-excite block never means that.
        for given, words in (
            ((x, scale[:1], x), "(1, 3, 1, 1)"),
            ((x, scale.int(), x), "int32"),
            ((x[0], scale, x[0]), "(3, 4, 4)"),
        ):
            with pytest.raises(RuntimeError) as found:
                functional.scale_add_relu(*given)
            refused(found.value, words)
