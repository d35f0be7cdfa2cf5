"""From a traced model to the one-call network of the compiled module."""

from __future__ import annotations

import hashlib
import json
import operator
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import _choices, _native
from resnet_fast._plan import fold
from resnet_fast.convert import Report, Row
from resnet_fast.nn.program import AddReLU, Call, ConvBNAct, MaxPool, Program, Ref, resolve
from resnet_fast.ops import common

F = torch.nn.functional


class Unsupported(Exception):
    """The network has something the compiled module does not run; the message says what."""


def lower(root: nn.Module, program: Program, dtype: torch.dtype, device: torch.device, exact: bool) -> Network:
    """Build the one-call network of a traced model.

    Raises:
        Unsupported: it has something the compiled module does not run; the message says what.
    """
    if device.type != "cpu":
        raise Unsupported(f"the compiled network runs on CPUs, the model is on {device}")
    if dtype not in _native.DTYPES:
        raise Unsupported(f"the compiled network takes float32 and bfloat16, not {dtype}")
    if _native.why_not():
        raise Unsupported(str(_native.why_not()))
    lowering = _Lowering(root, program, dtype)
    return Network(lowering, dtype, exact)


class _Lowering:
    """One pass over a program's steps. A value is an id of the network; `flat` ones have lost their 1x1 map."""

    def __init__(self, root: nn.Module, program: Program, dtype: torch.dtype) -> None:
        self.root = root
        self.net = _native.module().Network(_native.DTYPES[dtype])
        self.channels = self.input_channels(program)
        self.values: dict[Ref, int] = {Ref(0): self.net.input(self.channels)}
        self.flats: set[int] = set()
        self.pooled: set[int] = set()
        self.names: dict[int, str] = {}
        self.signature: list[str] = [str(dtype)]
        self.reads = Counter(ref for step in program.steps for ref in step.reads())
        for step in program.steps:
            self.step = step
            if isinstance(step, ConvBNAct):
                value = self.conv_bn_act(step)
            elif isinstance(step, AddReLU):
                value = self.net.add(self.values[step.x], self.values[step.residual], True)
            elif isinstance(step, MaxPool):
                value = self.max_pool(self.values[step.x], resolve(root, step.pool))
            else:
                value = self.call(step)
            self.values[step.out] = value
        if not isinstance(program.output, Ref):
            raise Unsupported("it returns something else than one tensor")
        self.net.output(self.values[program.output])
        self.flat = self.values[program.output] in self.flats

    def fingerprint(self) -> str:
        """What measured choices depend on: the graph, not the weights."""
        return hashlib.sha256("\n".join(self.signature).encode()).hexdigest()[:16]

    def input_channels(self, program: Program) -> int:
        for step in program.steps:
            if isinstance(step, ConvBNAct) and step.x == 0 and step.conv:
                return resolve(self.root, step.conv).in_channels
            if isinstance(step, Call) and step.kind == "call_module" and Ref(0) in step.reads():
                module = resolve(self.root, step.target)
                if isinstance(module, nn.Conv2d):
                    return module.in_channels
        raise Unsupported("its input does not go into a convolution")

    # convolutions and norms

    def conv_bn_act(self, step: ConvBNAct) -> int:
        bn = resolve(self.root, step.bn)
        conv = resolve(self.root, step.conv) if step.conv else None
        residual = -1 if step.residual is None else self.values[step.residual]
        if bn.running_mean is None:
            raise Unsupported(f"{'.'.join(step.bn)} has no running statistics")
        if conv is None:
            return self.norm(self.values[step.x], bn, residual, step.act == "relu", ".".join(step.bn))
        weight, bias = fold(conv, bn)
        return self.conv(self.values[step.x], conv, weight, bias, residual, step.act == "relu", ".".join(step.conv))

    def norm(self, x: int, bn: nn.BatchNorm2d, residual: int, relu: bool, name: str) -> int:
        """A norm on its own: a convolution of one 1x1 filter per channel."""
        scale, shift = common.scale_shift(
            None,
            *(None if t is None else t.double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)),
            bn.eps,
        )
        conv = nn.Conv2d(bn.num_features, bn.num_features, 1, groups=bn.num_features, bias=False)
        return self.conv(x, conv, scale.view(-1, 1, 1, 1), shift, residual, relu, name)

    def conv(
        self, x: int, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, residual: int, relu: bool, name: str
    ) -> int:
        padding = conv.padding
        if isinstance(padding, str):
            raise Unsupported(f'{name}: padding "{padding}"')
        if conv.padding_mode != "zeros":
            raise Unsupported(f"{name}: padding_mode {conv.padding_mode!r}")
        k, _, r, s = weight.shape
        weight = weight.detach().float().contiguous()
        shift = None if bias is None else bias.detach().float().contiguous()
        place = dict(K=k, R=r, S=s, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups)
        value = self.net.conv(
            x, **place, weight_ptr=weight.data_ptr(), shift_ptr=_address(shift), residual=residual, relu=relu
        )
        return self.named(value, name, place)

    def named(self, value: int, name: str, what: Any) -> int:
        self.names[value] = name
        self.signature.append(f"{value} {what}")
        return value

    # everything else

    def max_pool(self, x: int, pool: nn.MaxPool2d) -> int:
        if common.pair("dilation", pool.dilation) != (1, 1):
            raise Unsupported("a dilated max pool")
        kernel = common.pair("kernel_size", pool.kernel_size)
        stride = common.pair("stride", pool.stride)
        return self.net.max_pool(x, kernel, stride, common.pair("padding", pool.padding), pool.ceil_mode)

    def call(self, step: Call) -> int:
        if step.kind == "call_module":
            module = resolve(self.root, step.target)
            handler = _MODULES.get(type(module))
            if handler is None:
                raise Unsupported(f"{'.'.join(step.target)} is a {type(module).__name__}")
            if len(step.args) != 1 or step.kwargs or not isinstance(step.args[0], Ref):
                raise Unsupported(f"{'.'.join(step.target)} is called with more than one tensor")
            if getattr(module, "inplace", False):
                self.only_reader(step.args[0])
            return handler(self, self.values[step.args[0]], module, ".".join(step.target))
        handler = _FUNCTIONS.get(step.target) if step.kind in ("call_function", "call_method") else None
        if handler is None:
            raise Unsupported(f"its forward calls {getattr(step.target, '__name__', step.target)}")
        return handler(self, *step.args, **step.kwargs)

    def only_reader(self, value: Ref) -> None:
        """An in-place operation changes what other readers see; here every value is made once."""
        if self.reads[value] > 1:
            raise Unsupported("it changes in place a value that is read elsewhere")

    def value(self, argument: Any) -> int:
        if not isinstance(argument, Ref):
            raise Unsupported(f"its forward computes with the constant {argument!r}")
        return self.values[argument]

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> int:
        value = self.value(x)
        if start_dim != 1 or end_dim not in (-1, 3) or value not in self.pooled | self.flats:
            raise Unsupported("it flattens something else than a globally pooled map")
        self.flats.add(value)
        return value

    def global_avg_pool(self, x: int) -> int:
        value = self.net.global_avg_pool(x)
        self.pooled.add(value)
        return value

    def adaptive(self, x: int, size: Any) -> int:
        if size not in (1, (1, 1), [1, 1]):
            raise Unsupported(f"adaptive average pooling to {size}")
        return self.global_avg_pool(x)

    def mean(self, x: Any, dim: Any = None, keepdim: bool = False) -> int:
        if sorted(d % 4 for d in (dim if isinstance(dim, tuple | list) else [dim or 0])) != [2, 3]:
            raise Unsupported(f"a mean over {dim}")
        value = self.global_avg_pool(self.value(x))
        if not keepdim:
            self.flats.add(value)
        return value

    def linear(self, x: int, module: nn.Linear, name: str) -> int:
        if x not in self.flats:
            raise Unsupported(f"{name} is applied to a map")
        weight = module.weight.detach().float().contiguous()
        bias = None if module.bias is None else module.bias.detach().float().contiguous()
        value = self.net.linear(x, module.out_features, weight.data_ptr(), _address(bias), False)
        self.flats.add(value)
        return self.named(value, name, module.out_features)

    def plain_conv(self, x: int, conv: nn.Conv2d, name: str) -> int:
        value = self.conv(x, conv, conv.weight.double(), conv.bias, -1, False, name)
        if x in self.pooled and conv.kernel_size == (1, 1):
            self.pooled.add(value)
        return value

    def unary(self, kind: str, x: Any, inplace: bool = False) -> int:
        if inplace:
            self.only_reader(x)
        return self.pointwise(kind, self.value(x))

    def pointwise(self, kind: str, x: int) -> int:
        value = getattr(self.net, kind)(x)
        for places in (self.pooled, self.flats):
            if x in places:
                places.add(value)
        return value

    def add(self, a: Any, b: Any, inplace: bool = False) -> int:
        if inplace:
            self.only_reader(a)
        return self.net.add(self.value(a), self.value(b), False)

    def mul(self, a: Any, b: Any, inplace: bool = False) -> int:
        if inplace:
            self.only_reader(a)
        x, gate = self.value(a), self.value(b)
        if x in self.pooled:
            x, gate = gate, x
        if gate not in self.pooled or gate in self.flats or x in self.pooled:
            raise Unsupported("a product of two maps")
        return self.net.scale(x, gate)

    def dropout(self, x: Any, *args: Any, training: bool = True, **kwargs: Any) -> int:
        if training:
            raise Unsupported("dropout in evaluation mode")
        return self.value(x)

    def avg_pool(self, x: int, pool: nn.AvgPool2d) -> int:
        if pool.divisor_override is not None:
            raise Unsupported("average pooling with a divisor of its own")
        kernel, padding = common.pair("kernel_size", pool.kernel_size), common.pair("padding", pool.padding)
        stride = common.pair("stride", pool.stride)
        return self.net.avg_pool(x, kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _nothing(lowering: _Lowering, x: int, module: nn.Module, name: str) -> int:
    return x


_MODULES: dict[type[nn.Module], Callable[..., int]] = {
    nn.Conv2d: lambda t, x, m, name: t.plain_conv(x, m, name),
    nn.BatchNorm2d: lambda t, x, m, name: t.norm(x, m, -1, False, name),
    nn.ReLU: lambda t, x, m, name: t.pointwise("relu", x),
    nn.Sigmoid: lambda t, x, m, name: t.pointwise("sigmoid", x),
    nn.AdaptiveAvgPool2d: lambda t, x, m, name: t.adaptive(x, m.output_size),
    nn.AvgPool2d: lambda t, x, m, name: t.avg_pool(x, m),
    nn.MaxPool2d: lambda t, x, m, name: t.max_pool(x, m),
    nn.Flatten: lambda t, x, m, name: t.flatten(t.step.args[0], m.start_dim, m.end_dim),
    nn.Linear: lambda t, x, m, name: t.linear(x, m, name),
    nn.Identity: _nothing,
    nn.Dropout: _nothing,
    nn.Dropout2d: _nothing,
}
_FUNCTIONS: dict[Any, Callable[..., int]] = {
    torch.flatten: lambda t, *a, **k: t.flatten(*a, **k),
    "flatten": lambda t, *a, **k: t.flatten(*a, **k),
    torch.mean: lambda t, *a, **k: t.mean(*a, **k),
    "mean": lambda t, *a, **k: t.mean(*a, **k),
    F.adaptive_avg_pool2d: lambda t, x, size: t.adaptive(t.value(x), size),
    F.dropout: lambda t, x, *a, **k: t.dropout(x, *a, **k),
    torch.relu: lambda t, x: t.unary("relu", x),
    F.relu: lambda t, x, inplace=False: t.unary("relu", x, inplace),
    "relu": lambda t, x: t.unary("relu", x),
    "relu_": lambda t, x: t.unary("relu", x, True),
    torch.sigmoid: lambda t, x: t.unary("sigmoid", x),
    "sigmoid": lambda t, x: t.unary("sigmoid", x),
    "sigmoid_": lambda t, x: t.unary("sigmoid", x, True),
    operator.add: lambda t, a, b: t.add(a, b),
    torch.add: lambda t, a, b: t.add(a, b),
    operator.iadd: lambda t, a, b: t.add(a, b, True),
    operator.mul: lambda t, a, b: t.mul(a, b),
    torch.mul: lambda t, a, b: t.mul(a, b),
    operator.imul: lambda t, a, b: t.mul(a, b, True),
}


class Network:
    """A compiled network and its plans, one per shape and thread count, made at first sight."""

    def __init__(self, lowering: _Lowering, dtype: torch.dtype, exact: bool) -> None:
        self.net, self.flat, self.names = lowering.net, lowering.flat, lowering.names
        self.channels, self.fingerprint = lowering.channels, lowering.fingerprint()
        self.dtype, self.exact = dtype, exact
        self._plans: dict[tuple[int, int, int, int], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Run the plan of x's shape."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"this network wants an input of shape (N, {self.channels}, H, W), got {tuple(x.shape)}")
        if x.shape[0] == 0:
            return self(x.new_zeros(1, *x.shape[1:]))[:0]
        if x.dtype not in _native.DTYPES:
            x = x.to(self.dtype)
        last = x.is_contiguous(memory_format=torch.channels_last)
        if not last and not x.is_contiguous():
            x, last = x.contiguous(memory_format=torch.channels_last), True
        plan = self.plan(x)
        n, k, p, q = plan.out_shape
        y = torch.empty((n, p, q, k), dtype=self.dtype)
        plan.run(x.data_ptr(), 1 if last else 0, y.data_ptr(), _native.DTYPES[x.dtype])
        return y.view(n, k) if self.flat else y.permute(0, 3, 1, 2)

    def plan(self, x: Tensor, tune: bool = False) -> Any:
        """The plan for an input like x; with `tune` its kernels are measured, unless they were before."""
        n, c, h, w = x.shape
        threads = torch.get_num_threads()
        key = (n, h, w, threads)
        plan = self._plans.get(key)
        if plan is not None and not tune:
            return plan
        with self._lock:
            name = f"network|{self.fingerprint}|{c}|{key}|{'exact' if self.exact else ''}"
            known = _choices.get(name)
            measure = 1 if tune and known is None and _choices.measuring() else 0
            given = {int(k): v for k, v in json.loads(known).items()} if known else {}
            try:
                plan = self.net.plan(n, h, w, threads, self.exact, measure, given)
            except ValueError:
                if not given:
                    raise
                plan = self.net.plan(
                    n, h, w, threads, self.exact, measure, {}
                )  # kept by another version of the kernels
            if measure:
                _choices.put(name, json.dumps(plan.choices()))
            self._plans[key] = plan
        return plan

    def explain(self, x: Tensor | None) -> Report:
        """A row per step of x's plan, or of the plans made so far."""
        if x is not None:
            self(x)
        rows = [Row("", "Frozen", len(self.names), self._memory())]
        plan = self.plan(x) if x is not None else next(iter(self._plans.values()), None)
        for step in plan.describe() if plan is not None else []:
            rows.append(Row(self.names.get(step["value"], step["op"]), step["op"], 1, describe(step)))
        return Report(rows)

    def _memory(self) -> str:
        plans = ", ".join(
            f"{n}x{h}x{w} on {t} threads: arena {plan.arena_bytes / 2**20:.1f} MiB"
            for (n, h, w, t), plan in self._plans.items()
        )
        return f"one call; packed weights {self.net.packed_bytes / 2**20:.1f} MiB; {plans or 'no plan yet'}"


def describe(step: dict[str, Any]) -> str:
    """One step of a plan in words."""
    words = ["x".join(map(str, step["shape"]))]
    if step.get("algorithm"):
        words.append(f"{step['algorithm']} (blocks {step['block_rows']} x {step['block_cols']})")
    if step["images"] not in (0, step["shape"][0]):
        words.append(f"{step['images']} image(s) at a time")
    if step["fused"]:
        words.append("inside the next step")
    if step["ms"] is not None:
        words.append(f"{step['ms']:.3f} ms")
    return ", ".join(words)
