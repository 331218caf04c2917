# Two commands on a fresh machine: `make bench` and `make test`. They need python3 with venv, g++, make, git and a
# package index; all else (cmake and ninja too) comes from there into .venv, and nothing is installed outside it.
#
#   make bench       environment, wheel, the quick benchmark        make dev     build in place: PYTHONPATH=python
#   make test        environment, wheel, the tests                  make wheel   release wheel, all GPU generations
#   make test-deep   what `make test` leaves out: see below         make sdist   and a wheel from it
#   make doctor      what runs on this machine, and why             make lint    ruff, clang-format; `make format` mends
#   make mutants     plant small bugs everywhere in the CUDA sources: do the tests notice? FAMILY= SAMPLE= SEED= JOBS=
#   make test-slow   tests marked slow; make test-schedules: the simt tests under the emulator's other schedules
#   make docs-check  tables and examples of the docs                make clean   all but .venv; `make distclean`: that too
#   make sanitize-address   tests of the CPU code under ASan and UBSan; make sanitize-thread: under TSan
#   make cuda-static STATIC_ARCHS=90  registers, spills, instructions of the CUDA kernels; make cuda-budget writes them anew
#   make gpu-check  all that needs a GPU, in phases (PHASES="build tests"); make gpu-check-dry: without one, in CI
#
# PYTHON=python3.11 chooses the interpreter, CUDAARCHS="80;90" the GPU generations, GMKERNELS_CUDA=OFF a CPU-only build.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --no-input -q
STAMPS := $(VENV)/stamps

unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_REQUIRE_VIRTUALENV := 1
export PATH := $(abspath $(VENV)/bin):$(PATH)

# What the wheel is made of. Build outputs of `make dev` are not: they are no reason to build again.
SOURCES := CMakeLists.txt $(wildcard cmake/*) pyproject.toml constraints.txt $(sort $(shell find csrc python bench \
  -name __pycache__ -prune -o -type f ! -name '*.so' ! -name '*.pyc' ! -path 'bench/results/*' -print))
CPP := $(sort $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/simt/*.h tests/simt/*.cpp tests/simt/*.cu \
  tests/sanitize/*.cpp tests/gpu/*.cu))

# One GPU generation is enough to work with: that of the GPU here, else Hopper. `make wheel` builds for all.
LOCAL_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$$' \
  | tr -d . | sort -u | paste -sd';')
DEV_ARCHS := $(or $(CUDAARCHS),$(LOCAL_ARCHS),90)
# A build for other settings is another build: the stamp carries them.
WHEEL_STAMP := $(STAMPS)/wheel-$(subst ;,-,$(DEV_ARCHS))-$(or $(GMKERNELS_CUDA),AUTO)

FAMILIES := $(filter-out cuda,$(sort $(notdir $(patsubst %/,%,$(dir $(wildcard csrc/*/*.cu))))))
FAMILY_TESTS := $(sort $(foreach family,$(FAMILIES),$(wildcard tests/test_$(family)*.py)))
SANITIZE := sanitize-address sanitize-thread
.PHONY: help bench test test-deep test-slow test-schedules mutants doctor dev wheel sdist lint format docs-check clean distclean \
  $(SANITIZE) cuda-static cuda-budget gpu-check gpu-check-dry

help:
	@sed -n 's/^#   make /make /p' Makefile

# environment ----------------------------------------------------------------------------------------------------------

$(STAMPS)/env: constraints.txt
	@echo "== environment: .venv, everything pinned in constraints.txt (a few minutes the first time)"
	command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on PATH: install Python 3.11 or newer, or set PYTHON="; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): set PYTHON="; exit 1; }
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "this Python has no venv: e.g. apt-get install python3-venv"; exit 1; }
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip -c constraints.txt
	$(PIP) install torch -c constraints.txt
	$(PIP) install -r constraints.txt
	mkdir -p $(STAMPS)
	touch $@

# Built in isolation, as a user's `pip install` would, and installed as a wheel: what is tested is what is shipped.
$(WHEEL_STAMP): $(STAMPS)/env $(SOURCES)
	@echo "== wheel: GPU generations $(DEV_ARCHS) where nvcc is found"
	command -v $${CXX:-g++} >/dev/null || { echo "no g++ on PATH: e.g. apt-get install g++"; exit 1; }
	rm -rf build/wheel
	started=$$SECONDS
	CUDAARCHS="$(DEV_ARCHS)" $(PIP) wheel . --no-deps --build-constraint constraints.txt -w build/wheel
	$(PIP) install --no-deps --force-reinstall build/wheel/gmkernels-*.whl
	$(PIP) check
	echo "== wheel: $$((SECONDS - started)) s, $$(du -h build/wheel/*.whl | cut -f1)"
	rm -f $(STAMPS)/wheel-*
	touch "$@"

# what people run ------------------------------------------------------------------------------------------------------

bench: $(WHEEL_STAMP)
	@$(PY) -m gmkernels bench --quick

doctor: $(WHEEL_STAMP)
	@$(PY) -m gmkernels doctor

