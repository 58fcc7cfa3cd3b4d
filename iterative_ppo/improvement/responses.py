"""What every improvement step measures, whoever takes the gradients: responses of a policy, their KL, and its limits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iterative_ppo import losses
from iterative_ppo.batching import pad_right, pad_values
from iterative_ppo.config import ImprovementConfig
from iterative_ppo.improvement.base import UpdateMetrics
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.shared_prefix import families
from iterative_ppo.supervised import restore_weights, trained_weights

_FEWEST_RESPONSES_FOR_KL, _MOST_RESPONSES_FOR_KL = 128, 512
_COLLAPSED_ENTROPY_SHARE = 0.1
_COLLAPSED_LENGTH_SHARE = 0.2
_RUNAWAY_KL_FACTOR = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Sampled responses under their policy and the anchor. B responses, T response tokens."""

    prompts: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]
    mask_BT: Tensor
    old_logprob_BT: Tensor
    anchor_logprob_BT: Tensor

    def select(self, rows: Sequence[int]) -> tuple[list[TokenIds], list[TokenIds]]:
        """Prompts and responses of some rows."""
        return [self.prompts[row] for row in rows], [self.responses[row] for row in rows]

    @property
    def kl(self) -> float:
        """KL(policy ‖ anchor) in nats a response, by k3."""
        return self._per_response(losses.kl_k3(self.old_logprob_BT, self.anchor_logprob_BT))

    @property
    def kl_k1(self) -> float:
        """The same by k1."""
        return self._per_response(losses.kl_k1(self.old_logprob_BT, self.anchor_logprob_BT))

    def _per_response(self, x_BT: Tensor) -> float:
        return float(losses.masked_sum(x_BT, self.mask_BT)) / len(self.responses)


def sample_responses(
    policy: Policy,
    anchor: Policy,
    prompts: Sequence[TokenIds],
    *,
    generator: np.random.Generator,
    tokens_per_batch: int,
) -> Responses:
    """Samples one response a prompt, and notes its log-probabilities under policy and anchor."""
    uniforms_BT = generator.random((len(prompts), policy.config.max_response_tokens))
    policy.model.eval()
    sampled = policy.sample(prompts, uniforms_BT)
    _, mask_BT = pad_right(sampled.token_ids)
    width = mask_BT.shape[1]
    anchor_logprobs = anchor.logprobs(prompts, sampled.token_ids, tokens_per_batch=tokens_per_batch)
    if policy.is_float32:
        logprobs: Sequence[Sequence[float]] = sampled.token_logprobs
    else:
        # Rounded differently where tokens come one by one: that difference must not be taken for a KL.
        logprobs = policy.logprobs(prompts, sampled.token_ids, tokens_per_batch=tokens_per_batch)
    return Responses(
        prompts=tuple(prompts),
        responses=sampled.token_ids,
        mask_BT=mask_BT.to(policy.device),
        old_logprob_BT=pad_values(logprobs, width=width).to(policy.device),
        anchor_logprob_BT=pad_values(anchor_logprobs, width=width).to(policy.device),
    )


def num_responses_for_kl(config: ImprovementConfig) -> int:
    """How many fresh responses a KL is measured on: as many as an update has, within limits."""
    return int(
        np.clip(config.prompts_per_update * config.num_samples, _FEWEST_RESPONSES_FOR_KL, _MOST_RESPONSES_FOR_KL)
    )


def fresh_responses(
    policy: Policy,
    anchor: Policy,
    batches: Iterator[list[TokenIds]],
    num_responses: int,
    *,
    generator: np.random.Generator,
    tokens_per_batch: int,
) -> Responses:
    """Responses of a policy as it is, that decide no gradient: to whole batches of prompts, `num_responses` at least."""
    asked: list[TokenIds] = []
    while len(asked) < num_responses:
        asked += next(batches)
    return sample_responses(policy, anchor, asked, generator=generator, tokens_per_batch=tokens_per_batch)


