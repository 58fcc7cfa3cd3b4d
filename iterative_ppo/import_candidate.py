"""The policy that another stack trained, taken back into its run as the candidate of the step at which the run stands."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo.adapters import has_adapter, without_adapter
from iterative_ppo.compatibility import architecture_difference, tokenizer_difference
from iterative_ppo.config import Config
from iterative_ppo.export import folder_hash, require_unchanged
from iterative_ppo.improvement.responses import sample_responses
from iterative_ppo.loading import load_policy, load_q_function
from iterative_ppo.open_step import OpenStep
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction
from iterative_ppo.q_reward import q_reward
from iterative_ppo.rendering import TokenIds
from iterative_ppo.run_directory import RunDirectory, Stage
from iterative_ppo.turns_to_tokens import all_prompts, tokenize

_NUM_RESPONSES = 512
_NUM_PROBES = 100


def import_candidate(step: OpenStep, source: Path) -> Stage:
    """Makes the run's improvement stage of a policy folder; the run goes on with it as with a candidate of its own.

    Args:
        step: where the run stands.
        source: a transformers folder, or a peft folder, which is merged.

    Raises:
        ValueError: the step has been made, the policy is of another kind than the one that it started from, its
            log-probabilities are not finite, or it comes from an export that was changed or belongs to another step.
    """
    if (step.run / step.name).exists():
        raise ValueError(f"{step.run / step.name}: this step is made already; go on with the run by --resume")
    require_unchanged(source, step)
    directory = RunDirectory(step.run, step.config, resume=True)

    def make(folder: Path) -> dict[str, Any]:
        policy, candidate = load_policy(step.config, step.policy), load_policy(step.config, source)
        if has_adapter(candidate.model):
            candidate = candidate.merged()
        prompts = all_prompts(tokenize(conversation, policy.renderer) for conversation in step.conversations())
        _require_one_kind(policy, candidate, source, prompts)
        candidate.save(folder / "policy")
        q_function = load_q_function(step.q_function, policy)
        measured = _measure(step.config, policy, candidate, q_function, prompts, seed=step.seed)
        if not math.isfinite(measured["kl"]):
            raise ValueError(f"{source}: its log-probabilities are not finite: its training has diverged")
        return {"num_prompts": len(prompts), "source": source.resolve(), "sha256": folder_hash(source), **measured}

    return directory.stage(step.name, seed=step.seed, parents=step.parents, make=make)


def _require_one_kind(policy: Policy, candidate: Policy, source: Path, prompts: Sequence[TokenIds]) -> None:
    model = without_adapter(policy.model) if has_adapter(policy.model) else policy.model
    texts = [policy.tokenizer.decode(prompt) for prompt in prompts[:_NUM_PROBES]]
    difference = architecture_difference(model, candidate.model) or tokenizer_difference(
        policy.tokenizer, candidate.tokenizer, texts=texts
    )
    if difference:
        raise ValueError(f"{source}: is not a policy of the kind that the step started from: {difference}")


def _measure(
    config: Config,
    policy: Policy,
    candidate: Policy,
    q_function: QFunction,
    prompts: Sequence[TokenIds],
    *,
    seed: int,
) -> dict[str, Any]:
    """KL to the anchor on fresh responses, and Q's view of policy and candidate on the same prompts with the same luck."""
    generator = np.random.default_rng(seed)
    tokens_per_batch = config.compute.tokens_per_batch
    asked = [prompts[i] for i in generator.integers(len(prompts), size=_NUM_RESPONSES).tolist()]
    uniforms_BT = generator.random((len(asked), config.policy.max_response_tokens))
    reward = q_reward(q_function, pessimism=config.q_function.pessimism, tokens_per_batch=tokens_per_batch)
    kl = sample_responses(candidate, policy, asked, generator=generator, tokens_per_batch=tokens_per_batch).kl
    return {
        "num_updates": 0,
        "stop_reason": "imported",
        "kl": kl,
        "kl_target": config.improvement.kl_target,
        "reward_first": float(reward(asked, policy.respond(asked, uniforms_BT)).mean()),
        "reward_last": float(reward(asked, candidate.respond(asked, uniforms_BT)).mean()),
    }
