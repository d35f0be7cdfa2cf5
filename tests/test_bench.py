"""The benchmark: its counting, its judgement, its reports, and small runs of every command."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from resnet_fast.bench import __main__ as bench
from resnet_fast.bench import cases, engines, operators, report, roofline, timer
from resnet_fast.bench.cases import BenchError, Case
from resnet_fast.bench.timer import Result

pytest.importorskip("torchvision", reason="torchvision is not installed")

MACHINE = roofline.Machine({"float32": 100.0, "bfloat16": 200.0}, 20.0, "made up")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Millions of elements per image: inference eager and fused, training eager, fused, and with the prologue.
MOVED = {
    "resnet18": (17, 5, 48, 33, 28),
    "resnet34": (26, 9, 73, 50, 43),
    "resnet50": (80, 27, 219, 154, 137),
    "resnet101": (121, 41, 326, 228, 206),
    "resnet152": (171, 58, 459, 318, 290),
}


@pytest.mark.parametrize("name", MOVED)
def test_elements_moved(name: str) -> None:
    counted = roofline.elements(roofline.layers(name))
    assert tuple(round(v / 1e6) for v in counted.values()) == MOVED[name]


def test_layers_are_counted_from_the_network() -> None:
    found = roofline.layers("resnet18")
    assert len(found) == 20
    assert sum(a.flops for a in found) == 3_627_122_688
    assert sum(a.residual for a in found) == 8
    assert sum(not a.relu for a in found) == 3  # projections
    assert sum(a.weights for a in found) == 11_689_512 - 9_600 - 513_000  # all but norms and classifier
    grouped = next(a for a in roofline.layers("resnext50_32x4d") if a.groups > 1)
    assert grouped.weights == 128 * 4 * 9
    assert sum(a.residual for a in roofline.layers("timm/resnet26d")) == 8


def test_floor_takes_the_longer_of_computing_and_moving() -> None:
    layer = roofline.Layer("a", 64, 56, 56, 64, 56, 56, 1, 1, 1, 0, 1, 1, False, True)
    fast_memory = roofline.Machine({"float32": 1.0}, 1e9, "")
    slow_memory = roofline.Machine({"float32": 1e9}, 1e-3, "")
    case = Case("infer", "a", 2)
    assert fast_memory.floor(case, [layer]) == pytest.approx(2 * layer.flops / 1e9)
    assert slow_memory.floor(case, [layer]) == pytest.approx(4 * (4 * 64 * 56 * 56 + 64 * 64) / 1e6)


def test_machine_is_measured() -> None:
    machine = roofline.measure("cpu", ["float32"], 1)
    assert machine.gflops["float32"] > 0.05
    assert machine.gbytes > 0.05
    assert "torch.mm" in machine.how


def test_photographs_are_preprocessed_as_for_imagenet() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    x = cases.photographs(5, 64)
    assert x.shape == (5, 3, 64, 64)
    assert torch.equal(x, cases.photographs(5, 64))
    assert len({float(image.sum()) for image in x}) == 5, "no two images are the same"
    low, high = ((v - torch.tensor(cases.MEAN)) / torch.tensor(cases.STD) for v in (0.0, 1.0))
    assert bool((x.amin((0, 2, 3)) >= low - 1e-5).all())
    assert bool((x.amax((0, 2, 3)) <= high + 1e-5).all())
    assert x.std() > 0.5


def test_calibrated_networks_see_normal_activations() -> None:
    model = cases.calibrated("resnet18", "random", 64)
    seen = {}
    model.layer4[1].bn2.register_forward_hook(
        lambda m, a, y: seen.update(y=(y - m.bias[:, None, None]) / m.weight[:, None, None])
    )
    with torch.no_grad():
        model(cases.images("random", 8, 64, 99))
    assert not model.training
    assert abs(float(seen["y"].mean())) < 0.2
    assert 0.5 < float(seen["y"].std()) < 2


def test_relative_error() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert timer.relative(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert timer.relative(torch.tensor([float("nan"), 4.0]), exact) == float("inf")


def test_top5_agreement() -> None:
    a = torch.arange(10.0)[None]
    assert timer.top5_agreement(a, a) == 1
    assert timer.top5_agreement(a, -a) == 0
    assert timer.top5_agreement(a, a.roll(2)) == pytest.approx(0.6)


def results(**medians: list[float]) -> dict[str, Result]:
    return {name: Result(name, medians=m, error=1e-6, allowed=2e-6) for name, m in medians.items()}


def test_ratios_are_taken_round_by_round() -> None:
    found = results(resnet_fast=[1.0, 2.0, 1.0], eager=[2.0, 4.0, 3.0], compile=[1.5, 3.0, 1.5])
    timer.compare(found)
    assert found["resnet_fast"].ratio == (2.0, 2.0, 3.0)
    assert found["resnet_fast"].peer_ratio == (1.5, 1.5, 1.5)
    assert found["eager"].ratio == (1.0, 1.0, 1.0)


def test_a_wrong_result_gets_no_ratio() -> None:
    found = results(resnet_fast=[1.0], eager=[2.0], compile=[0.1])
    found["resnet_fast"].error = 3e-6
    found["compile"].error = float("nan")
    timer.compare(found)
    assert found["resnet_fast"].ratio is None
    assert found["resnet_fast"].peer_ratio is None
    assert not found["compile"].correct
    assert found["eager"].peer_ratio == (1.0, 1.0, 1.0), "a wrong engine is no peer"
    text = report.table((Case("infer", "resnet18", 1), list(found.values()), 0.01))
    assert "WRONG (> 2.0e-06)" in text


@pytest.mark.parametrize(
    ("dtype", "exact", "factor"), [("float32", False, 3), ("float32", True, 2), ("bfloat16", False, 2)]
)
def test_the_law(tmp_path: Path, dtype: str, exact: bool, factor: int) -> None:
    """Twice eager's error plus one rounding; three times for float32 plans that may use Winograd."""
    case = Case("infer", "resnet18", 2, size=32, dtype=dtype, data="random", exact=exact)
    path = cases.prepare(case, tmp_path)
    truth = cases.load(path)[1]["exact"]
    unit = torch.randn_like(truth)
    unit *= truth.norm() / unit.norm()
    rounding = torch.finfo(getattr(torch, dtype)).eps / 2
    own = 10 * rounding
    for name, error in (
        ("eager", own),
        ("resnet_fast", factor * own + 0.9 * rounding),
        ("compile", 2 * own + 1.1 * rounding),
    ):
        torch.save(truth + error * unit, f"{path}.{name}")
    found = results(eager=[1.0], resnet_fast=[1.0], compile=[1.0])
    timer.judge(case, found, path)
    assert found["resnet_fast"].correct
    assert not found["compile"].correct
    torch.save(truth + (factor * own + 1.1 * rounding) * unit, f"{path}.resnet_fast")
    timer.judge(case, found, path)
    assert not found["resnet_fast"].correct


