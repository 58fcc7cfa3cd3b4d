"""Collecting: the same seed gives the same conversations, however many run at a time; the log loses nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from tiny import word_policy

from iterative_ppo import sampling_chunks
from iterative_ppo.conversation_log import conversation_to_dict, read_conversations, write_conversations
from iterative_ppo.conversations import Conversation, turn_rewards
from iterative_ppo.environments.rollout import EnvironmentFailure, RolloutStatistics, collect, collect_scripted
from iterative_ppo.environments.suggested_response import SuggestedResponse
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.sampling import ConversationCache, SampledResponses, cache_bytes_per_token


class Game(gymnasium.Env[str, str]):
    """Two to five turns; what is said and paid depends on the hidden number, on chance and on the response."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def reset(self, *, seed: int | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.num_turns = int(self.np_random.integers(2, 6))
        self.totals.append(0.0)
        return f"customer {self.np_random.integers(1000)}", {"system": "you play"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.num_turns -= 1
        reward = round(float(self.np_random.normal()) + len(action) / 10, 3)
        self.totals[-1] += reward
        return f"word {self.np_random.integers(100)}", reward, self.num_turns == 0, False, {}

    def scripted_response(self, messages: Sequence[dict[str, str]], generator: np.random.Generator) -> str:
        return f"answer {len(messages)} {generator.integers(10)}"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return word_policy(max_response_tokens=6)


def play(policy: Policy, *, seed: int = 3, lockstep: int = 4, num: int = 10, **more: Any) -> list[Conversation]:
    settings = {"make_environment": Game, "max_turns": 9, "name": "p"} | more
    make_environment = settings.pop("make_environment")
    return list(collect(policy, make_environment, num_conversations=num, seed=seed, lockstep=lockstep, **settings))


def texts(conversations: Sequence[Conversation]) -> list[list[str]]:
    return [[message.content for message in conversation.messages] for conversation in conversations]


def test_the_same_seed_gives_the_same_conversations(policy: Policy) -> None:
    assert play(policy) == play(policy)
    assert texts(play(policy, seed=4)) != texts(play(policy))


@pytest.mark.parametrize("lockstep", [1, 3, 10, 512])
def test_how_many_run_at_a_time_makes_no_difference(policy: Policy, lockstep: int) -> None:
    one_by_one, together = play(policy, lockstep=1), play(policy, lockstep=lockstep)
    assert texts(together) == texts(one_by_one)
    assert [c.id for c in together] == [f"p-{i:06d}" for i in range(10)]
    assert [c.outcome for c in together] == [c.outcome for c in one_by_one]
    for a, b in zip(together, one_by_one, strict=True):
        for mine, other in zip(a.messages, b.messages, strict=True):
            assert mine.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-3))


