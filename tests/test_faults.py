"""One table of the faults that packages like this one had, and the tests that hold each off.

Every line is a case in which a fused package went wrong somewhere: a silent wrong number, a crash, a hang. A line names
its tests as "file::function" (a file under tests/, a function or method in it), or says what it waits for. This file's
own tests see to it that every test named exists and that nothing is left blank.
"""

# ruff: noqa: E501

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
C, SUB, BN, CONV, CBA, POOL, ADD = (
    f"ops/{n}.py"
    for n in (
        "contract",
        "subsystems",
        "test_bn_act",
        "test_conv2d",
        "test_conv_bn_act",
        "test_max_pool2d",
        "test_add_relu",
    )
)
CONVERT, FREEZE, CHOOSER, HOUSE = "test_convert.py", "test_freeze.py", "test_backends.py", "test_house.py"
CHOICES, LEFT, TRAINING = "test_choices.py", "test_convert_left.py", "test_convert_training.py"


class Waits(str):
    """Why a line has no test yet."""


FAULTS = {
    "semantics": {
        "a maximum that drops NaN; ReLU's gradient at NaN is 1": [f"{ADD}::test_nan_gradient", f"{C}::test_nonfinite", f"{C}::test_nan_in_dy", f"{POOL}::test_nan_takes_the_gradient"],
        "a library's ReLU epilogue that turns NaN into 0": [f"{C}::test_nonfinite"],
        "one-pass variance at mean/std 1e3, 1e4": [f"{BN}::test_variance_of_a_large_mean", "kernels/test_bn_act_cpu.py::test_large_mean"],
        "inputs of 1e20, 1e30; tiny and huge spreads": [f"{BN}::test_huge_inputs", f"{BN}::test_variance_of_extreme_sizes", "kernels/test_bn_act_cpu.py::test_extreme_and_special_values"],
        "a variance of 0": [f"{BN}::test_constant_channels"],
        "gamma negative, zero, without beta; beta without gamma; no affine": [f"{C}::test_values", f"{C}::test_gradients"],
        "momentum None": [f"{BN}::test_refusals_as_eager", f"{TRAINING}::test_norms_of_every_kind"],
        "track_running_stats off, or toggled later": [f"{C}::test_values", f"{TRAINING}::test_norms_of_every_kind"],
        "eps 0 in evaluation, eps <= 0 in training": [f"{C}::test_values", f"{BN}::test_refusals_as_eager"],
        "one value per channel in training: eager's words": [f"{BN}::test_refusals_as_eager", f"{CBA}::test_refusals_as_eager"],
        "empty batches, statistics untouched": [f"{BN}::test_empty", f"{CONV}::test_empty", f"{CBA}::test_empty", f"{POOL}::test_empty", f"{ADD}::test_empty"],
        "bias before the norm, groups, depthwise, dilation, strides 1 to 3, even filters, sizes that are not square": [f"{C}::test_values", f"{C}::test_gradients", f"{CONV}::test_any_window"],
        "padding above half the filter": [f"{C}::test_values", f"{CONV}::test_any_window"],
        "padding 'same', also with even filters": [f"{CONV}::test_named_padding"],
        "padding modes other than zeros": [f"{LEFT}::test_changed_settings_are_followed"],
        "an output of size 0, an input smaller than the filter": [f"{CONV}::test_refusals_as_eager", f"{POOL}::test_refusals_as_eager", "test_arithmetic.py::test_output_size"],
        "all dimensions equal": [f"{C}::test_values", f"{C}::test_gradients"],
        "channels 1, 3, 5, 65, 127": [f"{C}::test_values", f"{C}::test_gradients"],
        "more than 10^4 pixels; more than 65,535 images": [f"{C}::test_values", "cuda/test_cuda_checks.py::test_grids_of_more_than_two_to_the_31_elements"],
        "more than 2^31 elements": ["cuda/test_cuda_far.py::test_add_relu", "cuda/test_cuda_far.py::test_bn_apply", "cuda/test_cuda_far.py::test_max_pool2d"],
        "a second running statistic missing": [f"{BN}::test_refusals_as_eager"],
    },
    "layouts": {
        "x, residual, dy contiguous, channels_last, sliced, transposed": [f"{C}::test_layouts", f"{C}::test_layout_of_dy"],
        "expanded tensors: strides of 0": [f"{C}::test_layouts", f"{C}::test_expanded_inputs"],
        "ambiguous strides: one channel, one pixel": [f"{C}::test_values", f"{C}::test_gradients", f"{SUB}::test_meta"],
        "channels_last out, dx in the format of x": [f"{C}::test_layouts", f"{TRAINING}::test_input_gradient_and_layouts"],
        "filters that are not dense": [f"{CONV}::test_weight_layouts"],
        "memory a kernel did not write": [f"{C}::test_values", f"{C}::test_gradients", "test_faults.py::test_poison_is_seen"],
    },
    "autograd": {
        "every subset of requires_grad, first layer without dx": [f"{C}::test_requires_grad_subsets", f"{C}::test_no_gradient_wanted", f"{TRAINING}::test_every_subset_of_parameters_and_input"],
        "frozen norms, frozen filters": [f"{BN}::test_frozen_statistics", f"{CBA}::test_frozen_weights", f"{TRAINING}::test_frozen_norms"],
        "the residual used again after the block": [f"{ADD}::test_residual_used_again", f"{BN}::test_residual_used_again"],
        "saved tensors changed in place": [f"{ADD}::test_saved_output_changed_in_place", f"{BN}::test_saved_tensors_changed_in_place"],
        "two forwards before one backward": [f"{BN}::test_two_forwards_before_one_backward"],
        "double backward right, or a clear error": [f"{C}::test_gradcheck", f"{SUB}::test_func_transforms_refused", f"{CBA}::test_operator_differentiated_directly", f"{TRAINING}::test_double_backward"],
        "activation checkpointing": [f"{BN}::test_checkpoint", f"{TRAINING}::test_checkpointing"],
        "a leak over hundreds of iterations": [f"{TRAINING}::test_no_leak"],
        "gradients for integers": [f"{BN}::test_refusals_as_eager", f"{CONV}::test_refusals_as_eager", f"{POOL}::test_refusals", f"{ADD}::test_refusals"],
        "NaN and infinities in x, residual, gamma, dy": [f"{C}::test_nonfinite", f"{C}::test_nan_in_dy"],
        "an operator that returns its own input": [f"{SUB}::test_opcheck"],
    },
    "conversion": {
        "a conv also used without its norm, a norm of two convs": [f"{LEFT}::test_what_only_looks_like_a_chain"],
        "a block called twice": [f"{LEFT}::test_a_block_called_twice"],
        "hooks on inner modules": [f"{LEFT}::test_hooks_on_inner_modules_run", f"{LEFT}::test_backward_hooks_and_global_hooks_run"],
        "deepcopy, pickle, torch.save keep the new weights": [f"{CONVERT}::test_copies_stay_fused", f"{CONVERT}::test_new_weights_are_used"],
        "SyncBatchNorm before and after": [f"{LEFT}::test_sync_batchnorm"],
        "state_dict keys, both ways, strict": [f"{CONVERT}::test_state_dict_both_ways", f"{CONVERT}::test_keeps_parameters_keys_class_and_mode"],
        "restore is bitwise eager": [f"{CONVERT}::test_restore_is_bitwise"],
        "stale packed weights": [f"{CONV}::test_changed_weights", f"{CONVERT}::test_new_weights_are_used"],
        "subclassed, parametrised, quantised modules": [f"{LEFT}::test_parametrised_and_pruned_convolutions", f"{LEFT}::test_what_only_looks_like_a_chain"],
    },
    "mixed precision and devices": {
        "autocast's dtypes": [f"{SUB}::test_autocast", f"{TRAINING}::test_bottlenecks_under_autocast"],
        "bfloat16 beside float32 norms; everything in bfloat16": [f"{BN}::test_mixed_dtypes", f"{BN}::test_all_low_precision", f"{ADD}::test_mixed_dtypes"],
        "float64, float16 on the CPU": [f"{C}::test_values", f"{C}::test_gradients"],
        "tensors on different devices": [f"{ADD}::test_refusals", f"{BN}::test_refusals_as_eager", f"{CONV}::test_refusals"],
        "meta tensors": [f"{SUB}::test_meta"],
        "integer and complex inputs": [f"{BN}::test_refusals_as_eager", f"{CONV}::test_refusals", f"{POOL}::test_refusals_as_eager"],
        "another CUDA stream, another GPU, graph capture": ["cuda/test_cuda_gpu.py::test_another_stream", "cuda/test_cuda_gpu.py::test_the_second_device", "cuda/test_cuda_gpu.py::test_captured_in_a_graph"],
    },
    "processes and threads": {
        "DataLoader workers, fork after a parallel region": [f"{C}::test_forked_worker"],
        "fork while another thread holds a lock": [f"{CHOICES}::test_fork_while_another_thread_measures"],
        "several Python threads at once": [f"{C}::test_python_threads", f"{CHOICES}::test_many_threads_measure_once", f"{FREEZE}::test_several_threads_call_at_once"],
        "torch.set_num_threads in a fresh Python thread": [f"{CHOOSER}::test_set_num_threads_reaches_our_kernels"],
        "the same bits for any number of threads": [f"{C}::test_threads", "kernels/test_bn_act_cpu.py::test_same_bits_for_any_thread_count", f"{FREEZE}::test_bits_do_not_depend_on_threads"],
        "the same bits in every repeat, deterministic algorithms on": [f"{C}::test_repeats"],
        "fewer threads than were asked for": ["kernels/test_network.py::test_fewer_threads_than_asked_for_do_not_hang"],
        "four processes on a cold cache": [f"{CHOICES}::test_four_processes_at_once"],
        "a corrupt or truncated cache": [f"{CHOICES}::test_a_corrupt_file_is_ignored_and_replaced", f"{CHOICES}::test_a_truncated_file_is_ignored"],
        "a foreign or world-writable cache, a pipe in its place": [f"{CHOICES}::test_a_foreign_owned_file_is_not_trusted", f"{CHOICES}::test_a_file_others_may_write_is_not_trusted", f"{CHOICES}::test_a_pipe_or_a_folder_in_the_files_place"],
        "a read-only home": [f"{CHOICES}::test_a_read_only_folder", f"{CHOICES}::test_a_folder_that_cannot_be_made"],
        "each instruction set forced": ["kernels/test_isas.py::test_every_instruction_set", f"{CHOOSER}::test_an_unknown_instruction_set"],
    },
    "build and import": {
        "no triton, no compiled module": [f"{HOUSE}::test_import_without_triton_and_the_compiled_module"],
        "no nvcc, a broken CUDA part": ["cuda/test_cuda_build.py::test_required_without_nvcc_is_an_error", "cuda/test_cuda_build.py::test_a_broken_cuda_part_does_not_hurt"],
        "setup.py imports torch or reads the network": [f"{HOUSE}::test_setup_needs_no_torch"],
        "compilation at import": [f"{HOUSE}::test_import_reads_no_optional_package"],
        "no C++ compiler, an empty PATH, spaces in the path, uninstall and reinstall": Waits("an isolated install takes minutes: done by hand and by CI on a fresh clone, not here"),
    },
    "sanitizers": {
        "AddressSanitizer and UndefinedBehaviorSanitizer": Waits("a build of its own: `make sanitize` runs the kernels' tests under both"),
    },
}  # fmt: skip
LINES = [(f"{part}: {fault}", held) for part, lines in FAULTS.items() for fault, held in lines.items()]


