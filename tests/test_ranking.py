"""Within-state ranking on a game whose true values are known: a perfect Q, an inverted one, a blind one."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tiny import letter_policy

from iterative_ppo.policy import Policy
from iterative_ppo.ranking import Ranking, rank_within_states
from iterative_ppo.rendering import TokenIds


def worth(response: str) -> float:
    """A wins, B loses, anything else lies between."""
    return {"a": 1.0, "b": 0.0}.get(response[:1], 0.5)


class Game(gymnasium.Env[str, str]):
    """Two turns; the first response that begins with a or b decides."""

    def reset(self, *, seed: int | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "c", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "c", worth(action), True, False, {}


class NoisyGame(Game):
    """The same values in the mean over chance, and a hidden number that `branch` draws anew."""

    branches = 0
    hidden = 0

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "c", float(self.np_random.random() < worth(action)), True, False, {}

    def branch(self, generator: np.random.Generator) -> "NoisyGame":
        NoisyGame.branches += 1
        other = NoisyGame()
        other.np_random = generator
        return other


class FakeQ:
    """Q by the response's text."""

    def __init__(self, policy: Policy, value: Callable[[str], float]) -> None:
        self.policy, self.value = policy, value

    def values(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int
    ) -> torch.Tensor:
        assert len(prompts) == len(responses)
        assert tokens_per_batch == 512
        return torch.tensor([self.value(self.policy.renderer.response_text(response)) for response in responses])


@pytest.fixture(scope="module")
def policy() -> Policy:
    return letter_policy(num_letters=3, max_response_tokens=2, temperature=3.0)


def rank(policy: Policy, value: Callable[[str], float], game: type[Game] = Game, **changes: Any) -> Ranking:
    sizes = {"num_states": 5, "num_responses": 6, "num_rollouts": 4, "lockstep": 7, "seed": 1} | changes
    return rank_within_states(
        policy, FakeQ(policy, value), game, max_turns=3, tokens_per_batch=512, progress=lambda *_: None, **sizes
    )


def test_a_perfect_q_ranks_perfectly_and_regrets_nothing(policy: Policy) -> None:
    ranking = rank(policy, worth)
    assert ranking.num_states == 5
    assert ranking.kendall_tau.mean == pytest.approx(1.0)
    assert ranking.correlation == pytest.approx(1.0)
    assert ranking.ceiling.mean == pytest.approx(1.0)
    assert ranking.regret.mean == 0.0
    assert ranking.random_regret.mean > 0.1


def test_an_inverted_q_ranks_backwards_and_chooses_the_worst(policy: Policy) -> None:
    ranking = rank(policy, lambda response: -worth(response))
    assert ranking.kendall_tau.mean == pytest.approx(-1.0)
    assert ranking.correlation == pytest.approx(-1.0)
    assert ranking.regret.mean > ranking.random_regret.mean


def test_a_q_that_does_not_see_the_response_ranks_nothing(policy: Policy) -> None:
    blind = rank(policy, lambda _: 0.7)
    assert blind.kendall_tau.mean == 0.0
    assert blind.correlation == pytest.approx(0.0, abs=1e-9)


def test_what_differs_between_states_is_no_ranking(policy: Policy) -> None:
    """A Q that knows each state's mean to the last digit and its responses not at all correlates with nothing here,
    and one that ranks within states is not made worse by offsets of whole states."""

    class ByState(FakeQ):
        def values(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], **_: Any) -> torch.Tensor:
            return super().values(prompts, responses, tokens_per_batch=512) + 100.0 * len(prompts[0])

    sizes = {"num_states": 5, "num_responses": 6, "num_rollouts": 4, "lockstep": 7, "seed": 1, "max_turns": 3}
    ranking = rank_within_states(
        policy, ByState(policy, worth), Game, tokens_per_batch=512, progress=lambda *_: None, **sizes
    )
    assert ranking.correlation == pytest.approx(1.0, abs=1e-4)


def test_the_same_seed_gives_the_same_ranking_whatever_the_lockstep(policy: Policy) -> None:
    assert rank(policy, worth, NoisyGame) == rank(policy, worth, NoisyGame, lockstep=100)


def test_rollouts_of_one_response_differ_and_noise_lowers_the_ceiling(policy: Policy) -> None:
    ranking = rank(policy, worth, NoisyGame)
    assert ranking.ceiling.mean < 0.999, "two halves of two rollouts cannot agree on coin flips"
    assert rank(policy, worth, NoisyGame, num_rollouts=400).kendall_tau.mean > ranking.ceiling.mean


def test_the_environments_own_branches_are_used_where_it_has_them(policy: Policy) -> None:
    NoisyGame.branches = 0
    assert rank(policy, worth, NoisyGame, num_states=1).exact_branches
    assert 2 * 4 <= NoisyGame.branches <= 6 * 4
    assert NoisyGame.branches % 4 == 0


def test_other_environments_are_copied_with_chance_of_their_own(policy: Policy) -> None:
    draws: list[float] = []
    originals: list[gymnasium.Env[str, str]] = []

    class Copied(Game):
        def __init__(self) -> None:
            originals.append(self)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            if self is not originals[0]:
                draws.append(float(self.np_random.random()))
            return super().step(action)

    ranking = rank(policy, worth, Copied, num_states=1)
    assert not ranking.exact_branches
    assert len(originals) == 1, "copied, not made anew"
    assert len(draws) >= 8
    assert len(set(draws)) == len(draws)


def test_one_response_only_cannot_be_ranked() -> None:
    certain = letter_policy(max_response_tokens=1, temperature=1e-4)
    with pytest.raises(ValueError, match="one response only"):
        rank(certain, worth)


def test_states_are_taken_from_all_turns(policy: Policy) -> None:
    lengths: list[int] = []

    class Long(Game):
        def reset(self, *, seed: int | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
            self.num_turns = 0
            return super().reset(seed=seed)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.num_turns += 1
            return "c", worth(action), self.num_turns == 3, False, {}

    class Q(FakeQ):
        def values(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], **_: Any) -> torch.Tensor:
            lengths.append(len(prompts[0]))
            assert len(set(prompts)) == 1, "one state"
            return super().values(prompts, responses, tokens_per_batch=512)

    rank_within_states(
        policy,
        Q(policy, worth),
        Long,
        num_states=12,
        num_responses=2,
        num_rollouts=2,
        max_turns=3,
        lockstep=8,
        tokens_per_batch=512,
        seed=0,
        progress=lambda *_: None,
    )
    assert len(set(lengths)) >= 3
