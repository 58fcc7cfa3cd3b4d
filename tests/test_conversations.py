"""The log format: what is accepted, how errors read, exact round trips, and the MDP that a conversation holds."""

import copy
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterative_ppo import conversations as module
from iterative_ppo.conversations import (
    DECISIONS,
    ENDS,
    Conversation,
    LogError,
    Message,
    chat_messages,
    conversation_from_dict,
    conversation_to_dict,
    decision_points,
    folds_by_group,
    read_conversations,
    split_by_group,
    summarize,
    turn_rewards,
    write_conversations,
)

DATA = Path(__file__).parents[1] / "../shared/data"
LOGS = {"persuasionforgood": 1_017, "casino": 2_060}

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


def user(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def record(*messages: Any, **keys: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "messages": list(messages) or [user("hi"), assistant("hello")],
        "end": "terminated",
        **keys,
    }


def conversation(*messages: Any, **keys: Any) -> Conversation:
    return conversation_from_dict(record(*messages, **keys))


def write_lines(path: Path, *lines: bytes | str | dict[str, Any]) -> Path:
    encoded = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded) + b"\n")
    return path


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
    written = conversation_to_dict(
        conversation(message, policy=None, outcome=None, metadata=None, other=None)
    )
    assert written == record(user("hi", unknown=None), other=None)


def test_a_conversation_without_assistant_messages_has_no_decision_points() -> None:
    silent = conversation(user("hi"), outcome=0.0)
    assert decision_points(silent) == ()
    assert turn_rewards(silent) == ()


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


BAD_LINES: list[tuple[bytes, str, str]] = [
    (
        b'{"id": "c" "messages": []}',
        "",
        "not valid JSON at column 12, near '\"messages\": []}': Expecting ','",
    ),
    (b'{"id": "c", "messages": [', "", "at column 26, near the end of the line: Expecting value"),
    (b"{'id': 1}", "", "not valid JSON at column 2"),
    (b'{"id": "a\tb"}', "", "Invalid control character"),
    (b'{"id": "\\x"}', "", "Invalid \\escape"),
    (b"{} {}", "", "Extra data"),
    (b"[]", "", "must be a JSON object with id and messages, not a list"),
    (b"NaN", "", "not a number"),
    (b'{"id": "\xff"}', "", "not UTF-8: byte 0xff at byte offset 8"),
    (b'{"id": "\xed\xa0\x80"}', "", "not UTF-8: byte 0xed at byte offset 8"),
    (b'{"id": "a\0"}', "", "NUL byte at byte offset 9"),
    ('{"id": "a"}'.encode("utf-16-le"), "", "UTF-16 and not UTF-8?"),
    (b"\xef\xbb\xbf" + json.dumps(record()).encode(), "", "not valid JSON at column 1, near '\\ufeff{"),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": "\\ud800"}]}',
        "messages[0].content",
        "surrogate",
    ),
    (b'{"id": "c", "id": "d", "messages": [{"role": "user", "content": ""}]}', "id", "more than once"),
    (
        b'{"id": "c", "messages": [{"role": "user", "role": "user", "content": ""}]}',
        "messages[0].role",
        "once",
    ),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": ""}], "a": {"b": [{"c": 1, "c": 2}]}}',
        "a.b[0].c",
        "o",
    ),
    (b'{"id": "c", "messages": [{"role": "user", "content": ""}], "outcome": NaN}', "outcome", "finite"),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": ""}], "outcome": -Infinity}',
        "outcome",
        "finite",
    ),
    (b'{"id": "c", "messages": [{"role": "user", "content": ""}], "outcome": 1e999}', "outcome", "finite"),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": ""}], "outcome": 1' + b"0" * 400 + b"}",
        "outcome",
        "fin",
    ),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": ""}], "outcome": 1' + b"0" * 9000 + b"}",
        "",
        "4,300",
    ),
    (
        b'{"id": "c", "messages": [{"role": "user", "content": ""}], "metadata": {"x": NaN}}',
        "metadata.x",
        "finite",
    ),
    (b"[" * 100_000 + b"]" * 100_000, "", "nested too deeply"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "", "nested too deeply"),
]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("bad", "field", "reason"), BAD_LINES)
def test_a_bad_line_names_file_line_field_and_reason(
    tmp_path: Path, bad: bytes, field: str, reason: str, ending: bytes
) -> None:
    path = tmp_path / "week12.jsonl"
    path.write_bytes(json.dumps(record()).encode() + ending + ending + bad + ending)
    reader = iter(read_conversations(path))
    assert next(reader).id == "c"
    with pytest.raises(LogError) as caught:
        next(reader)
    error = caught.value
    assert (error.file, error.line, error.field) == (str(path), 3, field)
    assert reason in error.reason
    assert str(error).startswith(f"{path}:3: field `{field}`: " if field else f"{path}:3: ")
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


def test_a_line_cut_off_at_the_end_of_the_file_says_so(tmp_path: Path) -> None:
    whole = json.dumps(record()).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + b"\n" + whole[:-9])
    with pytest.raises(LogError, match=r"log\.jsonl:2: not valid JSON at column .*was it cut off\?"):
        list(read_conversations(path))
    path.write_bytes(whole + b"\n" + whole)
    assert len(list(read_conversations(path))) == 2


def test_a_log_error_stays_on_one_line_and_survives_pickling() -> None:
    error = LogError("a\nb.jsonl", 2, "id", "is missing")
    assert str(error) == "a\\nb.jsonl:2: field `id`: is missing"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("keys", [{"end": "done"}, {"outcome": float("nan")}, {"metadata": {"x": object()}}])
def test_the_writer_refuses_what_the_reader_would_and_leaves_the_old_file(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    path = tmp_path / "log.jsonl"
    good = conversation()
    write_conversations(path, [good])
    bad = Conversation(**{"id": "c", "messages": good.messages, "end": "terminated", **keys})
    with pytest.raises(LogError, match=r"log\.jsonl:2: field"):
        write_conversations(path, [good, bad])
    assert list(read_conversations(path)) == [good]
    assert os.listdir(tmp_path) == ["log.jsonl"]


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


# ---- Round trips ----

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = TEXT.filter(lambda text: bool(text.strip()))
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)