def paced_kl_coefficient(kl_coefficient: float, kl: float, num_updates: int, config: ImprovementConfig) -> float:
    """Beta that brings the KL closer to an even way to the budget."""
    pace = config.kl_target * num_updates / config.num_updates
    return losses.adapted_kl_coefficient(kl_coefficient, kl, kl_target=pace)


def stop_reason(
    candidate: Policy,
    responses: Responses,
    updates: Sequence[UpdateMetrics],
    config: ImprovementConfig,
    *,
    good_weights: dict[str, Tensor],
    fresh: Callable[[], Responses],
) -> str:
    """Why the step ends at these responses of the candidate, which is then a good one again; empty where it goes on.

    Args:
        good_weights: of the last policy that was within the budget.
        fresh: samples responses of the candidate as it is.
    """
    if problem := collapse(responses, updates, config):
        restore_weights(candidate.model, good_weights)
        return f"collapse: {problem}"
    if responses.kl > config.kl_target:
        _step_back(candidate, good_weights, lambda: fresh().kl <= config.kl_target)
        return "kl_target"
    return ""


def _step_back(policy: Policy, good_weights: dict[str, Tensor], is_good: Callable[[], bool]) -> None:
    """Goes back along the last update until the policy is good again: half of it, a quarter, ..., none."""
    far_weights = trained_weights(policy.model)
    for share in (0.5, 0.25, 0.125):
        restore_weights(
            policy.model, {name: torch.lerp(good_weights[name], far, share) for name, far in far_weights.items()}
        )
        if is_good():
            return
    restore_weights(policy.model, good_weights)


def collapse(responses: Responses, updates: Sequence[UpdateMetrics], config: ImprovementConfig) -> str:
    """What has gone wrong with the policy, in words; empty when nothing has."""
    if not math.isfinite(responses.kl) or not torch.isfinite(responses.old_logprob_BT[responses.mask_BT]).all():
        return "log-probabilities are not finite; lower improvement.learning_rate"
    if responses.kl > _RUNAWAY_KL_FACTOR * config.kl_target:
        return (
            f"KL to the anchor jumped to {responses.kl:.2f} nats a response in one update, "
            f"{_RUNAWAY_KL_FACTOR:g} times the budget; lower improvement.learning_rate"
        )
    if not updates:
        return ""
    first, last = updates[0], updates[-1]
    if last.entropy < _COLLAPSED_ENTROPY_SHARE * first.entropy:
        return f"entropy fell from {first.entropy:.3f} to {last.entropy:.3f} nats a token; lower improvement.kl_target"
    length = float(responses.mask_BT.sum()) / len(responses.responses)
    if length < _COLLAPSED_LENGTH_SHARE * first.response_tokens:
        return f"responses shrank from {first.response_tokens:.1f} to {length:.1f} tokens; lower improvement.kl_target"
    return ""


def prompt_batches(
    prompts: Sequence[TokenIds], config: ImprovementConfig, generator: np.random.Generator
) -> Iterator[list[TokenIds]]:
    """Endless batches of prompts, each repeated `num_samples` times in adjacent rows; every prompt equally often.

    Prompts that are prefixes of each other are drawn together: they cost little more than the longest of them. Equal ones
    are drawn apart: a batch has each prompt about as often as the logs do.
    """
    groups = families(prompts, max_copies=1)
    queue: list[int] = []
    size = min(config.prompts_per_update, len(prompts))
    while True:
        while len(queue) < size:
            queue += shuffled(groups, generator)
        yield [prompts[row] for row in queue[:size] for _ in range(config.num_samples)]
        queue = queue[size:]


def shuffled(groups: Sequence[Sequence[int]], generator: np.random.Generator) -> list[int]:
    """All rows, group after group, the groups in a random order."""
    return [row for group in generator.permutation(len(groups)).tolist() for row in groups[group]]
