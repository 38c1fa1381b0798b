# make demo   install into .venv, train AdaDim on handwritten digits with two processes, print the result
# make test   the test suite                 make check   format, lint, types, tests: what CI runs
#             PINS=cuda12 or PINS=cuda13 chooses the pinned set; else the GPU's driver does
#             WORKERS=2 processes of pytest share the test files
# make test-faults  a real Slurm, killed and hung ranks, full disks: an hour; before a release
# make bench  every benchmark, into runs/bench.md (25 minutes)
# make golden rewrite tests/golden (a diff there needs a line in CHANGELOG.md)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
WORKERS ?= 2
FAULTS ?= slurm or faults

.PHONY: demo test test-faults check bench format golden docs clean
.DEFAULT_GOAL := test

PINS := $(or $(PINS),$(shell $(PYTHON) ddp_ssl/driver.py 2>/dev/null))
INSTALLED := $(VENV)/.installed-$(PINS)

$(INSTALLED): setup.py constraints.txt constraints-cuda12.txt
	@case "$(PINS)" in cuda12 | cuda13) ;; \
	  *) echo "make: PINS=$(PINS): cuda12 or cuda13 would be accepted" >&2; exit 2 ;; esac
	@# Two sets in one environment would mix their CUDA libraries.
	@if ls $(VENV)/.installed* >/dev/null 2>&1 && [ ! -e $@ ]; then rm -rf $(VENV); fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python ddp_ssl/driver.py >/dev/null
	@echo "installing the set $(PINS) into $(VENV) (about 7 GB, a few minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(PINS),dev,plots,onnx]' \
	  -c $(if $(filter cuda12,$(PINS)),constraints-cuda12.txt,constraints.txt)
	@touch $@

demo: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(NPROC) -m ddp_ssl.train

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slurm and not faults"

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m "$(FAULTS)" -rs

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict ddp_ssl
	$(MAKE) test

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	@mkdir -p runs && : > runs/bench.md
	@for name in gpu_path losses lars step saving options input view_shards metrics scaling growth data \
	  start_up; do \
	  printf '\n## tools/bench/%s.py\n\n' $$name; $(BIN)/python tools/bench/$$name.py || exit 1; \
	done 2>runs/bench.err | tee -a runs/bench.md

golden: $(INSTALLED)
	$(BIN)/python -m tests.golden

docs: $(INSTALLED)
	$(BIN)/python tools/config_reference.py > docs/config.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
