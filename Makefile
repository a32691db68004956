# make run    evaluate two small models as they are and under every config, and write the reports   (FRESH=1 starts over)
# make test   run every test, offline
# make demo   chat with the default model in the browser, with and without techniques   (DEMO="--port 8000")
PYTHON ?= python3
OUT ?= runs/default
TINY_OUT ?= runs/puzzles
# questions a task: a few minutes in all on 2 cores, most where the default model is able
LIMIT ?= mllm_vqa=32,mllm_caption=8,mllm_reading=12,mllm_docqa=6,mllm_text=6
# one by one: a batch is as deep as its deepest prompt
BATCH ?= 1
TASKS ?= mllm_vqa,mllm_caption,mllm_reading,mllm_docqa,mllm_text
TINY_TASKS ?= puzzle_scenes,puzzle_choice,puzzle_list,puzzle_counting,puzzle_words
TINY_LIMIT ?= 60
PYTEST ?=
DEMO ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: run test demo lint clean

run: $(INSTALLED)
	$(BIN)/mllm fetch-default
	HF_HUB_OFFLINE=1 $(BIN)/mllm eval --model default --configs configs/*.yaml configs/default/*.yaml --tasks $(TASKS) \
		--limit $(LIMIT) --batch-size $(BATCH) --out $(OUT) $(if $(FRESH),--fresh)
	HF_HUB_OFFLINE=1 $(BIN)/mllm eval --model tiny --configs configs/*.yaml configs/tiny/*.yaml --tasks $(TINY_TASKS) \
		--limit $(TINY_LIMIT) --batch-size $(BATCH) --out $(TINY_OUT) $(if $(FRESH),--fresh)

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 $(PYTEST)

demo: $(INSTALLED)
	$(BIN)/mllm fetch-default
	HF_HUB_OFFLINE=1 $(BIN)/mllm demo $(DEMO)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e ".[all,dev]"
	touch $(INSTALLED)

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache *.egg-info
