"""Launch scripts and TRL's script: the flags that they set, and what the stacks themselves make of an export, where they are."""

import argparse
import ast
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny
from exports import job, length, loaded, run_prompts
from fake_q_server import q_server
from logs import assistant, conversation, user
from test_rendering import renderer_of

from iterative_ppo.export import openrlhf, verl
from iterative_ppo.export.prompts import ExactPrompts, exact_prompts
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction


def launched(script: Path, tmp_path: Path, *arguments: str) -> list[str]:
    """The words that a launch script starts its trainer with: a python3 that prints them is first on the path."""
    fake = tmp_path / "bin/python3"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "NUM_GPUS": "8"}
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(
        ["bash", script, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    *words, last = done.stdout.splitlines()
    assert last.startswith("next: ippo import ")
    return words


def test_verls_launch_script_sets_what_the_theorem_needs(exported: Path, tmp_path: Path) -> None:
    module, trainer, *words = launched(exported / "verl/launch.sh", tmp_path, "actor_rollout_ref.actor.optim.lr=1e-6")
    assert (module, trainer) == ("-m", "verl.trainer.main_ppo")
    settings = dict(word.split("=", 1) for word in words)
    assert words[-1] == "actor_rollout_ref.actor.optim.lr=1e-6", "what the user gives comes last"
    expected = {
        "algorithm.use_kl_in_reward": "True",
        "algorithm.kl_ctrl.kl_coef": "0.1",
        "algorithm.gamma": "1.0",
        "algorithm.lam": "1.0",
        "algorithm.adv_estimator": "gae",
        "actor_rollout_ref.actor.use_kl_loss": "False",
        "actor_rollout_ref.model.path": str(exported / "verl/policy"),
        "critic.model.path": str(exported / "verl/critic"),
        "reward.custom_reward_function.path": str(exported / "verl/reward.py"),
        "trainer.n_gpus_per_node": "8",
        "data.train_batch_size": "16",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "4",
        "data.max_response_length": "12",
    }
    assert {name: settings[name] for name in expected} == expected
    assert int(settings["data.max_prompt_length"]) == max(map(len, run_prompts(exported)))


def openrlhf_parser() -> argparse.ArgumentParser:
    """OpenRLHF's own parser, made of the statements of its source where the package is there; else of the flags below."""
    package = importlib.util.find_spec("openrlhf")
    if package is None or package.origin is None:
        parser = argparse.ArgumentParser()
        for flag, arguments in OPENRLHF_FLAGS.items():
            parser.add_argument(flag, **arguments)
        return parser
    source = (Path(package.origin).parent / "cli/train_ppo_ray.py").read_text(encoding="utf-8")
    main = next(
        node for node in ast.parse(source).body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    )
    is_parse = [isinstance(node, ast.Assign) and "parse_args" in ast.unparse(node) for node in main.body]
    namespace: dict[str, Any] = {}
    exec("import argparse\nfrom datetime import datetime", namespace)
    exec(compile(ast.Module(main.body[: is_parse.index(True)], []), "train_ppo_ray.py", "exec"), namespace)
    return namespace["parser"]


OPENRLHF_FLAGS: dict[str, dict[str, Any]] = {
    "--actor.model_name_or_path": {"type": str},
    "--critic.model_name_or_path": {"type": str},
    "--ds.value_head_prefix": {"type": str},
    "--reward.remote_url": {"type": str},
    "--reward.clip_range": {"type": float, "nargs": 2},
    "--data.prompt_dataset": {"type": str},
    "--data.input_key": {"type": str},
    "--data.label_key": {"type": str},
    "--data.max_len": {"type": int},
    "--data.max_samples": {"type": int},
    "--rollout.temperature": {"type": float},
    "--rollout.top_p": {"type": float},
    "--rollout.n_samples_per_prompt": {"type": int},
    "--rollout.max_new_tokens": {"type": int},
    "--rollout.batch_size": {"type": int},
    "--algo.advantage.estimator": {"type": str, "choices": ["gae", "reinforce", "rloo"]},
    "--algo.advantage.gamma": {"type": float},
    "--algo.advantage.lambd": {"type": float},
    "--algo.kl.init_coef": {"type": float},
    "--algo.kl.estimator": {"type": str, "choices": ["k1", "k2", "k3"]},
    "--actor.eps_clip": {"type": float},
    "--actor.loss_agg_mode": {"type": str, "choices": ["token-mean", "seq-mean-token-mean"]},
    "--critic.value_clip": {"type": float},
    "--critic.adam.lr": {"type": float},
    "--critic.lr_scheduler": {"type": str},
    "--train.num_episodes": {"type": int},
    "--train.batch_size": {"type": int},
    "--train.max_epochs": {"type": int},
    "--train.seed": {"type": int},
    "--actor.adam.lr": {"type": float},
    "--actor.adam.betas": {"type": float, "nargs": 2},
    "--actor.lr_scheduler": {"type": str},
    "--actor.num_gpus_per_node": {"type": int},
    "--ref.num_gpus_per_node": {"type": int},
    "--critic.num_gpus_per_node": {"type": int},
    "--vllm.num_engines": {"type": int},
    "--vllm.gpu_memory_utilization": {"type": float},
    "--vllm.enable_sleep": {"action": "store_true"},
    "--ds.enable_sleep": {"action": "store_true"},
    "--train.colocate_all": {"action": "store_true"},
    "--ckpt.output_dir": {"type": str},
}
"""Those of OpenRLHF 0.11.2 that we set, from its `openrlhf/cli/train_ppo_ray.py`."""


def test_openrlhfs_launch_script_parses_and_sets_what_the_theorem_needs(exported: Path, tmp_path: Path) -> None:
    module, trainer, *words = launched(exported / "openrlhf/launch.sh", tmp_path, "--actor.adam.lr", "1e-6")
    assert (module, trainer) == ("-m", "openrlhf.cli.train_ppo_ray")
    settings = vars(openrlhf_parser().parse_args(words))
    assert {flag.removeprefix("--") for flag in words if flag.startswith("--")} <= {
        flag.removeprefix("--") for flag in OPENRLHF_FLAGS
    }
    assert settings["actor.adam.lr"] == 1e-6
    expected = {
        "algo.advantage.estimator": "gae",
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": 1.0,
        "algo.kl.init_coef": 0.1,
        "algo.kl.estimator": "k1",
        "reward.clip_range": [-1000000.0, 1000000.0],
        "actor.model_name_or_path": str(exported / "openrlhf/policy"),
        "critic.model_name_or_path": str(exported / "openrlhf/critic"),
        "reward.remote_url": str(exported / "openrlhf/reward.py"),
        "rollout.batch_size": 16,
        "train.batch_size": 8,
        "data.max_samples": 16,
        "train.num_episodes": 1,
        "actor.num_gpus_per_node": 8,
    }
    assert {name: settings[name] for name in expected} == expected
    for name, off in {
        "algo.kl.use_loss": False,
        "reward.normalize_enable": False,
        "data.apply_chat_template": False,
    }.items():
        assert settings.get(name, off) == off
    assert settings.get("algo.kl.target") is None


def test_every_prompt_is_asked_as_often_as_our_own_step_asks() -> None:
    """10 prompts: six updates of at most 512 ask each of them in every update; 2,000 prompts: six of 256 ask 1,536."""
    few = exact_prompts([conversation(user(f"hi {i}"), assistant("ho")) for i in range(10)], renderer_of("chatml"))
    script = openrlhf.launch(job(few))
    assert "--data.max_samples 10\n" in script
    assert "--train.num_episodes 6\n" in script
    assert "--rollout.batch_size 10\n" in script
    many = ExactPrompts(prompts=few.prompts * 200, num_left_out={})
    script = openrlhf.launch(job(many, prompts_per_update=256))
    assert "--data.max_samples 1536\n" in script
    assert "--train.num_episodes 1\n" in script
    assert "ippo serve-q 'runs/my run'" in script


# ---- verl itself, in an environment of its own ----


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "texts"])
def test_verl_accepts_the_export_and_computes_what_we_compute(form: str, exported: Path, tmp_path: Path) -> None:
    """Its configuration is composed with the overrides, its data set class reads the prompts, its reward manager calls the
    reward file, and its core algorithms agree with our losses; see verl_checks.py."""
    python = os.environ.get("VERL_PYTHON")
    if python is None:
        pytest.skip("verl has an environment of its own (make verl-env): VERL_PYTHON does not name its interpreter")
    folder = tmp_path / "verl"
    shutil.copytree(exported / "verl", folder)
    if form == "texts":
        step = find_open_step(exported / "run")
        exact = exact_prompts(step.conversations(), Policy.load(step.policy, step.config.policy).renderer)
        texts = tuple(dataclasses.replace(prompt, messages=None) for prompt in exact.prompts)
        exact = dataclasses.replace(exact, prompts=texts)
        verl.write_prompts(exact, folder / "prompts.parquet")
        (folder / "launch.sh").write_text(verl.launch(job(exact)))
    words = launched(folder / "launch.sh", tmp_path)
    (tmp_path / "overrides.json").write_text(json.dumps(words[2:]))
    with q_server(length) as server:
        environment = os.environ | {
            "IPPO_Q_URL": server.url,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, Path(__file__).with_name("verl_checks.py"), folder, tmp_path / "overrides.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all checks passed"
    assert len(server.questions) == 2
    for path, body, _ in server.questions:
        assert path == "/v1/q"
        [item] = body["items"]
        assert tuple(item["prompt_ids"]) in run_prompts(exported)


# ---- TRL ----


def test_the_reward_in_trls_script_is_the_one_of_our_own_step(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Link, ensemble and pessimism; a response cut at the cap is judged with an end. TRL itself is not needed for it."""
    for name in ("trl", "datasets"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    script = loaded(exported / "trl/train.py")
    step = find_open_step(exported / "run")
    policy, q_function = Policy.load(step.policy, step.config.policy), QFunction.load(step.q_function)
    prompts = run_prompts(exported)[:40]
    responses = policy.respond(prompts, np.random.default_rng(0).random((40, 12)))
    cut = [response[:-1] if row % 2 and len(response) > 1 else response for row, response in enumerate(responses)]
    expected = q_function.pessimistic_values(prompts, responses, pessimism=1.0, tokens_per_batch=512)
    rewards = script.q_reward(1.0)(prompt_ids=prompts, completion_ids=cut, prompts=[], completions=[])
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert script.given(["bf16=true", "learning_rate=1e-6", "output_dir=x"]) == {
        "bf16": True,
        "learning_rate": 1e-6,
        "output_dir": "x",
    }


@pytest.mark.slow
def test_trls_script_trains_a_candidate(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    shutil.copytree(exported / "trl", tmp_path / "trl")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", tmp_path / "trl/train.py", "max_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    step = find_open_step(exported / "run")
    candidate = Policy.load(tmp_path / "trl/candidate", step.config.policy)
    policy = Policy.load(step.policy, step.config.policy)
    assert 0 < tiny.largest_difference(tiny.weights(policy.model), tiny.weights(candidate.model)) < 0.1
