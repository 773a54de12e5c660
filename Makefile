# Each target first builds .venv from pyproject.toml with plain pip; later calls reuse it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint check bench
.NOTPARALLEL:

demo: $(STAMP)
	$(BIN)/tinymim demo

# Calls pytest itself, not `python -m pytest`, which would put the root on sys.path.
test: $(STAMP)
	@$(BIN)/pytest

# The link gives mypy a folder called tinymim whatever the checkout is called.
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p .cache && ln -sfn .. .cache/tinymim
	$(BIN)/mypy

# Exactly what .ci/run runs.
check: lint test

bench: $(STAMP)
	@for script in benchmarks/bench_*.py; do \
		[ -e "$$script" ] || continue; \
		echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
