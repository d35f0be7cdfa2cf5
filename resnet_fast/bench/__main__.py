"""Side-by-side speed of this package, eager torch and torch.compile, with every result checked against float64.

python -m resnet_fast.bench infer --model resnet18,resnet50 --batch 1,16
python -m resnet_fast.bench train --model resnet50 --batch 8 --dtype bfloat16
python -m resnet_fast.bench op conv_bn_act --model resnet50 --batch 16
python -m resnet_fast.bench roofline
python -m resnet_fast.bench suite          what `make bench` runs: inference and training, one table, one picture
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from resnet_fast.bench import engines, layers, operators, report, roofline, timer, worker
from resnet_fast.bench.cases import BenchError, Case

DTYPES = ("float32", "bfloat16")


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"wanted positive numbers, got {text}")
    return values


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _dtypes(text: str) -> list[str]:
    for name in _names(text):
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"wanted some of {', '.join(DTYPES)}, got {name}")
    return _names(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m resnet_fast.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, models: str, batch: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument(
            "--model", type=_names, default=_names(models), help=f"torchvision names or timm/NAME [{models}]"
        )
        p.add_argument("--batch", type=_numbers, default=_numbers(batch), help=f"[{batch}]")
        p.add_argument("--size", type=int, default=224, help="image size [224]")
        p.add_argument("--dtype", type=_dtypes, default=["float32"], help="float32, bfloat16 or both [float32]")
        p.add_argument(
            "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one"
        )
        p.add_argument(
            "--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all of this machine's cores]"
        )
        p.add_argument(
            "--seconds", type=float, default=0.7, help="an engine's turn in a round, one call at least [0.7; suite 0.5]"
        )
        p.add_argument("--rounds", type=int, default=7, help="interleaved rounds [7; suite 5]")
        p.add_argument("--csv", type=Path, metavar="FILE")
        p.add_argument("--json", type=Path, metavar="FILE")
        return p

    for name, text, models, batch in (
        ("infer", "inference: frozen against eager and torch.compile with freezing", "resnet50", "1,16"),
        ("train", "training steps: converted against eager and torch.compile", "resnet50", "8"),
        ("suite", "inference and training of several networks, files written", "resnet18,resnet50", "1,16"),
    ):
        p = add(name, text, models, batch)
        p.add_argument("--engines", type=_names, help=", ".join(engines.LEGEND))
        p.add_argument("--data", choices=["photos", "random"], default="photos", help="photographs, or noise [photos]")
        p.add_argument(
            "--minutes", type=float, help="leave rounds out (not below 3) to end in about this time [suite 4.5]"
        )
        p.add_argument(
            "--at-most", type=float, metavar="MINUTES", help="engines not ready by then are left out [no limit]"
        )
        p.add_argument(
            "--exact",
            action="store_true",
            help="no Winograd or Strassen convolutions; the law is then twice eager's error",
        )
        p.add_argument("--plot", type=Path, metavar="FILE", help="PNG, SVG or PDF")
        if name == "suite":
            p.add_argument("--train-batch", type=_numbers, default=[16, 8], help="one, or one per model [16,8]")
            # Under 8 minutes with making the environment, on two cores.
            p.set_defaults(rounds=5, seconds=0.5, minutes=4.5)
            p.add_argument("--output", type=Path, help="folder of the files [benchmarks/results, else here]")
    p = add("op", "one operator over every layer shape of a network, per backend", "resnet50", "1")
    p.add_argument(
        "operator",
        choices=[*operators.OPERATORS, "network"],
        help="network: every step of the frozen network, inside it",
    )
    p = add("roofline", "elements a network moves, counted; and this machine's rates", ",".join(FAMILY), "1")
    hidden = commands.add_parser("worker")
    hidden.add_argument("--engine", required=True)
    hidden.add_argument("--case", type=Path, required=True)
    return top


FAMILY = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def device(name: str) -> str:
    """cuda or cpu.

    Raises:
        BenchError: CUDA is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device here")
    return name


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases a command line asks for."""
    where = device(args.device)
    common = {"size": args.size, "device": where, "threads": args.threads, "data": args.data, "exact": args.exact}
    found = []
    for dtype in args.dtype:
        for model in args.model:
            modes = ["infer"] if args.command == "suite" else [args.command]
            found += [Case(mode, model, batch, dtype=dtype, **common) for mode in modes for batch in args.batch]
        if args.command == "suite":
            batches = args.train_batch if len(args.train_batch) > 1 else args.train_batch * len(args.model)
            if len(batches) != len(args.model):
                raise BenchError(f"--train-batch: wanted one batch or {len(args.model)}, got {len(batches)}")
            found += [Case("train", m, b, dtype=dtype, **common) for m, b in zip(args.model, batches, strict=True)]
    return found


def engines_of(args: argparse.Namespace, case: Case) -> list[str]:
    """The engines asked for, else the case's own; a suite leaves out what would cost its time and change no comparison with
    the best peer: eager in NCHW, level with channels_last at its best, and compiling training steps."""
    if args.engines:
        return args.engines
    left_out = {"infer": ("eager_nchw",), "train": ("eager_nchw", "compile", "compile_graphs")}
    skip = left_out[case.mode] if args.command == "suite" else ()
    return [name for name in engines.defaults(case) if name not in skip]


def compare(args: argparse.Namespace) -> int:
    """infer, train and suite.

    Returns:
        1 when a result of this package broke the law or an engine of it failed, else 0.
    """
    try:
        import matplotlib  # noqa: F401  (missed at the end, it would cost the whole run)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise BenchError(f"{error.name} is not installed; pip install 'resnet_fast[bench]'") from error
    begin = time.perf_counter()
    cases = cases_of(args)
    chosen = [engines_of(args, case) for case in cases]
    for name in (n for names in chosen for n in names):
        if name not in engines.LEGEND:
            raise BenchError(f"--engines: wanted some of {', '.join(engines.LEGEND)}, got {name!r}")
    console = Console(stderr=True)
    end = begin + 60 * args.at_most if args.at_most else float("inf")
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    runs: list[report.Run] = []
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring this machine", total=sum(len(n) * (args.rounds + 1) for n in chosen))
        machine = roofline.measure(cases[0].device, args.dtype, args.threads)
        for done, (case, names) in enumerate(zip(cases, chosen, strict=True), 1):
            deadline = begin + 60 * args.minutes * done / len(cases) if args.minutes else float("inf")

            def tell(text: str) -> None:
                progress.update(task, advance=1, description=text)

            progress.update(task, description=f"{case}: computing the float64 result")
            results = timer.measure(case, names, args.rounds, args.seconds, Path(folder), tell, deadline, end)
            runs.append((case, results, machine.floor(case, roofline.layers(case.model, case.size))))
            print("\n" + report.table(runs[-1]), flush=True)
            write(args, runs, machine, picture=False)  # a run that is ended leaves what it measured
    print("\n" + report.notes(runs, machine))
    if args.command == "suite" and not args.engines:
        print(
            "The suite leaves out eager in NCHW and torch.compile of training; `bench infer` and `bench train` have them."
        )
    for path in write(args, runs, machine):
        print(f"written: {path}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    own = [r for _, results, _ in runs for r in results if r.engine in engines.OWN]
    return 0 if all(r.correct for r in own) else 1


def write(
    args: argparse.Namespace, runs: list[report.Run], machine: roofline.Machine, picture: bool = True
) -> list[Path]:
    """The files asked for; a suite writes all three, named after the day and the hardware."""
    paths = {"csv": args.csv, "json": args.json, "png": args.plot}
    if args.command == "suite":
        results = Path("benchmarks/results")
        folder = args.output or (results if results.is_dir() else Path())
        name = report.stem(runs[0][0].device, "suite")
        paths = {kind: path or folder / f"{name}.{kind}" for kind, path in paths.items()}
    for path in filter(None, paths.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    if paths["csv"]:
        report.write_csv(runs, paths["csv"])
    if paths["json"]:
        report.write_json(runs, machine, paths["json"])
    if paths["png"] and picture:
        report.plot(runs, paths["png"])
    return [path for path in paths.values() if path]


def show_roofline(args: argparse.Namespace) -> int:
    """Elements per image by network, and times at this machine's rates."""
    from tabulate import tabulate

    where = device(args.device)
    counted = {name: roofline.layers(name, args.size) for name in args.model}
    header = ["", *(f"{c} M" for c in roofline.elements([]))]
    print(roofline.__doc__)
    print(f"Elements per image of {args.size} px:\n")
    lines = [[name, *(f"{v / 1e6:.1f}" for v in roofline.elements(found).values())] for name, found in counted.items()]
    print(tabulate(lines, header))
    _show_launches(args)
    machine = roofline.measure(where, args.dtype, args.threads)
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in machine.gflops.items())
    print(f"\n{report.device_name(where)}: {rates}, {machine.gbytes:.1f} GB/s\n  ({machine.how})\n")
    lines = []
    for name, found in counted.items():
        flops = sum(a.flops for a in found) / 1e9
        for batch in args.batch:
            times = [
                f"{1e3 * machine.floor(Case(mode, name, batch, dtype=dtype), found):.1f}"
                for dtype in args.dtype
                for mode in ("infer", "train")
            ]
            lines.append([name, batch, f"{flops:.2f}", *times])
    print(
        tabulate(lines, ["", "batch", "GFLOP/image", *(f"{m} {d}, ms" for d in args.dtype for m in ("infer", "train"))])
    )
    return 0


