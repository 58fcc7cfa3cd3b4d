"""Results as tables for the terminal."""

from rich.table import Table
from rich.text import Text

from iterative_ppo.conversations import printable
from iterative_ppo.log_summary import LogSummary

_MAX_POLICIES_SHOWN = 10


def summary_table(summary: LogSummary) -> Table:
    """What stands in the logs, one row a question; what a log says about itself is printed as text, never as markup.

    Example:
        conversations     1,017
        turns            10,600   decision points of the policy
        outcomes known    1,017   mean 0.53589, min 0, max 1
        ends              1,017   terminated (100.0%)
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    _add(table, "conversations", summary.num_conversations)
    _add(table, "messages", summary.num_messages)
    _add(table, "turns", summary.num_turns, "decision points of the policy")
    _add(table, "words", summary.num_words)
    _add(table, "outcomes known", summary.num_outcomes_known, _outcome_range(summary))
    _add(table, "outcomes missing", summary.num_outcomes_missing)
    _add_shares(table, "ends", summary.num_by_end, len(summary.num_by_end))
    _add_shares(table, "policies", summary.num_by_policy, _MAX_POLICIES_SHOWN)
    _add_shares(table, "decisions", summary.num_by_decision, len(summary.num_by_decision))
    _add(table, "lines set aside", summary.num_skipped, "\n".join(printable(file) for file in summary.rejects))
    for index, warning in enumerate(summary.warnings):
        table.add_row("" if index else "warnings", Text("!", "yellow"), Text(printable(warning), "yellow"))
    return table


def _add(table: Table, label: str, count: int, note: str = "") -> None:
    table.add_row(label, f"{count:,}", Text(note))


def _add_shares(table: Table, label: str, counts: dict[str, int], num_shown: int) -> None:
    """The largest counts, one on a line, and the others in one."""
    if not counts:
        table.add_row(label, "-", "none")
        return
    total = sum(counts.values())
    shown = list(counts.items())[:num_shown]
    for index, (name, count) in enumerate(shown):
        _add(table, "" if index else label, count, f"{printable(name)} ({count / total:.1%})")
    num_others = len(counts) - len(shown)
    if num_others:
        count = total - sum(count for _, count in shown)
        _add(table, "", count, f"{num_others:,} others ({count / total:.1%})")


def _outcome_range(summary: LogSummary) -> str:
    if summary.outcome_mean is None:
        return ""
    return f"mean {summary.outcome_mean:g}, min {summary.outcome_min:g}, max {summary.outcome_max:g}"