# Two processes: the emulator and most of what Python does are one thread. A thread that waits for its team must not spin
# then. worksteal keeps neighbours together, which share what torch has loaded, and no long file is left for the end.
test: $(WHEEL_STAMP)
	@echo "== tests"
	OMP_WAIT_POLICY=passive $(PY) -m pytest tests -m "not slow" -n 2 --dist worksteal

# All of them, also when one fails, each with its wall and CPU seconds.
DEEP := test-slow test-schedules sanitize-address sanitize-thread cuda-static
test-deep: $(WHEEL_STAMP)
	@failed=()
	for part in $(DEEP); do
	  echo "== deep: $$part"
	  TIMEFORMAT="== deep: $$part: %0R s, CPU %0U + %0S s"
	  time $(MAKE) $$part || failed+=($$part)
	done
	echo "== deep: $${failed[*]:+FAILED: }$${failed[*]:-all passed}"
	[ $${#failed[@]} = 0 ]

test-slow: $(WHEEL_STAMP)
	@OMP_WAIT_POLICY=passive $(PY) -m pytest tests -m slow -n 2 --dist worksteal

# Ascending is the one that `make test` takes; two processes, because the emulator is one thread.
test-schedules: $(WHEEL_STAMP)
	@for schedule in $$(PYTHONPATH=tests $(PY) -c "from simt import SCHEDULES; print(*SCHEDULES[1:])"); do
	  echo "== emulator, schedule $$schedule"
	  OMP_WAIT_POLICY=passive GMK_SIMT_SCHEDULE=$$schedule $(PY) -m pytest -n 2 -m "not slow" -k "simt and not huge" $(FAMILY_TESTS)
	done

# All generations and the disassembly; STATIC_ARCHS=90 is the quick form, without it.
cuda-static: $(STAMPS)/env
	@$(PY) tests/cuda_static/check.py $(if $(STATIC_ARCHS),--archs $(STATIC_ARCHS) --no-sass)

cuda-budget: $(STAMPS)/env
	@$(PY) tests/cuda_static/check.py --write

# With the machine's own Python: it has a torch that fits its driver. The dry run takes .venv's.
gpu-check:
	@$(PYTHON) tests/gpu/check.py $(if $(OUT),--out "$(OUT)") $(PHASES)

gpu-check-dry: $(STAMPS)/env
	@$(PY) tests/gpu/check.py --dry $(PHASES)

$(SANITIZE): sanitize-%: $(STAMPS)/env
	@OMP_WAIT_POLICY=passive $(PY) tests/sanitize/run.py $*

mutants: $(WHEEL_STAMP)
	@PYTHONPATH=tests $(PY) -m mutation --family "$(FAMILY)" --sample $(or $(SAMPLE),0) --seed $(or $(SEED),0) --jobs $(or $(JOBS),2)

docs-check: $(WHEEL_STAMP)
	@echo "== docs: generated tables, runnable examples"
	$(PY) -m gmkernels.bench.tables --check
	$(PY) -m gmkernels.bench.real --check
	$(PY) -m pytest tests/test_docs.py

# to work on a kernel --------------------------------------------------------------------------------------------------

dev: $(STAMPS)/env
	@echo "== in place: build/dev, then PYTHONPATH=python"
	CUDAARCHS="$(DEV_ARCHS)" cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DGMKERNELS_CUDA=$(or $(GMKERNELS_CUDA),AUTO)
	cmake --build build/dev
	cmake --install build/dev --prefix python
	ln -sfn ../../bench python/gmkernels/bench

lint: $(STAMPS)/env
	@echo "== ruff, clang-format"
	$(PY) -m ruff check .
	clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/env
	@$(PY) -m ruff check --fix .
	clang-format -i $(CPP)

# to ship --------------------------------------------------------------------------------------------------------------

# libgomp stays outside the wheel: it must be the one that torch has loaded. The manylinux tag is that of this machine's
# glibc; for the tag that torch has, run this in its manylinux image.
wheel: $(STAMPS)/env
	@echo "== release wheel: GPU generations $(or $(CUDAARCHS),all)"
	rm -rf build/release-wheel
	$(PIP) wheel . --no-deps --build-constraint constraints.txt -C build-dir=build/release -w build/release-wheel
	mkdir -p dist
	case "$$(uname -s)" in
	  Linux) auditwheel repair --exclude libgomp.so.1 -w dist build/release-wheel/gmkernels-*.whl ;;
	  *) cp build/release-wheel/gmkernels-*.whl dist/ ;;
	esac
	ls -l dist

sdist: $(STAMPS)/env
	@echo "== sdist, and a wheel from it"
	rm -rf build/from-sdist dist/gmkernels-*.tar.gz
	$(PY) -m build --sdist -o dist . >/dev/null
	CUDAARCHS="$(DEV_ARCHS)" $(PIP) wheel dist/gmkernels-*.tar.gz --no-deps --build-constraint constraints.txt -w build/from-sdist
	ls -l dist/*.tar.gz build/from-sdist/*.whl

clean:
	@rm -rf build dist $(STAMPS)/wheel-* python/gmkernels/_C*.so python/gmkernels/bench .pytest_cache .ruff_cache .hypothesis

distclean: clean
	@rm -rf $(VENV)
