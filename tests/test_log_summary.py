"""What a summary counts over several logs, and what it warns of."""

import json
from pathlib import Path
from typing import Any

import pytest
from logs import DATA, assistant, record, user, write_lines

from iterative_ppo import log_summary
from iterative_ppo.conversations import LogError
from iterative_ppo.log_summary import summarize


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
        "rejects": [str(tmp_path / "aside")],
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
    assert [warning for warning in summary.warnings if "holds no conversation" in warning and str(empty) in warning]
    bad = write_lines(tmp_path / "bad.jsonl", "x")
    assert "holds no conversation" in summarize([bad], bad_lines="skip").warnings[0]


def test_an_id_in_two_logs_is_a_duplicate(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", record(id="1", outcome=0), record(id="2", outcome=1))
    assert "whose id stood before: 2" in summarize([path, path]).warnings[0]


def test_bad_lines_of_several_logs_share_one_file_or_lie_beside_each(tmp_path: Path) -> None:
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    logs[0].write_bytes(b"bad one")  # no newline: the lines must not run together
    logs[1].write_bytes(b"bad two\nbad three\n")
    summary = summarize(logs, bad_lines="skip", rejects=tmp_path / "aside")
    assert (summary.num_skipped, summary.rejects) == (3, (str(tmp_path / "aside"),))
    assert (tmp_path / "aside").read_bytes() == b"bad one\nbad two\nbad three\n"
    summary = summarize(logs, bad_lines="skip")
    assert (summary.num_skipped, summary.rejects) == (3, tuple(f"{log}.rejected" for log in logs))
    assert (tmp_path / "a.jsonl.rejected").read_bytes() == b"bad one"
    assert (tmp_path / "b.jsonl.rejected").read_bytes() == b"bad two\nbad three\n"


@pytest.mark.parametrize(("num_same", "warns"), [(10, False), (11, True)])
def test_a_response_repeated_everywhere_is_found_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_same: int, warns: bool
) -> None:
    responses = [f"answer {i}" for i in range(20 - num_same)] + ["Sorry?"] * num_same
    lines = [record(user("u"), assistant(text), id=str(i), outcome=i) for i, text in enumerate(responses)]
    assert ("one response makes up 11 of 20: it starts with 'Sorry?'" in warnings_of(tmp_path / "a", *lines)) is warns
    assert "one response" not in warnings_of(tmp_path / "a", *lines[-11:])  # too few to tell
    monkeypatch.setattr(log_summary, "_MAX_COUNTED_RESPONSES", 2)
    tally = log_summary._Tally()
    for text in [f"answer {i}" for i in range(999)] + ["Sorry?"] * 1_001:
        tally._count_response(text)
        assert len(tally.responses) <= 2
    assert tally.responses.most_common(1)[0][0][1] == "Sorry?"


def test_the_base_rate_of_the_real_log() -> None:
    path = DATA / "persuasionforgood" / "conversations.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data are not here: {path}")
    summary = summarize([path])
    assert summary.outcome_mean == pytest.approx(0.536, abs=5e-4)
    assert summary.num_by_policy == {"unknown": 1_017}
    assert summary.warnings == ()