def test_conversations_that_memory_does_not_hold_wait_and_are_the_same(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for 400 tokens, so for all ten at first, and for fewer as they grow."""
    expected = play(policy, lockstep=10)
    sample, rows_at_a_time = ConversationCache.sample, []

    def spy(cache: ConversationCache, prompts: Sequence[TokenIds], uniforms_BT: np.ndarray) -> SampledResponses:
        rows_at_a_time.append(len(prompts))
        assert len(prompts) == 1 or len(prompts) * (max(map(len, prompts)) + 6) <= 400
        return sample(cache, prompts, uniforms_BT)

    monkeypatch.setattr(ConversationCache, "sample", spy)
    monkeypatch.setattr(sampling_chunks, "_CACHE_BYTES", 400 * cache_bytes_per_token(policy.model))
    statistics = RolloutStatistics()
    found = play(policy, lockstep=10, statistics=statistics)
    assert texts(found) == texts(expected)
    assert [c.outcome for c in found] == [c.outcome for c in expected]
    assert sum(rows_at_a_time) == statistics.num_turns
    assert rows_at_a_time[0] == 10
    assert len(rows_at_a_time) > 5, "some waited"


def test_a_longer_collection_begins_like_a_shorter_one(policy: Policy) -> None:
    assert texts(play(policy, num=6)) == texts(play(policy, num=10))[:6]


def test_two_policies_meet_the_same_customers(policy: Policy) -> None:
    other = word_policy(seed=1, max_response_tokens=6)
    mine, theirs = play(policy), play(other)
    assert [c.messages[1].content for c in mine] == [c.messages[1].content for c in theirs]
    assert len({c.messages[1].content for c in mine}) > 5
    assert texts(mine) != texts(theirs)


def test_conversations_pass_through_a_log_unchanged(policy: Policy, tmp_path: Path) -> None:
    conversations = play(policy)
    write_conversations(tmp_path / "log.jsonl", conversations)
    assert list(read_conversations(tmp_path / "log.jsonl")) == conversations


def test_turn_rewards_and_outcome_add_up_to_what_the_environment_paid(policy: Policy) -> None:
    games: list[Game] = []

    def make() -> Game:
        games.append(Game())
        return games[-1]

    conversations = play(policy, lockstep=1, make_environment=make)
    paid = [total for game in games for total in game.totals]
    assert [sum(turn_rewards(c) or ()) for c in conversations] == pytest.approx(paid)
    for conversation in conversations:
        acted = [message for message in conversation.messages if message.role == "assistant"]
        assert acted[-1].reward is None, "the last turn's reward is the outcome"
        assert all(message.reward is not None for message in acted[:-1])


def test_every_response_has_its_logprob_under_the_policy(policy: Policy) -> None:
    for conversation in play(policy, num=3):
        for message in conversation.messages:
            assert (message.logprob is None) == (message.role != "assistant")
            assert message.logprob is None or message.logprob <= 0


def test_our_cap_is_a_truncation(policy: Policy) -> None:
    conversations = play(policy, max_turns=3)
    num_turns = [sum(message.role == "assistant" for message in c.messages) for c in conversations]
    uncapped = [sum(message.role == "assistant" for message in c.messages) for c in play(policy)]
    assert {"truncated", "terminated"} == {c.end for c in conversations}
    assert num_turns == [min(num, 3) for num in uncapped]
    assert [c.end == "truncated" for c in conversations] == [num > 3 for num in uncapped]
    assert all(c.outcome is not None for c in conversations)


def test_statistics_count_turns_and_what_the_context_had_no_room_for(policy: Policy) -> None:
    statistics = RolloutStatistics()
    conversations = play(policy, statistics=statistics)
    assert statistics.num_turns == sum(m.role == "assistant" for c in conversations for m in c.messages)
    assert statistics.num_encoded_tokens > statistics.num_turns
    assert statistics.num_dropped_messages == 0
    narrow = RolloutStatistics()
    play(word_policy(max_response_tokens=6, context_tokens=48), statistics=narrow)
    assert narrow.num_dropped_messages > 0


def test_suggestion_sent_message_and_decision_are_logged(policy: Policy, tmp_path: Path) -> None:
    conversations = play(policy, make_environment=SuggestedResponse, num=12)
    acted = [message for c in conversations for message in c.messages if message.role == "assistant"]
    assert all(message.suggestion is not None and message.decision is not None for message in acted)
    assert len({message.decision for message in acted}) >= 3
    for message in acted:
        assert message.action == message.suggestion
        if message.decision == "accepted":
            assert message.content == message.suggestion
        if message.decision in ("edited", "rejected"):
            assert message.content != message.suggestion
    write_conversations(tmp_path / "log.jsonl", conversations)
    assert list(read_conversations(tmp_path / "log.jsonl")) == conversations
    last = [record for record in conversation_to_dict(conversations[0])["messages"] if record["role"] == "assistant"][
        -1
    ]
    assert {"suggestion", "content", "decision"} <= last.keys()


def test_the_scripted_seller_writes_the_same_log_each_time() -> None:
    def write(seed: int) -> list[Conversation]:
        return list(collect_scripted(Game, num_conversations=5, seed=seed, max_turns=9))

    assert write(1) == write(1)
    assert write(1) != write(2)
    assert all(message.logprob is None for c in write(1) for message in c.messages)


def test_a_failure_says_which_conversation_and_turn(policy: Policy) -> None:
    class Broken(Game):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            observation, reward, *rest = super().step(action)
            return (observation, reward if self.num_turns else float("inf"), *rest)

    with pytest.raises(EnvironmentFailure, match=r"environment Broken, conversation p-00000\d, turn \d: .* reward inf"):
        play(policy, make_environment=Broken)
