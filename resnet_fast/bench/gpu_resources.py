"""What the compiled Triton kernels use, without a GPU: `python -m resnet_fast.bench.gpu_resources` writes the table.

Every kernel, in every tile its chooser may pick for typical ResNet layers, is compiled ahead of time for several cards;
registers, spills, shared memory, matrix instructions, asynchronous copies and access widths are read from what comes
out. The rooms run on meta tensors while their launches are recorded, so real layer sizes cost nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.add_relu import triton as add_relu
from resnet_fast.ops.bn_act import triton as bn_act
from resnet_fast.ops.bn_act_global_avg_pool2d import triton as bn_act_global_avg_pool2d
from resnet_fast.ops.bn_act_max_pool2d import triton as bn_act_max_pool2d
from resnet_fast.ops.conv2d import triton as conv2d
from resnet_fast.ops.conv2d import triton_tiles
from resnet_fast.ops.conv_bn_act import triton as conv_bn_act
from resnet_fast.ops.max_pool2d import triton as max_pool2d
from resnet_fast.ops.recomputed_conv_bn_act import triton as recomputed_conv_bn_act
from resnet_fast.ops.scale_add_relu import triton as scale_add_relu

#: Compute capability -> shared memory one program may use, bytes.
SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def traffic(self) -> int:
        """Bytes of all tensors of the launch, each once: what must move if nothing is cached before or after."""
        return sum(t.numel() * t.element_size() for t in self.args.values() if isinstance(t, Tensor))

    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict]:
        """Types, constants and divisibility, as a launch on aligned tensors specialises them."""
        types, constants, attributes = {}, dict(self.constants), {}
        for i, name in enumerate(self.kernel.arg_names):
            value = self.args.get(name)
            if name in constants:
                types[name] = "constexpr"
            elif value is None or (isinstance(value, int) and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                types[name] = "*" + _TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return types, constants, attributes

    def key(self) -> str:
        """Equal for launches of one compiled kernel."""
        return f"{self.name} {self.signature()} {self.warps} {self.stages}"


def record(run: Callable[[], Any]) -> list[Launch]:
    """The launches a piece of code makes, none of which is executed."""
    launches: list[Launch] = []
    with rooms.executor(lambda *launch: launches.append(Launch(*launch))):
        run()
    return launches


def compile_for(launch: Launch, target: int | str) -> Any:
    """Compile a launch's kernel for a compute capability (80, 90, ...) or an AMD architecture ("gfx942")."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = launch.signature()
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    stages = min(launch.stages, 2) if isinstance(target, str) else launch.stages
    return triton.compile(source, target=gpu, options=dict(num_warps=launch.warps, num_stages=stages))


