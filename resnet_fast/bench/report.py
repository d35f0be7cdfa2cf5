"""Results as a table, as CSV and JSON, and as a picture."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from resnet_fast import _native, info
from resnet_fast.bench import engines
from resnet_fast.bench.cases import Case
from resnet_fast.bench.roofline import Machine
from resnet_fast.bench.timer import Result

Run = tuple[Case, list[Result], float]

HEADER = ["engine", "ms", "rounds' range", "img/s", "x eager", "x best peer", "% roof", "MiB", "error", "law", "top-5"]


def number(value: float, digits: int = 3) -> str:
    """A figure with so many significant digits, never in exponents from 0.01 up."""
    if value != value:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 0.01 else f"{value:.1e}"


def _ratio(given: tuple[float, float, float] | None) -> str:
    return "-" if given is None else f"{given[0]:.2f} [{given[1]:.2f} {given[2]:.2f}]"


def rows(run: Run) -> list[list[str]]:
    """The lines of one case's table, of the engines that ran."""
    case, results, floor = run
    lines = []
    for r in results:
        if r.failed is not None:
            continue
        middle, low, high = r.seconds
        verdict = "ok" if r.correct else f"WRONG (> {r.allowed:.1e})"
        lines.append(
            [
                r.engine,
                number(middle * 1e3, 4),
                f"{number(low * 1e3)} .. {number(high * 1e3)}",
                number(case.batch / middle),
                _ratio(r.ratio),
                _ratio(r.peer_ratio),
                f"{100 * floor / middle:.0f}",
                number(r.memory, 4),
                f"{r.error:.1e}",
                verdict,
                "" if r.top5 is None else f"{100 * r.top5:.0f} %",
            ]
        )
    return lines


def table(run: Run) -> str:
    """One case as text."""
    case, results, _ = run
    rounds = max((len(r.medians) for r in results), default=0)
    lines = [f"{case}, {case.size} px, {case.threads} threads, {rounds} rounds"]
    found = rows(run)
    if found:
        align = ["left"] + ["right"] * (len(HEADER) - 1)
        lines.append(tabulate(found, HEADER, disable_numparse=True, colalign=align))
    lines += [f"{r.engine} failed: {r.failed}" for r in results if r.failed is not None]
    return "\n".join(lines)


def notes(runs: Sequence[Run], machine: Machine) -> str:
    """What a reader must know to read the tables."""
    cases = [case for case, _, _ in runs]
    names = list(dict.fromkeys(r.engine for _, results, _ in runs for r in results))
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in machine.gflops.items())
    photos = any(case.data == "photos" for case in cases)
    lines = [
        f"This machine: {device_name(cases[0].device)}, {rates}, {machine.gbytes:.0f} GB/s.",
        f"  ({machine.how})",
        "ms: median of the rounds' medians, engines interleaved; ratios: median [least, largest] over the rounds.",
        "% roof: time the direct convolutions and one pass over every tensor would need at these rates, per layer the longer "
        "of both, over the time taken; Winograd, Strassen and caches can beat it.",
        "MiB: peak of the process while it was timed (on a GPU: of the allocator).",
        "error: root mean square against float64, relative"
        + _what(cases)
        + "; law: at most twice eager's (worse layout) + "
        "one rounding, three times for float32 plans with Winograd convolutions; no ratio is given without it.",
        f"Data: {'scikit-learn photographs china.jpg, flower.jpg, preprocessed as for ImageNet' if photos else 'normal noise'}. "
        "Weights: seeded random, BatchNorm statistics calibrated on them (no pretrained weights are downloaded)"
        + (
            "; top-5: share of the five largest logits in common with eager."
            if any(c.mode == "infer" for c in cases)
            else "."
        ),
        *(f"{name}: {engines.LEGEND[name]}." for name in names),
    ]
    return "\n".join(lines)


def _what(cases: Sequence[Case]) -> str:
    modes = {case.mode for case in cases}
    parts = {"infer": "logits", "train": "loss and all gradients"}
    return " (" + ", ".join(f"{mode}: {parts[mode]}" for mode in sorted(modes)) + ")"


def device_name(device: str) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else info.cpu_name()


def stem(device: str, kind: str) -> str:
    """A results file's name without suffix: date, hardware, kind."""
    name = device_name(device)
    if device != "cuda":
        name += f" {_family()}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{datetime.date.today().isoformat()}-{slug}-{kind}"


def _family() -> str:
    """Family and model number of a processor whose name says little."""
    try:
        with open("/proc/cpuinfo") as f:
            lines = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
        found = {k.strip(): v.strip() for k, v in lines.items()}
        return f"family {found['cpu family']} model {found['model']}"
    except (OSError, KeyError):
        return ""