def optional(keys: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def unknown(known: frozenset[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(TEXT.filter(lambda key: key not in known), JSON, max_size=2)


MESSAGE_KEYS = unknown(module._MESSAGE_KEYS)
PLAIN_KEYS = optional({"metadata": OBJECT})
ASSISTANT_KEYS = optional(
    {
        "suggestion": TEXT,
        "decision": st.sampled_from(DECISIONS),
        "logprob": NUMBER.map(lambda number: -abs(number)),
        "prompt": TEXT,
        "reward": NUMBER,
        "metadata": OBJECT,
    }
)


@st.composite
def messages_of(draw: st.DrawFn, role: str) -> dict[str, Any]:
    keys = draw(ASSISTANT_KEYS if role == "assistant" else PLAIN_KEYS)
    return {"role": role, "content": draw(TEXT), **keys, **draw(MESSAGE_KEYS)}


@st.composite
def records(draw: st.DrawFn, *, alternate: bool) -> dict[str, Any]:
    systems = draw(st.integers(0, 1 if alternate else 2))
    sides = ("user", "assistant")
    if alternate:
        first = draw(st.integers(0, 1))
        roles = [sides[(first + i) % 2] for i in range(draw(st.integers(0, 4)))]
    else:
        roles = draw(st.lists(st.sampled_from(sides), max_size=5))
    roles = ["system"] * systems + roles or ["user"]
    known = draw(optional({"policy": NAME, "outcome": NUMBER, "metadata": OBJECT}))
    return {
        "id": draw(NAME),
        "messages": [draw(messages_of(role)) for role in roles],
        "end": draw(st.sampled_from(ENDS)),
        **known,
        **draw(unknown(module._CONVERSATION_KEYS)),
    }


@given(records(alternate=True))
@settings(deadline=None, max_examples=100)
def test_a_record_without_consecutive_messages_is_written_back_as_it_was(valid: dict[str, Any]) -> None:
    before = copy.deepcopy(valid)
    assert conversation_to_dict(conversation_from_dict(valid)) == before
    assert valid == before


def read_or_skip(valid: dict[str, Any]) -> Conversation | None:
    try:
        return conversation_from_dict(valid)
    except LogError as error:
        if "sum over the joined messages is not finite" in error.reason:
            return None
        raise


@given(st.lists(records(alternate=False), max_size=4))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back_equal(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    expected = [read for item in valid if (read := read_or_skip(item)) is not None]
    for read in expected:
        assert conversation_from_dict(conversation_to_dict(read)) == read
    assert write_conversations(tmp_path / "log.jsonl", iter(expected)) == len(expected)
    assert list(read_conversations(tmp_path / "log.jsonl")) == expected
    assert (tmp_path / "log.jsonl").read_bytes().count(b"\n") == len(expected)


# ---- Files ----


def test_blank_lines_crlf_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    line = json.dumps(record()).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \t\n" + line + b"\r\n")
    assert list(read_conversations(path)) == [conversation()] * 2
    path.write_bytes(b"\xef\xbb\xbf\n\n" + line)
    assert list(read_conversations(path)) == [conversation()]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_yields_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    assert list(read_conversations(tmp_path / "log.jsonl")) == []


def test_the_file_is_opened_at_iteration_and_os_errors_come_through(tmp_path: Path) -> None:
    reader = read_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError):
        next(iter(reader))
    with pytest.raises(IsADirectoryError):
        next(iter(read_conversations(tmp_path)))
    with pytest.raises(FileNotFoundError):
        write_conversations(tmp_path / "missing" / "log.jsonl", [])
    with pytest.raises(FileExistsError):
        write_conversations(tmp_path, [])
    with pytest.raises(ValueError, match="bad_lines"):
        read_conversations(tmp_path / "log.jsonl", bad_lines="ignore")  # type: ignore[arg-type]


def test_skip_sets_bad_lines_aside_byte_for_byte_and_counts_them(tmp_path: Path) -> None:
    bad = [b'{"id": 1}', b"\xff\xfe", b"\xef\xbb\xbf{}"]
    path = write_lines(tmp_path / "log.jsonl", bad[2], record(), bad[0], "", record(), bad[1])
    reader = read_conversations(path, bad_lines="skip")
    for _ in range(2):  # each iteration starts anew
        assert len(list(reader)) == 2
        assert reader.num_skipped == 3
        assert (tmp_path / "log.jsonl.rejected").read_bytes() == bad[2] + b"\n" + bad[0] + b"\n" + bad[
            1
        ] + b"\n"
    aside = tmp_path / "aside"
    assert len(list(read_conversations(path, bad_lines="skip", rejects=aside))) == 2
    assert aside.read_bytes() == (tmp_path / "log.jsonl.rejected").read_bytes()


def test_skip_writes_no_file_where_every_line_is_good(tmp_path: Path) -> None:
    reader = read_conversations(write_lines(tmp_path / "log.jsonl", record()), bad_lines="skip")
    assert len(list(reader)) == 1
    assert reader.num_skipped == 0
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_rejects_never_overwrite_the_log_itself(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", "bad", record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the log itself"):
        list(read_conversations(path, bad_lines="skip", rejects=path))
    with pytest.raises(ValueError, match="is the log itself"):
        summarize([path], bad_lines="skip", rejects=path)
    assert path.read_bytes() == before


BYTES = st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))
BROKEN = st.builds(
    lambda line, at, byte: line[: at % len(line)] + bytes([byte]) + line[at % len(line) + 1 :],
    records(alternate=False).map(lambda item: json.dumps(item).encode()),
    st.integers(0, 10_000),
    st.integers(0, 255).filter(lambda byte: byte != 10),
)


@given(
    st.lists(BYTES | BROKEN | JSON.map(lambda value: json.dumps(value).encode()), max_size=6), st.booleans()
)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_set_aside_or_refused_with_a_log_error(
    tmp_path: Path, lines: list[bytes], ends_in_newline: bool
) -> None:
    path, aside = tmp_path / "log.jsonl", tmp_path / "aside"
    aside.unlink(missing_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n" * ends_in_newline)
    raw = path.read_bytes().split(b"\n")
    raw = [line + b"\n" for line in raw[:-1]] + raw[-1:]
    present = [
        line
        for i, line in enumerate(raw)
        if (line[3:] if i == 0 and line[:3] == b"\xef\xbb\xbf" else line).strip(b" \t\r\n")
    ]
    expected_aside = []
    errors = []
    num_good = 0
    for line in present:
        single = tmp_path / "single.jsonl"
        single.write_bytes(line if line is raw[0] else b"\n" + line)
        try:
            num_good += len(list(read_conversations(single)))
        except LogError as error:
            errors.append(str(error))
            expected_aside.append(line)
    assert all(error.isprintable() for error in errors)
    reader = read_conversations(path, bad_lines="skip", rejects=aside)
    assert len(list(reader)) == num_good
    assert num_good + reader.num_skipped == len(present)
    assert (aside.read_bytes() if aside.exists() else b"") == b"".join(expected_aside)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    def crash() -> Any:
        yield conversation(id="new")
        raise RuntimeError("killed")

    path = tmp_path / "log.jsonl"
    write_conversations(path, [conversation(id="old")])
    with pytest.raises(RuntimeError, match="killed"):
        write_conversations(path, crash())
    assert [read.id for read in read_conversations(path)] == ["old"]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_a_log_can_be_rewritten_from_itself_through_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "log.jsonl", tmp_path / "latest.jsonl"
    write_conversations(path, [conversation(id=str(i)) for i in range(9)])
    link.symlink_to(path)
    assert write_conversations(link, (read for read in read_conversations(link) if int(read.id) % 2)) == 4
    assert link.is_symlink()
    assert [read.id for read in read_conversations(path)] == ["1", "3", "5", "7"]


def test_memory_holds_one_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    text = "a few words about shoes " * 40
    source = (
        conversation(user(f"{i} {text}"), assistant(f"{i}. {text}"), id=str(i), outcome=i)
        for i in range(2_000)
    )
    tracemalloc.start()
    try:
        write_conversations(path, source)
        assert sum(1 for _ in read_conversations(path)) == 2_000
        assert summarize([path]).num_turns == 2_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 3_500_000
    assert peak_bytes < path.stat().st_size / 4


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
    if len(set(groups)) < num_folds:
        with pytest.raises(ValueError, match="number of groups"):
            folds_by_group(groups, num_folds=num_folds, seed=seed)
        return
    folds = folds_by_group(groups, num_folds=num_folds, seed=seed)
    fold = dict(zip(groups, folds.tolist(), strict=True))
    assert [fold[group] for group in groups] == folds.tolist()
    sizes = np.bincount(list(fold.values()), minlength=num_folds)
    assert len(sizes) == num_folds
    assert sizes.max() - sizes.min() <= 1


def test_splits_depend_on_the_seed_and_refuse_impossible_requests() -> None:
    groups = [str(i) for i in range(50)]
    splits = {tuple(split_by_group(groups, held_out_share=0.2, seed=seed).tolist()) for seed in range(5)}
    assert len(splits) == 5
    assert all(sum(split) == 10 for split in splits)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_by_group(groups, held_out_share=share, seed=0)
    with pytest.raises(ValueError, match="num_folds"):
        folds_by_group(groups, num_folds=1, seed=0)
    with pytest.raises(ValueError, match="at least 2 groups"):
        split_by_group([], held_out_share=0.2, seed=0)


# ---- Summary ----


def test_a_summary_counts_what_stands_in_all_logs(tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "a.jsonl",
        record(user("one two"), assistant("three", decision="accepted"), outcome=1, policy="p", id="1"),
        record(user("x"), assistant("y", suggestion="z", decision="edited"), outcome=0, id="2"),
    )
    second = write_lines(
        tmp_path / "b.jsonl",
        "broken",
        {"id": "3", "messages": [user("a b  c"), assistant("d")]},
    )
    summary = summarize([first, second], bad_lines="skip", rejects=tmp_path / "aside")
    assert summary.to_dict() == {
        "num_conversations": 3,
        "num_messages": 6,
        "num_turns": 3,
        "num_words": 9,
        "num_skipped": 1,
        "num_outcomes_known": 2,
        "num_outcomes_missing": 1,
        "outcome_mean": 0.5,
        "outcome_min": 0.0,
        "outcome_max": 1.0,
        "num_by_end": {"terminated": 2, "censored": 1},
        "num_by_policy": {"unknown": 2, "p": 1},
        "num_by_decision": {"accepted": 1, "edited": 1},
        "warnings": ["conversations without an outcome (never used as a label): 1 (for example '3')"],
    }
    assert json.loads(json.dumps(summary.to_dict())) == summary.to_dict()
    with pytest.raises(LogError, match=r"b\.jsonl:1: not valid JSON"):
        summarize([first, second])


def warnings_of(path: Path, *lines: dict[str, Any]) -> str:
    warnings = summarize([write_lines(path, *lines)]).warnings
    assert all(warning.isprintable() for warning in warnings)
    return "\n".join(warnings)


def test_a_summary_warns_of_what_looks_wrong(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert warnings_of(path, record(id="1", outcome=0), record(id="2", outcome=1)) == ""
    twice = warnings_of(path, *[record(id="a\nb", outcome=i) for i in range(5)])
    assert twice == "conversations whose id stood before: 4 (for example 'a\\nb', 'a\\nb', 'a\\nb')"
    constant = warnings_of(path, record(id="1", outcome=1), record(id="2", outcome=1))
    assert constant == "every known outcome is 1: there is nothing to learn from"
    silent = warnings_of(path, record(user("u"), id="q", outcome=1))
    assert silent == "conversations without an assistant message: 1 (for example 'q')"
    alone = warnings_of(path, record(assistant("a"), id="q", outcome=1))
    assert alone == "conversations without a user message: 1 (for example 'q')"
    cut = warnings_of(path, record(id="q", outcome=1, end="censored"))
    assert cut == "censored conversations with an outcome (never used as a label): 1 (for example 'q')"


def test_a_summary_warns_of_files_without_conversations(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    summary = summarize([empty])
    assert (summary.num_conversations, summary.outcome_mean) == (0, None)
    assert [
        warning
        for warning in summary.warnings
        if "holds no conversation" in warning and str(empty) in warning
    ]
    bad = write_lines(tmp_path / "bad.jsonl", "x")
    assert "holds no conversation" in summarize([bad], bad_lines="skip").warnings[0]


def test_an_id_in_two_logs_is_a_duplicate(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", record(id="1", outcome=0), record(id="2", outcome=1))
    assert "whose id stood before: 2" in summarize([path, path]).warnings[0]


def test_bad_lines_of_several_logs_share_one_file_or_lie_beside_each(tmp_path: Path) -> None:
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    logs[0].write_bytes(b"bad one")  # no newline: the lines must not run together
    logs[1].write_bytes(b"bad two\nbad three\n")
    assert summarize(logs, bad_lines="skip", rejects=tmp_path / "aside").num_skipped == 3
    assert (tmp_path / "aside").read_bytes() == b"bad one\nbad two\nbad three\n"
    assert summarize(logs, bad_lines="skip").num_skipped == 3
    assert (tmp_path / "a.jsonl.rejected").read_bytes() == b"bad one"
    assert (tmp_path / "b.jsonl.rejected").read_bytes() == b"bad two\nbad three\n"


@pytest.mark.parametrize(("num_same", "warns"), [(10, False), (11, True)])
def test_a_response_repeated_everywhere_is_found_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_same: int, warns: bool
) -> None:
    responses = [f"answer {i}" for i in range(20 - num_same)] + ["Sorry?"] * num_same
    lines = [record(user("u"), assistant(text), id=str(i), outcome=i) for i, text in enumerate(responses)]
    assert (
        "one response makes up 11 of 20: it starts with 'Sorry?'" in warnings_of(tmp_path / "a", *lines)
    ) is warns
    assert "one response" not in warnings_of(tmp_path / "a", *lines[-11:])  # too few to tell
    monkeypatch.setattr(module, "_MAX_COUNTED_RESPONSES", 2)
    tally = module._Tally()
    for text in [f"answer {i}" for i in range(999)] + ["Sorry?"] * 1_001:
        tally._count_response(text)
        assert len(tally.responses) <= 2
    assert tally.responses.most_common(1)[0][0][1] == "Sorry?"


# ---- Real logs ----


@pytest.mark.parametrize("name", LOGS)
def test_real_logs_are_read_and_written_back_exactly(tmp_path: Path, name: str) -> None:
    path = DATA / name / "conversations.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data are not here: {path}")
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    read = list(read_conversations(path))
    assert len(read) == len(raw) == LOGS[name]
    assert [conversation_to_dict(item) for item in read] == [{**item, "end": "terminated"} for item in raw]
    assert write_conversations(tmp_path / "log.jsonl", read) == len(read)
    assert list(read_conversations(tmp_path / "log.jsonl")) == read
    for item in read:
        rewards = turn_rewards(item)
        assert rewards is not None
        assert len(rewards) == len(decision_points(item))
        assert sum(rewards) == item.outcome


def test_the_base_rate_of_the_real_log() -> None:
    path = DATA / "persuasionforgood" / "conversations.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data are not here: {path}")
    summary = summarize([path])
    assert summary.outcome_mean == pytest.approx(0.536, abs=5e-4)
    assert summary.num_by_policy == {"unknown": 1_017}
    assert summary.warnings == ()
