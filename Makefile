# Every target sets up what it needs in .venv; the first takes a few minutes, later ones none.
PYTHON ?= python3
RAY_USAGE_STATS_ENABLED ?= 0
export RAY_USAGE_STATS_ENABLED
# Every Ray worker imports torch: without bytecode on disk each of them would compile it again, for five seconds.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED := .venv/installed

.PHONY: demo test chaos bench lint docs ui lock clean

demo: $(INSTALLED)  ## the main job: render, decode, search, train, compare; ends with a table and pictures
	@.venv/bin/python jobs/demo.py

# Two processes share two cores; threads of PyTorch that wait for each other must not spin.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

chaos: $(INSTALLED)  ## what takes minutes: jobs killed on the way, five minutes of mutated files
	.venv/bin/python -m pytest -m chaos tests/test_chaos.py
	GIFFY_RAY_FUZZ_S=300 .venv/bin/python -m pytest -s tests/data/test_fuzz.py

bench: $(INSTALLED)  ## speed, side by side with what else there is; an hour's quarter on a quiet machine
	.venv/bin/pip install -qq --no-deps opencv-python-headless==5.0.0.93 torchcodec==0.13.0 decord==0.6.0
	PYTHONPATH=. .venv/bin/python benchmarks/decode.py
	PYTHONPATH=. .venv/bin/python benchmarks/ingest.py
	.venv/bin/pip install -qq lightning==2.6.6
	PYTHONPATH=. .venv/bin/python benchmarks/train.py
	PYTHONPATH=. .venv/bin/python benchmarks/evaluate.py --clips 64
	PYTHONPATH=. .venv/bin/python benchmarks/scaling.py
	PYTHONPATH=. .venv/bin/python benchmarks/tracking.py
	PYTHONPATH=. .venv/bin/python benchmarks/population.py

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

docs: $(INSTALLED)  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

ui: $(INSTALLED)  ## the MLflow page of the runs in RUNS, on http://127.0.0.1:PORT
	@.venv/bin/giffy ui $(or $(RUNS),runs) --port $(or $(PORT),5000)

lock: $(INSTALLED)  ## after changing a range in pyproject.toml
	.venv/bin/pip install --upgrade --editable .[dev,perceptual,postgres] torch==2.13.0
	(echo "# Every version that the project is run and tested with; written by 'make lock'."; \
	 .venv/bin/pip freeze --exclude-editable | sed 's/+cpu//') > requirements.lock

$(INSTALLED): requirements.lock pyproject.toml
	@echo "installing into .venv; two minutes or so"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install -qq --no-compile --requirement requirements.lock
	@.venv/bin/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf runs site .pytest_cache .ruff_cache
