# make demo   install into .venv, train AdaDim on handwritten digits with two processes, print the result
# make test   the test suite                 make check   format, lint, types, tests: what CI runs
#             CUDA=cuda12 or CUDA=cuda13 installs that pinned set; else the GPU's driver decides
# make test-faults  a real Slurm, killed and hung ranks, full disks: the tests that take long
# make bench  every benchmark, into runs/bench.md (25 minutes)
# make golden rewrite tests/golden (a diff there needs a line in CHANGELOG.md)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2

.PHONY: demo test test-faults check bench format golden docs clean
.DEFAULT_GOAL := test

$(VENV)/.installed: setup.py constraints.txt constraints-cuda12.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; set=$${CUDA:-$$($(PYTHON) ddp_ssl/driver.py)}; \
	case $$set in cuda13) pins=constraints.txt ;; cuda12) pins=constraints-cuda12.txt ;; \
	  *) echo "make: CUDA=$$set: cuda12 or cuda13 would be accepted" >&2; exit 2 ;; esac; \
	echo "installing $$pins into $(VENV) (about 7 GB, a few minutes)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c $$pins -e ".[$$set,dev,plots,onnx]"
	@touch $@

demo: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(NPROC) -m ddp_ssl.train

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slurm and not faults"

test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slurm or faults" -rs

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict ddp_ssl
	$(MAKE) test

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	@mkdir -p runs && : > runs/bench.md
	@for name in gpu_path losses lars step saving options input view_shards metrics scaling growth data; do \
	  printf '\n## tools/bench/%s.py\n\n' $$name; $(BIN)/python tools/bench/$$name.py || exit 1; \
	done 2>runs/bench.err | tee -a runs/bench.md

golden: $(VENV)/.installed
	$(BIN)/python -m tests.golden

docs: $(VENV)/.installed
	$(BIN)/python tools/config_reference.py > docs/config.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
