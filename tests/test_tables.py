"""Tables as a terminal of 80 columns shows them."""

import io
from pathlib import Path

from logs import assistant, record, user, write_lines
from rich.console import Console

from iterative_ppo.log_summary import LogSummary, summarize
from iterative_ppo.tables import summary_table


def rows(summary: LogSummary) -> list[str]:
    """The printed lines, each run of spaces as one."""
    screen = io.StringIO()
    Console(file=screen, width=80).print(summary_table(summary))
    lines = screen.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return [" ".join(line.split()) for line in lines]


def test_a_summary_fits_the_terminal_and_says_where_bad_lines_went(tmp_path: Path) -> None:
    log = write_lines(
        tmp_path / "log.jsonl",
        record(user("one two"), assistant("three", decision="accepted"), outcome=1, policy="p", id="1"),
        record(user("x"), assistant("y", suggestion="z", decision="edited"), outcome=0.5, id="2"),
        "broken",
        {"id": "[red]3[/red]", "messages": [user("a b  c"), assistant("d")]},
    )
    aside = Path("aside.jsonl")
    summary = summarize([log], bad_lines="skip", rejects=tmp_path / aside)
    printed = rows(summary)
    assert printed[:12] == [
        "conversations 3",
        "messages 6",
        "turns 3 decision points of the policy",
        "words 9",
        "outcomes known 2 mean 0.75, min 0.5, max 1",
        "outcomes missing 1",
        "ends 2 terminated (66.7%)",
        "1 censored (33.3%)",
        "policies 2 unknown (66.7%)",
        "1 p (33.3%)",
        "decisions 1 accepted (50.0%)",
        "1 edited (50.0%)",
    ]
    assert printed[12].startswith("lines set aside 1 ")
    # Long paths and warnings go on in the next line; what the log says is no markup.
    rest = "".join(printed[12:]).replace(" ", "")
    assert f"{tmp_path / aside}warnings!conversationswithoutanoutcome" in rest
    assert rest.endswith("(forexample'[red]3[/red]')")


def test_the_ten_largest_policies_are_named_and_the_others_counted(tmp_path: Path) -> None:
    policies = [f"p{i}" for i in range(12) for _ in range(20 - i)]
    lines = [record(id=str(i), outcome=i, policy=policy) for i, policy in enumerate(policies)]
    lines.append(record(id="last", outcome=0, policy="[bold]\x1b[2J" + "x" * 200))
    printed = rows(summarize([write_lines(tmp_path / "log.jsonl", *lines)]))
    start = printed.index("policies 20 p0 (11.4%)")
    assert printed[start + 9] == "11 p9 (6.3%)"
    assert printed[start + 10] == "20 3 others (11.4%)"  # p10, p11 and the last one: 10 + 9 + 1
    named = rows(summarize([write_lines(tmp_path / "log.jsonl", lines[-1])]))
    assert "[bold]\\x1b[2Jxxx" in "".join(named)


def test_an_empty_log_has_a_table_too(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    printed = rows(summarize([empty]))
    assert printed[:10] == [
        "conversations 0",
        "messages 0",
        "turns 0 decision points of the policy",
        "words 0",
        "outcomes known 0",
        "outcomes missing 0",
        "ends - none",
        "policies - none",
        "decisions - none",
        "lines set aside 0",
    ]
    assert "holds no conversation" in " ".join(printed[10:])
