"""The single-turn improvement step: it raises the reward, stays near its anchor, and reaches the known optimum."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iterative_ppo.config import ImprovementConfig
from iterative_ppo.improvement import native
from iterative_ppo.improvement.base import Improvement, RewardFunction, UpdateMetrics
from iterative_ppo.improvement.native import _minibatches, improve, sample_rollout
from iterative_ppo.improvement.responses import paced_kl_coefficient, prompt_batches
from iterative_ppo.losses import explained_variance, token_entropy
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.shared_prefix import TreeBatch, families

TOKENS = 2048
ALGORITHMS = ["ppo", "grpo", "rloo"]
MODELS = [tiny.llama, tiny.grouped_query_llama, tiny.gpt2]
PROMPTS: list[TokenIds] = [
    (tiny.USER, *said, tiny.END, tiny.ASSISTANT)
    for said in tiny.random_rows(np.random.default_rng(0), [2, 5, 1, 9, 3, 4, 7, 2], low=tiny.A, high=tiny.G + 1)
]


class LetterValue(nn.Module):
    """The smallest token value: a number for each token, the value of every prefix that ends with it."""

    def __init__(self, num_tokens: int = 12) -> None:
        super().__init__()
        self.value = nn.Embedding(num_tokens, 1)
        nn.init.zeros_(self.value.weight)

    def forward(self, batch: TreeBatch) -> Tensor:
        return self.value(batch.token_BT).squeeze(-1)


def says_a(_: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
    """A customer who likes the letter a."""
    return torch.tensor([float(tiny.A in response) for response in responses])


def config_of(algorithm: str, **settings: object) -> ImprovementConfig:
    """Thirty-two responses an update, from the same settings for all algorithms."""
    rows = (
        {"prompts_per_update": 32, "num_samples": 1}
        if algorithm == "ppo"
        else {"prompts_per_update": 8, "num_samples": 4}
    )
    defaults = {
        "num_updates": 16,
        "num_minibatches": 2,
        "learning_rate": 1e-4,
        "token_value_learning_rate": 1e-2,
        "kl_target": 1.0,
        "adaptive_kl": False,
    }
    return ImprovementConfig(**({"algorithm": algorithm} | rows | defaults | settings))


def run(
    policy: Policy,
    config: ImprovementConfig,
    *,
    prompts: Sequence[TokenIds] = PROMPTS,
    reward: RewardFunction = says_a,
    seed: int = 0,
    tokens_per_batch: int = TOKENS,
    token_value: nn.Module | None = None,
    on_update: Callable[[UpdateMetrics, Policy], None] | None = None,
) -> Improvement:
    if token_value is None:
        token_value = LetterValue(policy.model.config.vocab_size)
    return improve(
        policy,
        prompts,
        reward,
        config,
        token_value=token_value,
        generator=np.random.default_rng(seed),
        tokens_per_batch=tokens_per_batch,
        on_update=on_update,
    )


def mean_reward_and_kl(candidate: Policy, anchor: Policy) -> tuple[float, float]:
    """On 800 fresh responses: the mean reward, and KL(candidate‖anchor) in nats a response by plain log-ratios."""
    rollout = sample_rollout(
        candidate, anchor, PROMPTS * 100, says_a, generator=np.random.default_rng(99), tokens_per_batch=TOKENS
    )
    return float(rollout.reward_B.mean()), rollout.kl_k1


# --- what it is for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_the_mean_reward_rises_within_the_kl_budget(algorithm: str, kl_in: str):
    policy = tiny.letter_policy()
    improvement = run(policy, config_of(algorithm, kl_in=kl_in, num_updates=20))
    before, _ = mean_reward_and_kl(policy, policy)
    after, kl = mean_reward_and_kl(improvement.candidate, policy)
    assert after > before + 0.2
    assert 0 < improvement.kl < 1.15, "the budget, up to the error of measuring it afresh"
    assert 0 < kl < 1.4, "the measured KL is the candidate's own, up to sampling error"
    assert improvement.stop_reason in ("updates", "kl_target")
    assert improvement.updates[-1].reward_mean > improvement.updates[0].reward_mean


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_small_kl_budget_is_kept_and_named(algorithm: str):
    """The policy that went over the budget is not the one that is handed back."""
    policy = tiny.letter_policy()
    improvement = run(policy, config_of(algorithm, kl_target=0.1, num_updates=40))
    assert improvement.stop_reason == "kl_target"
    assert 0.02 < improvement.kl < 0.13, "measured afresh, of what the budget allowed of the last update"
    assert len(improvement.updates) < 40
    _, kl = mean_reward_and_kl(improvement.candidate, policy)
    assert kl < 0.2


# --- the optimum in closed form -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bandit:
    """One prompt, and responses of at most two tokens from eight: 57 of them, all listed.

    Q depends on the second token after some first tokens and not after the others, so that the KL which a first
    token leads to differs: whoever forgets it prefers the wrong first tokens.
    """

    policy: Policy
    prompt: TokenIds
    responses: list[TokenIds]
    q_value: Tensor

    def reward(self, _: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        """A response cut after two tokens comes with an end token behind."""
        index = {response: i for i, response in enumerate(self.responses)}
        return self.q_value[[index[response[:2]] for response in responses]]

    def logprob(self, policy: Policy) -> Tensor:
        """log π of every response, float64."""
        logprobs = policy.logprobs([self.prompt] * len(self.responses), self.responses, tokens_per_batch=TOKENS)
        return torch.tensor([sum(values) for values in logprobs], dtype=torch.float64)


@cache
def bandit() -> Bandit:
    others = [token for token in range(8) if token != tiny.END]
    responses = [(tiny.END,), *((first, second) for first in others for second in range(8))]
    return Bandit(
        policy=tiny.letter_policy(num_letters=3, max_response_tokens=2),
        prompt=(tiny.USER, tiny.A, tiny.END, tiny.ASSISTANT),
        responses=responses,
        q_value=torch.tensor([0.6 if r[0] % 2 else float(r[-1] % 2) for r in responses]),
    )


def kl(logp: Tensor, logq: Tensor) -> float:
    return float((logp.exp() * (logp - logq)).sum())


@pytest.mark.parametrize(
    ("algorithm", "kl_in"),
    [("rloo", "reward"), ("rloo", "loss"), ("ppo", "reward"), ("ppo", "loss"), ("grpo", "reward")],
)
def test_it_reaches_the_closed_form_optimum(algorithm: str, kl_in: str):
    """The best policy for E[Q] − β KL(π'‖π) is π exp(Q/β), normalised. With β = 0.3 it is 0.44 nats from π."""
    one, beta = bandit(), 0.3
    anchor_logprob = one.logprob(one.policy)
    assert float(anchor_logprob.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    optimum_logprob = (anchor_logprob + one.q_value / beta).log_softmax(0)
    assert kl(optimum_logprob, anchor_logprob) > 0.4
    improvement = run(
        one.policy,
        ImprovementConfig(
            algorithm=algorithm,
            kl_in=kl_in,
            kl_coefficient=beta,
            num_updates=60,
            prompts_per_update=1,
            num_samples=256,
            num_passes=1,
            num_minibatches=1,
            learning_rate=3e-3,
            token_value_learning_rate=1e-2,
            kl_target=50.0,
            adaptive_kl=False,
        ),
        prompts=[one.prompt],
        reward=one.reward,
        seed=1,
    )
    assert improvement.stop_reason == "updates"
    assert kl(optimum_logprob, one.logprob(improvement.candidate)) < 0.04


# --- what it leaves alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policy_handed_in_is_the_anchor_and_is_not_changed(algorithm: str):
    """Nor is the token value. The KL of the first update is zero and grows from there: the anchor stays behind."""
    policy, token_value = tiny.letter_policy(), LetterValue()
    before, value_before = tiny.weights(policy.model), tiny.weights(token_value)
    improvement = run(policy, config_of(algorithm, num_updates=5), token_value=token_value)
    assert tiny.largest_difference(before, policy.model.state_dict()) == 0
    assert tiny.largest_difference(value_before, token_value.state_dict()) == 0
    assert tiny.largest_difference(before, improvement.candidate.model.state_dict()) > 0
    assert all(p.grad is None for p in policy.model.parameters())
    assert improvement.updates[0].kl == pytest.approx(0, abs=1e-6)
    assert improvement.updates[0].kl_k1 == pytest.approx(0, abs=1e-5)
    assert improvement.updates[-1].kl > 1e-4


@pytest.mark.parametrize(("algorithm", "num_samples"), [("ppo", 1), ("grpo", 3)])
def test_the_prompts_given_are_answered_equally_often(algorithm: str, num_samples: int):
    """Six prompts, four an update, six updates: each four times, and the copies of a prompt are neighbours."""
    asked: list[TokenIds] = []

    def reward(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        asked.extend(prompts)
        assert len(prompts) == len(responses) == 4 * num_samples
        for start in range(0, len(prompts), num_samples):
            assert len(set(prompts[start : start + num_samples])) == 1
        assert all(response[-1] == tiny.END for response in responses), "scored as it would be sent"
        return says_a(prompts, responses)

    config = config_of(algorithm, prompts_per_update=4, num_samples=num_samples, num_updates=6)
    run(tiny.letter_policy(), config, prompts=PROMPTS[:6], reward=reward)
    assert collections.Counter(asked) == dict.fromkeys(PROMPTS[:6], 4 * num_samples)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_change_nothing(algorithm: str):
    """The same generator, one batch or many: the same responses, metrics and weights."""

    def varied(_: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        """Where all rewards are equal, nothing but the rounding of the KL would decide where Adam goes."""
        return torch.tensor([sum(response) / 10 for response in responses])

    whole, split = (
        run(tiny.letter_policy(), config_of(algorithm, num_updates=3), tokens_per_batch=size, reward=varied)
        for size in (100_000, 64)
    )
    difference = tiny.largest_difference(whole.candidate.model.state_dict(), split.candidate.model.state_dict())
    assert difference < 1e-5
    for a, b in zip(whole.updates, split.updates, strict=True):
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), abs=1e-5, nan_ok=True)


def test_the_values_before_the_first_pass_are_its_forward_pass(monkeypatch: pytest.MonkeyPatch):
    """One minibatch that fits the token budget: two passes take two forward passes of the token value, not three."""

    class Counting(LetterValue):
        num_calls = 0

        def forward(self, batch: TreeBatch) -> Tensor:
            Counting.num_calls += 1
            return super().forward(batch)

    config = config_of("ppo", num_updates=3, num_minibatches=1, num_passes=2)
    kept = run(tiny.letter_policy(), config, token_value=Counting())
    assert Counting.num_calls == 3 * 2
    monkeypatch.setattr(native, "_have_graphs", lambda _: False)
    again = run(tiny.letter_policy(), config, token_value=Counting())
    assert Counting.num_calls == 3 * 2 + 3 * 3
    assert kept.updates == again.updates
    assert tiny.largest_difference(*(tiny.weights(i.candidate.model) for i in (kept, again))) == 0


def test_the_same_generator_gives_the_same_candidate():
    first, same, other = (run(tiny.letter_policy(), config_of("ppo", num_updates=3), seed=seed) for seed in (0, 0, 1))
    assert tiny.largest_difference(first.candidate.model.state_dict(), same.candidate.model.state_dict()) == 0
    assert tiny.largest_difference(first.candidate.model.state_dict(), other.candidate.model.state_dict()) > 0
    assert first.updates == same.updates or math.isnan(first.updates[0].explained_variance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_offset_of_every_prompt_changes_nothing_to_speak_of(algorithm: str):
    """Only differences of Q within a state move the policy: the reward plus 10 at one prompt and −10 at another leads
    a response's probability the same way, once there is something to compare it with. Without any baseline the
    offsets would drown the reward."""
    policy = tiny.letter_policy()
    prompts = PROMPTS[:2]

    def with_offset(prompts_B: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        offset_B = torch.tensor([10.0 if prompt == prompts[0] else -10.0 for prompt in prompts_B])
        return says_a(prompts_B, responses) + offset_B

    class PromptValue(nn.Module):
        """10 and −10 behind the two prompts, whose first letters differ: the state's own part of the reward."""

        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(10.0))

        def forward(self, batch: TreeBatch) -> Tensor:
            token_BT = batch.token_BT
            return torch.where(token_BT[:, 1:2] == prompts[0][1], self.size, -self.size).expand(token_BT.shape)

    assert prompts[0][1] != prompts[1][1]
    config = config_of(algorithm, prompts_per_update=2, num_samples=32, num_updates=12, kl_target=2.0)
    improvement = run(policy, config, prompts=prompts, reward=with_offset, token_value=PromptValue())
    rewards = [
        float(
            sample_rollout(
                p, policy, prompts * 300, says_a, generator=np.random.default_rng(5), tokens_per_batch=TOKENS
            ).reward_B.mean()
        )
        for p in (policy, improvement.candidate)
    ]
    assert rewards[1] > rewards[0] + 0.15


# --- ratio one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_at_the_first_pass_whatever_the_padding(
    model: Callable[..., PreTrainedModel], temperature: float
):
    """The sampler's log-probabilities (cache, padding in its gaps) are those that the gradient pass computes (trees
    padded on the right), row by row, in any batch: p p r r r . | p r . . . ."""
    policy = tiny.letter_policy(model, temperature=temperature)
    rollout = sample_rollout(policy, policy, PROMPTS, says_a, generator=np.random.default_rng(2), tokens_per_batch=64)
    for rows in (range(8), [3], [1, 3], [7, 0, 5]):
        for batch in policy.response_logits(*rollout.select(rows), tokens_per_batch=64):
            own, width = [rows[place] for place in batch.rows], batch.mask_BT.shape[1]
            ratio_BT = (batch.logprobs() - rollout.old_logprob_BT[own, :width]).exp()
            assert float((ratio_BT - 1)[batch.mask_BT].abs().max()) < 1e-5
            assert torch.equal(batch.mask_BT, rollout.mask_BT[own, :width])
    assert float((rollout.old_logprob_BT - rollout.anchor_logprob_BT).abs().max()) < 1e-5


def test_a_prompt_that_begins_every_conversation_is_not_drawn_all_at_once():
    """Two openings, four hundred conversations: batches and minibatches hold both. Drawn as the families that they are, each
    would hold one, and a policy trained on one opening at a time says to all what the last one called for."""
    openings = [(tiny.A, tiny.B), (tiny.C, tiny.D)]
    prompts = [openings[row % 2] for row in range(400)]
    config = config_of("ppo", prompts_per_update=64, num_samples=2, num_minibatches=4)
    generator = np.random.default_rng(0)
    batches = prompt_batches(prompts, config, generator)
    for _ in range(6):
        batch = next(batches)
        assert len(batch) == 128
        assert batch[::2] == batch[1::2], "a prompt's samples are adjacent"
        assert 0.25 < np.mean([prompt == openings[0] for prompt in batch]) < 0.75
        for rows in _minibatches(batch, config, generator):
            assert 0.2 < np.mean([batch[row] == openings[0] for row in rows]) < 0.8
            assert all(row ^ 1 in rows for row in rows), "a prompt's samples stay together"


# --- metrics ------------------------------------------------------------------------------------------------


def test_the_metrics_of_one_update_by_hand():
    """One pass, one minibatch, so all is measured before the first step: the ratio is 1, nothing is clipped, the KL
    is 0, and the rest is computed here from the same responses."""
    policy, value = tiny.letter_policy(), LetterValue()
    with torch.no_grad():
        value.value.weight.normal_(generator=torch.Generator().manual_seed(0))
    config = config_of("ppo", num_passes=1, num_minibatches=1, num_updates=1, prompts_per_update=8, gae_lambda=1.0)
    [update] = run(policy, config, token_value=value, seed=3).updates

    generator = np.random.default_rng(3)
    prompts = [PROMPTS[families(PROMPTS)[group][0]] for group in generator.permutation(8)]
    rollout = sample_rollout(policy, policy, prompts, says_a, generator=generator, tokens_per_batch=TOKENS)
    assert update.update == 0
    assert update.num_passes == 1
    assert update.clip_fraction == 0
    assert update.kl == pytest.approx(0, abs=1e-6)
    assert update.kl_k1 == pytest.approx(0, abs=1e-5)
    assert update.reward_mean == pytest.approx(np.mean([tiny.A in response for response in rollout.responses]))
    num_tokens = sum(map(len, rollout.responses))
    assert update.response_tokens == pytest.approx(num_tokens / 8)

    entropy, values, returns = 0.0, [], []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        [logits] = policy.response_logits([prompt], [response], tokens_per_batch=TOKENS)
        entropy += float(token_entropy(logits.logits_NV).detach().sum())
        before = (prompt[-1], *response[:-1])  # the last token of each prefix, of which LetterValue knows the value
        values += [float(value.value.weight[token]) for token in before]
        returns += [float(tiny.A in response)] * len(response)  # λ = 1: the reward, at every token
    assert update.entropy == pytest.approx(entropy / num_tokens, abs=1e-5)
    assert update.explained_variance == pytest.approx(
        explained_variance(torch.tensor(values), torch.tensor(returns)), abs=1e-4
    )


def test_passes_end_when_the_policy_has_moved_far_enough():
    policy = tiny.letter_policy()
    [stopped] = run(policy, config_of("ppo", num_updates=1, num_passes=6, early_stop_kl=1e-5), seed=1).updates
    [free] = run(policy, config_of("ppo", num_updates=1, num_passes=6, early_stop_kl=1e5), seed=1).updates
    assert stopped.num_passes < free.num_passes == 6
    assert free.clip_fraction > 0


def test_every_update_is_reported_with_the_policy_as_it_then_is():
    seen: list[tuple[UpdateMetrics, dict[str, Tensor]]] = []
    improvement = run(
        tiny.letter_policy(),
        config_of("ppo", num_updates=3, kl_target=50.0),
        on_update=lambda metrics, policy: seen.append((metrics, tiny.weights(policy.model))),
    )
    assert [metrics for metrics, _ in seen] == list(improvement.updates)
    assert [metrics.update for metrics, _ in seen] == [0, 1, 2]
    assert tiny.largest_difference(seen[-1][1], improvement.candidate.model.state_dict()) == 0
    assert tiny.largest_difference(seen[0][1], seen[1][1]) > 0


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_an_error(bad: float):
    def reward(prompts: Sequence[TokenIds], _: Sequence[TokenIds]) -> Tensor:
        return torch.tensor([0.0] * (len(prompts) - 1) + [bad])

    with pytest.raises(ValueError, match="not finite"):
        run(tiny.letter_policy(), config_of("ppo"), reward=reward)


@pytest.mark.parametrize("learning_rate", [0.03, 1.0, 1e6])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_runaway_learning_rate_leaves_the_last_good_weights(algorithm: str, learning_rate: float):
    """Whether it is caught as a spent budget or as a collapse, what comes back is the policy before."""
    policy, seen = tiny.letter_policy(), [tiny.weights(tiny.letter_policy().model)]
    config = config_of(algorithm, learning_rate=learning_rate, kl_target=0.3, num_updates=30)
    improvement = run(policy, config, on_update=lambda _, candidate: seen.append(tiny.weights(candidate.model)))
    assert improvement.stop_reason.startswith(("collapse: ", "kl_target"))
    assert "\n" not in improvement.stop_reason
    assert improvement.kl <= 0.3
    assert tiny.largest_difference(seen[-2], improvement.candidate.model.state_dict()) == 0, (
        "one update before the last"
    )
    _, kl = mean_reward_and_kl(improvement.candidate, policy)
    assert kl < 0.6


def test_responses_that_shrink_to_nothing_are_a_collapse():
    """The reward is for silence, and the KL budget is out of reach: length is what gives it away."""
    policy = tiny.letter_policy()

    def silence(_: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        return torch.tensor([-float(len(response)) for response in responses])

    config = config_of("rloo", kl_target=100.0, num_updates=100, kl_coefficient=0.0, learning_rate=5e-3)
    improvement = run(policy, config, reward=silence)
    assert improvement.stop_reason.startswith("collapse: ")
    assert len(improvement.updates) < 100


def test_a_policy_without_a_gradient_to_follow_stays_where_it_is():
    """Every response earns the same: nothing can be ranked, and nothing happens but rounding, which AdamW scales up and
    the KL holds."""

    def constant(prompts: Sequence[TokenIds], _: Sequence[TokenIds]) -> Tensor:
        return torch.full((len(prompts),), -20.3)

    policy = tiny.letter_policy()
    improvement = run(policy, config_of("grpo", prompts_per_update=4, num_samples=7, num_updates=5), reward=constant)
    assert improvement.kl < 0.02


def test_ppo_needs_a_token_value_and_says_so():
    with pytest.raises(ValueError, match="token value"):
        improve(
            tiny.letter_policy(),
            PROMPTS,
            says_a,
            config_of("ppo"),
            generator=np.random.default_rng(0),
            tokens_per_batch=TOKENS,
        )


def test_a_frozen_token_value_is_used_and_not_fitted():
    """Learning rate 0: the same candidate as with a value that has no parameters and says the same."""

    class Zero(nn.Module):
        def forward(self, batch: TreeBatch) -> Tensor:
            return torch.zeros(batch.token_BT.shape)

    config = config_of("ppo", num_updates=3, token_value_learning_rate=0.0)
    frozen, none = (run(tiny.letter_policy(), config, token_value=value) for value in (LetterValue(), Zero()))
    assert tiny.largest_difference(frozen.candidate.model.state_dict(), none.candidate.model.state_dict()) < 1e-6


def test_an_update_that_goes_too_far_is_taken_in_part():
    """Its first update overshoots the budget by far; what is handed back is not the anchor, and within the budget."""
    config = config_of("rloo", kl_target=0.15, learning_rate=3e-3, num_passes=1, num_minibatches=1)
    improvement = run(tiny.letter_policy(), config)
    assert improvement.stop_reason == "kl_target"
    assert len(improvement.updates) == 1
    assert 0.01 < improvement.kl < 0.2


@pytest.mark.parametrize(("kl", "expected"), [(0.4, 0.4), (0.2, 0.2), (0.1, 0.2), (0.8, 0.8)])
def test_the_budget_is_spent_evenly(kl: float, expected: float):
    """After two of eight updates a quarter of a budget of 1.6 is due."""
    config = config_of("ppo", kl_target=1.6, num_updates=8)
    assert paced_kl_coefficient(0.4, kl, 2, config) == expected


def test_the_price_of_kl_follows_the_budget():
    """A reward whose differences are tiny against beta still moves the policy, once beta has come down; with beta
    fixed it does not. And a beta of nothing is no answer: it comes up where the policy runs ahead."""

    def small(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        return 0.01 * says_a(prompts, responses)

    settings = {"num_updates": 12, "learning_rate": 3e-4, "kl_target": 0.5, "kl_coefficient": 0.5}
    fixed, adaptive = (
        run(tiny.letter_policy(), config_of("rloo", adaptive_kl=on, **settings), reward=small) for on in (False, True)
    )
    assert adaptive.updates[-1].kl_coefficient < 0.1
    assert {update.kl_coefficient for update in fixed.updates} == {0.5}
    assert adaptive.kl > 2 * fixed.kl
    hasty = run(
        tiny.letter_policy(),
        config_of("rloo", adaptive_kl=True, num_updates=12, learning_rate=1e-3, kl_target=2.0, kl_coefficient=0.001),
    )
    assert max(update.kl_coefficient for update in hasty.updates) > 0.001
