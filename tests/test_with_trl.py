"""The improvement step by TRL: exact prompts and rewards, the anchor that the theorem wants, the budget kept, the loop."""

import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from test_cli import SHOP
from test_improvement import PROMPTS, config_of, mean_reward_and_kl, says_a
from torch import Tensor

from iterative_ppo import config as config_module
from iterative_ppo import conformance
from iterative_ppo import policy as policy_module
from iterative_ppo.commands import loop
from iterative_ppo.config import ConfigError, ImprovementConfig
from iterative_ppo.improvement import backends
from iterative_ppo.improvement.base import Improvement, RewardFunction
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds

with_trl = pytest.importorskip("iterative_ppo.improvement.with_trl", reason="needs the extra trl")

TOKENS = 2048


def config(algorithm: str = "rloo", **settings: object) -> ImprovementConfig:
    return config_of(algorithm, **({"backend": "trl", "learning_rate": 1e-3, "num_updates": 6} | settings))


def run(policy: Policy, settings: ImprovementConfig, *, reward: RewardFunction = says_a, seed: int = 0) -> Improvement:
    return with_trl.improve(
        policy, PROMPTS, reward, settings, generator=np.random.default_rng(seed), tokens_per_batch=TOKENS
    )


# --- what it is for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_mean_reward_rises_within_the_kl_budget(algorithm: str):
    policy = tiny.letter_policy()
    before = tiny.weights(policy.model)
    improvement = run(policy, config(algorithm, num_updates=12))
    reward_before, _ = mean_reward_and_kl(policy, policy)
    reward_after, kl = mean_reward_and_kl(improvement.candidate, policy)
    assert reward_after > reward_before + 0.2
    assert 0 < improvement.kl < 1.2
    assert 0 < kl < 1.4, "the measured KL is the candidate's own, up to sampling error"
    assert improvement.updates[0].kl == pytest.approx(0, abs=1e-5), "the anchor is the policy handed in"
    assert tiny.largest_difference(tiny.weights(policy.model), before) == 0


def test_a_small_kl_budget_is_kept_and_named():
    improvement = run(tiny.letter_policy(), config(kl_target=0.1, num_updates=40))
    assert improvement.stop_reason == "kl_target"
    assert 0.01 < improvement.kl < 0.15
    assert len(improvement.updates) < 40


def test_the_price_of_a_nat_adapts_to_the_pace():
    """Far behind a steady drift to a budget of 100 nats: beta is halved before each further update."""
    improvement = run(
        tiny.letter_policy(), config(kl_target=100.0, adaptive_kl=True, num_updates=3, kl_coefficient=0.4)
    )
    assert [update.kl_coefficient for update in improvement.updates] == [0.4, 0.2, 0.1]


def test_a_collapse_ends_the_step_with_the_last_good_weights():
    policy = tiny.letter_policy()
    before = tiny.weights(policy.model)
    improvement = run(policy, config(kl_target=1e-3, learning_rate=3e-2))
    assert improvement.stop_reason.startswith("collapse: KL to the anchor jumped")
    assert tiny.largest_difference(tiny.weights(improvement.candidate.model), before) == 0


# --- to the last token --------------------------------------------------------------------------------------


