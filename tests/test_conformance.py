"""The conformance check: our step passes it, and every wrong problem that a stack may silently solve fails it."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from iterative_ppo import conformance
from iterative_ppo.config import ImprovementConfig
from iterative_ppo.conformance import (
    Problem,
    backend_of,
    check_backend,
    judge,
    logprobs,
    problems,
    solve,
    start_policy,
)
from iterative_ppo.improvement.base import RewardFunction
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds

native = backend_of("native")
RewardOf = Callable[[RewardFunction, ImprovementConfig], RewardFunction]


def failed(backend: conformance.Backend, problem: str, *, algorithm: str = "rloo", kl_in: str = "reward") -> set[str]:
    """What a backend fails that solves one problem by itself, and is given the answers of the others."""
    asked = problems(0)
    candidates = {name: other.optimum() for name, other in asked.items()}
    assert judge(asked, candidates).passed
    candidates[problem] = solve(backend, asked[problem], algorithm=algorithm, kl_in=kl_in, seed=0)
    return {check.name for check in judge(asked, candidates).checks if not check.passed}


def with_reward(reward_of: RewardOf) -> conformance.Backend:
    """Our step on another reward: what a stack with that mistake optimises."""

    def backend(
        policy: Policy, prompts: Sequence[TokenIds], reward: RewardFunction, config: ImprovementConfig, seed: int
    ) -> Policy:
        return native(policy, prompts, reward_of(reward, config), config, seed)

    return backend


def is_cut(response: TokenIds) -> bool:
    return len(response) > conformance._MAX_TOKENS


def anchored_elsewhere(reward: RewardFunction, config: ImprovementConfig) -> RewardFunction:
    """E[Q] − β KL(π'‖ρ) is E[Q + β log ρ/π] − β KL(π'‖π): anchored at ρ, the policy of another seed."""
    log_ratio_SA = logprobs(start_policy(1)) - logprobs(start_policy(0))
    shifted = Problem(anchor_SA=logprobs(start_policy(0)), q_SA=config.kl_coefficient * log_ratio_SA)
    return lambda prompts, responses: reward(prompts, responses) + shifted.reward(prompts, responses)


def tokens_discounted(reward: RewardFunction, _: ImprovementConfig) -> RewardFunction:
    """The reward of the end seen from the first token, at a token discount of 0.9."""
    return lambda prompts, responses: (
        reward(prompts, responses)
        * torch.tensor([0.9 ** (min(len(response), conformance._MAX_TOKENS) - 1) for response in responses])
    )


def reward_of_the_end_dropped(reward: RewardFunction, _: ImprovementConfig) -> RewardFunction:
    """Responses that end by themselves are paid nothing."""
    return lambda prompts, responses: (
        reward(prompts, responses) * torch.tensor([float(is_cut(response)) for response in responses])
    )


def without_kl(
    policy: Policy, prompts: Sequence[TokenIds], reward: RewardFunction, config: ImprovementConfig, seed: int
) -> Policy:
    """As with an estimator whose gradient is zero on average: k1 added to the loss."""
    return native(policy, prompts, reward, dataclasses.replace(config, kl_coefficient=0.0), seed)


def does_nothing(policy: Policy, *_: object) -> Policy:
    return policy


def test_the_optimum_is_the_closed_form_on_all_responses():
    """All probabilities of a policy add up to 1; the optimum gains all that there is, and nothing nearby gains more."""
    anchor_SA = logprobs(start_policy(0))
    generator = torch.Generator().manual_seed(0)
    problem = Problem(anchor_SA=anchor_SA, q_SA=torch.rand(3, len(conformance.RESPONSES), generator=generator).double())
    optimum_SA = problem.optimum()
    torch.testing.assert_close(anchor_SA.exp().sum(1), torch.ones(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(optimum_SA.exp().sum(1), torch.ones(3).double())
    assert problem.share_of_gain(anchor_SA) == 0
    assert problem.share_of_gain(optimum_SA) == pytest.approx(1)
    # J(pi*) − J(pi) = β KL(pi‖pi*): the identity of the closed-form gain.
    gain = problem.objective(optimum_SA) - problem.objective(anchor_SA)
    assert gain == pytest.approx(conformance._BETA * float(conformance.kl_by_prompt(anchor_SA, optimum_SA).mean()))
    for step in torch.randn(20, *anchor_SA.shape, generator=generator).double():
        nearby_SA = (optimum_SA + 0.01 * step).log_softmax(1)
        assert problem.objective(nearby_SA) < problem.objective(optimum_SA)


@pytest.mark.slow
def test_ppo_as_it_comes_passes():
    result = check_backend(native)
    assert result.passed, [check for check in result.checks if not check.passed]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "problem", "caught_by"),
    [
        (native, "optimum", set()),
        (with_reward(anchored_elsewhere), "anchor", {"anchor"}),
        (with_reward(tokens_discounted), "length", {"token_discount"}),
        (with_reward(reward_of_the_end_dropped), "end", {"end_of_response"}),
        (without_kl, "optimum", {"kl_to_optimum", "kl_penalty", "share_of_gain"}),
        (does_nothing, "optimum", {"kl_to_optimum", "kl_penalty", "share_of_gain"}),
    ],
)
def test_a_step_on_another_problem_fails(backend: conformance.Backend, problem: str, caught_by: set[str]):
    assert failed(backend, problem) == caught_by


def test_a_candidate_over_another_vocabulary_is_not_judged():
    """What it says beside the listed responses would count as nothing: its KL to the optimum comes out below 0."""
    wider = start_policy(0)
    wider.model.resize_token_embeddings(12, mean_resizing=False)
    with pytest.raises(conformance.BackendError, match="a policy over another vocabulary"):
        solve(lambda *_: wider, problems(0)["optimum"], algorithm="ppo", kl_in="loss", seed=0)


@pytest.mark.slow
def test_a_group_normalised_loss_is_found_out():
    """GRPO divides the reward by a group's deviation and not a KL in the loss: its price is another one than was set."""
    assert "kl_penalty" in failed(native, "optimum", algorithm="grpo", kl_in="loss")
