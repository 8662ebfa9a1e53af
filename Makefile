# Two commands do everything on a fresh machine with Python 3.10+, gcc and make:
#   make demo    a language model learns by KLQ, on the GPU when there is one
#   make test    the whole test suite
# make bench: every op of the CPU, naive against fused
# make gpu, on a machine with an NVIDIA GPU: build for it, check every kernel on it, measure
# make step: one iteration of the loop by phases, beside TRL's PPO in an environment of its own
# make -j3 sanitize, there too: every kernel under compute-sanitizer
# All set up .venv by themselves. PYTHON=python3 uses that interpreter and its packages instead.

TORCH ?= torch==2.13.0
PYTHON ?=
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
TOOLS ?= memcheck racecheck initcheck
RUNS ?= runs
OUT ?= runs/bench
WORKERS ?= 8
SANITIZE := $(addprefix sanitize-,$(TOOLS))

ifeq ($(PYTHON),)
PY := .venv/bin/python
READY := .venv/.ready
else
PY := $(PYTHON)
READY := in-place
endif

# demo and test: on a machine others use too, OMP_NUM_THREADS=1 avoids stalls between threads
.PHONY: demo test bench step gpu sanitize $(SANITIZE) lint format in-place clean

demo: $(READY)
	$(PY) -m klq.cli train --preset exact --output_dir $(RUNS)/exact --overwrite
	$(PY) -m klq.cli train --preset docsum --output_dir $(RUNS)/docsum --overwrite

test: $(READY) $(if $(PYTHON),,lint)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal --durations=10

bench: $(READY)
	$(PY) -m klq.cli bench --device cpu --out $(OUT)

step: $(READY) .venv-trl/.ready
	$(PY) -m benchmarks.step --trl .venv-trl/bin/python --out $(OUT)

gpu: export KLQ_CUDA = 1
gpu: export TORCH_CUDA_ARCH_LIST ?= 9.0a
gpu: $(READY) in-place
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal tests/kernels \
	  --ignore=tests/kernels/test_triton_interpreter.py -k "cuda or triton or gpu"
	$(PY) -m klq.cli bench --device cuda --out $(OUT)

# a cudaMalloc a tensor: in a cached block nothing ends where the tensor ends, nor begins unwritten
sanitize: $(SANITIZE)
$(SANITIZE): export KLQ_CUDA = 1
$(SANITIZE): export TORCH_CUDA_ARCH_LIST ?= 9.0a
$(SANITIZE): export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
$(SANITIZE): export KLQ_RACECHECK = 1
$(SANITIZE): sanitize-%: $(READY) in-place
	compute-sanitizer --tool $* --error-exitcode 1 $(PY) -m pytest -q -m small -p no:xdist \
	  tests/kernels/test_gpu_small.py tests/kernels/test_gpu_linear.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $(shell find csrc -type f)

.venv/.ready: $(SOURCES)
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install -q $(TORCH) "setuptools>=77" wheel pybind11 ninja
	.venv/bin/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

# the last release with a PPO trainer; a torch of its own, or TORCH=...
.venv-trl/.ready:
	test -x .venv-trl/bin/python || $(or $(PYTHON),python3) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q $(TORCH) trl==1.12.0
	touch $@

in-place: $(if $(PYTHON),,$(READY))
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build dist *.egg-info klq_kernels/_C*.so