def _flat(run: Run) -> list[dict[str, Any]]:
    case, results, floor = run
    lines = []
    for r in results:
        line: dict[str, Any] = {**asdict(case), "engine": r.engine, "failed": r.failed or ""}
        if r.failed is None:
            middle, low, high = r.seconds
            ratio, peer = r.ratio or (None,) * 3, r.peer_ratio or (None,) * 3
            line |= {"ms": 1e3 * middle, "ms_min": 1e3 * low, "ms_max": 1e3 * high, "img_per_s": case.batch / middle}
            line |= {"x_eager": ratio[0], "x_eager_min": ratio[1], "x_eager_max": ratio[2]}
            line |= {"x_best_peer": peer[0], "x_best_peer_min": peer[1], "x_best_peer_max": peer[2]}
            line |= {"percent_of_roofline": 100 * floor / middle, "peak_mib": r.memory, "setup_s": r.setup}
            line |= {"error": r.error, "error_allowed": r.allowed, "correct": r.correct}
            line |= {"error_against_eager": r.against_eager, "top5_agreement": r.top5}
        lines.append(line)
    return lines


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One line per case and engine."""
    lines = [line for run in runs for line in _flat(run)]
    fields = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fields)
        writer.writeheader()
        writer.writerows(lines)


def write_json(runs: Sequence[Run], machine: Machine, path: Path) -> None:
    """Everything: the machine, the software, each case, each engine's rounds."""
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(runs[0][0].device),
        "machine": asdict(machine),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "isa": _native.isa()},
        "results": [
            {"case": asdict(case), "roofline_ms": 1e3 * floor, "engines": _flat((case, results, floor))}
            | {"rounds_ms": {r.engine: [1e3 * s for s in r.medians] for r in results}}
            for case, results, floor in runs
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


# Colours that differ in lightness too; the package's own is the strong one.
COLOURS = {
    "resnet_fast": "#c8452f",
    "converted": "#e08a5b",
    "eager": "#4d7ea8",
    "eager_nchw": "#a9c1d9",
    "eager_bf16": "#7fa0bf",
    "compile": "#6b6f76",
    "compile_graphs": "#a5a8ad",
}


def plot(runs: Sequence[Run], path: Path) -> None:
    """Bars of throughput against eager channels_last, one group per case, whiskers over the rounds; img/s on the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in COLOURS if any(r.engine == n for _, results, _ in runs for r in results)]
    width = 0.82 / len(names)
    figure, axes = plt.subplots(figsize=(max(6.5, 1.2 + 1.75 * len(runs)), 4.8), layout="constrained")
    top = 1.0
    for column, (case, results, _) in enumerate(runs):
        found = {r.engine: r for r in results}
        for place, name in enumerate(names):
            result = found.get(name)
            at = column + (place - (len(names) - 1) / 2) * width
            if result is None or result.ratio is None:
                why = "" if result is None else "failed" if result.failed else "wrong"
                axes.text(at, 0.03, why, ha="center", va="bottom", rotation=90, fontsize=8, color=COLOURS[name])
                continue
            middle, low, high = result.ratio
            top = max(top, high)
            label = name if column == 0 else None
            axes.bar(at, middle, width * 0.94, color=COLOURS[name], label=label, zorder=2)
            axes.errorbar(at, middle, [[middle - low], [high - middle]], color="#202020", lw=0.9, capsize=2, zorder=3)
            rate = number(case.batch / result.seconds[0])
            light = name in ("eager_nchw", "compile_graphs", "converted")
            colour = "#202020" if light else "white"
            axes.text(at, 0.03, rate, ha="center", va="bottom", rotation=90, fontsize=8, color=colour, zorder=4)
            if name == "resnet_fast":
                axes.text(at, high + 0.03, f"{middle:.2f}x", ha="center", va="bottom", fontsize=9, weight="bold")
    axes.axhline(1, color="#202020", lw=0.8, zorder=1)
    labels = [
        f"{c.model}\n{'training' if c.mode == 'train' else 'inference'}\nbatch {c.batch}\n{c.dtype}" for c, _, _ in runs
    ]
    axes.set_xticks(range(len(runs)), labels, fontsize=9)
    axes.set_ylabel("speed relative to eager channels_last")
    axes.set_ylim(0, top * 1.12)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.grid(axis="y", color="#dddddd", lw=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    case = runs[0][0]
    where = device_name(case.device) + (f", {case.threads} threads" if case.device == "cpu" else "")
    axes.set_title(
        f"{where}, {case.size} px, torch {torch.__version__.split('+')[0]}\n"
        "in the bars: images/s; whiskers: least and largest round",
        fontsize=10,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)
