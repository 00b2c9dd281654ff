# Each target sets itself up on a machine that has only Python and git.
.PHONY: setup train test lint lock

setup:
	@scripts/tools/setup.sh

# Trains configs/tiny.yaml on the source text of Python's standard library; pass overrides as ARGS="train.steps=100".
train: setup
	.venv/bin/dsv3 train configs/tiny.yaml $(ARGS)

test: setup
	.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

# Pin again what pyproject.toml asks for: versions and hashes, no download addresses.
lock: setup
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 --generate-hashes \
	    --no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock
