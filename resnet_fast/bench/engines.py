"""The engines: what a user may run a network by. Each is a function from a case and a model to a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.bench import cases
from resnet_fast.bench.cases import Case

Run = Callable[[], Any]

#: What each engine is, as the report's legend says it.
LEGEND = {
    "resnet_fast": "this package: freeze(model) for inference, convert(model) for training",
    "converted": "this package: convert(model) in evaluation mode, not frozen",
    "eager": "torch, channels_last (bfloat16: autocast)",
    "eager_nchw": "torch, contiguous (bfloat16: autocast)",
    "eager_bf16": "torch, channels_last, model and input in bfloat16",
    "compile": "torch.compile, channels_last; inference with inductor's freezing (bfloat16: model and input cast)",
    "compile_graphs": "torch.compile(mode='reduce-overhead'), CUDA graphs",
}
#: What ratios are taken to, and the engines that are this package.
BASE = "eager"
OWN = ("resnet_fast", "converted")


def defaults(case: Case) -> list[str]:
    """The engines of a case, this package's first."""
    names = ["resnet_fast", "eager", "eager_nchw"]
    if case.dtype == "bfloat16" and case.mode == "infer":
        names.append("eager_bf16")
    names.append("compile")
    if case.device == "cuda":
        names.append("compile_graphs")
    return names


def build(engine: str, case: Case, model: nn.Module, x: Tensor, target: Tensor) -> Run:
    """Make an engine's call: it returns the logits, or in training the loss.

    Args:
        engine: a key of `LEGEND`.
        case: mode, dtype and device.
        model: with the case's weights, on the CPU, in plain modules; the engine may change it.
        x, target: the batch, on the CPU.

    Raises:
        cases.BenchError: an engine that is unknown or does not do this.
    """
    if engine not in LEGEND:
        raise cases.BenchError(f"--engines: wanted some of {', '.join(LEGEND)}, got {engine!r}")
    layout = torch.contiguous_format if engine == "eager_nchw" else torch.channels_last
    model = model.to(case.device).to(memory_format=layout).train(case.mode == "train")
    x, target = x.to(case.device).contiguous(memory_format=layout), target.to(case.device)
    make = _infer if case.mode == "infer" else _train
    return make(engine, case, model, x, target)


def _infer(engine: str, case: Case, model: nn.Module, x: Tensor, target: Tensor) -> Run:
    dtype = getattr(torch, case.dtype)
    low = dtype != torch.float32
    if engine == "resnet_fast":
        import resnet_fast

        frozen = resnet_fast.freeze(model, example=x, dtype=dtype, exact=case.exact)
        del model
        return _without_gradients(lambda: frozen(x), torch.inference_mode)
    if engine in ("compile", "compile_graphs"):
        import torch._inductor.config as config

        config.freezing = True
        given = x.to(dtype)
        options = {"mode": "reduce-overhead"} if engine == "compile_graphs" else {}
        compiled = torch.compile(model.to(dtype), **options)
        return _without_gradients(lambda: compiled(given), torch.no_grad)
    if engine == "eager_bf16":
        model, given = model.bfloat16(), x.bfloat16()
        return _without_gradients(lambda: model(given), torch.inference_mode)
    if engine == "converted":
        import resnet_fast

        resnet_fast.convert(model)

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(case.device, dtype=torch.bfloat16, enabled=low):
            return model(x)

    return call


def _without_gradients(call: Run, context: Callable[[], Any]) -> Run:
    def run() -> Any:
        with context():
            return call()

    return run


def _train(engine: str, case: Case, model: nn.Module, x: Tensor, target: Tensor) -> Run:
    if engine == "eager_bf16":
        raise cases.BenchError("eager_bf16 is an engine for inference")
    if engine in OWN:
        import resnet_fast

        resnet_fast.convert(model)
    elif engine == "compile_graphs":
        model = torch.compile(model, mode="reduce-overhead")
    elif engine == "compile":
        model = torch.compile(model)
    dtype = getattr(torch, case.dtype)

    def call() -> Tensor:
        return cases.step(model, x, target, dtype)

    return call
