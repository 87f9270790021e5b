# Every target sets up .venv first; when nothing changed, that takes no time worth mentioning.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test lint docs docs-check clean

help:
	@echo "make demo    set up, make the OpenMoji data, train, squeeze, evaluate (10 to 15 minutes on 2 CPU cores)"
	@echo "make test    set up, run all tests"
	@echo "make lint    set up, run ruff and mypy"
	@echo "make docs    set up, build the documentation into build/site"
	@echo "make docs-check  set up, run the commands of the documentation on small data"
	@echo "make setup   set up .venv only"
	@echo "make clean   remove what the targets above made: .venv, datasets/openmoji, output/openmoji, build/site"

setup:
	@$(PYTHON) tools/bootstrap.py --venv $(VENV)

demo: setup
	$(RUN) datasets/prepare_openmoji.py
	$(RUN) train_net.py --config-file configs/quick/openmoji.yaml --resume

# One thread a test process: two processes with two threads each would wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m mypy datasets/prepare_openmoji.py datasets/openmoji_scenes tools/bootstrap.py
	MYPYPATH=tools $(RUN) -m mypy tools/docs_site.py tools/docs_commands.py tools/docs_example.py tools/draw_stages.py tools/reference.py

docs: setup
	$(RUN) tools/settings.py --check
	$(RUN) tools/reference.py --check
	$(RUN) tools/draw_stages.py --check
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

docs-check: setup
	OMP_NUM_THREADS=1 $(RUN) tools/docs_commands.py

clean:
	rm -rf $(VENV) datasets/openmoji output/openmoji build/site
