# Two commands set everything up: `make demo` and `make test`. Both are idempotent and need no root and no server.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements

.PHONY: demo test quick bench bench-record bench-pages lint format kernels manifest wheel clean

# The environment: remade only when the pins change. setuptools and wheel travel with the pins, so that the install
# below needs no build isolation and stays incremental.
$(STAMP): requirements-dev.txt requirements-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vista: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cuda.txt
	@touch $@

# Build and install in place; a second run with nothing changed takes seconds.
.PHONY: install
install: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  --no-deps -e .

demo: install
	$(BIN)/vista demo

# The kernels in their emulator take half of the time and one core: most of them run beside the rest. An OpenMP thread
# that waited for the other core would only spin.
BESIDE := $(filter-out %/test_sglu.py %/test_sglu_sm90.py %/test_sglu_mutants.py,$(wildcard python_tests/kernels/test_*.py))
test: install
	@export OMP_NUM_THREADS=1; mkdir -p build; \
	$(BIN)/python -m pytest --durations=20 $(BESIDE) > build/test_kernels.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest --durations=20 $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$beside; code=$$?; cat build/test_kernels.log; exit $$((rest != 0 || code != 0))

quick: install
	$(BIN)/python -m pytest -m "not slow"

# Fails on a loss against the baseline of this kind of machine, in ratios; under 15 minutes on two cores.
RESULTS := build/bench.json
bench: install
	$(BIN)/python -m pytest bench/ --results $(RESULTS) --compare

# Measure and record anew: baseline, results page, scaling study. Read the diff.
bench-record: install
	rm -f $(RESULTS)
	$(BIN)/python -m pytest bench/ --results $(RESULTS)
	$(MAKE) bench-pages

# The same from results that are there.
bench-pages:
	$(BIN)/python -m bench.baseline --update $(RESULTS)
	$(BIN)/python -m bench.page $(RESULTS)
	$(BIN)/python -m bench.scaling $(RESULTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(abspath $(BIN))/clang-format --dry-run --Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(abspath $(BIN))/clang-format -i

# Compile gate for the CUDA kernels; needs nvcc, not a GPU. `VISTA_CUDA=1 make test` finds them compiled.
kernels: $(STAMP)
	$(BIN)/python tools/compile_kernels.py

# Record what nvcc made of each kernel, for the test that compares.
manifest: kernels
	$(BIN)/python tools/kernel_manifest.py --update

wheel: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist
