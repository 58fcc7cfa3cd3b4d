"""Small logs for the tests: records by hand, and any valid record for hypothesis."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from iterative_ppo.conversation_checks import CONVERSATION_KEYS, MESSAGE_KEYS
from iterative_ppo.conversation_log import conversation_from_dict
from iterative_ppo.conversations import DECISIONS, ENDS, Conversation, LogError

DATA = Path(__file__).parents[1] / "../shared/data"


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


UNKNOWN_MESSAGE_KEYS = unknown(MESSAGE_KEYS)
PLAIN_KEYS = optional({"metadata": OBJECT})
ASSISTANT_KEYS = optional(
    {
        "suggestion": TEXT,
        "decision": st.sampled_from(DECISIONS),
        "logprob": NUMBER.map(lambda number: -abs(number)),
        "prompt": TEXT.map("a prompt ".__add__),
        "reward": NUMBER,
        "metadata": OBJECT,
    }
)


@st.composite
def messages_of(draw: st.DrawFn, role: str) -> dict[str, Any]:
    keys = draw(ASSISTANT_KEYS if role == "assistant" else PLAIN_KEYS)
    return {"role": role, "content": draw(TEXT), **keys, **draw(UNKNOWN_MESSAGE_KEYS)}


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
        **draw(unknown(CONVERSATION_KEYS)),
    }


def read_or_skip(valid: dict[str, Any]) -> Conversation | None:
    try:
        return conversation_from_dict(valid)
    except LogError as error:
        if "sum over the joined messages is not finite" in error.reason:
            return None
        raise