def test_report_shows_failures_and_files_keep_everything(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    runs = []
    for mode, batch in (("infer", 1), ("train", 16)):
        found = results(resnet_fast=[0.010, 0.011], eager=[0.020, 0.021], eager_nchw=[0.03, 0.04], compile=[])
        found["compile"].failed = "RuntimeError: no compiler"
        timer.compare(found)
        runs.append((Case(mode, "resnet50", batch), list(found.values()), 0.005))
    text = report.table(runs[0])
    assert "compile failed: RuntimeError: no compiler" in text
    assert "1.95 [1.91 2.00]" in text
    report.write_csv(runs, tmp_path / "a.csv")
    report.write_json(runs, MACHINE, tmp_path / "a.json")
    report.plot(runs, tmp_path / "a.png")
    with (tmp_path / "a.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 8
    assert float(lines[0]["x_eager"]) == pytest.approx(1.955, abs=0.01)
    assert lines[3]["failed"]
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"][1]["rounds_ms"]["eager"] == [20, 21]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "calibrated" in report.notes(runs, MACHINE)
    assert report.stem("cpu", "suite").endswith("-suite")


SMALL = ["--size", "32", "--rounds", "2", "--seconds", "0.01", "--threads", "1", "--data", "random"]


def test_infer_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"r.{kind.replace('plot', 'png')}" for kind in ("csv", "json", "plot")}
    options = [f"--{kind}={path}" for kind, path in files.items()]
    engines_ = ["--engines", "resnet_fast,eager"]
    code = bench.main(["infer", "--model", "resnet18", "--batch", "2", "--device", "cpu", *engines_, *SMALL, *options])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "infer resnet18 batch 2 float32" in text
    content = json.loads(files["json"].read_text())
    by_engine = {e["engine"]: e for e in content["results"][0]["engines"]}
    assert by_engine["resnet_fast"]["correct"] is True
    assert by_engine["resnet_fast"]["ms"] > 0
    assert by_engine["resnet_fast"]["peak_mib"] > 50
    assert by_engine["resnet_fast"]["top5_agreement"] > 0.7
    assert len(content["results"][0]["rounds_ms"]["eager"]) == 2
    assert all(path.stat().st_size for path in files.values())


def test_train_end_to_end_with_an_engine_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engines", "eager,eager_bf16", "--device", "cpu"]
    assert bench.main(["train", "--model", "resnet18", "--batch", "4", *options, *SMALL]) == 0
    text = capsys.readouterr().out
    assert "eager_bf16 failed: BenchError: eager_bf16 is an engine for inference" in text
    row = next(line for line in text.splitlines() if line.startswith("eager "))
    assert float(row.split()[1].replace(",", "")) > 0
    assert "1.00 [1.00 1.00]" in row


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    case = Case("infer", "resnet18", 1, size=32, data="random")
    path = cases.prepare(case, tmp_path)
    worker = timer.Worker("eager", path, case)
    try:
        worker.process.kill()
        assert "exit status" in worker.ask(0.1, 30)["failed"]
    finally:
        worker.close()


@pytest.mark.parametrize("op", operators.OPERATORS)
def test_op_tables(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--size", "64", "--rounds", "1", "--seconds", "0.001", "--threads", "1", "--device", "cpu"]
    code = bench.main(["op", op, "--model", "resnet18", *few])
    text = capsys.readouterr().out
    assert code == int("WRONG" in text), "what is outside the law is the exit status"
    shapes = {"conv2d": 11, "conv_bn_act": 15, "bn_act": 9, "add_relu": 4, "max_pool2d": 1, "bn_act_max_pool2d": 1,
              "scale_add_relu": 4, "bn_act_global_avg_pool2d": 1}[op]  # fmt: skip
    timed = [line for line in text.splitlines() if " eager " in line and line.split()[-1] == "1.00"]
    assert len(timed) == shapes
    if not op.startswith("conv"):  # one layer's convolution is tested, against many samples, in tests/kernels
        assert "WRONG" not in text


def test_op_refuses_to_time_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("resnet_fast.ops.add_relu.cpu", reason="the compiled module is not built")
    if cpu.common.cpu_why_not() is not None:
        pytest.skip(cpu.common.cpu_why_not())
    work = next(iter(operators.works("add_relu", roofline.layers("resnet18", 32), 1)))
    operators.check("add_relu", work, torch.float32, "cpu")
    assert work.verdicts["cpu"] == "ok"
    right = cpu.fwd
    monkeypatch.setattr(cpu, "fwd", lambda x, residual: right(x, residual) * 1.0001)
    operators.check("add_relu", work, torch.float32, "cpu")
    assert work.verdicts["cpu"].startswith("WRONG")
    operators.measure(work, torch.float32, "cpu", 1, 0.001)
    assert "cpu" not in work.times
    assert "eager" in work.times


def test_roofline_prints_its_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["roofline", "--model", "resnet18", "--device", "cpu", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "Counting rules" in text
    assert "train prologue" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["infer", "--engines", "tensorrt"], "wanted some of resnet_fast"),
        (["infer", "--model", "resnet19", "--rounds", "1"], "resnet19"),
        (["suite", "--train-batch", "1,2,3"], "wanted one batch or 2"),
        (["op", "conv2d", "--csv", "x.csv"], "op prints a table"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_cuda_without_a_card() -> None:
    if torch.cuda.is_available():
        assert bench.device("auto") == "cuda"
    else:
        assert bench.device("auto") == "cpu"
        with pytest.raises(BenchError, match="no CUDA device"):
            bench.device("cuda")


def test_late_rounds_are_left_out(tmp_path: Path) -> None:
    """A case that is over its time still gets MIN_ROUNDS, and a suite gives each case its share."""
    case = Case("infer", "resnet18", 1, size=32, data="random")
    (eager,) = timer.measure(case, ["eager"], 9, 0.001, tmp_path, deadline=0.0)
    assert eager.failed is None
    assert len(eager.medians) == timer.MIN_ROUNDS


def test_engines_that_are_not_ready_in_time_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels that compile at first sight cannot take the whole run beyond its end; what was not run is said to be so."""
    case = Case("infer", "resnet18", 1, size=32, data="random")
    (late,) = timer.measure(case, ["eager"], 3, 0.001, tmp_path, end=time.perf_counter() + 0.01)
    assert "no answer in 1 s" in late.failed or "left out" in late.failed
    file = tmp_path / "r.csv"
    chosen = ["--engines", "resnet_fast,eager", "--device", "cpu", "--at-most", "1e-9", "--csv", str(file)]
    assert bench.main(["infer", "--model", "resnet18", "--batch", "1", *chosen, *SMALL]) == 1
    assert "resnet_fast failed: left out: no time was left" in capsys.readouterr().out
    assert "left out" in file.read_text()


def test_an_ended_run_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(resnet_fast=[0.010], eager=[0.020])
    timer.compare(found)

    def measure(case: Case, *rest: object) -> list[Result]:
        if case.batch == 2:
            raise KeyboardInterrupt
        return list(found.values())

    monkeypatch.setattr(timer, "measure", measure)
    monkeypatch.setattr(roofline, "measure", lambda *a: MACHINE)
    files = [f"--{kind}={tmp_path / kind}" for kind in ("csv", "json")]
    options = ["--engines", "resnet_fast,eager", "--device", "cpu"]
    assert bench.main(["infer", "--model", "resnet18", "--batch", "1,2", *options, *SMALL, *files]) == 130
    assert len((tmp_path / "csv").read_text().splitlines()) == 3
    assert len(json.loads((tmp_path / "json").read_text())["results"]) == 1


def test_exact_gradients_where_a_cards_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 step is tried on the device; without the memory for it the CPU's result is the same."""
    model, x, target = torch.nn.Linear(3, 4).double(), torch.randn(2, 3).double(), torch.tensor([1, 3])
    wanted, real, devices = cases.exact_step(model, x, target, "cpu"), cases.step, []

    def step(*args):
        devices.append(args[1].device.type)
        if args[1].device.type == "meta":
            raise torch.OutOfMemoryError("made up")
        return real(*args)

    monkeypatch.setattr(cases, "step", step)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    assert torch.equal(cases.exact_step(model, x, target, "meta"), wanted) and devices == ["meta", "cpu"]


def test_what_the_suite_leaves_out() -> None:
    args = bench.parser().parse_args(["suite", "--device", "cpu"])
    found = {str(case): bench.engines_of(args, case) for case in bench.cases_of(args)}
    assert len(found) == 6
    assert all(("compile" in names) == text.startswith("infer") for text, names in found.items())
    assert all("eager" in names and "eager_nchw" not in names for names in found.values())
    args = bench.parser().parse_args(["suite", "--device", "cpu", "--engines", "eager,compile"])
    assert all(bench.engines_of(args, case) == ["eager", "compile"] for case in bench.cases_of(args))


def test_every_engine_has_a_legend_and_a_colour() -> None:
    assert set(engines.LEGEND) == set(report.COLOURS)
    for device in ("cpu", "cuda"):
        for mode in ("infer", "train"):
            assert set(engines.defaults(Case(mode, "resnet18", 1, dtype="bfloat16", device=device))) <= set(
                engines.LEGEND
            )


def test_a_card_alone_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--device cuda` runs the suite that fits a GPU, unattended, into a file named after the card."""
    found = []
    monkeypatch.setattr(bench, "compare", lambda args: found.append(args) or 0)
    assert bench.main(["--device", "cuda"]) == 0 and bench.main(["--device=cuda", "--batch", "8"]) == 0
    args, own = found
    assert (args.command, args.batch, args.train_batch, args.dtype, args.minutes) == (
        "suite",
        [1, 64],
        [128],
        ["bfloat16"],
        6,
    )
    assert args.at_most < 9, "the run ends by itself, however long kernels compile"
    assert own.batch == [8] and own.train_batch == [128]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = bench.cases_of(args)
    assert {c.device for c in made} == {"cuda"} and len(made) == 6
    assert all("compile" not in bench.engines_of(args, c) for c in made if c.mode == "train")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert report.stem("cuda", "suite").endswith("-nvidia-h100-80gb-hbm3-suite")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
