"""Checks at the log's boundary: a JSON value in, the checked record out, messages of one side joined.

A check knows no file, no line and no path to its value: a FieldError gathers the path on its way out.
"""

import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from iterative_ppo.conversations import DECISIONS, ENDS, ROLES, Conversation, Message

_ASSISTANT_KEYS = ("suggestion", "decision", "logprob", "prompt", "reward")
MESSAGE_KEYS = frozenset({"role", "content", "metadata", *_ASSISTANT_KEYS})
CONVERSATION_KEYS = frozenset({"id", "policy", "messages", "outcome", "end", "metadata"})
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
_T = TypeVar("_T")


class FieldError(Exception):
    """A value that a check refused, and the path to it within what was checked."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def inside(self, key: str | int) -> "FieldError":
        """The same error seen from one level further out, so that paths cost nothing while all is well."""
        if isinstance(key, int):
            part = f"[{key}]"
        else:
            part = key if key.isidentifier() and len(key) <= 60 else f"[{shown(key)}]"
        dot = "." if self.field and not self.field.startswith("[") else ""
        return FieldError(part + dot + self.field, self.reason)


REPEATED = object()
"""Stands for the value of a key that one JSON object holds twice: every check refuses it, at its own path."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        record.update({key: REPEATED for key, count in counts.items() if count > 1})
    return record


# NaN and Infinity are let through here and refused by the checks, which know the field.
_DECODER = json.JSONDecoder(object_pairs_hook=_json_object, parse_constant=float)


def parse_json(raw: bytes, *, hint: str = "") -> object:
    """A JSON value from UTF-8.

    Args:
        hint: added to the reason where it is not valid JSON.

    Raises:
        FieldError: it is none, with an empty path.
    """
    if b"\0" in raw:
        offset = raw.index(b"\0")
        raise FieldError("", f"NUL byte at byte offset {offset}: cut by a crash, or UTF-16 and not UTF-8?")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at byte offset {error.start}"
        raise FieldError("", f"not UTF-8: {bad}") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        near = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the line"
        raise FieldError("", f"not valid JSON at {line}column {error.colno}, near {near}: {error.msg}{hint}") from None
    except RecursionError:
        raise FieldError("", "not readable: nested too deeply") from None
    except ValueError:
        # Python's guard against quadratic time; json passes it on without a position.
        raise FieldError("", "not readable: holds an integer of more than 4,300 digits") from None


