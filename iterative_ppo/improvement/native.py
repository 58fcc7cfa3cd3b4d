"""Token-level PPO, GRPO and RLOO: the reference improvement step.

One update samples responses to logged prompts from the current policy, rewards each response once at its end, turns
that into token advantages and makes a few clipped gradient passes. The anchor is the policy that was handed in.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from iterative_ppo import distributed, losses
from iterative_ppo.adapters import copy_sharing_frozen
from iterative_ppo.config import ImprovementConfig
from iterative_ppo.improvement.base import Improvement, RewardFunction, UpdateMetrics
from iterative_ppo.improvement.responses import (
    Responses,
    fresh_responses,
    num_responses_for_kl,
    paced_kl_coefficient,
    prompt_batches,
    sample_responses,
    shuffled,
    stop_reason,
)
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.sharding import adamw, clip_gradients, gathered, has_shards
from iterative_ppo.shared_prefix import families, takes_trees, tree_batches
from iterative_ppo.supervised import Progress, no_progress, trained_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Responses):
    """The responses of one update with their rewards: what its losses need."""

    reward_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Baseline:
    """Token advantages [B, T] of a rollout and the token returns that its token value is fitted to."""

    advantage_BT: Tensor
    return_BT: Tensor
    token_value_BT: Tensor


def improve(
    policy: Policy,
    prompts: Sequence[TokenIds],
    reward: RewardFunction,
    config: ImprovementConfig,
    *,
    token_value: nn.Module | None = None,
    generator: np.random.Generator,
    tokens_per_batch: int,
    progress: Progress = no_progress,
    on_update: Callable[[UpdateMetrics, Policy], None] | None = None,
) -> Improvement:
    """One single-turn improvement step from `policy`, which is also the anchor of the KL.

    Args:
        policy: start and anchor; not changed.
        prompts: token ids of each prompt; every update answers `prompts_per_update` of them, each prompt equally often.
        reward: scores whole responses; the token at which it is paid is the response's last.
        token_value: for PPO: a module from a `TreeBatch` to the value of the prefix that ends at each of its tokens [B, T],
            which is read before response tokens; not changed.
        generator: all randomness of the step.
        tokens_per_batch: padded tokens in one forward and backward pass; the result does not depend on it.
        on_update: called after each update with its metrics and the policy as it then is.

    Returns:
        The candidate: the last policy whose measured KL to the anchor is within `kl_target`; of an update that goes
        beyond, as much of it as does not.
    """
    if config.algorithm == "ppo" and token_value is None:
        raise ValueError("PPO needs a token value to start from; GRPO and RLOO do without")
    [initialization] = generator.spawn(1)
    candidate = policy.branch(seed=int(initialization.integers(2**31)))
    learner = _Learner(candidate, token_value, config, tokens_per_batch=tokens_per_batch)
    batches = prompt_batches(prompts, config, generator)

    def fresh(num_responses: int) -> Responses:
        """Responses of the candidate as it is, that decide no gradient."""
        return fresh_responses(
            candidate, policy, batches, num_responses, generator=generator, tokens_per_batch=tokens_per_batch
        )

    good_weights = trained_weights(candidate.model)
    updates: list[UpdateMetrics] = []
    ended = ""
    while not ended:
        is_last = len(updates) == config.num_updates
        if is_last:
            responses = fresh(num_responses_for_kl(config))
        else:
            responses = rollout = sample_rollout(
                candidate, policy, next(batches), reward, generator=generator, tokens_per_batch=tokens_per_batch
            )
        ended = stop_reason(
            candidate, responses, updates, config, good_weights=good_weights, fresh=functools.partial(fresh, 1)
        )
        if is_last and not ended:
            ended = "updates"
        elif not ended:
            good_weights = trained_weights(candidate.model)
            if config.adaptive_kl and updates:
                learner.kl_coefficient = paced_kl_coefficient(learner.kl_coefficient, rollout.kl, len(updates), config)
            updates.append(learner.update(rollout, len(updates), generator))
            if on_update:
                on_update(updates[-1], candidate)
            progress(
                f"improve (reward {updates[-1].reward_mean:.3f}, KL {rollout.kl:.3f})", len(updates), config.num_updates
            )
    progress("improve", config.num_updates, config.num_updates)
    candidate.model.eval()
    # Where a measurement decided what is kept, it is too low on average: measured once more.
    kl = responses.kl if ended == "updates" else fresh(num_responses_for_kl(config)).kl
    return Improvement(candidate=candidate, updates=tuple(updates), kl=kl, stop_reason=ended)


def sample_rollout(
    policy: Policy,
    anchor: Policy,
    prompts: Sequence[TokenIds],
    reward: RewardFunction,
    *,
    generator: np.random.Generator,
    tokens_per_batch: int,
) -> Rollout:
    """Samples one response a prompt and scores it.

    A response cut at the cap carries no end-of-response token; it is scored with one, because that is how it would
    be sent and read by everyone after.
    """
    sampled = sample_responses(policy, anchor, prompts, generator=generator, tokens_per_batch=tokens_per_batch)
    reward_B = (
        reward(prompts, [policy.renderer.ended(tokens) for tokens in sampled.responses]).float().to(policy.device)
    )
    if not torch.isfinite(reward_B).all():
        raise ValueError("the reward function returned a value that is not finite")
    return Rollout(
        prompts=sampled.prompts,
        responses=sampled.responses,
        mask_BT=sampled.mask_BT,
        old_logprob_BT=sampled.old_logprob_BT,
        anchor_logprob_BT=sampled.anchor_logprob_BT,
        reward_B=reward_B,
    )


class _Learner:
    """The policy, its token value and their optimizers."""

    def __init__(
        self, policy: Policy, token_value: nn.Module | None, config: ImprovementConfig, *, tokens_per_batch: int
    ) -> None:
        self.policy = policy
        self.config = config
        self.kl_coefficient = config.kl_coefficient
        self.tokens_per_batch = tokens_per_batch
        self.policy_parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.policy_optimizer = adamw(self.policy_parameters, learning_rate=config.learning_rate, weight_decay=0.0)
        self.token_value: nn.Module | None = None
        self.value_parameters: list[nn.Parameter] = []
        if config.algorithm == "ppo":
            assert token_value is not None
            self.token_value = copy_sharing_frozen(token_value)
            self.value_parameters = [p for p in self.token_value.parameters() if p.requires_grad]
            if self.value_parameters:
                self.value_optimizer = adamw(
                    self.value_parameters, learning_rate=config.token_value_learning_rate, weight_decay=0.0
                )
        self.trains_value = bool(self.value_parameters) and config.token_value_learning_rate > 0

    def update(self, rollout: Rollout, update: int, generator: np.random.Generator) -> UpdateMetrics:
        """Gradient passes over one rollout."""
        minibatches = _minibatches(rollout.prompts, self.config, generator)
        kl, kl_k1 = rollout.kl, rollout.kl_k1
        if not self.policy.is_float32:
            rollout = self._rescored(rollout, minibatches)
        first_values = self._first_values(rollout)
        baseline = self._baseline(rollout, first_values)
        advantage_BT, scale = _normalized(baseline.advantage_BT, rollout.mask_BT)
        num_rows = len(rollout.responses)
        stats = _PassStatistics()
        num_passes = 0
        for pass_ in range(self.config.num_passes):
            if pass_ > 0:
                minibatches = _minibatches(rollout.prompts, self.config, generator)
            stats = _PassStatistics()
            for rows in minibatches:
                self._policy_step(rollout, advantage_BT, scale, rows, stats)
                if self.trains_value:
                    known = first_values if pass_ == 0 and _have_graphs(first_values) else None
                    values = known or self._token_values(rollout, rows)
                    self._value_step(values, rollout, baseline.return_BT, rows)
            stats = stats.added_up()
            num_passes += 1
            if stats.policy_kl / stats.num_tokens > self.config.early_stop_kl:
                break
        return UpdateMetrics(
            update=update,
            reward_mean=float(rollout.reward_B.mean()),
            kl=kl,
            kl_k1=kl_k1,
            entropy=stats.entropy / stats.num_tokens,
            clip_fraction=stats.num_clipped / stats.num_tokens,
            kl_coefficient=self.kl_coefficient,
            explained_variance=losses.explained_variance(
                baseline.token_value_BT[rollout.mask_BT], baseline.return_BT[rollout.mask_BT]
            )
            if self.token_value is not None
            else math.nan,
            response_tokens=float(rollout.mask_BT.sum()) / num_rows,
            num_passes=num_passes,
        )

    def _rescored(self, rollout: Rollout, minibatches: Sequence[Sequence[int]]) -> Rollout:
        """The rollout with log-probabilities from the batches of the first pass: its ratios are 1 but for the steps taken."""
        old_logprob_BT = torch.zeros_like(rollout.old_logprob_BT)
        for rows in minibatches:
            prompts, responses = rollout.select(rows)
            with torch.no_grad(), gathered(self.policy.model):
                for logits in self.policy.response_logits(prompts, responses, tokens_per_batch=self.tokens_per_batch):
                    width = logits.mask_BT.shape[1]
                    old_logprob_BT[[rows[place] for place in logits.rows], :width] = logits.logprobs()
        return dataclasses.replace(rollout, old_logprob_BT=distributed.add_up(old_logprob_BT))

    def _first_values(self, rollout: Rollout) -> list[tuple[list[int], Tensor]]:
        """The token values before the first pass, in micro-batches.

        With their graphs where one minibatch is all there is and fits the token budget: they are its first forward pass.
        """
        if self.token_value is None:
            return []
        num_tokens = sum(map(len, rollout.prompts)) + sum(map(len, rollout.responses))
        rows = range(len(rollout.responses))
        if (
            self.trains_value
            and self.config.num_minibatches == 1
            and num_tokens <= self.tokens_per_batch
            and not has_shards(self.value_parameters)
        ):
            return list(self._token_values(rollout, rows))
        with torch.no_grad(), gathered(self.token_value):
            return list(self._token_values(rollout, rows))

    def _baseline(self, rollout: Rollout, values: Sequence[tuple[list[int], Tensor]]) -> _Baseline:
        config = self.config
        token_reward_BT = losses.terminal_token_reward(rollout.reward_B, rollout.mask_BT)
        if config.kl_in == "reward":
            log_ratio_BT = losses.kl_k1(rollout.old_logprob_BT, rollout.anchor_logprob_BT)
            token_reward_BT = token_reward_BT - self.kl_coefficient * log_ratio_BT * rollout.mask_BT
        if self.token_value is not None:
            value_BT = torch.zeros_like(token_reward_BT)
            for batch, of_batch_BT in values:
                value_BT[batch, : of_batch_BT.shape[1]] = of_batch_BT.detach()
            distributed.add_up(value_BT)
            advantage_BT = losses.generalized_advantage_estimation(
                token_reward_BT, value_BT, rollout.mask_BT, lambda_=config.gae_lambda
            )
            return _Baseline(advantage_BT=advantage_BT, return_BT=advantage_BT + value_BT, token_value_BT=value_BT)
        response_reward_B = torch.where(rollout.mask_BT, token_reward_BT, 0.0).sum(1)
        advantage_B = (
            losses.group_advantages(response_reward_B, num_samples=config.num_samples, normalize=True)
            if config.algorithm == "grpo"
            else losses.leave_one_out_advantages(response_reward_B, num_samples=config.num_samples)
        )
        zeros_BT = torch.zeros_like(token_reward_BT)
        return _Baseline(
            advantage_BT=advantage_B[:, None] * rollout.mask_BT, return_BT=zeros_BT, token_value_BT=zeros_BT
        )

    def _token_values(self, rollout: Rollout, rows: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Value of the prefix before each response token, in micro-batches: their rows, and [rows, T], 0 at padding."""
        assert self.token_value is not None
        prompts, responses = rollout.select(rows)
        for places, batch in tree_batches(
            prompts,
            responses,
            tokens_per_batch=self.tokens_per_batch,
            share=takes_trees(self.token_value),
            ends=False,
            in_step=torch.is_grad_enabled() and has_shards(self.value_parameters),
        ):
            value_BT = batch.before(self.token_value(batch))
            yield [rows[place] for place in places], value_BT * batch.mask_RL.to(value_BT.device)

    def _policy_step(
        self, rollout: Rollout, advantage_BT: Tensor, scale: float, rows: Sequence[int], stats: "_PassStatistics"
    ) -> None:
        config = self.config
        prompts, responses = rollout.select(rows)
        for logits in self.policy.response_logits(prompts, responses, tokens_per_batch=self.tokens_per_batch):
            if not logits.rows:
                (0.0 * logits.logits_NV.sum()).backward()
                continue
            batch = [rows[place] for place in logits.rows]
            width = logits.mask_BT.shape[1]
            old_BT, anchor_BT = rollout.old_logprob_BT[batch, :width], rollout.anchor_logprob_BT[batch, :width]
            logprob_BT = logits.logprobs()
            loss = losses.clipped_surrogate(
                logprob_BT, old_BT, advantage_BT[batch, :width], logits.mask_BT, clip=config.clip
            )
            if config.kl_in == "loss":
                loss = loss + self.kl_coefficient * scale * losses.kl_loss(logprob_BT, anchor_BT, logits.mask_BT)
            (loss * len(batch) / len(rows)).backward()
            stats.add(logprob_BT.detach(), old_BT, logits.logits_NV.detach(), logits.mask_BT, clip=config.clip)
        distributed.sum_gradients(self.policy_parameters)
        clip_gradients(self.policy_parameters, 1.0)
        self.policy_optimizer.step()
        self.policy_optimizer.zero_grad(set_to_none=True)

    def _value_step(
        self, values: Iterable[tuple[list[int], Tensor]], rollout: Rollout, return_BT: Tensor, rows: Sequence[int]
    ) -> None:
        num_tokens = float(rollout.mask_BT[rows].sum())
        for batch, value_BT in values:
            if not batch:
                (0.0 * value_BT.sum()).backward()
                continue
            width = value_BT.shape[1]
            mask_BT = rollout.mask_BT[batch, :width]
            loss = losses.token_value_loss(value_BT, return_BT[batch, :width], mask_BT)
            (loss * float(mask_BT.sum()) / num_tokens).backward()
        distributed.sum_gradients(self.value_parameters)
        clip_gradients(self.value_parameters, 1.0)
        self.value_optimizer.step()
        self.value_optimizer.zero_grad(set_to_none=True)


