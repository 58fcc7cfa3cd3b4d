"""One record of the log format: what is accepted, how errors read, how messages of one side are joined."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logs import assistant, conversation, record, user

from iterative_ppo.conversation_log import (
    conversation_from_dict,
    conversation_to_dict,
    read_conversations,
    write_conversations,
)
from iterative_ppo.conversations import LogError, Message

EXAMPLE: dict[str, Any] = {
    "id": "c-001",
    "policy": "iteration-002",
    "messages": [
        {"role": "system", "content": "You sell running shoes."},
        {"role": "user", "content": "hi, any trail shoes?"},
        {
            "role": "assistant",
            "content": "What is your budget?",
            "suggestion": "Which budget do you have in mind?",
            "decision": "edited",
        },
        {"role": "user", "content": "around 80"},
    ],
    "outcome": 1.0,
    "end": "terminated",
}


# ---- What is accepted ----


def test_the_example_of_the_contract_reads_and_writes_back_exactly() -> None:
    read = conversation_from_dict(EXAMPLE)
    assert (read.id, read.policy, read.outcome, read.end) == ("c-001", "iteration-002", 1.0, "terminated")
    assert read.messages[2] == Message(
        role="assistant",
        content="What is your budget?",
        suggestion="Which budget do you have in mind?",
        decision="edited",
    )
    assert conversation_to_dict(read) == EXAMPLE


@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ({"outcome": 1.0}, "terminated"),
        ({"outcome": 0}, "terminated"),
        ({"outcome": None}, "censored"),
        ({}, "censored"),
        ({"outcome": 1.0, "end": None}, "terminated"),
        ({"outcome": 1.0, "end": "censored"}, "censored"),
        ({"end": "truncated"}, "truncated"),
    ],
)
def test_end_defaults_to_what_the_outcome_says_and_is_always_written(keys: dict[str, Any], end: str) -> None:
    read = conversation_from_dict({"id": "c", "messages": [user("hi")], **keys})
    assert read.end == end
    assert conversation_to_dict(read)["end"] == end


def test_an_integer_outcome_becomes_a_float() -> None:
    outcome = conversation(outcome=1).outcome
    assert outcome == 1.0
    assert isinstance(outcome, float)


def test_null_means_missing_for_optional_keys_but_stays_in_unknown_ones() -> None:
    optional = ("suggestion", "decision", "logprob", "prompt", "reward", "metadata")
    message = user("hi", **dict.fromkeys(optional), unknown=None)
    written = conversation_to_dict(conversation(message, policy=None, outcome=None, metadata=None, other=None))
    assert written == record(user("hi", unknown=None), other=None)


# ---- Errors ----

BAD_RECORDS: list[tuple[Any, str, str]] = [
    ([], "", "must be a JSON object"),
    ("text", "", "not a string"),
    (None, "", "not null"),
    ({"messages": [user("hi")]}, "id", "is missing"),
    (record(id=7), "id", "must be a string, not a number"),
    (record(id=""), "id", "must not be empty"),
    (record(id=" "), "id", "must not be empty"),
    (record(id=None), "id", "not null"),
    (record(policy=3), "policy", "must be a string"),
    (record(policy=""), "policy", "must not be empty"),
    ({"id": "c"}, "messages", "is missing"),
    (record(messages=[]), "messages", "must not be empty"),
    (record(messages={}), "messages", "must be a list of messages, not an object"),
    (record(messages=None), "messages", "not null"),
    (record("hi"), "messages[0]", "must be an object with role and content, not a string"),
    (record(user("hi"), None), "messages[1]", "not null"),
    (record({"content": "hi"}), "messages[0].role", "is missing"),
    (record({"role": "user"}), "messages[0].content", "is missing"),
    (record({"role": None, "content": ""}), "messages[0].role", "not null"),
    (record({"role": ["user"], "content": ""}), "messages[0].role", "not a list"),
    (record(user("hi"), {"role": "bot", "content": ""}), "messages[1].role", "did you mean `assistant`?"),
    (record({"role": "human", "content": ""}), "messages[0].role", "did you mean `user`?"),
    (record({"role": "Customer", "content": ""}), "messages[0].role", "did you mean `user`?"),
    (record({"role": "asistant", "content": ""}), "messages[0].role", "did you mean `assistant`?"),
    (record({"role": "developer", "content": ""}), "messages[0].role", "did you mean `system`?"),
    (record({"role": "tool", "content": ""}), "messages[0].role", "must be one of system, user, assistant"),
    (record({"role": "a\nb" * 99, "content": ""}), "messages[0].role", "'a\\nba"),
    (record(user("hi"), {"role": "system", "content": ""}), "messages[1].role", "may only stand first"),
    (record(user(None)), "messages[0].content", "not null"),  # type: ignore[arg-type]
    (record(user([{"type": "text"}])), "messages[0].content", "list of parts"),  # type: ignore[arg-type]
    (record(user(5)), "messages[0].content", "must be a string, not a number"),  # type: ignore[arg-type]
    (record(user("a\ud800")), "messages[0].content", "lone surrogate \\ud800 at character 2"),
    (record(user("hi", suggestion="x")), "messages[0].suggestion", "assistant messages only"),
    (record(user("hi", decision="edited")), "messages[0].decision", "assistant messages only"),
    (record(user("hi", logprob=-1.0)), "messages[0].logprob", "assistant messages only"),
    (record(user("hi", reward=1.0)), "messages[0].reward", "assistant messages only"),
    (record(user("hi", prompt="x")), "messages[0].prompt", "assistant messages only"),
    (record(assistant("", suggestion=1)), "messages[0].suggestion", "must be a string"),
    (record(assistant("", suggestion="\udfff")), "messages[0].suggestion", "lone surrogate"),
    (record(assistant("", decision="accept")), "messages[0].decision", "did you mean `accepted`?"),
    (record(assistant("", decision=True)), "messages[0].decision", "must be a string, not true or false"),
    (record(assistant("", logprob=0.5)), "messages[0].logprob", "must be at most 0"),
    (record(assistant("", logprob=float("-inf"))), "messages[0].logprob", "must be a finite number"),
    (record(assistant("", logprob="-1")), "messages[0].logprob", "must be a number, not a string"),
    (record(assistant("", logprob=False)), "messages[0].logprob", "write 0"),
    (record(assistant("", prompt=[])), "messages[0].prompt", "must be a string, not a list"),
    (record(assistant("", reward=float("nan"))), "messages[0].reward", "must be a finite number"),
    (record(assistant("", reward={})), "messages[0].reward", "must be a number, not an object"),
    (record(user("hi", metadata="x")), "messages[0].metadata", "must be an object, not a string"),
    (record(user("hi", note=[1, float("inf")])), "messages[0].note[1]", "must be a finite number"),
    (record(assistant("", reward=1e308), assistant("", reward=1e308)), "messages[0].reward", "is not finite"),
    (
        record(assistant("", logprob=-1e308), assistant("", logprob=-1e308)),
        "messages[0].logprob",
        "not finite",
    ),
    (record(outcome=True), "outcome", "must be a number, not true; write 1"),
    (record(outcome="1"), "outcome", "must be a number, not a string"),
    (record(outcome=float("nan")), "outcome", "must be a finite number"),
    (record(outcome=10**400), "outcome", "must be a finite number"),
    (record(outcome=np.float32(1.0)), "outcome", "must be a number, not float32"),
    (record(end="terminate"), "end", "did you mean `terminated`?"),
    (record(end="done"), "end", "must be one of terminated, truncated, censored, not 'done'"),
    (record(end=1), "end", "must be a string"),
    (record(metadata=[]), "metadata", "must be an object, not a list"),
    (record(metadata={"a": {"b": [0, "\ud800"]}}), "metadata.a.b[1]", "lone surrogate"),
    (record(metadata={"a b\n": float("nan")}), "metadata['a b\\n']", "must be a finite number"),
    (record(metadata={"\ud800": 1}), "metadata", "key '\\ud800': lone surrogate"),
    (record(metadata={1: 1}), "metadata", "keys must be strings"),
    (record(metadata={"a": (1, 2)}), "metadata.a", "must be a JSON value, not tuple"),
    (record(unknown={"a": float("nan")}), "unknown.a", "must be a finite number"),
]


@pytest.mark.parametrize(("bad", "field", "reason"), BAD_RECORDS)
def test_a_bad_record_names_file_line_field_and_reason(bad: Any, field: str, reason: str) -> None:
    with pytest.raises(LogError) as caught:
        conversation_from_dict(bad, file="week12.jsonl", line=3)
    error = caught.value
    assert (error.file, error.line, error.field) == ("week12.jsonl", 3, field)
    assert reason in error.reason
    where = f"field `{field}`: " if field else ""
    assert str(error) == f"week12.jsonl:3: {where}{error.reason}"
    assert str(error).isprintable()


def test_nesting_has_a_limit_that_does_not_depend_on_the_callers_stack(tmp_path: Path) -> None:
    def nested(depth: int) -> Any:
        value: Any = {}
        for _ in range(depth):
            value = {"a": value}
        return value

    deepest = conversation(metadata=nested(99))
    write_conversations(tmp_path / "log.jsonl", [deepest])
    assert list(read_conversations(tmp_path / "log.jsonl")) == [deepest]
    with pytest.raises(LogError, match="nested more than 100 levels deep"):
        conversation(metadata=nested(100))
    # Joining puts the second message's metadata three levels further in: an error now, not when it is read back.
    with pytest.raises(LogError, match=r"messages\[0\]\.joined\[0\]\.metadata.*nested more than 100"):
        conversation(user("a"), user("b", metadata=nested(99)))


# ---- Joining ----


def test_consecutive_messages_of_one_side_are_joined() -> None:
    joined = conversation(
        {"role": "system", "content": "Sell."},
        {"role": "system", "content": "Be kind."},
        user("hi", metadata={"at": 1}, lang="en"),
        user("there", metadata={"at": 2}, lang=None),
        assistant("A", suggestion="a", decision="edited", logprob=-1.5, prompt="P1", reward=0.5),
        assistant("B", decision="accepted", logprob=-2.0, prompt="P2", reward=0.25),
    )
    assert joined.messages == (
        Message(role="system", content="Sell.\nBe kind."),
        Message(
            role="user",
            content="hi\nthere",
            metadata={"at": 1},
            extra={"lang": "en", "joined": [{"metadata": {"at": 2}, "lang": None}]},
        ),
        Message(
            role="assistant",
            content="A\nB",
            suggestion="a\nB",
            decision="edited",
            logprob=-3.5,
            prompt="P1",
            reward=0.75,
            extra={"joined": [{"prompt": "P2"}]},
        ),
    )
    assert conversation_from_dict(conversation_to_dict(joined)) == joined


def test_joining_keeps_what_is_known_and_claims_no_more() -> None:
    (message,) = conversation(
        assistant("A", decision="accepted", logprob=-1.0),
        assistant("B", decision="accepted", reward=0.0),
        assistant("C", decision="accepted"),
    ).messages
    expected = Message(role="assistant", content="A\nB\nC", decision="accepted", reward=0.0)
    assert message == expected  # a part of the response has no log-probability of the whole


def test_two_abstentions_joined_are_an_abstention() -> None:
    (message,) = conversation(assistant("", suggestion=""), assistant("", suggestion="")).messages
    assert (message.action, message.content) == ("", "")
    (message,) = conversation(assistant("", suggestion=""), assistant("B")).messages
    assert (message.action, message.content) == ("B", "B")


def test_joining_what_was_joined_before_loses_nothing() -> None:
    once = conversation_to_dict(conversation(user("a", n=1), user("b", n=2)))
    once["messages"].append(user("c", n=3))
    (message,) = conversation_from_dict(once).messages
    assert message == Message(role="user", content="a\nb\nc", extra={"n": 1, "joined": [{"n": 2}, {"n": 3}]})
    (message,) = conversation(user("a", joined="mine"), user("b", joined=[])).messages
    assert message.extra == {"joined": ["mine", {"joined": []}]}