def shown(text: str) -> str:
    """Text quoted on one line, shortened."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


def wrong_kind(value: object, wanted: str) -> str:
    if value is REPEATED:
        return "the key stands more than once in this object"
    return f"must be {wanted}, not {_KINDS.get(type(value), type(value).__name__)}"


def check_text(value: object) -> str:
    if not isinstance(value, str):
        raise FieldError("", wrong_kind(value, "a string"))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            reason = f"lone surrogate {code} at character {error.start + 1}: it cannot be written as UTF-8"
            raise FieldError("", reason) from None
    return value


def _name(value: object) -> str:
    if isinstance(value, str) and not value.strip():
        raise FieldError("", "must not be empty")
    return check_text(value)


def _content(value: object) -> str:
    if value is None:
        raise FieldError("", "must be a string, not null; write an empty string where nothing was said")
    if isinstance(value, list):
        raise FieldError("", "must be a string: content as a list of parts is not supported, give the text")
    return check_text(value)


def _number(value: object) -> float:
    if isinstance(value, bool):
        raise FieldError("", f"must be a number, not {str(value).lower()}; write {int(value)}")
    if not isinstance(value, (int, float)):
        raise FieldError("", wrong_kind(value, "a number"))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FieldError("", "must be a finite number (no NaN, no Infinity, nothing above 1.8e308)")
    return number


def _logprob(value: object) -> float:
    number = _number(value)
    if number > 0:
        raise FieldError("", f"must be at most 0 (a log-probability summed over tokens), not {number:g}")
    return number


def _one_of(value: object, allowed: tuple[str, ...], aliases: dict[str, str]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    text = check_text(value)
    nearest = difflib.get_close_matches(text.lower(), allowed, n=1)
    meant = aliases.get(text.lower()) or (nearest[0] if nearest else None)
    hint = f"; did you mean `{meant}`?" if meant else ""
    raise FieldError("", f"must be one of {', '.join(allowed)}, not {shown(text)}{hint}")


def _role(value: object) -> str:
    return _one_of(value, ROLES, _ROLE_ALIASES)


def _decision(value: object) -> str:
    return _one_of(value, DECISIONS, {})


def _end(value: object) -> str:
    return _one_of(value, ENDS, {})


def _json(value: object, depth: int = 0) -> object:
    """Any value that JSON can hold, and that reads back as it was written."""
    if isinstance(value, str):
        return check_text(value)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, dict | list):
        raise FieldError("", wrong_kind(value, "a JSON value"))
    if depth == _MAX_DEPTH:
        raise FieldError("", f"nested more than {_MAX_DEPTH} levels deep")
    items: Iterable[tuple[str | int, object]] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(value, dict):
            _key(key)
        try:
            _json(item, depth + 1)
        except FieldError as error:
            raise error.inside(key) from None
    return value


def _key(key: object) -> None:
    if not isinstance(key, str):
        raise FieldError("", f"keys must be strings, not of type {type(key).__name__}")
    try:
        check_text(key)
    except FieldError as error:
        raise FieldError("", f"key {shown(key)}: {error.reason}") from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError("", wrong_kind(value, "an object"))
    _json(value)
    return value


def required(record: dict[str, Any], key: str, check: Callable[[object], _T]) -> _T:
    if key not in record:
        raise FieldError(key, "is missing")
    try:
        return check(record[key])
    except FieldError as error:
        raise error.inside(key) from None


def _optional(record: dict[str, Any], key: str, check: Callable[[object], _T]) -> _T | None:
    return None if record.get(key) is None else required(record, key, check)


def _unknown(record: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    if record.keys() <= known:
        return {}
    return _object({key: value for key, value in record.items() if key not in known})


def _message(value: object) -> Message:
    if not isinstance(value, dict):
        raise FieldError("", wrong_kind(value, "an object with role and content"))
    role = required(value, "role", _role)
    content = required(value, "content", _content)
    if len(value) == 2:
        return Message(role=role, content=content)  # most messages of most logs: worth a short cut
    for key in _ASSISTANT_KEYS:
        if role != "assistant" and value.get(key) is not None:
            raise FieldError(key, f"belongs to assistant messages only; this one is of role {role}")
    return Message(
        role=role,
        content=content,
        suggestion=_optional(value, "suggestion", check_text),
        decision=_optional(value, "decision", _decision),
        logprob=_optional(value, "logprob", _logprob),
        prompt=_optional(value, "prompt", _name),
        reward=_optional(value, "reward", _number),
        metadata=_optional(value, "metadata", _object),
        extra=_unknown(value, MESSAGE_KEYS),
    )


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise FieldError("", wrong_kind(value, "a list of messages"))
    if not value:
        raise FieldError("", "must not be empty")
    messages: list[Message] = []
    alternates = True
    last_role = "system"
    for index, item in enumerate(value):
        try:
            message = _message(item)
        except FieldError as error:
            raise error.inside(index) from None
        role = message.role
        if role == "system" and last_role != "system":
            raise FieldError(f"[{index}].role", "a system message may only stand first")
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
        except FieldError as error:
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
    lost = [without_nulls({"prompt": m.prompt, "metadata": m.metadata}) | m.extra for m in later]
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
        raise FieldError(key, "the sum over the joined messages is not finite")
    return total


def _lines(texts: Iterable[str]) -> str:
    """Texts on lines of their own; an empty one adds none, so that two abstentions stay an abstention."""
    return "\n".join(text for text in texts if text)


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The keys that hold a value."""
    return {key: value for key, value in record.items() if value is not None}


def check_conversation(record: object) -> Conversation:
    """One parsed line as a conversation, consecutive messages of one side joined.

    Raises:
        FieldError: The record is malformed.
    """
    if not isinstance(record, dict):
        raise FieldError("", wrong_kind(record, "a JSON object with id and messages"))
    outcome = _optional(record, "outcome", _number)
    return Conversation(
        id=required(record, "id", _name),
        messages=required(record, "messages", _messages),
        policy=_optional(record, "policy", _name),
        outcome=outcome,
        end=_optional(record, "end", _end) or ("censored" if outcome is None else "terminated"),
        metadata=_optional(record, "metadata", _object),
        extra=_unknown(record, CONVERSATION_KEYS),
    )