def _have_graphs(values: Sequence[tuple[list[int], Tensor]]) -> bool:
    return bool(values) and values[0][1].requires_grad


@dataclass(slots=True)
class _PassStatistics:
    """Sums over the tokens of one pass."""

    num_tokens: float = 0.0
    num_clipped: float = 0.0
    policy_kl: float = 0.0
    entropy: float = 0.0

    @torch.no_grad()
    def add(self, logprob_BT: Tensor, old_BT: Tensor, logits_NV: Tensor, mask_BT: Tensor, *, clip: float) -> None:
        num_tokens = float(mask_BT.sum())
        self.num_tokens += num_tokens
        self.num_clipped += num_tokens * float(losses.clip_fraction(logprob_BT, old_BT, mask_BT, clip=clip))
        self.policy_kl += float(losses.masked_sum(losses.kl_k3(old_BT, logprob_BT), mask_BT))
        self.entropy += float(losses.token_entropy(logits_NV).sum())

    def added_up(self) -> "_PassStatistics":
        """Of all processes."""
        return _PassStatistics(*distributed.sums(self.num_tokens, self.num_clipped, self.policy_kl, self.entropy))


def _normalized(advantage_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, float]:
    """Normalised advantages and the factor by which they were scaled: the KL's price must be scaled with them."""
    mean = losses.masked_mean(advantage_BT, mask_BT)
    deviation = losses.masked_mean((advantage_BT - mean).square(), mask_BT).sqrt()
    return losses.normalize_advantages(advantage_BT, mask_BT), 1.0 / (float(deviation) + 1e-4)


def _minibatches(
    prompts: Sequence[TokenIds], config: ImprovementConfig, generator: np.random.Generator
) -> list[list[int]]:
    """The rows in a random order, in parts of equal size; a prompt's samples stay together, and its prefixes with it."""
    order = shuffled(families(prompts, max_copies=config.num_samples), generator)
    size = math.ceil(len(order) / config.num_minibatches)
    return [order[start : start + size] for start in range(0, len(order), size)]
