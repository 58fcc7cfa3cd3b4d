"""Logged conversations: records, JSON Lines in and out, checks at the boundary, splits by conversation.

One line of a log is one conversation in OpenAI chat roles. The log is checked here, once: what this module
hands out can be trusted everywhere else. `null` and a missing key mean the same for every optional key, and
`conversation_to_dict` leaves such keys out; only `end` is always written.
"""

import dataclasses
import difflib
import errno
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

ROLES = ("system", "user", "assistant")
DECISIONS = ("accepted", "edited", "rejected", "ignored")
ENDS = ("terminated", "truncated", "censored")

_ASSISTANT_KEYS = ("suggestion", "decision", "logprob", "prompt", "reward")
_MESSAGE_KEYS = frozenset({"role", "content", "metadata", *_ASSISTANT_KEYS})
_CONVERSATION_KEYS = frozenset({"id", "policy", "messages", "outcome", "end", "metadata"})
_ROLE_ALIASES = {
    **dict.fromkeys(("agent", "ai", "bot", "chatbot", "gpt", "model"), "assistant"),
    **dict.fromkeys(("buyer", "client", "customer", "human", "visitor"), "user"),
    **dict.fromkeys(("developer", "instruction"), "system"),
}
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
# Far above any real metadata, far below the depth at which Python's json module gives up.
_MAX_DEPTH = 100
_MAX_COUNTED_RESPONSES = 10_000
_MIN_RESPONSES_TO_CALL_REPEATED = 20

BadLines = Literal["error", "skip"]
_T = TypeVar("_T")


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
        return f"{_printable(self.file)}:{self.line}: {where}{self.reason}"


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


# ---- Checks: one value in, the checked value out. A check knows no file, no line and no path to its value. ----


class _FieldError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def inside(self, key: str | int) -> "_FieldError":
        """The same error seen from one level further out, so that paths cost nothing while all is well."""
        if isinstance(key, int):
            part = f"[{key}]"
        else:
            part = key if key.isidentifier() and len(key) <= 60 else f"[{_shown(key)}]"
        dot = "." if self.field and not self.field.startswith("[") else ""
        return _FieldError(part + dot + self.field, self.reason)


