"""An exported run for the tests, and what is read of it; the run itself is the fixture `exported` of conftest.py."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet
from test_cli import run, sets

from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.export.launch import Job
from iterative_ppo.export.prompts import ExactPrompts
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.turns_to_tokens import all_prompts, tokenize

STACKS = ("verl", "openrlhf", "trl")


def export_everything(folder: Path) -> None:
    """A finished run of one iteration of several turns a conversation in `run`, and its export for each stack."""
    finished = run("iterate", "--out", "run", *sets(), folder=folder)
    assert finished.code == 0, finished.stderr
    for stack in STACKS:
        finished = run("export", stack, "run", "--out", stack, "--json", folder=folder)
        assert finished.code == 0, finished.stderr
        (folder / f"{stack}.json").write_text(finished.stdout.splitlines()[-1])


def run_prompts(folder: Path) -> list[TokenIds]:
    """What the run's own improvement step was prompted with."""
    step = find_open_step(folder / "run")
    policy = Policy.load(step.policy, step.config.policy)
    return all_prompts(tokenize(conversation, policy.renderer) for conversation in step.conversations())


def rows_of(folder: Path, stack: str) -> list[dict[str, Any]]:
    if stack == "verl":
        return list(pyarrow.parquet.read_table(folder / "verl/prompts.parquet").to_pylist())
    return [json.loads(line) for line in (folder / stack / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def length(item: Mapping[str, Any]) -> float:
    """A reward that tells items apart."""
    return float(len(item.get("response", item.get("query", ""))))


def loaded(file: Path) -> ModuleType:
    """A file as a module, by its path."""
    spec = importlib.util.spec_from_file_location(f"exported_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(prompts: ExactPrompts, **settings: Any) -> Job:
    return Job(
        run="runs/my run",
        improvement=ImprovementConfig(**settings),
        policy=PolicyConfig(),
        prompts=prompts,
        head="score",
        seed=3,
    )
