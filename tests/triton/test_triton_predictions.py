"""What the simulator predicts of the compiled kernels: the order of tiles, and of fused and unfused chains."""

from dataclasses import replace

import pytest
import torch
from cases import random, room
from conv_cases import every_tile

from resnet_fast.ops.conv2d.triton_tiles import NEAR, Tile, gemm_tiles, use, way


@pytest.mark.proof
def test_proof_predicted_order_of_a_chain(simulator):
    """A prediction from counted bytes and instructions, never a time: each fusion lowers the least time on every card."""
    z, weight = random((8, 64, 56, 56), torch.bfloat16, 0), random((64, 64, 1, 1), torch.bfloat16, 1)
    window = ([1, 1], [0, 0], [1, 1], 1)

    def reports(run):
        with simulator.running() as found:
            run()
        return [report for _, report in found]

    def parts():
        mean, var = room("bn_act").statistics(z)
        y = room("bn_act").fwd(z, None, None, mean, var, None, False, 1e-5, True)[0]
        room("bn_act").statistics(room("conv2d").fwd(y, weight, None, *window))

    def epilogue():
        mean, var = room("bn_act").statistics(z)
        y = room("bn_act").fwd(z, None, None, mean, var, None, False, 1e-5, True)[0]
        room("conv2d").forward_statistics(y, weight, None, *window)

    def prologue():
        mean, var = room("bn_act").statistics(z)
        before = room("conv2d").prologue(None, None, mean, var, 1e-5)
        room("conv2d").forward_statistics(z, weight, None, *window, before)

    chains = [(f.__name__, reports(f)) for f in (parts, epilogue, prologue)]
    for card in ("A100", "H100", "L4"):
        ranking = simulator.ptxsim.compare(chains, gpu=card)
        rows = {row["name"]: row for row in ranking.rows}
        order = [rows[name] for name in ("prologue", "epilogue", "parts")]
        assert [row["bytes"] for row in order] == sorted({row["bytes"] for row in order}), order
        assert [row["at_least_us"] for row in order] == sorted({row["at_least_us"] for row in order}), order
        assert ranking.best() == "prologue"
    for card in ("A100", "H100", "L4"):
        bytes_ = {}
        for name, found in chains:
            predicted = [simulator.ptxsim.predict(r, gpu=card) for r in found]
            bytes_[name] = sum(p["dram"].at_least_us for p in predicted)
        assert bytes_["prologue"] < bytes_["epilogue"] < bytes_["parts"], (card, bytes_)


@pytest.mark.proof
def test_proof_predicted_order_of_the_norms_backward(simulator):
    """A prediction: of 1x1 filters whole it moves fewer bytes than by its parts, by either way of the weight gradient, and is
    faster. (Of 3x3 filters the prologue's mask costs what it saves, or more: the operator's README has the figures.)"""
    n, c, h, k = 2, 64, 28, 256
    z, weight = random((n, c, h, h), torch.bfloat16, 0), random((k, c, 1, 1), torch.bfloat16, 1)
    dout = random((n, k, h, h), torch.bfloat16, 2)
    weight, vectors = weight.contiguous(memory_format=torch.channels_last), [torch.rand(c) + 0.5 for _ in range(4)]
    window = ([1, 1], [0, 0], [1, 1], 1)

    def whole():
        room("bn_act_conv2d").bwd(dout, z, *vectors, weight, False, True, 1e-5, *window, [True] * 4 + [False])

    def parts():
        y = room("bn_act").fwd(z, *vectors, None, False, 1e-5, True)[0]
        dy, _, _ = room("conv2d").bwd(dout, y, weight, False, *window, [True, True, False])
        room("bn_act").bwd(dy, z, None, *vectors, True, 1e-5, True, [True, True, True, False])

    chains = []
    for name, run in (("parts", parts), ("prologue", whole), ("stored", whole)):
        with simulator.running() as found, way(name):
            run()
        chains.append((name, [report for _, report in found]))
    for card in ("A100", "H100", "L4"):
        rows = {row["name"]: row for row in simulator.ptxsim.compare(chains, gpu=card).rows}
        print(card, {name: (round(row["at_least_us"], 1), row["bytes"]) for name, row in rows.items()})
        assert rows["prologue"]["bytes"] < rows["stored"]["bytes"] < rows["parts"]["bytes"]
        assert rows["prologue"]["at_least_us"] < rows["parts"]["at_least_us"], (card, rows)


