# make demo   train all three stages on the bundled data and check what was learned (minutes on two CPU cores)
# make test   run the tests
# make lint   ruff
# Each makes .venv and installs everything into it first, when it is missing or requirements changed.
# make bench  time every stage against its references on this machine's CPU (under 15 minutes)
# make bench-gpu   the same on a GPU, in the environment at hand: needs requirements.txt only (under 10 minutes)
# make experiments-cpu   the main comparison and its controls on SHARED (hours on two cores; the same again goes on); then make results
# make experiments-ablations   the same and what each part is worth
# PYTHON=python3.12 make demo   chooses the interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed

.PHONY: demo test lint data bench bench-gpu experiments-cpu experiments-ablations results clean

demo: $(READY)
	$(VENV)/bin/python demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

data: $(READY)
	$(VENV)/bin/python -m conversion.phantoms --dest Training_Data --volumes 6 --images 12 --seed 0

$(READY): requirements.txt requirements-tools.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

bench: $(READY)
	$(VENV)/bin/python -m benchmarks.step

STEP := --batch_size 16 --workers 8 --repeats 20
BF16 := --precisions [bf16] --images 128 --volumes 320

# All are run, whatever becomes of the others; the status is the worst of them. TO=FOLDER: after each, results go there.
bench-gpu:
	@set -f; worst=0; \
	for of in "step $(STEP) $(BF16) --parts [stage3,stage1]" \
		"step $(STEP) --volumes 160 --parts [stage2]" "data --parts [views]" \
		"step $(STEP) $(BF16) --parts [stage3] --compile true --reference false"; do \
		echo "$(PYTHON) -m benchmarks.$$of --device cuda"; \
		$(PYTHON) -m benchmarks.$$of --device cuda; code=$$?; \
		test $$code -le $$worst || worst=$$code; \
		test -z "$(TO)" || { mkdir -p "$(TO)"; cp benchmarks/results/nvidia*.json "$(TO)"; }; \
	done; exit $$worst

SHARED ?= ../shared/data
MINUTES ?= 0
EXPERIMENTS := experiments/main.yaml, experiments/controls.yaml
ABLATIONS := $(EXPERIMENTS), experiments/ablations.yaml

experiments-cpu: $(READY)
	$(VENV)/bin/python -m experiments.data --source $(SHARED)
	nice $(VENV)/bin/python -m experiments.run --experiments "[$(EXPERIMENTS)]" --minutes $(MINUTES)

experiments-ablations: $(READY)
	$(VENV)/bin/python -m experiments.data --source $(SHARED)
	nice $(VENV)/bin/python -m experiments.run --experiments "[$(ABLATIONS)]" --minutes $(MINUTES)

results: $(READY)
	$(VENV)/bin/python -m experiments.summarise --experiments "[$(ABLATIONS)]"

clean:
	rm -rf runs .pytest_cache .ruff_cache Training_Data/.cache
