# Two commands: `make demo` builds and runs the bundled model, `make test` runs every test.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Two files of tests at a time, each on one thread.
TWO    := -n 2 --dist loadfile
ENGINE := trtllm_models/tiny-yi_tp1_pp1

.PHONY: install demo test unit lint clean

install: $(VENV)/.installed

# torch comes first and pinned, so that the resolver takes one build of it and keeps it.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'torch==2.13.0'
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/python tools/setup_mpi.py
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	# A CUDA build of torch brings its Triton; beside a CPU build the interpreter tests the kernels.
	-$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/pip install -q 'triton==3.6.0'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python build.py --model_dir models/tiny-yi --output_dir $(ENGINE)
	$(BIN)/python run.py --engine_dir $(ENGINE) --max_output_len 60 \
	    --input_text "The module provides a function that" "A list is"

test: $(VENV)/.installed-dev lint
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO)

unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO) tests/unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) trtllm_models engine_outputs .pytest_cache .ruff_cache
