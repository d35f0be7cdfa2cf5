"""freeze: the same outputs, for inference only."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import _choices, _native, backends
from tests.model_law import realistic, same_evaluation

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

#: a frozen float32 network may use Winograd convolutions, whose rms error is at most three times eager's
WINOGRAD = 3.0
compiled = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


@pytest.fixture
def model():
    return realistic(torchvision.models.resnet18(num_classes=10)).eval()


@compiled
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "wide_resnet50_2",
    ],
)
def test_torchvision_in_one_call(name):
    model = realistic(getattr(torchvision.models, name)()).eval()
    frozen = resnet_fast.freeze(model)
    assert frozen.reason is None
    same_evaluation(model, frozen, torch.randn(2, 3, 96, 96), factor=WINOGRAD)


@compiled
@pytest.mark.parametrize("name", ["resnet26d", "resnet50d", "seresnet50", "seresnext50_32x4d"])
def test_timm_in_one_call(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = realistic(timm.create_model(name)).eval()
    frozen = resnet_fast.freeze(model)
    assert frozen.reason is None
    same_evaluation(model, frozen, torch.randn(2, 3, 96, 96), factor=WINOGRAD)


@compiled
def test_own_models_and_converted_models(model):
    x = torch.randn(2, 3, 64, 64)
    own = realistic(resnet_fast.models.resnet18(num_classes=10)).eval()
    frozen = resnet_fast.freeze(own)
    assert frozen.reason is None
    same_evaluation(own, frozen, x, factor=WINOGRAD)
    converted = resnet_fast.convert(model)
    assert resnet_fast.freeze(converted).reason is None
    assert resnet_fast.explain(converted).fused == 21  # freezing left it converted


@pytest.mark.parametrize(
    ("isa", "flags", "dtype", "outpaced"),
    [
        ("avx512_bf16", {"avx512f", "avx512_bf16"}, torch.bfloat16, False),
        ("avx512_bf16", {"avx512f", "avx512_bf16", "amx_bf16"}, torch.bfloat16, True),
        ("avx512_bf16", {"avx512f", "avx512_bf16", "amx_bf16"}, torch.float32, False),
        ("avx512", {"avx512f"}, torch.bfloat16, False),
        ("avx512", {"avx512f", "avx512_bf16"}, torch.bfloat16, True),
        ("avx2", {"avx2"}, torch.float32, False),
        ("avx2", {"avx2", "avx512f"}, torch.float32, True),
        ("default", {"asimd"}, torch.float32, True),
    ],
)
def test_where_a_library_may_be_ahead(monkeypatch, isa, flags, dtype, outpaced):
    """It has instructions that the kernels in use have not."""
    monkeypatch.setattr(_native, "isa", lambda: isa)
    monkeypatch.setattr(_native, "_processor", lambda: flags)
    assert _native.outpaced(dtype) is outpaced


@compiled
@pytest.mark.parametrize("faster", ["network", "library"])
def test_the_faster_way_is_measured_and_kept(model, monkeypatch, cache, faster):
    """Where a library may be ahead both ways are measured, once a shape, and either is right."""
    measured = []

    def fastest(names, call, args):
        measured.append(tuple(args[0].shape))
        assert set(names) == {"network", "library"} and all(call(name).shape == (2, 10) for name in names)
        return faster

    monkeypatch.setattr(_native, "outpaced", lambda dtype: True)
    monkeypatch.setattr(_choices, "measuring", lambda: True)
    monkeypatch.setattr(backends, "fastest", fastest)
    frozen, x = resnet_fast.freeze(model), torch.randn(2, 3, 64, 64)
    for _ in range(2):
        same_evaluation(model, frozen, x, factor=WINOGRAD)
    assert measured == [(2, 3, 64, 64)]
    assert ("measured faster" in str(frozen.explain(x))) == (faster == "library")
    again = resnet_fast.freeze(model)
    again(x)
    assert len(measured) == 1  # the choice is the network's, not this object's
    monkeypatch.setattr(_choices, "measuring", lambda: False)
    assert again(torch.randn(2, 3, 32, 32)).shape == (2, 10) and len(measured) == 1


def test_exact_obeys_the_general_law(model):
    same_evaluation(model, resnet_fast.freeze(model, exact=True), torch.randn(2, 3, 96, 96))


def test_bfloat16(model):
    frozen = resnet_fast.freeze(model, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).bfloat16()(x.bfloat16()).double()
        out = frozen(x)
        assert out.dtype == torch.float32 and frozen(x.bfloat16()).dtype == torch.bfloat16
    assert (out.double() - truth).norm() <= 2 * (eager - truth).norm() + torch.finfo(torch.bfloat16).eps * truth.norm()


def test_float64_runs_operator_by_operator(model):
    frozen, x = resnet_fast.freeze(model.double()), torch.randn(2, 3, 64, 64).double()
    assert "float64" in frozen.reason
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))


def test_the_model_stays_as_it_was(model):
    model.train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    frozen = resnet_fast.freeze(model, torch.randn(1, 3, 64, 64))
    assert model.training and [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    x = torch.randn(2, 3, 64, 64)
    kept = frozen(x)
    with torch.no_grad():
        model.fc.weight.zero_()  # freezing copied: the model may go on training
    assert torch.equal(frozen(x), kept)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 64, 96), (5, 95, 33), (2, 224, 224)])
def test_any_batch_and_size(model, shape):
    n, h, w = shape
    frozen = resnet_fast.freeze(model, example=torch.randn(2, 3, 64, 64))
    same_evaluation(model, frozen, torch.randn(n, 3, h, w), factor=WINOGRAD)


def test_layouts_give_the_same_bits(model):
    frozen, x = resnet_fast.freeze(model), torch.randn(3, 3, 64, 80)
    want = frozen(x)
    assert torch.equal(frozen(x.to(memory_format=torch.channels_last)), want)
    assert torch.equal(frozen(x.transpose(2, 3).contiguous().transpose(2, 3)), want)
    wide = torch.randn(3, 3, 64, 160)
    wide[..., ::2] = x
    assert torch.equal(frozen(wide[..., ::2]), want)


def test_feature_maps_come_out_channels_last(model):
    body = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1).eval()
    x = torch.randn(2, 3, 64, 64)
    out = resnet_fast.freeze(body)(x)
    assert out.shape == (2, 64, 16, 16) and out.is_contiguous(memory_format=torch.channels_last)
    same_evaluation(body, resnet_fast.freeze(body), x, factor=WINOGRAD)


def test_refuses_training(model):
    frozen = resnet_fast.freeze(model)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        frozen.train()
    assert frozen.eval() is frozen and not frozen.training
    with pytest.raises(RuntimeError, match="inference only"):
        frozen(torch.randn(1, 3, 64, 64, requires_grad=True))
    with pytest.raises(RuntimeError, match="freeze the model again"):
        frozen.to(torch.float64)
    assert not list(frozen.parameters()) and not frozen.state_dict()


def test_bad_input(model):
    frozen = resnet_fast.freeze(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        resnet_fast.freeze(torch.randn(3))
    with pytest.raises(ValueError, match="floating"):
        resnet_fast.freeze(model, dtype=torch.int8)
    for bad in (torch.randn(3, 64, 64), torch.randn(1, 4, 64, 64), torch.randn(1, 3, 0, 64)):
        with pytest.raises((ValueError, RuntimeError)):
            frozen(bad)


def test_empty_batch(model):
    assert resnet_fast.freeze(model)(torch.randn(0, 3, 64, 64)).shape == (0, 10)


@compiled
def test_bits_do_not_depend_on_threads(model):
    frozen, x, before = resnet_fast.freeze(model), torch.randn(3, 3, 64, 64), torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(frozen(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


def test_several_threads_call_at_once(model):
    frozen = resnet_fast.freeze(model)
    inputs = [torch.randn(n, 3, 64, 64) for n in (1, 2, 1, 3)]
    want = [frozen(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            if not torch.equal(frozen(inputs[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_what_is_not_understood_still_runs():
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.rest = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.SiLU())

        def forward(self, x):
            return self.rest(self.body(x)).softmax(1)

    class Branch(Swish):
        def forward(self, x):
            return super().forward(x) if x.mean() > -100 else x

    for kind, word in ((Swish, "operator by operator"), (Branch, "module by module")):
        model, x = realistic(kind()).eval(), torch.randn(2, 3, 16, 16)
        frozen = resnet_fast.freeze(model)
        assert word in frozen.reason and word in str(resnet_fast.explain(frozen))
        same_evaluation(model, frozen, x)


def test_in_place_aliasing_is_not_mistaken():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.conv(x)
            z = self.relu(y)  # y changes with it
            return self.bn(z) + y

    model, x = realistic(Alias()).eval(), torch.randn(2, 3, 8, 8)
    same_evaluation(model, resnet_fast.freeze(model), x)
    same_evaluation(model, resnet_fast.convert(copy.deepcopy(model)), x)


def test_explain_shows_the_plan(model):
    frozen = resnet_fast.freeze(model)
    text = str(resnet_fast.explain(frozen, torch.randn(1, 3, 64, 64)))
    assert "layer4.1.conv2" in text and "MiB" in text
    assert "dtype=torch.float32" in repr(frozen)


def test_a_trained_model_keeps_its_predictions():
    """Digits (1,797 real 8x8 images): a small ResNet trained here predicts the same, frozen or not."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].div_(16).expand(-1, 3, -1, -1)
    target = torch.tensor(digits.target)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    block = resnet_fast.nn.BasicBlock(16, 16)
    model = nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        picked = torch.randint(0, 1500, (64,))
        loss = nn.functional.cross_entropy(model(images[picked]), target[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    held, truth = images[1500:].contiguous(), target[1500:]
    with torch.no_grad():
        logits = model(held)
    assert (logits.argmax(1) == truth).float().mean() > 0.7, "the test wants a model that has learnt something"
    for frozen in (resnet_fast.freeze(model), resnet_fast.freeze(model, dtype=torch.bfloat16)):
        out = frozen(held)
        margin = logits.topk(2, 1).values
        sure = margin[:, 0] - margin[:, 1] > 0.1
        assert sure.float().mean() > 0.8
        assert torch.equal(out.argmax(1)[sure], logits.argmax(1)[sure])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("act", ["relu", None])
def test_folded_convolutions_keep_nan(dtype, act):
    """oneDNN's own ReLU turns NaN into 0; a frozen model run operator by operator must not."""
    from resnet_fast._plan import FoldedConv

    conv, bn = nn.Conv2d(8, 16, 3, padding=1), realistic(nn.BatchNorm2d(16)).eval()
    folded = FoldedConv(conv, bn, act, dtype)
    x, residual = torch.randn(2, 8, 6, 6).to(dtype), torch.randn(2, 16, 6, 6).to(dtype)
    x[0, 3, 2, 2], residual[1, 5, 4, 4] = float("nan"), float("nan")
    for rest in (None, residual):
        with torch.no_grad():
            want = bn(conv(x.float()))
            want = want if rest is None else want + rest.float()
            want = torch.relu(want) if act else want
            got = folded(x, None if rest is None else rest.clone())
        assert want.isnan().any() and torch.equal(got.isnan(), want.isnan())
