# Every target makes the virtual environment it needs; nothing but Python and, for the compiled module, a C++ compiler
# has to be there. `make` alone lists the targets.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOURCES := $(shell find csrc tools -type f -not -name '*.pyc') setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help bench bench-ops test test-all lint format sanitize gpu-proof gpu gpu-steps info clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The package is installed in place (-e): whatever runs from this folder then finds the compiled module beside its source.
# --no-compile: only what is imported gets its bytecode, which saves a third of the installation.
# Without a card the benchmark's environment leaves the CUDA module out: compiling it takes longer than the benchmark.
.venv-bench/.done: export RESNET_FAST_CUDA ?= $(if $(shell command -v nvidia-smi),,0)
.venv-%/.done: $(SOURCES)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[$*]'
	@touch $@

.venv-lint/.done:
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --quiet --disable-pip-version-check ruff clang-format
	@touch $@

bench: .venv-bench/.done  ## fused against eager and torch.compile on photographs: table, CSV, JSON, picture
	.venv-bench/bin/python -m resnet_fast.bench suite $(BENCH_ARGS)

bench-ops: .venv-bench/.done  ## pytest-benchmark over the operators and models
	.venv-bench/bin/python -m pytest benchmarks/ops benchmarks/models -p no:cacheprovider -o python_files='bench_*.py' -o python_functions='bench_*' $(PYTEST_ARGS)

test: .venv-test/.done  ## the tests
	.venv-test/bin/python -m pytest -n auto --dist worksteal -m 'not slow and not gpu and not proof' $(PYTEST_ARGS)

test-all: .venv-test/.done  ## the tests, the long ones too
	.venv-test/bin/python -m pytest -n auto --dist worksteal -m 'not gpu' $(PYTEST_ARGS)

lint: .venv-lint/.done  ## ruff and clang-format, changing nothing
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs .venv-lint/bin/clang-format --dry-run --Werror

format: .venv-lint/.done  ## ruff and clang-format, in place
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs .venv-lint/bin/clang-format -i

# A copy of the tree, so that the build beside the sources stays. The sanitizers' libraries must be the first in the
# process, as Python itself is built without them; libstdc++ comes along so that a thrown exception is intercepted.
# Leaks are Python's own and not checked.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
CXX ?= g++
preload = $$($(CXX) -print-file-name=$(1))
sanitize: .venv-test/.done  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	.venv-test/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' 'pybind11>=2.13'
	mkdir -p build/sanitize
	rm -rf build/sanitize/csrc build/sanitize/resnet_fast build/sanitize/tests
	cp -rp csrc resnet_fast tests tools setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/resnet_fast/*.so
	cd build/sanitize && CFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' RESNET_FAST_CUDA=0 \
	  ../../.venv-test/bin/python setup.py -q build_ext --inplace
	cd build/sanitize && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$(call preload,libasan.so) $(call preload,libubsan.so) $(call preload,libstdc++.so.6)" \
	  PYTHONPATH=. ../../.venv-test/bin/python -m pytest tests/kernels tests/ops/test_residual_block.py tests/test_buffers.py -p no:cacheprovider $(PYTEST_ARGS)

gpu-proof: .venv-test/.done  ## what can be proved about the GPU kernels without a GPU
	.venv-test/bin/python -m pytest -n auto tests/triton tests/cuda -m 'proof or not proof' $(PYTEST_ARGS)
	.venv-test/bin/python tools/cuda_resources.py --check

# Unattended: ended after GPU_LIMIT seconds. Tests first, for GPU_TESTS seconds at most; whatever they say the benchmark
# follows, which names its files after the card; compute-sanitizer has what time is left. The exit status tells of all.
# Tests in several processes: most of their time is compiling. --foreground: the outer limit ends them too.
GPU_LIMIT ?= 540
GPU_TESTS ?= 180
gpu: .venv-bench/.done .venv-test/.done  ## on a machine with a GPU, in 9 minutes: tests, benchmark, compute-sanitizer
	timeout --kill-after=10 $(GPU_LIMIT) $(MAKE) --no-print-directory gpu-steps

gpu-steps:
	@status=0; \
	timeout --foreground --kill-after=10 $(GPU_TESTS) .venv-test/bin/python -m pytest -n auto -m gpu $(PYTEST_ARGS) || status=1; \
	.venv-bench/bin/python -m resnet_fast.bench --device cuda --minutes 4 --at-most 4.5 $(BENCH_ARGS) || status=1; \
	card=$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-'); \
	.venv-bench/bin/python tools/cuda_timing.py --csv "benchmarks/results/cuda-timing-$$card.csv" || status=1; \
	compute-sanitizer --error-exitcode 1 .venv-test/bin/python -m pytest -m gpu tests/triton tests/cuda $(PYTEST_ARGS) || status=1; \
	compute-sanitizer --tool racecheck --error-exitcode 1 .venv-test/bin/python -m pytest -m gpu tests/cuda $(PYTEST_ARGS) || status=1; \
	exit $$status

info: .venv-bench/.done  ## what is built, what would run here, and why not
	.venv-bench/bin/python -m resnet_fast.info

clean:  ## remove what was made here: environments, builds, caches (results stay)
	rm -rf .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks resnet_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
