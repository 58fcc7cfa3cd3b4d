.PHONY: install check format test

install:
	pip install -c constraints.txt -e ".[dev]"

check:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest
