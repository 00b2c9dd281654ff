# Each target sets itself up on a machine that has only Python and git.
.PHONY: setup setup-slow train test test-slow test-all lint lock

TEST_WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal --durations=25

setup:
	@scripts/tools/setup.sh

# Trains configs/tiny.yaml on the source text of Python's standard library; pass overrides as ARGS="train.steps=100".
train: setup
	.venv/bin/dsv3 train configs/tiny.yaml $(ARGS)

# The environments that slow tests need besides: compilers of TPU and NVIDIA GPUs (1.2 GB), and torch.
setup-slow: setup
	@scripts/tools/setup_aot.sh
	@.venv/bin/python scripts/tools/_peer.py

# More processes with TEST_WORKERS=8; pytest's options, or some tests only, as ARGS="tests/model -x".
test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup-slow
	$(PYTEST) -m slow $(ARGS)

test-all: setup-slow
	$(PYTEST) $(ARGS)

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

# Pin again what pyproject.toml asks for: versions and hashes, no download addresses.
lock: setup
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 --generate-hashes \
	    --no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock
