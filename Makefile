# make help says what there is. All set-up happens on the way: .venv with the packages of
# constraints.txt, and the extension, built in place for this machine.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Where torch comes from besides pip's own configuration; auto: PyTorch's index of CPU builds where
# there is no GPU and the index can be reached. TORCH_INDEX= for none.
TORCH_INDEX ?= auto

# The CUDA kernels take minutes to compile: only where there is a GPU, and for that GPU.
ifndef SPECEXTEND_CUDA
SPECEXTEND_CUDA := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),AUTO,OFF)
endif

python  := $(VENV)/bin/python
cuda    := $(shell echo $(SPECEXTEND_CUDA) | tr A-Z a-z)
env     := $(VENV)/environment.json
flavour := build/flavour
built   := build/installed
sources := setup.py pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
module  := $(wildcard specextend/_C.*.so)

export SPECEXTEND_CUDA
export SPECEXTEND_BUILD_DIR := $(CURDIR)/build/$(cuda)
export CCACHE_BASEDIR ?= $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo picture test test-long test-newest test-oldest mutants bench build env lint format clean distclean FORCE
.DEFAULT_GOAL := help

help:
	@echo 'make demo       continue a document of 16,000 tokens, plainly and with SpecExtend, and compare'
	@echo 'make test       the tests; make test-long: the sweeps of many minutes'
	@echo 'make test-newest, make test-oldest    a look at both ends of what pip may install, each in'
	@echo '                an environment of its own (build/smoke)'
	@echo 'make mutants    faults planted one at a time, and which of them the tests notice (15 minutes)'
	@echo 'make picture    docs/images/web.png, the page of demo --web in chromium'
	@echo 'make bench      the ops against torch and against what this machine can do'
	@echo 'make build      the environment (.venv) and the extension alone'
	@echo 'make lint       ruff and clang-format, checking; make format: changing'
	@echo 'make clean      what was built; make distclean: the environment too'
	@echo
	@echo 'ARGS="..."           more arguments for demo, test, mutants or bench'
	@echo 'PYTHON=python3       the Python to make .venv from; its torch >= 2.10, if any, is kept'
	@echo 'SPECEXTEND_CUDA=     AUTO, ON or OFF; default: AUTO where there is a GPU, else OFF'
	@echo 'TORCH_INDEX=URL      an index to take torch from (now: $(TORCH_INDEX))'

# Threads that wait by spinning for milliseconds, as they do, make small models a hundred times as
# slow where something else wants their cores. A tenth of a millisecond costs nothing where not.
test test-long: export OMP_WAIT_POLICY ?= PASSIVE
# Tests run in several processes, so one thread in each.
test test-long: export OMP_NUM_THREADS ?= 1
# And they start some dozens: each would read torch and transformers from their sources for five
# seconds where Python is told to keep no bytecode.
test test-long: export PYTHONDONTWRITEBYTECODE =
workers := -n auto --maxprocesses 4 --dist worksteal
demo: export GOMP_SPINCOUNT ?= 10000

demo: $(built)
	@$(python) -m specextend demo $(ARGS)

picture: $(built)
	@SPECEXTEND_TEST_BROWSER=1 SPECEXTEND_WEB_PICTURE=docs/images/web.png \
	  $(python) -m pytest tests/test_web.py -k picture $(ARGS)

test: $(built)
	@$(python) -m pytest $(workers) $(ARGS)

test-long: $(built)
	@$(python) -m pytest $(workers) -m long $(ARGS)

test-newest test-oldest: test-%:
	@$(PYTHON) tools/smoke.py $* --torch-index='$(TORCH_INDEX)'

mutants: $(built)
	@$(python) tools/mutate.py $(ARGS)

bench: $(built)
	@$(python) bench/bench_ops.py $(ARGS)

build: $(built)
env: $(env)

# ---- set-up --------------------------------------------------------------------------------------

$(env): constraints.txt pyproject.toml tools/make_env.py $(flavour)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there: install Python >= 3.10," \
	  "or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) tools/make_env.py $(VENV) --torch-index='$(TORCH_INDEX)' --stamp=$@

# What the module was built for and with; changed only when that changes.
$(flavour): FORCE
	@mkdir -p build
	@is="$(VENV) $$SPECEXTEND_CUDA $$CMAKE_ARGS"; [ "$$is" = "$$(cat $@ 2>/dev/null)" ] || echo "$$is" > $@

$(built): $(env) $(flavour) $(sources) $(if $(module),,FORCE)
	@echo 'extension: building ($(if $(filter OFF,$(SPECEXTEND_CUDA)),CPU kernels,CUDA $(SPECEXTEND_CUDA)))'
	@$(python) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# ---- the rest ------------------------------------------------------------------------------------

# Tools of the versions in constraints.txt alone: others format otherwise.
linters := $(VENV)/linters
$(linters): constraints.txt | $(env)
	@$(python) -m pip install -q --no-deps -c constraints.txt ruff clang-format
	@touch $@

cxx := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: $(linters)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(cxx)

format: $(linters)
	@$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(cxx)

clean:
	rm -rf build dist *.egg-info specextend/_C.*.so

distclean: clean
	rm -rf $(VENV)
