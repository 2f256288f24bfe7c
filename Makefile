# make demo   train all three stages on the bundled data and check what was learned (minutes on two CPU cores)
# make test   run the tests
# make lint   ruff
# Each makes .venv and installs everything into it first, when it is missing or requirements changed.
# make bench  time every stage against its references on this machine's CPU (under 15 minutes)
# make bench-gpu   the same on a GPU, in the environment at hand: needs requirements.txt only (under 10 minutes)
# PYTHON=python3.12 make demo   chooses the interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed

.PHONY: demo test lint data bench bench-gpu clean

demo: $(READY)
	$(VENV)/bin/python demo.py

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

data: $(READY)
	$(VENV)/bin/python -m datasets.phantoms --dest Training_Data --volumes_per_anatomy 10 --images 32 --seed 0

$(READY): requirements.txt requirements-tools.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

bench: $(READY)
	$(VENV)/bin/python -m benchmarks.attention
	$(VENV)/bin/python -m benchmarks.kmeans
	$(VENV)/bin/python -m benchmarks.stage2
	$(VENV)/bin/python -m benchmarks.step

bench-gpu:
	$(PYTHON) -m benchmarks.attention --device cuda
	$(PYTHON) -m benchmarks.kmeans --device cuda
	$(PYTHON) -m benchmarks.stage2 --device cuda
	$(PYTHON) -m benchmarks.augmentation --device cuda
	$(PYTHON) -m benchmarks.step --device cuda --precisions [bf16] --batch_size 16 --images 128 --workers 8 --steps 30

clean:
	rm -rf runs .pytest_cache .ruff_cache Training_Data/.cache
