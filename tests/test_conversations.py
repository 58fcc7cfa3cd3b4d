"""The records: the multi-turn MDP that a conversation holds, splits by conversation, how an error reads."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import assistant, conversation, read_or_skip, records, user

from iterative_ppo.conversations import (
    LogError,
    Message,
    chat_messages,
    decision_points,
    folds_by_group,
    split_by_group,
    turn_rewards,
)


def test_a_log_error_stays_on_one_line_and_survives_pickling() -> None:
    error = LogError("a\nb.jsonl", 2, "id", "is missing")
    assert str(error) == "a\\nb.jsonl:2: field `id`: is missing"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, ValueError)


# ---- The multi-turn MDP ----


def test_the_chat_holds_the_action_and_what_was_sent_instead() -> None:
    read = conversation(
        {"role": "system", "content": "S"},
        assistant("same", suggestion="same"),
        user("u1"),
        assistant("sent", suggestion="proposed", decision="edited"),
        user("u2"),
        assistant("", suggestion="unwanted", decision="ignored"),
        user("u3"),
        assistant("own words", suggestion=""),
        user("u4"),
        assistant("", suggestion="", prompt="exact", logprob=-0.5),
        outcome=1.0,
    )
    chat = (
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "same"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "proposed"},
        {"role": "user", "content": "[sent instead: sent]\nu2"},
        {"role": "assistant", "content": "unwanted"},
        {"role": "user", "content": "[nothing was sent]\nu3"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "[sent instead: own words]\nu4"},
        {"role": "assistant", "content": ""},
    )
    assert chat_messages(read.messages) == chat
    points = decision_points(read)
    assert [point.turn for point in points] == [0, 1, 2, 3, 4]
    assert [point.response for point in points] == ["same", "proposed", "unwanted", "", ""]
    assert [point.chat for point in points] == [chat[:1], chat[:3], chat[:5], chat[:7], chat[:9]]
    assert (points[-1].prompt, points[-1].logprob, points[-1].conversation_id) == ("exact", -0.5, "c")


def test_a_prefix_that_ends_in_an_edited_message_still_says_what_was_sent() -> None:
    read = conversation(user("u"), assistant("", suggestion="a"), user("v"))
    assert chat_messages(read.messages[:2])[2:] == ({"role": "user", "content": "[nothing was sent]"},)
    unjoined = [
        Message(role="assistant", content="B", suggestion="A"),
        Message(role="assistant", content="C"),
    ]
    assert chat_messages(unjoined) == (
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "[sent instead: B]"},
        {"role": "assistant", "content": "C"},
    )


@given(records(alternate=False))
@settings(deadline=None, max_examples=100)
def test_a_state_is_a_prefix_of_every_later_state(valid: dict[str, Any]) -> None:
    read = read_or_skip(valid)
    if read is None:
        return
    points = decision_points(read)
    ends = [i for i, message in enumerate(read.messages) if message.role == "assistant"]
    assert len(points) == len(ends)
    for point, end in zip(points, ends, strict=True):
        state = chat_messages(read.messages[:end])
        assert point.chat == state
        for longer in range(end, len(read.messages) + 1):
            assert chat_messages(read.messages[:longer])[: len(state)] == state
        if end + 1 < len(read.messages):
            assert chat_messages(read.messages[: end + 1])[len(state)]["content"] == point.response


def test_turn_rewards_pay_the_outcome_once_at_the_last_turn() -> None:
    messages = (user("u"), assistant("a", reward=0.25), user("v"), assistant("b", reward=-0.5), user("w"))
    assert turn_rewards(conversation(*messages, outcome=1.0)) == (0.25, 0.5)
    assert turn_rewards(conversation(*messages, outcome=1.0, end="truncated")) == (0.25, 0.5)
    assert turn_rewards(conversation(*messages, outcome=1.0, end="censored")) is None
    assert turn_rewards(conversation(*messages)) is None
    assert turn_rewards(conversation(user("u"), assistant("a"), user("v"), assistant("b"), outcome=0)) == (
        0.0,
        0.0,
    )


def test_a_conversation_without_assistant_messages_has_no_decision_points() -> None:
    silent = conversation(user("hi"), outcome=0.0)
    assert decision_points(silent) == ()
    assert turn_rewards(silent) == ()


# ---- Splits ----

GROUPS = st.lists(st.sampled_from([*"abcdefgh", "a\0"]), min_size=1, max_size=40)


@given(GROUPS, st.floats(0.01, 0.99), st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_a_split_keeps_groups_whole_whatever_the_order_of_rows(
    groups: list[str], share: float, seed: int, random: Any
) -> None:
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match="at least 2 groups"):
            split_by_group(groups, held_out_share=share, seed=seed)
        return
    held_out = split_by_group(groups, held_out_share=share, seed=seed)
    assert held_out.dtype == np.bool_
    side = dict(zip(groups, held_out.tolist(), strict=True))
    assert [side[group] for group in groups] == held_out.tolist()
    assert 0 < sum(side.values()) < len(side)
    assert abs(sum(side.values()) - share * len(side)) <= 1
    shuffled = random.sample(groups, len(groups))
    assert split_by_group(shuffled, held_out_share=share, seed=seed).tolist() == [side[g] for g in shuffled]


@given(GROUPS, st.integers(2, 5), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_folds_keep_groups_whole_and_even_in_number(groups: list[str], num_folds: int, seed: int) -> None:
    outcomes = np.random.default_rng(seed).random(len(groups)).tolist()
    if len(set(groups)) < num_folds:
        with pytest.raises(ValueError, match="number of groups"):
            folds_by_group(groups, outcomes, num_folds=num_folds, seed=seed)
        return
    folds = folds_by_group(groups, outcomes, num_folds=num_folds, seed=seed)
    fold = dict(zip(groups, folds.tolist(), strict=True))
    assert [fold[group] for group in groups] == folds.tolist()
    sizes = np.bincount(list(fold.values()), minlength=num_folds)
    assert len(sizes) == num_folds
    assert sizes.max() - sizes.min() <= 1


def test_folds_have_outcomes_alike() -> None:
    outcomes = [1.0] * 20 + [0.0] * 30
    groups = [str(i) for i in range(50)]
    splits = [folds_by_group(groups, outcomes, num_folds=5, seed=seed) for seed in range(3)]
    for folds in splits:
        assert np.bincount(folds, outcomes).tolist() == [4.0] * 5
        assert np.bincount(folds).tolist() == [10] * 5
    assert len({tuple(folds.tolist()) for folds in splits}) == 3
    dialogues = folds_by_group(["a", "a", "b", "b"], [0, 1, 1, 1], num_folds=2, seed=0).tolist()
    assert dialogues[0] == dialogues[1] != dialogues[2] == dialogues[3]


def test_splits_depend_on_the_seed_and_refuse_impossible_requests() -> None:
    groups = [str(i) for i in range(50)]
    splits = {tuple(split_by_group(groups, held_out_share=0.2, seed=seed).tolist()) for seed in range(5)}
    assert len(splits) == 5
    assert all(sum(split) == 10 for split in splits)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_by_group(groups, held_out_share=share, seed=0)
    with pytest.raises(ValueError, match="num_folds"):
        folds_by_group(groups, [0.0] * 50, num_folds=1, seed=0)
    with pytest.raises(ValueError, match="at least 2 groups"):
        split_by_group([], held_out_share=0.2, seed=0)
