# Every target makes the virtual environment it needs; nothing but Python and, for the compiled module, a C++ compiler
# has to be there. `make` alone lists the targets.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help bench bench-ops test test-all lint format sanitize gpu-proof gpu info clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The package is installed in place (-e): whatever runs from this folder then finds the compiled module beside its source.
# --no-compile: only what is imported gets its bytecode, which saves a third of the installation.
.venv-%/.done: $(SOURCES)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[$*]'
	@touch $@

.venv-lint/.done:
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --quiet --disable-pip-version-check ruff clang-format
	@touch $@

bench: .venv-bench/.done  ## fused against eager and torch.compile on photographs: table, CSV, JSON, picture (< 8 minutes)
	.venv-bench/bin/python -m resnet_fast.bench suite $(BENCH_ARGS)

bench-ops: .venv-bench/.done  ## pytest-benchmark over the operators and models
	.venv-bench/bin/python -m pytest benchmarks/ops benchmarks/models -o python_files='bench_*.py' -o python_functions='bench_*' $(PYTEST_ARGS)

test: .venv-test/.done  ## the tests (< 15 minutes)
	.venv-test/bin/python -m pytest -m 'not slow and not gpu and not proof' $(PYTEST_ARGS)

test-all: .venv-test/.done  ## the tests, the long ones too
	.venv-test/bin/python -m pytest -m 'not gpu' $(PYTEST_ARGS)

lint: .venv-lint/.done  ## ruff and clang-format, changing nothing
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs .venv-lint/bin/clang-format --dry-run --Werror

format: .venv-lint/.done  ## ruff and clang-format, in place
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs .venv-lint/bin/clang-format -i

# A second build beside the first. The sanitizers' libraries must be the first in the process, Python itself is built
# without them; libstdc++ comes along so that a thrown exception is intercepted. Leaks: Python's own, not checked.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
CXX ?= g++
sanitize: .venv-test/.done  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' 'pybind11>=2.13'
	CFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' .venv-test/bin/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	.venv-test/bin/pytest tests/kernels -p no:cacheprovider $(PYTEST_ARGS)

gpu-proof: .venv-test/.done  ## what can be proved about the GPU kernels without a GPU
	.venv-test/bin/python -m pytest tests/triton tests/cuda -m 'proof or not proof' $(PYTEST_ARGS)

gpu: .venv-bench/.done .venv-test/.done  ## on a machine with a GPU: tests, compute-sanitizer, benchmark
	.venv-test/bin/python -m pytest -m gpu $(PYTEST_ARGS)
	compute-sanitizer --error-exitcode 1 .venv-test/bin/python -m pytest -m gpu tests/triton tests/cuda $(PYTEST_ARGS)
	.venv-bench/bin/python -m resnet_fast.bench suite --device cuda --batch 1,64,256 --train-batch 128 --dtype float32,bfloat16 $(BENCH_ARGS)

info: .venv-bench/.done  ## what is built, what would run here, and why not
	.venv-bench/bin/python -m resnet_fast.info

clean:  ## remove what was made here: environments, builds, caches (results stay)
	rm -rf .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks resnet_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
