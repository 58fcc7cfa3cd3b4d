"""What a log holds, and what looks wrong with it."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterative_ppo.conversation_checks import shown
from iterative_ppo.conversation_log import BadLines, Rejects, check_bad_lines, read_checked, rejects_path
from iterative_ppo.conversations import Conversation, printable

_MAX_COUNTED_RESPONSES = 10_000
_MIN_RESPONSES_TO_CALL_REPEATED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """Counts over one or more logs, and one line for each thing that looks wrong.

    Example:
        LogSummary(num_conversations=1017, num_messages=21949, num_turns=10600, num_words=364980, num_skipped=0,
                   num_outcomes_known=1017, num_outcomes_missing=0, outcome_mean=0.536, outcome_min=0.0,
                   outcome_max=1.0, num_by_end={"terminated": 1017}, num_by_policy={"unknown": 1017},
                   num_by_decision={}, rejects=(), warnings=())
    """

    num_conversations: int
    num_messages: int
    num_turns: int
    """Decision points: assistant messages, after joining."""
    num_words: int
    """Whitespace words of all contents."""
    num_skipped: int
    """Malformed lines set aside in `rejects`."""
    num_outcomes_known: int
    """Conversations that give a label: outcome known and not censored."""
    num_outcomes_missing: int
    """The others."""
    outcome_mean: float | None
    """Mean over the known ones: the base rate where outcomes are 0 and 1."""
    outcome_min: float | None
    outcome_max: float | None
    num_by_end: dict[str, int]
    num_by_policy: dict[str, int]
    num_by_decision: dict[str, int]
    """Decisions that stand in the log; messages without one are not counted."""
    rejects: tuple[str, ...]
    """Files that hold the lines set aside; empty where none was."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"rejects": list(self.rejects), "warnings": list(self.warnings)}


@dataclass(slots=True)
class _Tally:
    """What grows with the log: 8 bytes for each id, and nothing else without a bound."""

    num_conversations: int = 0
    num_messages: int = 0
    num_turns: int = 0
    num_words: int = 0
    num_known: int = 0
    outcome_sum: float = 0.0
    outcome_min: float = math.inf
    outcome_max: float = -math.inf
    ends: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    id_hashes: set[int] = field(default_factory=set)
    responses: Counter[tuple[int, str]] = field(default_factory=Counter)
    oddities: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, conversation: Conversation) -> None:
        self.num_conversations += 1
        self.num_messages += len(conversation.messages)
        self.ends[conversation.end] += 1
        self.policies[conversation.policy or "unknown"] += 1
        num_turns_before = self.num_turns
        for message in conversation.messages:
            self.num_words += len(message.content.split())
            if message.role == "assistant":
                self.num_turns += 1
                self._count_response(message.action)
            if message.decision is not None:
                self.decisions[message.decision] += 1
        if conversation.outcome is not None and conversation.end != "censored":
            self.num_known += 1
            self.outcome_sum += conversation.outcome
            self.outcome_min = min(self.outcome_min, conversation.outcome)
            self.outcome_max = max(self.outcome_max, conversation.outcome)
        id_hash = hash(conversation.id)
        self._note(id_hash in self.id_hashes, "conversations whose id stood before", conversation)
        self.id_hashes.add(id_hash)
        self._note(self.num_turns == num_turns_before, "conversations without an assistant message", conversation)
        has_user = any(message.role == "user" for message in conversation.messages)
        self._note(not has_user, "conversations without a user message", conversation)
        self._note(
            conversation.outcome is None,
            "conversations without an outcome (never used as a label)",
            conversation,
        )
        is_cut = conversation.end == "censored" and conversation.outcome is not None
        self._note(is_cut, "censored conversations with an outcome (never used as a label)", conversation)

    def _note(self, is_odd: bool, what: str, conversation: Conversation) -> None:
        if is_odd:
            self.oddities[what] += 1
            if self.oddities[what] <= 3:
                self.examples.setdefault(what, []).append(shown(conversation.id))

    def _count_response(self, response: str) -> None:
        # Misra-Gries: a response that makes up more than half of all is never lost from a bounded counter.
        key = (hash(response), response[:40])
        if key in self.responses or len(self.responses) < _MAX_COUNTED_RESPONSES:
            self.responses[key] += 1
        else:
            self.responses = Counter({kept: count - 1 for kept, count in self.responses.items() if count > 1})

    def warnings(self) -> Iterator[str]:
        for what, count in self.oddities.items():
            yield f"{what}: {count:,} (for example {', '.join(self.examples[what])})"
        if self.num_known > 1 and self.outcome_min == self.outcome_max:
            yield f"every known outcome is {self.outcome_min:g}: there is nothing to learn from"
        for (_, start), count in self.responses.most_common(1):
            if self.num_turns >= _MIN_RESPONSES_TO_CALL_REPEATED and count > self.num_turns / 2:
                yield f"one response makes up {count:,} of {self.num_turns:,}: it starts with {start!r}"


def summarize(
    paths: Iterable[str | os.PathLike[str]], *, bad_lines: BadLines = "error", rejects: Path | None = None
) -> LogSummary:
    """Counts what stands in the logs, in one streaming pass over all of them.

    Args:
        paths: Logs; an id that stands in two of them is a duplicate.
        bad_lines: As in `read_conversations`.
        rejects: One file for the bad lines of all logs; `<path>.rejected` for each log unless given.
    """
    check_bad_lines(bad_lines)
    logs = [Path(path) for path in paths]
    tally = _Tally()
    warnings: list[str] = []
    asides: list[Rejects | None] = [None] * len(logs)
    if bad_lines == "skip" and rejects is not None:
        asides = [Rejects(Path(rejects), logs)] * len(logs)
    elif bad_lines == "skip":
        asides = [Rejects(rejects_path(log), logs) for log in logs]
    for log, aside in zip(logs, asides, strict=True):
        num_before = tally.num_conversations
        for conversation in read_checked(log, aside):
            tally.add(conversation)
        if tally.num_conversations == num_before:
            warnings.append(f"{printable(str(log))} holds no conversation: empty, or every line was set aside")
    used = [aside for aside in dict.fromkeys(asides) if aside is not None and aside.num_lines]
    is_known = tally.num_known > 0
    return LogSummary(
        num_conversations=tally.num_conversations,
        num_messages=tally.num_messages,
        num_turns=tally.num_turns,
        num_words=tally.num_words,
        num_skipped=sum(aside.num_lines for aside in used),
        num_outcomes_known=tally.num_known,
        num_outcomes_missing=tally.num_conversations - tally.num_known,
        outcome_mean=tally.outcome_sum / tally.num_known if is_known else None,
        outcome_min=tally.outcome_min if is_known else None,
        outcome_max=tally.outcome_max if is_known else None,
        num_by_end=dict(tally.ends.most_common()),
        num_by_policy=dict(tally.policies.most_common()),
        num_by_decision=dict(tally.decisions.most_common()),
        rejects=tuple(str(aside.path) for aside in used),
        warnings=(*warnings, *tally.warnings()),
    )