def test_prompts_and_responses_arrive_as_the_tokens_that_they_are():
    """Every prompt is one of those handed in, equally often; every response ends once, at its end."""
    policy = tiny.letter_policy()
    asked: list[TokenIds] = []

    def reward(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        asked.extend(prompts)
        assert all(response[-1] == tiny.END and tiny.END not in response[:-1] for response in responses)
        assert all(len(response) <= policy.config.max_response_tokens + 1 for response in responses)
        return says_a(prompts, responses)

    run(policy, config(num_updates=2), reward=reward)
    assert collections.Counter(asked) == collections.Counter(dict.fromkeys(PROMPTS, 2 * 4))


def test_responses_are_drawn_from_the_policy_itself():
    """No top-k, no top-p, its own temperature: letters come as often as the policy says, at the first token."""
    policy = tiny.letter_policy(temperature=1.7)
    prompt = PROMPTS[0]
    first: list[int] = []

    def reward(_: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        first.extend(response[0] for response in responses)
        return torch.zeros(len(responses))

    settings = config(num_updates=1, num_samples=2000, prompts_per_update=1, num_minibatches=1, num_passes=1)
    with_trl.improve(
        policy, [prompt], reward, settings, generator=np.random.default_rng(0), tokens_per_batch=8 * TOKENS
    )
    letters = list(range(policy.model.config.vocab_size))
    rows = policy.logprobs([prompt] * len(letters), [(letter,) for letter in letters], tokens_per_batch=TOKENS)
    expected = np.exp([value for [value] in rows])
    observed = np.bincount(first, minlength=len(letters)) / len(first)
    np.testing.assert_allclose(observed, expected, atol=4 * 0.5 / len(first) ** 0.5)


def test_a_step_is_decided_by_its_generator():
    first, again, other = (
        tiny.weights(run(tiny.letter_policy(), config(num_updates=2), seed=seed).candidate.model) for seed in (0, 0, 1)
    )
    assert tiny.largest_difference(first, again) == 0
    assert tiny.largest_difference(first, other) > 0


def test_the_split_into_micro_batches_changes_next_to_nothing():
    narrow, wide = (
        with_trl.improve(
            tiny.letter_policy(),
            PROMPTS,
            says_a,
            config(num_updates=1, num_passes=1, learning_rate=1e-4),
            generator=np.random.default_rng(0),
            tokens_per_batch=tokens,
        ).candidate
        for tokens in (64, 8 * TOKENS)
    )
    assert tiny.largest_difference(tiny.weights(narrow.model), tiny.weights(wide.model)) < 2e-4


# --- adapters -----------------------------------------------------------------------------------------------


def test_an_adapter_is_anchored_at_itself_and_not_at_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After two steps the policy is far from the base model, and a third begins with a KL of 0 by TRL's own figure."""
    monkeypatch.setattr(policy_module, "_SMALLEST_FOR_ADAPTERS", 0)
    tiny.letter_policy().save(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", tiny.policy_config(lora_rank=4))
    for seed in range(2):
        candidate = run(policy, config(learning_rate=1e-2, kl_target=1e9), seed=seed).candidate
        shared = {p.data_ptr() for p in policy.model.parameters() if not p.requires_grad}
        assert shared == {p.data_ptr() for p in candidate.model.parameters() if not p.requires_grad} != set()
        policy = candidate
    _, kl_to_base = mean_reward_and_kl(policy, Policy.load(tmp_path / "base", tiny.policy_config(lora_rank=4)))
    assert kl_to_base > 0.1
    seen: list[float] = []
    logged = with_trl._Watch.on_log

    def on_log(
        watch: object, args: object, state: object, control: object, logs: dict[str, float], **_: object
    ) -> None:
        seen.extend(logs[key] for key in ["kl"] if key in logs)
        logged(watch, args, state, control, logs)

    monkeypatch.setattr(with_trl._Watch, "on_log", on_log)
    run(policy, config(num_updates=1))
    assert seen[0] == pytest.approx(0, abs=1e-5)


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_reward_that_is_not_finite_ends_the_step():
    with pytest.raises(ValueError, match="not finite"):
        run(tiny.letter_policy(), config(), reward=lambda prompts, _: torch.full((len(prompts),), float("nan")))


def test_what_trl_does_not_have_is_named():
    with pytest.raises(ValueError, match="TRL has no PPO"):
        run(tiny.letter_policy(), config("ppo"))
    with pytest.raises(ConfigError, match=r"improvement\.algorithm: TRL has no PPO"):
        config_module.from_dict({"improvement": {"backend": "trl"}})
    with pytest.raises(ConfigError, match=r"improvement\.num_minibatches: .* 3 do not divide 8 prompts x 4 responses"):
        config_module.from_dict({"improvement": dataclasses.asdict(config(num_minibatches=3))})


def test_a_backend_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match=r"^improvement\.backend: trl is not installed; .*\[trl\]"):
        backends.require_backend(config())


# --- the theorem, and the loop ------------------------------------------------------------------------------


@pytest.mark.slow
def test_rloo_conforms():
    result = conformance.check_backend(conformance.backend_of("trl"), algorithm="rloo")
    assert result.passed, [check for check in result.checks if not check.passed]


@pytest.mark.slow
def test_the_loop_runs_on_trl_and_its_outcome_rate_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hat_shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    tables = {
        "environment": {"entry_point": "hat_shop:Shop"},
        "policy": {"hidden_size": 32, "scripted_conversations": 512, "max_response_tokens": 8},
        "iterations": {"count": 2, "conversations": 512},
        "evaluation": {"conversations": 400},
        "improvement": {"backend": "trl", "algorithm": "rloo", "prompts_per_update": 128, "kl_target": 1.0},
    }
    result = loop.run_iterate(
        config_module.from_dict(tables),
        tmp_path / "run",
        resume=False,
        console=Console(quiet=True),
        progress=lambda *_: None,
    )
    first, *_, last = result["iterations"]
    assert last["low"] > first["high"]
    assert result["final"]["low"] > first["high"]
    manifest = json.loads((tmp_path / "run/iteration-001/improve/manifest.json").read_text())
    assert manifest["config"]["improvement"]["backend"] == "trl"