@functools.cache
def functions(file: str) -> set[str]:
    """The tests a file defines, methods included."""
    tree = ast.parse((TESTS / file).read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("held", [held for _, held in LINES], ids=[line for line, _ in LINES])
def test_every_fault_is_held_off(held):
    """By tests that exist, or with a reason why not yet."""
    if isinstance(held, Waits):
        assert len(held.split()) > 5, "a reason is a sentence"
        return
    assert held, "no test and no reason"
    for test in held:
        file, _, name = test.partition("::")
        assert name in functions(file), f"{test} does not exist"


def test_the_contracts_tests_run_for_every_operator():
    """What the table finds in ops/contract.py and ops/subsystems.py counts only if every operator's file has a class of it with cases."""
    for op in ("add_relu", "bn_act", "conv2d", "conv_bn_act", "max_pool2d"):
        tree = ast.parse((TESTS / "ops" / f"test_{op}.py").read_text())
        classes = [
            n for n in tree.body if isinstance(n, ast.ClassDef) and any(ast.unparse(b) == "Contract" for b in n.bases)
        ]
        assert classes, f"test_{op}.py has no Contract"
        names = {
            t.id for n in classes[0].body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        assert {"op", "cases", "core", "small", "wants"} <= names


def test_poison_is_seen(poisoned):
    """The fixture that fills torch.empty does so, for every dtype a kernel writes."""
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(1000, dtype=dtype).isnan().all()
        assert torch.empty(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last).isnan().all()
    assert (torch.empty(1000, dtype=torch.uint8) == 255).all()
