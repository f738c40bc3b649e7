# Shortcuts for work on bidm, in an activated environment; see CONTRIBUTING.md.

.PHONY: check format test fast slow bench words

check:  ## lint, types, import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:  ## apply ruff's fixes and format
	ruff check --fix .
	ruff format .

test:  ## all tests but the slow ones, on all cores
	python -m pytest

fast:  ## the quick part: neither slow nor long (tests/conftest.py)
	python -m pytest -m "not slow and not long"

slow:  ## tests of over half a minute each
	python -m pytest -m slow

bench:  ## packed against float on this CPU
	python benchmarks/cpu_unet.py --rounds 3

words:  ## retired words and docstring rules, every violation
	python tests/test_retired_names.py