@pytest.mark.proof
def test_proof_predicted_order_in_inference(simulator):
    """A prediction: norm, residual and ReLU in the convolution's epilogue against passes of their own. (Of a small map, where
    launches are all the time, it is that folding the norm's vectors is a launch, too.)
    """
    x, weight = random((8, 64, 56, 56), torch.bfloat16, 0), random((64, 64, 3, 3), torch.bfloat16, 1)
    residual, vectors, window = random(x.shape, torch.bfloat16, 2), [torch.ones(64)] * 4, ([1, 1], [1, 1], [1, 1], 1)
    gamma, beta, mean, var = vectors

    def reports(run):
        with simulator.running() as found:
            run()
        return [report for _, report in found]

    def parts():
        y = room("conv2d").fwd(x, weight, None, *window)
        y = room("bn_act").fwd(y, gamma, beta, mean, var, None, False, 1e-5, False)[0]
        room("add_relu").fwd(y, residual)

    def norm():
        y = room("conv2d").fwd(x, weight, None, *window)
        room("bn_act").fwd(y, gamma, beta, mean, var, residual, False, 1e-5, True)

    def whole():
        room("conv_bn_act").fwd(x, weight, None, gamma, beta, mean, var, residual, 1e-5, True, *window)

    def folded():
        room("conv_bn_act").fwd(x, weight, None, None, beta, None, None, residual, 0.0, True, *window)

    chains = [(f.__name__, reports(f)) for f in (folded, whole, norm, parts)]
    for card in ("A100", "H100", "L4"):
        rows = {row["name"]: row for row in simulator.ptxsim.compare(chains, gpu=card).rows}
        times = [rows[name]["at_least_us"] for name, _ in chains]
        assert times == sorted(set(times)), (card, times)


@pytest.mark.proof
def test_proof_predicted_order_of_tiles(simulator):
    """A prediction, never a time: a tile changes no compulsory byte, and a larger one moves fewer sectors for them."""
    x, weight = random((1, 128, 32, 32), torch.bfloat16, 0), random((128, 128, 3, 3), torch.bfloat16, 1)
    entries = []
    for tile in (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)):
        with simulator.running() as found, use(tile):
            room("conv2d").fwd(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
        entries.append((str(tile), dict(found)["gather_gemm"]))
    for card in ("A100", "H100", "L4"):
        rows = simulator.ptxsim.compare(entries, gpu=card).rows
        assert len({row["bytes"] for row in rows}) == 1
        sectors, instructions = ([row[word] for row in rows] for word in ("sectors", "instructions"))
        assert sectors == sorted(set(sectors)) and instructions[0] == min(instructions), (card, rows)


#: (batch, channels, height, filters, taps): problems of few programs and of many
RANKED = ((1, 256, 14, 256, 3), (2, 64, 56, 64, 3), (1, 512, 7, 2048, 1), (8, 64, 56, 256, 1))


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("problem", RANKED, ids=str)
def test_proof_the_choosers_tile_is_predicted_best(simulator, problem, dtype):
    """A prediction, never a time. What is taken without a measurement is, of all tiles and splits, the one with the least
    time by counted work on an A100, as near as the chooser's own model tells times apart."""
    n, c, h, k, taps = problem
    x, weight = random((n, c, h, h), dtype, 0), random((k, c, taps, taps), dtype, 1)
    candidates = gemm_tiles(n * h * h, k, taps * taps * c, c, dtype.itemsize, False, 108, 1, 80)
    widest = max(tile.n for tile in candidates)
    others = [replace(tile, split=1) for tile in every_tile(dtype.itemsize) if tile.n <= max(widest, k)]
    entries = []
    for tile in dict.fromkeys([*candidates, *others]):
        with simulator.running() as found, use(tile):
            room("conv2d").fwd(x, weight, None, [1, 1], [taps // 2] * 2, [1, 1], 1)
        entries.append((str(tile), [report for name, report in found]))
    rows = simulator.ptxsim.compare(entries, gpu="A100").rows
    times = {row["name"]: row["counted_us"] for row in rows}
    print("predicted:", {name: round(us, 1) for name, us in sorted(times.items(), key=lambda item: item[1])})
    assert times[str(candidates[0])] <= NEAR * min(times.values()), (str(candidates[0]), times)