_REPEATED = object()
"""Stands for the value of a key that one JSON object holds twice: every check refuses it, at its own path."""


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _shown(text: str) -> str:
    """Text quoted on one line, shortened."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


def _wrong(value: object, wanted: str) -> str:
    if value is _REPEATED:
        return "the key stands more than once in this object"
    return f"must be {wanted}, not {_KINDS.get(type(value), type(value).__name__)}"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _FieldError("", _wrong(value, "a string"))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            reason = f"lone surrogate {code} at character {error.start + 1}: it cannot be written as UTF-8"
            raise _FieldError("", reason) from None
    return value


def _name(value: object) -> str:
    if isinstance(value, str) and not value.strip():
        raise _FieldError("", "must not be empty")
    return _text(value)


def _content(value: object) -> str:
    if value is None:
        raise _FieldError("", "must be a string, not null; write an empty string where nothing was said")
    if isinstance(value, list):
        raise _FieldError("", "must be a string: content as a list of parts is not supported, give the text")
    return _text(value)


def _number(value: object) -> float:
    if isinstance(value, bool):
        raise _FieldError("", f"must be a number, not {str(value).lower()}; write {int(value)}")
    if not isinstance(value, (int, float)):
        raise _FieldError("", _wrong(value, "a number"))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _FieldError("", "must be a finite number (no NaN, no Infinity, nothing above 1.8e308)")
    return number


def _logprob(value: object) -> float:
    number = _number(value)
    if number > 0:
        raise _FieldError("", f"must be at most 0 (a log-probability summed over tokens), not {number:g}")
    return number


def _one_of(value: object, allowed: tuple[str, ...], aliases: dict[str, str]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    text = _text(value)
    nearest = difflib.get_close_matches(text.lower(), allowed, n=1)
    meant = aliases.get(text.lower()) or (nearest[0] if nearest else None)
    hint = f"; did you mean `{meant}`?" if meant else ""
    raise _FieldError("", f"must be one of {', '.join(allowed)}, not {_shown(text)}{hint}")


def _role(value: object) -> str:
    return _one_of(value, ROLES, _ROLE_ALIASES)


def _decision(value: object) -> str:
    return _one_of(value, DECISIONS, {})


def _end(value: object) -> str:
    return _one_of(value, ENDS, {})


def _json(value: object, depth: int = 0) -> object:
    """Any value that JSON can hold, and that reads back as it was written."""
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, dict | list):
        raise _FieldError("", _wrong(value, "a JSON value"))
    if depth == _MAX_DEPTH:
        raise _FieldError("", f"nested more than {_MAX_DEPTH} levels deep")
    items: Iterable[tuple[str | int, object]] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(value, dict):
            _key(key)
        try:
            _json(item, depth + 1)
        except _FieldError as error:
            raise error.inside(key) from None
    return value


def _key(key: object) -> None:
    if not isinstance(key, str):
        raise _FieldError("", f"keys must be strings, not of type {type(key).__name__}")
    try:
        _text(key)
    except _FieldError as error:
        raise _FieldError("", f"key {_shown(key)}: {error.reason}") from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _FieldError("", _wrong(value, "an object"))
    _json(value)
    return value


def _required(record: dict[str, Any], key: str, check: Callable[[object], _T]) -> _T:
    if key not in record:
        raise _FieldError(key, "is missing")
    try:
        return check(record[key])
    except _FieldError as error:
        raise error.inside(key) from None


def _optional(record: dict[str, Any], key: str, check: Callable[[object], _T]) -> _T | None:
    return None if record.get(key) is None else _required(record, key, check)


def _unknown(record: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    if record.keys() <= known:
        return {}
    return _object({key: value for key, value in record.items() if key not in known})


def _message(value: object) -> Message:
    if not isinstance(value, dict):
        raise _FieldError("", _wrong(value, "an object with role and content"))
    role = _required(value, "role", _role)
    content = _required(value, "content", _content)
    if len(value) == 2:
        return Message(role=role, content=content)  # most messages of most logs: worth a short cut
    for key in _ASSISTANT_KEYS:
        if role != "assistant" and value.get(key) is not None:
            raise _FieldError(key, f"belongs to assistant messages only; this one is of role {role}")
    return Message(
        role=role,
        content=content,
        suggestion=_optional(value, "suggestion", _text),
        decision=_optional(value, "decision", _decision),
        logprob=_optional(value, "logprob", _logprob),
        prompt=_optional(value, "prompt", _text),
        reward=_optional(value, "reward", _number),
        metadata=_optional(value, "metadata", _object),
        extra=_unknown(value, _MESSAGE_KEYS),
    )


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _FieldError("", _wrong(value, "a list of messages"))
    if not value:
        raise _FieldError("", "must not be empty")
    messages: list[Message] = []
    alternates = True
    last_role = "system"
    for index, item in enumerate(value):
        try:
            message = _message(item)
        except _FieldError as error:
            raise error.inside(index) from None
        role = message.role
        if role == "system" and last_role != "system":
            raise _FieldError(f"[{index}].role", "a system message may only stand first")
        alternates = alternates and (role != last_role or index == 0)
        last_role = role
        messages.append(message)
    return tuple(messages if alternates else _joined(messages))


def _joined(messages: list[Message]) -> Iterator[Message]:
    start = 0
    for _, same_role in itertools.groupby(messages, key=lambda message: message.role):
        run = list(same_role)
        try:
            yield _join(run)
        except _FieldError as error:
            raise error.inside(start) from None
        start += len(run)


def _join(run: list[Message]) -> Message:
    """Consecutive messages of one side as one: one action between two customer messages, as the turn clock wants."""
    first, *later = run
    if not later:
        return first
    has_suggestion = any(message.suggestion is not None for message in run)
    logprobs = [message.logprob for message in run if message.logprob is not None]
    rewards = [message.reward for message in run if message.reward is not None]
    lost = [_present({"prompt": m.prompt, "metadata": m.metadata}) | m.extra for m in later]
    extra = first.extra
    if any(lost):
        # A line that was joined, written and then joined again (by another tool's append) keeps its old list.
        earlier = extra.get("joined", [])
        earlier = earlier if isinstance(earlier, list) else [earlier]
        extra = _object({**extra, "joined": [*earlier, *filter(None, lost)]})
    return Message(
        role=first.role,
        content=_lines(message.content for message in run),
        suggestion=_lines(message.action for message in run) if has_suggestion else None,
        decision=first.decision if all(m.decision == first.decision for m in later) else "edited",
        # The sum over a part of the response would pass for the log-probability of all of it.
        logprob=_sum("logprob", logprobs) if len(logprobs) == len(run) else None,
        prompt=first.prompt,
        reward=_sum("reward", rewards) if rewards else None,
        metadata=first.metadata,
        extra=extra,
    )


def _sum(key: str, numbers: list[float]) -> float:
    total = sum(numbers)
    if not math.isfinite(total):
        raise _FieldError(key, "the sum over the joined messages is not finite")
    return total


def _lines(texts: Iterable[str]) -> str:
    """Texts on lines of their own; an empty one adds none, so that two abstentions stay an abstention."""
    return "\n".join(text for text in texts if text)


def _present(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _conversation(record: object) -> Conversation:
    if not isinstance(record, dict):
        raise _FieldError("", _wrong(record, "a JSON object with id and messages"))
    outcome = _optional(record, "outcome", _number)
    return Conversation(
        id=_required(record, "id", _name),
        messages=_required(record, "messages", _messages),
        policy=_optional(record, "policy", _name),
        outcome=outcome,
        end=_optional(record, "end", _end) or ("censored" if outcome is None else "terminated"),
        metadata=_optional(record, "metadata", _object),
        extra=_unknown(record, _CONVERSATION_KEYS),
    )


# ---- Records and files ----


def conversation_from_dict(record: object, *, file: str = "<memory>", line: int = 0) -> Conversation:
    """Checks one record of the log format and joins consecutive messages of one side.

    Metadata and unknown keys are kept by reference, not copied.

    Raises:
        LogError: The record is malformed; `file` and `line` are used only to say where.
    """
    try:
        return _conversation(record)
    except _FieldError as error:
        raise LogError(file, line, error.field, error.reason) from None


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """The record that `conversation_from_dict` reads back as an equal conversation.

    Optional keys without a value are left out; `end` is always written, so that a reader need not know its default.
    """
    messages = [
        _present(
            {
                "role": message.role,
                "content": message.content,
                "suggestion": message.suggestion,
                "decision": message.decision,
                "logprob": message.logprob,
                "prompt": message.prompt,
                "reward": message.reward,
                "metadata": message.metadata,
            }
        )
        | message.extra
        for message in conversation.messages
    ]
    known = {
        "id": conversation.id,
        "policy": conversation.policy,
        "messages": messages,
        "outcome": conversation.outcome,
        "end": conversation.end,
        "metadata": conversation.metadata,
    }
    return _present(known) | conversation.extra


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        record.update({key: _REPEATED for key, count in counts.items() if count > 1})
    return record


# NaN and Infinity are let through here and refused by the checks, which know the field.
_DECODER = json.JSONDecoder(object_pairs_hook=_json_object, parse_constant=float)


def _parse(raw: bytes) -> object:
    if b"\0" in raw:
        offset = raw.index(b"\0")
        raise _FieldError("", f"NUL byte at byte offset {offset}: cut by a crash, or UTF-16 and not UTF-8?")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at byte offset {error.start}"
        raise _FieldError("", f"not UTF-8: {bad}") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        near = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the line"
        cut = "" if raw.endswith(b"\n") else "; the file ends in this line: was it cut off?"
        raise _FieldError(
            "", f"not valid JSON at column {error.pos + 1}, near {near}: {error.msg}{cut}"
        ) from None
    except RecursionError:
        raise _FieldError("", "not readable: nested too deeply") from None
    except ValueError:
        # Python's guard against quadratic time; json passes it on without a position.
        raise _FieldError("", "not readable: holds an integer of more than 4,300 digits") from None


class _Rejects:
    """Bad lines, byte for byte, in a file that is made when the first one comes."""

    def __init__(self, path: Path, logs: Sequence[Path]) -> None:
        if path.exists() and any(log.exists() and log.samefile(path) for log in logs):
            raise ValueError(f"{path} is the log itself: bad lines need a file of their own")
        self.path = path
        self.num_lines = 0
        self._separator = b""

    def add(self, raw: bytes) -> None:
        with open(self.path, "ab" if self.num_lines else "wb") as file:
            file.write(self._separator + raw)
        # Else the unended last line of one log and the first bad line of the next would become one.
        self._separator = b"" if raw.endswith(b"\n") else b"\n"
        self.num_lines += 1


def _read(path: Path, rejects: _Rejects | None) -> Iterator[Conversation]:
    with open(path, "rb") as log:
        for line, raw in enumerate(log, start=1):
            body = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not body.strip(b" \t\r\n"):
                continue
            try:
                conversation = _conversation(_parse(body))
            except _FieldError as error:
                if rejects is None:
                    raise LogError(str(path), line, error.field, error.reason) from None
                rejects.add(raw)
                continue
            yield conversation


def _rejects_path(path: Path) -> Path:
    return path.with_name(path.name + ".rejected")


def _check_bad_lines(bad_lines: str) -> None:
    if bad_lines not in ("error", "skip"):
        raise ValueError(f"bad_lines must be error or skip, not {bad_lines!r}")


class ConversationReader:
    """The conversations of one log, one line in memory at a time; each `iter()` reads the file anew.

    Attributes:
        num_skipped: Lines set aside by the latest iteration so far.
        rejects: Where these lines go, byte for byte; each iteration writes the file anew, and not before a bad line.
    """

    def __init__(self, path: Path, *, bad_lines: BadLines, rejects: Path) -> None:
        self.path = path
        self.bad_lines = bad_lines
        self.rejects = rejects
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Conversation]:
        self.num_skipped = 0
        if self.bad_lines == "error":
            yield from _read(self.path, None)
            return
        rejects = _Rejects(self.rejects, [self.path])
        for conversation in _read(self.path, rejects):
            self.num_skipped = rejects.num_lines
            yield conversation
        self.num_skipped = rejects.num_lines


def read_conversations(
    path: str | os.PathLike[str], *, bad_lines: BadLines = "error", rejects: Path | None = None
) -> ConversationReader:
    """Reads a log lazily: the file is opened when the iteration starts, and OSErrors come from there.

    Args:
        path: JSON Lines in UTF-8, one conversation a line; blank lines and a byte order mark are passed over.
        bad_lines: `error` raises LogError at the first malformed line; `skip` sets such lines aside.
        rejects: File for the lines set aside; `<path>.rejected` unless given. One for each log: it is written anew.
    """
    _check_bad_lines(bad_lines)
    path = Path(path)
    return ConversationReader(path, bad_lines=bad_lines, rejects=Path(rejects or _rejects_path(path)))


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Writes a log as one whole: after a crash the old file stands, or the new one, never a part.

    Every record is checked as it would be at read, so that a log written here can always be read. `conversations`
    may be a reader of the same path.

    Returns:
        The number of conversations written.

    Raises:
        LogError: A conversation could not be read back; the line is the one it would have had.
    """
    target = Path(os.path.realpath(path))  # a link to the log stays a link
    if target.exists() and not target.is_file():  # a rename would put a plain file in the place of /dev/null
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    num_written = 0
    try:
        with open(partial, "wb") as log:
            for conversation in conversations:
                record = conversation_to_dict(conversation)
                conversation_from_dict(record, file=str(path), line=num_written + 1)
                log.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
                num_written += 1
            log.flush()
            os.fsync(log.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return num_written


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


def folds_by_group(groups: Sequence[str], *, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Gives each row its fold, 0 to num_folds - 1: whole groups, their number equal over the folds within one."""
    ranks, num_groups = _group_ranks(groups, seed)
    if not 2 <= num_folds <= num_groups:
        raise ValueError(
            f"num_folds must lie between 2 and the number of groups, {num_groups}, not {num_folds}"
        )
    return ranks % num_folds


# ---- What a log holds, and what looks wrong with it ----


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """Counts over one or more logs, and one line for each thing that looks wrong.

    Example:
        LogSummary(num_conversations=1017, num_messages=21949, num_turns=10411, num_words=392000, num_skipped=0,
                   num_outcomes_known=1017, num_outcomes_missing=0, outcome_mean=0.536, outcome_min=0.0,
                   outcome_max=1.0, num_by_end={"terminated": 1017}, num_by_policy={"unknown": 1017},
                   num_by_decision={}, warnings=())
    """

    num_conversations: int
    num_messages: int
    num_turns: int
    """Decision points: assistant messages, after joining."""
    num_words: int
    """Whitespace words of all contents."""
    num_skipped: int
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
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"warnings": list(self.warnings)}


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
        self._note(
            self.num_turns == num_turns_before, "conversations without an assistant message", conversation
        )
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
                self.examples.setdefault(what, []).append(_shown(conversation.id))

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
    _check_bad_lines(bad_lines)
    logs = [Path(path) for path in paths]
    tally = _Tally()
    warnings: list[str] = []
    asides: list[_Rejects | None] = [None] * len(logs)
    if bad_lines == "skip" and rejects is not None:
        asides = [_Rejects(Path(rejects), logs)] * len(logs)
    elif bad_lines == "skip":
        asides = [_Rejects(_rejects_path(log), logs) for log in logs]
    for log, aside in zip(logs, asides, strict=True):
        num_before = tally.num_conversations
        for conversation in _read(log, aside):
            tally.add(conversation)
        if tally.num_conversations == num_before:
            warnings.append(
                f"{_printable(str(log))} holds no conversation: empty, or every line was set aside"
            )
    is_known = tally.num_known > 0
    return LogSummary(
        num_conversations=tally.num_conversations,
        num_messages=tally.num_messages,
        num_turns=tally.num_turns,
        num_words=tally.num_words,
        num_skipped=sum(aside.num_lines for aside in set(asides) if aside is not None),
        num_outcomes_known=tally.num_known,
        num_outcomes_missing=tally.num_conversations - tally.num_known,
        outcome_mean=tally.outcome_sum / tally.num_known if is_known else None,
        outcome_min=tally.outcome_min if is_known else None,
        outcome_max=tally.outcome_max if is_known else None,
        num_by_end=dict(tally.ends.most_common()),
        num_by_policy=dict(tally.policies.most_common()),
        num_by_decision=dict(tally.decisions.most_common()),
        warnings=(*warnings, *tally.warnings()),
    )
