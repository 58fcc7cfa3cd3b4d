"""Log files: errors name their line, exact round trips, bad lines set aside, whole writes, real logs."""

import copy
import itertools
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import DATA, JSON, assistant, conversation, read_or_skip, record, records, user, write_lines

from iterative_ppo.conversation_log import (
    conversation_from_dict,
    conversation_to_dict,
    read_conversations,
    read_part,
    write_conversations,
)
from iterative_ppo.conversations import Conversation, LogError, decision_points, turn_rewards
from iterative_ppo.log_summary import summarize

LOGS = {"persuasionforgood": 1_017, "casino": 2_060}

# ---- Errors ----

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


def test_a_line_cut_off_at_the_end_of_the_file_says_so(tmp_path: Path) -> None:
    whole = json.dumps(record()).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + b"\n" + whole[:-9])
    with pytest.raises(LogError, match=r"log\.jsonl:2: not valid JSON at column .*was it cut off\?"):
        list(read_conversations(path))
    path.write_bytes(whole + b"\n" + whole)
    assert len(list(read_conversations(path))) == 2


@pytest.mark.parametrize("keys", [{"end": "done"}, {"outcome": float("nan")}, {"metadata": {"x": object()}}])
def test_the_writer_refuses_what_the_reader_would_and_leaves_the_old_file(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = tmp_path / "log.jsonl"
    good = conversation()
    write_conversations(path, [good])
    bad = Conversation(**{"id": "c", "messages": good.messages, "end": "terminated", **keys})
    with pytest.raises(LogError, match=r"log\.jsonl:2: field"):
        write_conversations(path, [good, bad])
    assert list(read_conversations(path)) == [good]
    assert os.listdir(tmp_path) == ["log.jsonl"]


# ---- Round trips ----


@given(records(alternate=True))
@settings(deadline=None, max_examples=100)
def test_a_record_without_consecutive_messages_is_written_back_as_it_was(valid: dict[str, Any]) -> None:
    before = copy.deepcopy(valid)
    assert conversation_to_dict(conversation_from_dict(valid)) == before
    assert valid == before


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_parts_without_a_gap_are_the_whole_log(tmp_path: Path, data: st.DataObject) -> None:
    """Wherever the cuts fall: in a line, at its end, in the byte order mark, many in one line."""
    lines = [json.dumps(record(user("é" * i), id=str(i))) for i in range(5)]
    lines.insert(data.draw(st.integers(0, 5)), " ")
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (end.join(lines) + data.draw(st.sampled_from(["", end]))).encode())
    size = path.stat().st_size
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=8))), size]
    parts = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert [c for part in parts for c in read_part(path, part)] == list(read_conversations(path))


def test_a_bad_line_of_a_part_has_its_number_in_the_log(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", record(), "", record(), "{broken", record())
    with pytest.raises(LogError) as whole:
        list(read_conversations(path))
    start = path.read_bytes().index(b"{broken")
    for part in (range(path.stat().st_size), range(start - 3, start + 1), range(start, start + 40)):
        with pytest.raises(LogError) as error:
            list(read_part(path, part))
        assert str(error.value) == str(whole.value)
    assert whole.value.line == 4


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
        assert (tmp_path / "log.jsonl.rejected").read_bytes() == bad[2] + b"\n" + bad[0] + b"\n" + bad[1] + b"\n"
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


@given(st.lists(BYTES | BROKEN | JSON.map(lambda value: json.dumps(value).encode()), max_size=6), st.booleans())
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
    source = (conversation(user(f"{i} {text}"), assistant(f"{i}. {text}"), id=str(i), outcome=i) for i in range(2_000))
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