def _show_launches(args: argparse.Namespace) -> None:
    """Bytes of the GPU kernels, from their launches on meta tensors; needs Triton's sources, no card."""
    import torch
    from tabulate import tabulate

    from resnet_fast.ops import triton_common

    if triton_common.missing():
        print(f"\nBytes of the GPU kernels are left out: {triton_common.missing()}")
        return
    from resnet_fast.bench import gpu_traffic

    dtype = getattr(torch, args.dtype[0])
    batch = max(32, *args.batch)
    print(
        f"\nMB a GPU's kernels move at batch {batch} in {args.dtype[0]}: torch's operators, and the Triton launches:\n"
    )
    print(tabulate(gpu_traffic.table(args.model, batch, args.size, dtype), ["", *(c for c, _ in gpu_traffic.COLUMNS)]))


#: What `--device cuda` alone runs: chosen to end well under 9 minutes on one card, unattended.
CARD = {"--batch": "1,64", "--train-batch": "128", "--dtype": "bfloat16", "--minutes": "6", "--at-most": "8"}


def completed(arguments: list[str]) -> list[str]:
    """Options without a command are the suite's; with `--device cuda` what is not given is as in `CARD`."""
    if not arguments or not arguments[0].startswith("--") or arguments[0] == "--help":
        return arguments
    given = ["suite", *arguments]
    for name, value in CARD.items() if "cuda" in arguments or "--device=cuda" in arguments else ():
        if not any(a.split("=")[0] == name for a in arguments):
            given += [name, value]
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when all of this package's results were right, 1 when not, 2 when it could not be run."""
    args = parser().parse_args(completed(sys.argv[1:] if arguments is None else arguments))
    try:
        if args.command == "worker":
            worker.main(args.engine, args.case)
            return 0
        if args.command == "roofline":
            return show_roofline(args)
        if args.command == "op":
            table = layers if args.operator == "network" else operators
            return table.main(args, device(args.device))
        return compare(args)
    except BenchError as error:
        print(f"resnet_fast.bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
