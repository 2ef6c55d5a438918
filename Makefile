# Everything runs in .venv. An install is remembered by a stamp in there and done again when pyproject.toml changes.
# All paths are relative, so that the folder's own path may hold anything, spaces too.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# the first of these that is Python 3.11 or newer; name another with `make PYTHON=... install`
PYTHON ?= $(shell for p in python3.11 python3; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
ARGS ?=
# test processes that run at a time, each a whole file; 0 runs everything in one
WORKERS ?= auto
RUN := .venv/bin/python -m
STAMP := .venv/.installed

.PHONY: help install quickstart test bench docs soak lint clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv and install the package into it

quickstart: $(STAMP)-plots ## train with and without recipes on embedded data: a table and a picture, a few minutes
	$(RUN) lightning_recipes.quickstart $(ARGS)

test: $(STAMP)-test ## run the whole test suite; options for pytest in ARGS="-k aaer -x"
	$(RUN) pytest --numprocesses=$(WORKERS) --dist=loadfile $(ARGS)

bench: $(STAMP)-bench ## measure what recipes cost, hours for all of it; ARGS="bytes imports", ARGS="steps AAER --blocks 1"
	$(RUN) benchmarks $(ARGS)

docs: $(STAMP)-docs ## build the documentation into site/, warnings are errors; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict $(ARGS)

soak: $(STAMP)-test ## kill and resume runs with random recipes for an hour, and count what is lost
	$(RUN) tests.soak $(ARGS)

lint: $(STAMP)-test ## check the code's style
	$(RUN) ruff check $(ARGS) .

clean: ## remove build output, caches and run folders
	rm -rf build dist site soak lightning_logs .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	"$(PYTHON)" -m venv .venv
	@touch $@

$(STAMP): .venv/.made pyproject.toml
	$(RUN) pip install --disable-pip-version-check -e .
	@touch $@

$(STAMP)-%: .venv/.made pyproject.toml
	$(RUN) pip install --disable-pip-version-check -e ".[$*]"
	@touch $@ $(STAMP) $(STAMP)-plots # every extra here has it in it
