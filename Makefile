# A fresh machine needs 64-bit Linux, Python >= 3.11, a C++ compiler and make. Each target makes the environment it lacks.
PYTHON ?= python3
VENV ?= .venv
# The build of torch is chosen here, not in the package. TORCH_INDEX: another index to take it from, such as one of
# those that pytorch.org names, where the default one has no build for this machine or a larger one than it needs.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# 1 where an NVIDIA GPU answers: then torch must have CUDA, and the [cuda] extra comes too. `make CUDA= demo` does without.
ifeq ($(origin CUDA),undefined)
CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
endif
PYTEST_ARGS ?=

AMX_TESTS := $(addprefix tests/engines/test_openvino_,in_16_bits.py pairs.py tiles.py)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMPS := $(VENV)/.stamps
CXX_SOURCES := $(wildcard csrc/*)
PACKAGE_SOURCES := pyproject.toml setup.py README.md $(CXX_SOURCES)
SOURCES := $(shell find posecrafter_rt kernels export -name node_modules -prune -o -type f -not -name '*.pyc' -not -name '*.so' -print)
WHEEL_DIR := build/wheel
WEB := posecrafter_rt/serve/web
STATIC := posecrafter_rt/serve/static
comma := ,
say = @echo "==> $(1)"
# TensorRT's library comes from an index of NVIDIA's own, which may be out of reach: everything works without it.
define add_cuda
@test -z "$(CUDA)" || { echo "==> TensorRT and xformers"; $(PIP) -e '.[cuda]'; } || \
  echo "note: without them engines are torch's; '$(BIN)/python -m pip install -e .[cuda]' tries again"
endef

.PHONY: demo install test test-slow test-browser check lint types page page-with-npm web wheel bench-gpu clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo
	$(BIN)/posecrafter-rt demo --output demo $(if $(wildcard demo/metrics.json),--force)

install: $(STAMPS)/demo

# With compiled files of the package kept: tests start some hundred processes that import it.
test: $(STAMPS)/dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# AMX's products, too, in software where the processor has none; and where npm is, the page with its own tracking.
test-slow: $(STAMPS)/dev $(if $(shell command -v npm),web)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	$(BIN)/python -m pytest -n auto -p tests.emulated_amx $(AMX_TESTS)

# The page of `serve` in the system's Chromium; skipped, with the reason, where there is none.
test-browser: $(STAMPS)/dev
	$(BIN)/python -m pytest -rfEs -m "browser and not slow" tests/serve/browser $(PYTEST_ARGS)

check: lint types page wheel

lint: $(STAMPS)/dev
	$(call say,ruff and clang-format)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "hint: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(wildcard posecrafter_rt/engines/operations/* tests/native/*.cpp tests/native/*.h)

# kernels/ and export/ are subpackages that lie elsewhere; mypy finds them through a folder of links that looks installed.
types: $(STAMPS)/dev
	$(call say,mypy)
	@rm -rf build/types && mkdir -p build/types/posecrafter_rt
	@ln -s $(CURDIR)/posecrafter_rt/* $(CURDIR)/kernels $(CURDIR)/export build/types/posecrafter_rt/
	@cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p posecrafter_rt

# The page of `serve`: checked and tested where npm is, and what is committed must be what its sources give.
page:
	@command -v npm >/dev/null || { echo "==> page: not checked, npm is not installed"; exit 0; } && $(MAKE) --no-print-directory page-with-npm

page-with-npm: web
	@cd $(WEB) && npm run --silent check && { npm test --silent >/dev/null || { npm test; exit 1; }; }
	@test -z "$$(git status --porcelain -- $(STATIC))" || { echo "error: $(STATIC) is not what its sources give" >&2; \
	  echo "hint: commit what \`make web\` wrote" >&2; exit 1; }

# Builds the page, and adds the tracker that follows a webcam's person in the browser (26 MB, not committed).
web:
	$(call say,page: npm packages$(comma) build)
	@cd $(WEB) && npm ci --silent --no-audit --no-fund && npm run --silent build -- --logLevel warn

# Imported from another folder in an environment that has numpy and nothing else: what is lean stays lean.
wheel: $(STAMPS)/wheel
	@test -e $(STATIC)/tracker || echo "note: the wheel leaves out the page's tracker, for $(STATIC)/tracker is not there; 'make web', then 'make wheel' adds it"

$(STAMPS)/wheel: $(STAMPS)/dev $(PACKAGE_SOURCES) $(SOURCES) tests/wheel_check.py
	$(call say,wheel: build$(comma) install into an empty environment$(comma) import)
	@rm -rf $(WHEEL_DIR) build/lib* build/bdist*
	@$(BIN)/python -m build --wheel --outdir $(WHEEL_DIR) . >$(VENV)/wheel.log 2>&1 || { tail -40 $(VENV)/wheel.log >&2; exit 1; }
	@$(BIN)/python -m venv $(WHEEL_DIR)/venv
	@$(WHEEL_DIR)/venv/bin/python -m pip install --quiet --disable-pip-version-check numpy
	@$(WHEEL_DIR)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(WHEEL_DIR)/*.whl
	@cd / && $(abspath $(WHEEL_DIR))/venv/bin/python $(CURDIR)/tests/wheel_check.py
	@touch $@

bench-gpu: $(STAMPS)/dev
	@test -n "$(CUDA)" || { echo "error: no NVIDIA GPU answers on this machine" >&2; exit 1; }
	$(BIN)/python -m bench.gpu

# The stamps go with the extension, so that the next target builds it again. demo/ stays: it holds an avatar.
clean:
	rm -rf build dist *.egg-info posecrafter_rt/_native*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(addprefix $(STAMPS)/,demo dev wheel)

$(BIN)/python:
	$(call say,environment in $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11" >&2; echo "hint: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import platform, sys; libc, version = platform.libc_ver(); is_new = libc == "glibc" and \
	  tuple(map(int, version.split(".")[:2])) >= (2, 28); \
	  sys.exit(sys.platform == "linux" and not (is_new and sys.maxsize > 2**32))' || \
	  { echo "error: torch has no build for this system: it needs 64-bit Linux with glibc 2.28 or newer" >&2; \
	  echo "hint: such as Debian 12 or Ubuntu 24.04, in a container if need be" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make environments" >&2; \
	  echo "hint: on Debian and Ubuntu: apt install python3-venv python3-dev" >&2; exit 1; }

# torch comes first and alone, so that the range in the package's metadata does not choose another build of it.
$(STAMPS)/torch: | $(BIN)/python
	$(call say,$(TORCH) (the largest part of the installation))
	@$(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@test -z "$(CUDA)" || $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	  { echo "error: an NVIDIA GPU is here, but this build of torch has no CUDA" >&2; \
	  echo "hint: make TORCH_INDEX=URL with the CUDA index that pytorch.org names, or make CUDA= to do without" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(PACKAGE_SOURCES) $(STAMPS)/torch
	$(call say,posecrafter-rt with what the demo needs)
	@$(PIP) -e '.[demo]'
	$(add_cuda)
	@touch $@

# rtmlib without its dependencies: all are here already but for further builds of OpenCV, which would overwrite ours.
$(STAMPS)/dev: $(PACKAGE_SOURCES) $(STAMPS)/torch
	$(call say,posecrafter-rt with what the tests need)
	@$(PIP) -e '.[demo,serve,dev]'
	@$(PIP) --no-deps rtmlib
	$(add_cuda)
	@touch $@ $(STAMPS)/demo
