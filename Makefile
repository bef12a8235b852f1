# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo    sets up, then runs the shipped sweep `digits`
#   make test    sets up, then passes the tests
PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test slow steady faults clusters autoscaling gpu bench lint setup lock clean

setup: .venv/.ready

# Bytecode is compiled once here: every Ray process imports torch, and would compile it again without.
.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python -e .
	touch $@

demo: setup
	$(BIN)/python -m diffult_ray.sweep digits

test: setup lint
	$(BIN)/python -m pytest --doctest-modules diffult_ray
	$(BIN)/python -m pytest -m "not slow and not faults and not cluster and not autoscaling and not gpu"

# Over half an hour on two cores.
slow: setup
	$(BIN)/python -m pytest -m slow

# A part of it that CI runs, too, 15 to 21 minutes: stages, methods and data without kills.
STEADY := $(addprefix tests/test_,stages.py folder_of_digits.py methods.py inception.py preflight.py)

steady: setup
	$(BIN)/python -m pytest -m slow -k "not killed" $(STEADY)

# Kills, damage and outages during whole sweeps, about an hour and a half on two cores; the last line counts them.
faults: setup
	$(BIN)/python -m pytest -m faults tests/faults

# Sweeps on several raylets, with machines that come, go and are drained; not part of .ci/run.
clusters: setup
	$(BIN)/python -m pytest -m cluster

# A cluster of several nodes on this machine that grows and shrinks; not part of .ci/run.
autoscaling: setup
	$(BIN)/python -m pytest -m autoscaling

# Every path of a GPU against the CPU, on a machine that has one; not part of .ci/run.
gpu: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

# Ratios of two things measured in turns, about twenty minutes on two idle cores: docs/BENCHMARKS.md.
# CIFAR=DIR adds those on the real CIFAR-100. GPU=1 takes those of a GPU instead.
BENCHMARKS := unet classifier scoring kid precision bench_batches plan report
ON_CIFAR := epochs scaling
ON_GPU := --gpu --compile --graphs --threads 4

bench: setup
	mkdir -p build
ifdef GPU
	$(BIN)/python tests/benchmarks/unet.py $(ON_GPU) --batch 48 --inner 12 --only training >> build/bench.jsonl
	$(BIN)/python tests/benchmarks/unet.py $(ON_GPU) --batch 256 --inner 12 --only evaluation >> build/bench.jsonl
	$(BIN)/python tests/benchmarks/classifier.py $(ON_GPU) --inner 100 >> build/bench.jsonl
	$(BIN)/python tests/benchmarks/classifier.py $(ON_GPU) --inner 100 --at-once 1 2 4 8 >> build/bench.jsonl
else
	for each in $(BENCHMARKS); do $(BIN)/python tests/benchmarks/$$each.py >> build/bench.jsonl || exit 1; done
	for each in $(if $(CIFAR),$(ON_CIFAR)); do \
	  $(BIN)/python tests/benchmarks/$$each.py --root $(CIFAR) >> build/bench.jsonl || exit 1; done
endif
	$(BIN)/python docs/benchmarks.py docs/benchmarks.jsonl build/bench.jsonl

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# The torch pair is named: torchvision from the package index needs the CUDA build of torch beside it.
lock:
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > .pair.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-header \
	  --no-emit-index-url --constraint .pair.txt pyproject.toml -o requirements.lock
	rm .pair.txt

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache
