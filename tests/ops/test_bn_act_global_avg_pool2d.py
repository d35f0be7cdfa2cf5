"""bn_act_global_avg_pool2d against batch_norm, an addition, relu and the mean over pixels."""

import torch
import torch.nn.functional as F
from contract import Contract, outcome, refused, using

from resnet_fast import functional
from resnet_fast.testing import check


def draw(*shape, dtype):
    return torch.randn(shape).to(dtype)


class TestBnActGlobalAvgPool2d(Contract):
    op = "bn_act_global_avg_pool2d"
    wants = ("x", "weight", "bias", "residual")
    core = ("end", "65 channels", "evaluation", "large")
    small = "small"
    folded = ("weight",)
    uses = ("bn_act_global_avg_pool2d", "bn_act")
    #: shape, residual, training, affine
    cases = {  # noqa: RUF012
        "end": ((3, 16, 7, 7), True, True, True),
        "65 channels": ((2, 65, 5, 4), True, True, True),
        "one channel": ((3, 1, 5, 5), True, True, True),
        "one pixel": ((5, 8, 1, 1), True, True, True),
        "no residual": ((3, 16, 5, 6), False, True, True),
        "no residual in evaluation": ((3, 16, 5, 6), False, False, True),
        "no affine": ((3, 8, 6, 5), True, True, False),
        "evaluation": ((3, 16, 7, 7), True, False, True),
        "evaluation, no affine": ((3, 16, 7, 7), False, False, False),
        "all equal": ((8, 8, 8, 8), True, True, True),
        "small": ((2, 2, 2, 3), True, True, True),
        "large": ((2, 64, 28, 29), True, True, True),
    }

    def make(self, case, dtype):
        shape, residual, training, affine = case
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        c = shape[1]
        # Two heaps of values, far from the kink on either side: one pixel at it, and a whole image's gradient is chance.
        x = (torch.randint(0, 2, shape) * 6 - 2.5 + 0.5 * torch.randn(shape)).to(dtype)
        inputs = {
            "x": x,
            "running_mean": draw(c, dtype=wide) * 0.1 + 0.5,
            "running_var": 9 * torch.rand(c, dtype=wide) + 4.5,
            "weight": (1 + torch.rand(c, dtype=wide)) * (torch.randint(0, 2, (c,)) * 2 - 1) if affine else None,
            "bias": torch.rand(c, dtype=wide) * 0.2 if affine else None,
            "residual": None,
            "training": training,
        }
        if residual:
            heaps = (torch.randint(0, 2, shape) * 2 - 1) * (1 + torch.rand(shape))
            inputs["residual"] = (heaps - self.map(**inputs).double()).to(dtype)
        return inputs

    def ours(self, **inputs):
        inputs = {k: v.clone() if k.startswith("running") else v for k, v in inputs.items()}
        return functional.bn_act_global_avg_pool2d(**inputs)

    def map(self, x, running_mean, running_var, weight, bias, residual, training, **_):
        vectors = (running_mean.clone(), running_var.clone(), weight, bias)
        if x.dtype in (torch.bfloat16, torch.float16):
            vectors = tuple(None if v is None else v.float() for v in vectors)
        y = F.batch_norm(x, *vectors, training)
        return y if residual is None else y + residual

    def test_the_kink_leaves_gradients(self):
        """The law is kept over what these inputs leave: next to nothing may be left out."""
        for name in ("end", "no residual", "evaluation", "large"):
            kink = self.kink(**self.make(self.cases[name], torch.bfloat16))
            assert (kink > 8 * torch.finfo(torch.bfloat16).eps * 4).double().mean() > 0.9, name

    def plain(self, **inputs):
        y = self.map(**inputs)
        return F.adaptive_avg_pool2d(torch.relu(y), 1)

    def kink(self, **inputs):
        """The pixel of each image and channel that is nearest to it."""
        return self.map(**inputs).abs().amin((2, 3), keepdim=True)

    def test_saves_no_map(self):
        """What backward keeps of the size of a map are the two inputs, which others keep too."""
        inputs = self.make(self.cases["end"], torch.float32)
        leaves = {k: v.requires_grad_() if k in self.wants else v for k, v in inputs.items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            self.ours(**leaves)
        maps = {t.data_ptr() for t in kept if t.shape == inputs["x"].shape}
        assert maps == {inputs["x"].data_ptr(), inputs["residual"].data_ptr()}

    def test_running_statistics(self, room):
        """They move as bn_act's own, bit for bit."""
        inputs = self.make(self.cases["end"], torch.float32)
        mine, theirs = ([inputs[k].clone() for k in ("running_mean", "running_var")] for _ in range(2))
        with using(room):
            functional.bn_act_global_avg_pool2d(inputs["x"], *mine, training=True, momentum=0.3)
            functional.bn_act(inputs["x"], *theirs, training=True, momentum=0.3)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs)) and not torch.equal(mine[0], inputs["running_mean"])

    def test_nan_takes_the_gradient(self, room):
        """An image's mean with a NaN is NaN; the gradient passes there as torch's ReLU lets it."""
        inputs = self.make(self.cases["evaluation"], torch.float32)
        inputs["x"][0, 0, 3, 3] = float("nan")
        found = []
        for function in (self.ours, self.plain):
            given = inputs | {"x": inputs["x"].clone().requires_grad_()}
            with using(room if function == self.ours else "auto"):
                y = function(**given)
                found.append((y.detach(), torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]))
        (mine, ours), (theirs, eager) = found
        assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(ours != 0, eager != 0)

    def test_empty(self):
        x = torch.randn(0, 3, 4, 4, requires_grad=True)
        y = functional.bn_act_global_avg_pool2d(x, torch.zeros(3), torch.ones(3), training=True)
        y.sum().backward()
        assert y.shape == (0, 3, 1, 1) and x.grad.shape == x.shape

    def test_refusals(self):
        x, ones = torch.randn(2, 3, 7, 7), torch.ones(3)
        for kind, words, call in (
            (RuntimeError, "pixels", lambda: functional.bn_act_global_avg_pool2d(x[:, :, :0], ones, ones)),
            (RuntimeError, "(3, 7, 7)", lambda: functional.bn_act_global_avg_pool2d(x[0], ones, ones)),
            (RuntimeError, "(2,)", lambda: functional.bn_act_global_avg_pool2d(x, ones, ones, ones[:2])),
            (RuntimeError, "residual", lambda: functional.bn_act_global_avg_pool2d(x, ones, ones, residual=x[:1])),
            (ValueError, "eps", lambda: functional.bn_act_global_avg_pool2d(x, ones, ones, training=True, eps=0)),
        ):
            mine = outcome(call)
            assert isinstance(mine, kind), mine
            refused(mine, words)

    def test_it_is_bn_act_and_a_mean(self):
        """In float32 the parts round as the two operators apart do."""
        inputs = self.make(self.cases["end"], torch.float32)
        y = functional.bn_act(**{k: v.clone() if k.startswith("running") else v for k, v in inputs.items()})
        assert torch.equal(self.ours(**inputs), y.mean((2, 3), keepdim=True))
        check.compare(self.ours, self.plain, lambda: inputs)
