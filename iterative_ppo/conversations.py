"""Logged conversations: the records, the turn clock that they hold, splits by conversation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

ROLES = ("system", "user", "assistant")
DECISIONS = ("accepted", "edited", "rejected", "ignored")
ENDS = ("terminated", "truncated", "censored")


def printable(text: str) -> str:
    """Text that stays on one line and moves no cursor."""
    return text if text.isprintable() else repr(text)[1:-1]


class LogError(ValueError):
    """A malformed line of a log, in one line of text.

    Example:
        >>> print(LogError("week12.jsonl", 3, "messages[2].role", "must be a string, not null"))
        week12.jsonl:3: field `messages[2].role`: must be a string, not null

    Attributes:
        file: The log as the caller named it.
        line: Line number, from 1; 0 for a record that never stood in a file.
        field: Path of the offending value; empty where the line as a whole is at fault (not JSON at all).
        reason: What is wrong, and where possible what to write instead.
    """

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        super().__init__(file, line, field, reason)
        self.file = file
        self.line = line
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        where = f"field `{self.field}`: " if self.field else ""
        return f"{printable(self.file)}:{self.line}: {where}{self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, after consecutive messages of one side were joined.

    Example:
        Message(role="assistant", content="What is your budget?", suggestion="Which budget do you have?",
                decision="edited", logprob=-7.25)
    """

    role: str
    content: str
    """What went to the other side; empty where nothing was sent."""
    suggestion: str | None = None
    """What the policy proposed; None where that is the content, empty where it abstained."""
    decision: str | None = None
    logprob: float | None = None
    """Sum over the response's tokens, of the sampling distribution."""
    prompt: str | None = None
    """The exact prompt text, where it differs from the rendered messages."""
    reward: float | None = None
    """Turn reward beside the outcome."""
    metadata: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Unknown keys, written back as they came; `joined` holds what joining could not merge."""

    @property
    def action(self) -> str:
        """What the policy produced: the suggestion if there is one, else the content."""
        return self.content if self.suggestion is None else self.suggestion


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One logged conversation and its outcome.

    Example:
        Conversation(id="c-001", policy="iteration-002", outcome=1.0, end="terminated",
                     messages=(Message(role="user", content="hi"), Message(role="assistant", content="hello")))
    """

    id: str
    messages: tuple[Message, ...]
    policy: str | None = None
    """Who acted; None for foreign logs."""
    outcome: float | None = None
    end: str
    """terminated (by the task), truncated (by our cap) or censored (cut by the log's window: never a label)."""
    metadata: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionPoint:
    """One state of the multi-turn MDP and the action taken there.

    Points of one conversation share the dicts in `chat`: read them, do not change them.

    Example:
        DecisionPoint(conversation_id="c-001", turn=0, chat=({"role": "user", "content": "hi"},),
                      response="hello", prompt=None, logprob=None)
    """

    conversation_id: str
    turn: int
    """Index among the decision points of the conversation, from 0."""
    chat: tuple[dict[str, str], ...]
    """The state: everything up to the customer's latest message, as role and content."""
    response: str
    """The action: one whole response; empty for an abstention."""
    prompt: str | None
    """The logged prompt text, to be used in place of a rendered `chat`."""
    logprob: float | None


# ---- The multi-turn MDP that a conversation holds ----


def chat_messages(messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
    """A prefix of a conversation as the policy sees it: role and content, its own actions word for word.

    Where something else than the suggestion was sent, a bracketed line before the customer's next message says so.
    The chat before an assistant message is a prefix of the chat of every longer prefix, so that a prompt cache holds.

    Example:
        An assistant message with suggestion "Which size?" and content "Size?", then the customer's "42", become
        ({"role": "assistant", "content": "Which size?"},
         {"role": "user", "content": "[sent instead: Size?]\\n42"})
    """
    chat: list[dict[str, str]] = []
    note = ""
    for message in messages:
        content = message.action
        if note and message.role == "user":
            content = f"{note}\n{content}"
        elif note:
            chat.append({"role": "user", "content": note})
        chat.append({"role": message.role, "content": content})
        note = ""
        if message.action != message.content:
            note = f"[sent instead: {message.content}]" if message.content else "[nothing was sent]"
    if note:
        chat.append({"role": "user", "content": note})
    return tuple(chat)


def decision_points(conversation: Conversation) -> tuple[DecisionPoint, ...]:
    """Every state in which the policy acted, with its action; empty where no assistant message stands."""
    chat = chat_messages(conversation.messages)
    acted = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    actions = [message for message in conversation.messages if message.role == "assistant"]
    return tuple(
        DecisionPoint(
            conversation_id=conversation.id,
            turn=turn,
            chat=chat[:index],  # the prefix property of chat_messages
            response=message.action,
            prompt=message.prompt,
            logprob=message.logprob,
        )
        for turn, (index, message) in enumerate(zip(acted, actions, strict=True))
    )


def turn_rewards(conversation: Conversation) -> tuple[float, ...] | None:
    """Reward of each decision point, the outcome added to the last; None where there is no label.

    The action of turn i is paid r_{i+1} on reaching the next state; here it stands at index i.
    """
    if conversation.outcome is None or conversation.end == "censored":
        return None
    rewards = [message.reward or 0.0 for message in conversation.messages if message.role == "assistant"]
    if rewards:
        rewards[-1] += conversation.outcome
    return tuple(rewards)


# ---- Splits by conversation (or by customer, dialogue, ...) ----


def _group_ranks(groups: Sequence[str], seed: int) -> tuple[npt.NDArray[np.int64], int]:
    """Place of each row's group in a random order of the groups, and their number; the rows' order plays no part."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    rank = dict(zip(names, order, strict=True))
    return np.array([rank[group] for group in groups], dtype=np.int64), len(names)


def split_by_group(groups: Sequence[str], *, held_out_share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Marks the held-out rows: whole groups, about `held_out_share` of them, at least one on each side."""
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must lie between 0 and 1, not {held_out_share}")
    ranks, num_groups = _group_ranks(groups, seed)
    if num_groups < 2:
        raise ValueError(f"a split needs at least 2 groups (conversations), got {num_groups}")
    return ranks < min(max(round(held_out_share * num_groups), 1), num_groups - 1)


def folds_by_group(
    groups: Sequence[str], outcomes: Sequence[float], *, num_folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Gives each row its fold, 0 to num_folds - 1: whole groups, alike in number and in their outcomes over the folds.

    Left to chance, a fold with more sales than others is predicted from others with fewer; predictions of all folds put
    together are then ordered worse than those of any one.

    Args:
        outcomes: one a row; a group's is the mean over its rows.
    """
    ranks, num_groups = _group_ranks(groups, seed)
    if not 2 <= num_folds <= num_groups:
        raise ValueError(f"num_folds must lie between 2 and the number of groups, {num_groups}, not {num_folds}")
    mean_outcome = np.bincount(ranks, outcomes) / np.bincount(ranks)
    generator = np.random.default_rng(seed)
    dealt = [generator.permutation(num_folds) for _ in range(0, num_groups, num_folds)]
    fold_of_rank = np.empty(num_groups, dtype=np.int64)
    fold_of_rank[np.argsort(mean_outcome, kind="stable")] = np.concatenate(dealt)[:num_groups]
    return fold_of_rank[ranks]