def _cuobjdump(*arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def resources(compiled: Any) -> dict[str, int]:
    """Registers, bytes of spills, shared memory; matrix instructions, asynchronous copies, accesses, shuffles in the code.

    Registers and spills are ptxas's; the instructions are counted in the PTX, each once however often a loop runs it.
    """
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        names = Counter(re.findall(r"^\s+([a-z]\w+)\s", text, re.M))
        found = {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1)),
            "shared": compiled.metadata.shared,
            "matrix": sum(n for k, n in names.items() if k.startswith("v_mfma")),
            "async_copies": 0,
            "loads": sum(n for k, n in names.items() if re.match(r"(global|buffer)_load", k)),
            "loads_128": sum(n for k, n in names.items() if re.match(r"(global|buffer)_load_dwordx4", k)),
            "stores": sum(n for k, n in names.items() if re.match(r"(global|buffer)_store", k)),
            "stores_128": sum(n for k, n in names.items() if re.match(r"(global|buffer)_store_dwordx4", k)),
            "shuffles": sum(n for k, n in names.items() if k.startswith(("ds_bpermute", "ds_permute", "ds_swizzle"))),
        }
        return found
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", file)
    text = compiled.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    copies, copies_128 = count(r"cp\.async\.c[ag]\.shared"), count(r"cp\.async\.c[ag]\.shared[^;]*, (?:0x10|16)\b")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "matrix": count(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma\."),
        "async_copies": copies,
        "loads": count(r"ld\.global\.") + copies,
        "loads_128": count(r"ld\.global\.(?:\w+[.:]+)*(?:v4\.\w32|v2\.\w64)") + copies_128,
        "stores": count(r"st\.global\."),
        "stores_128": count(r"st\.global\.(?:\w+[.:]+)*(?:v4\.\w32|v2\.\w64)"),
        "shuffles": count(r"shfl\.sync"),
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t


#: Layers of ResNets: label, batch, C, H, K, filter, stride, padding.
LAYERS = (
    ("3x3 64@56", 32, 64, 56, 64, 3, 1, 1),
    ("3x3 256@14", 32, 256, 14, 256, 3, 1, 1),
    ("3x3/2 128@56", 32, 128, 56, 128, 3, 2, 1),
    ("1x1 64-256@56", 32, 64, 56, 256, 1, 1, 0),
    ("1x1/2 256-512@56", 32, 256, 56, 512, 1, 2, 0),
    ("7x7/2 3-64@224", 32, 3, 224, 64, 7, 2, 3),
)


def convolution_launches(layer: tuple, dtype: torch.dtype) -> list[Launch]:
    """Every candidate tile of a layer: the forward in evaluation with residual, in training with statistics and prologue,
    data gradient and weight gradient, both also with the norm before the layer (its statistics the batch's, and known);
    of a stem with its pool in one kernel, without prologue and data gradient."""
    _, n, c, h, k, r, stride, padding = layer
    x, weight, vector = _meta(n, c, h, h, dtype=dtype), _meta(k, c, r, r, dtype=dtype), _meta(k)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    p = (h + 2 * padding - r) // stride + 1
    y = _meta(n, k, p, p, dtype=dtype)

    def run() -> None:
        with triton_tiles.every_candidate():
            conv_bn_act.fwd(x, weight, None, vector, vector, vector, vector, y, 1e-5, True, *geometry)
            conv2d.forward_statistics(x, weight, None, *geometry)
            if c > 3:
                norm = _meta(c)
                before = conv2d.prologue(norm, norm, norm, norm, 1e-5)
                conv2d.forward_statistics(x, weight, None, *geometry, before)
                conv2d.weight_gradient(y, x, weight, *geometry, before)
                for known in (False, True):
                    conv2d.data_gradient(y, x, conv2d.krsc(weight), *geometry, before, known, True)
            elif dtype != torch.float32:
                norm, pool = (vector, vector, vector, vector), [3, 3, 2, 2, 1, 1, 1, 1, (p + 1) // 2, (p + 1) // 2]
                none = (None,) * 4
                recomputed_conv_bn_act.fwd(x, *none, weight, None, *norm, None, False, 1.0, 1e-5, True, *geometry, pool)
            conv2d.bwd(y, x, weight, False, *geometry, [c > 3, True, False])

    return record(run)


def elementwise_launches(c: int, h: int, dtype: torch.dtype) -> list[Launch]:
    """The kernels of the element-wise operators, norms and pools, forward and backward, for one activation."""
    x, vector = _meta(32, c, h, h, dtype=dtype), _meta(c)

    def run() -> None:
        add_relu.fwd(x, x)
        add_relu.bwd(x, x)
        bn_act.fwd(x, vector, vector, None, None, x, True, 1e-5, True)
        bn_act.fwd(x, vector, vector, None, None, None, True, 1e-5, True)
        for y, wants in ((x, [True] * 4), (None, [True, True, True, False])):
            bn_act.bwd(x, x, y, vector, vector, vector, vector, True, 1e-5, True, wants)
        window = ([3, 3], [2, 2], [1, 1], [1, 1])
        y, argmax = max_pool2d.fwd(x, *window, [(h + 1) // 2] * 2, True)
        max_pool2d.bwd(y, argmax, h, h, *window)
        norm = (vector, vector, vector, vector)
        bn_act_max_pool2d.fwd(x, *norm, 1e-5, *window, [(h + 1) // 2] * 2, True)
        bn_act_max_pool2d.bwd(y, argmax, x, *norm, True, 1e-5, *window, [True] * 3)
        few = _meta(32, c, 1, 1, dtype=dtype)
        for residual in (x, None):
            bn_act_global_avg_pool2d.fwd(x, *norm, residual, 1e-5)
            wants = [True, True, True, residual is not None]
            bn_act_global_avg_pool2d.bwd(few, x, *norm, residual, True, 1e-5, wants)
        scale_add_relu.fwd(x, few, x)
        scale_add_relu.bwd(x, x, few, x, [True] * 3)

    return record(run)


def all_launches(target: int | str) -> Iterator[tuple[str, str, Launch]]:
    """(problem, dtype, launch) of the whole table for a target, each compiled kernel once."""
    seen = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        maps = ((64, 56),) if dtype == torch.float32 else ((64, 56), (2048, 7))
        cases = [(f"{c}@{h}", elementwise_launches(c, h, dtype)) for c, h in maps]
        layers = (LAYERS[0], LAYERS[3], LAYERS[-1]) if dtype == torch.float32 else LAYERS
        with triton_tiles.architecture(0 if isinstance(target, str) else target):
            cases += [(layer[0], convolution_launches(layer, dtype)) for layer in layers]
        for problem, launches in cases:
            for launch in launches:
                if launch.key() not in seen:
                    seen.add(launch.key())
                    yield problem, _TYPES[dtype], launch


def tile_of(launch: Launch) -> str:
    """The tile of a launch, and a convolution's form, in a few words."""
    blocks = [str(v) for k, v in launch.constants.items() if k.startswith("BLOCK")]
    split = launch.constants.get("SPLIT", 1)
    form = ""
    if launch.args.get("z_ptr") is not None:
        form = " known norm's backward" if launch.constants["FIXED"] else " norm's backward"
    elif launch.name in ("gather_gemm", "conv_weight_gradient"):
        forms = (("pre_scale_ptr", " prologue"), ("part_ptr", " statistics"))
        form = "".join(word for name, word in forms if launch.args.get(name) is not None)
    return "x".join(blocks) + (f" split {split}" if split > 1 else "") + form


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/triton_resources.csv")
    parser.add_argument("--targets", nargs="*", default=["80", "86", "90", "100", "gfx942"])
    parser.add_argument("--only", default="", help="problems whose name contains this")
    options = parser.parse_args()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    faults = 0
    with open(options.out, "w", newline="") as file:
        table = None
        for name in options.targets:
            target = int(name) if name.isdigit() else name
            for problem, dtype, launch in all_launches(target):
                if options.only not in problem:
                    continue
                found = resources(compile_for(launch, target))
                row = dict(kernel=launch.name, problem=problem, dtype=dtype, target=name, tile=tile_of(launch))
                row |= dict(warps=launch.warps, stages=launch.stages) | found
                if table is None:
                    table = csv.DictWriter(file, row)
                    table.writeheader()
                table.writerow(row)
                file.flush()
                if found["spills"]:
                    faults += 1
                    print(f"spills: {row}", flush=True)
    print(f"{options.out} written; {faults} kernels spill")


if __name__ == "__main__":
    main()
