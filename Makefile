# The README's two commands are `make compare` and `make test`; both set up .venv by themselves. `make compare` installs
# what it needs itself and compiles the kernels for this processor alone; all else installs the rest as well, with the
# kernels for every instruction set, and from then on `make compare` takes that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= normwise-out
STAMP := $(VENV)/.installed
NEVER_ASKED := build/never-asked.json
TO_COMPARE := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.installed-to-compare)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/* csrc/*/*/*)
CPP := $(filter %.h %.cpp,$(SOURCES))

.PHONY: compare test test-all-kernels test-without-kernels test-models test-trainers test-triton test-aarch64
.PHONY: triton-budgets lint format bench docs wheel test-wheel clean

compare: $(TO_COMPARE)
	$(BIN)/normwise compare --out $(OUT)

test: test-all-kernels test-without-kernels

# The tests of the kernels run on every instruction set that the processor has, and list the others as skipped.
test-all-kernels: $(STAMP)
	$(BIN)/python -m pytest -n auto --note-never-asked=$(NEVER_ASKED)

# What must work without a compiler as well. Left out are the tests that name the backend they run on ("kernels", "no
# kernels", "aten", "reference"): without a library they are skipped, or run what they have run already; and, where the
# tests have just run with a library, those that never asked whether it is there.
test-without-kernels: $(STAMP)
	NORMWISE_ISA=none $(BIN)/python -m pytest -n auto --where-the-library-counts --never-asked=$(NEVER_ASKED) \
		tests/nn tests/ops tests/surgery tests/diagnosis

# Models of transformers, timm and diffusers, made from their configurations: nothing is downloaded but the libraries.
test-models: $(VENV)/.models
	$(BIN)/python -m pytest -n auto tests/models

# Callbacks and loggers in Lightning, transformers' Trainer, TensorBoard and Weights & Biases (offline).
test-trainers: $(VENV)/.trainers
	$(BIN)/python -m pytest -n auto tests/trainers

# The GPU kernels without a GPU: run by Triton's interpreter on the CPU, and compiled for three GPUs.
test-triton: $(VENV)/.triton $(VENV)/.triton-3.6
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/triton_kernels

# The kernels for arm64 on another processor: cross-compiled, and run by an emulator.
test-aarch64: $(STAMP)
	$(BIN)/python -m pytest tests/aarch64

# What the kernels take of a GPU, written anew: read the difference before you commit it.
triton-budgets: $(VENV)/.triton $(VENV)/.triton-3.6
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python tests/triton_kernels/compile_launches.py \
		--budgets tests/triton_kernels/budgets.json >/dev/null

$(VENV)/.triton: $(STAMP)
	$(BIN)/python scripts/install_extra.py triton --quiet -c constraints.txt
	touch $@

# The Triton of torch 2.11, to compile with; its interpreter fails with the NumPy that the tests run with.
$(VENV)/.triton-3.6: $(STAMP)
	rm -rf $(VENV)/triton-3.6
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(VENV)/triton-3.6 triton==3.6.0
	touch $@

$(VENV)/.models: $(STAMP)
	$(BIN)/python scripts/install_extra.py models --quiet -c constraints.txt
	touch $@

$(VENV)/.trainers: $(STAMP)
	$(BIN)/python scripts/install_extra.py trainers --quiet -c constraints.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks --json bench.json

# Needs Python 3.11. The second line knows what the first lets pass: files that are missing, pages outside of nav.
docs: $(STAMP)
	$(BIN)/zensical build --clean --strict
	$(BIN)/python scripts/check_site.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# constraints.txt holds exact versions, so that every machine tests the same packages
# (and pip does not fetch a build of torch that weighs several GB).
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The kernels are compiled while the packages are installed, which takes one core. Of their Python files most are never
# imported: those that are, Python compiles by itself (--no-compile). Editable installs need pip 21.3.
$(VENV)/.installed-to-compare: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import pip, sys; sys.exit(int(pip.__version__.partition(".")[0]) < 22)' || $(BIN)/python -m pip install --quiet --upgrade pip
	NORMWISE_LEVELS=native $(BIN)/python -m pip install --quiet --no-deps --no-compile -e '.[lab]' & kernels=$$!; \
	$(BIN)/python scripts/install_extra.py lab --quiet --no-compile -c constraints.txt; packages=$$?; \
	wait $$kernels && test $$packages = 0
	touch $@

# What is released of Linux, but for the container that cibuildwheel builds in: a source distribution and, built from
# that, a wheel, which auditwheel labels by the oldest C library that it runs with. libgomp is torch's.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist/unlabelled .
	mv dist/unlabelled/*.tar.gz dist/
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist dist/unlabelled/*.whl
	rm -r dist/unlabelled

# The wheel where there is no compiler: WHEEL_OPTIONS="-c constraints.txt" installs torch, too, instead of borrowing it.
WHEEL_OPTIONS ?= --torch-of $(VENV)
test-wheel: wheel
	$(BIN)/python scripts/check_wheel.py --sdist dist/*.tar.gz $(WHEEL_OPTIONS) dist/*.whl

clean:
	rm -rf $(VENV) build dist site .cache .pytest_cache .mypy_cache .ruff_cache
	rm -rf CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja cmake_install.cmake .ninja_deps .ninja_log
	rm -f src/normwise/backends/cpu/libnormwise.*
