"""The log format: JSON Lines, one conversation a line, in OpenAI chat roles.

A log is checked here, once: what this module hands out can be trusted everywhere else. `null` and a missing key mean
the same for every optional key, and `conversation_to_dict` leaves such keys out; only `end` is always written.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from iterative_ppo.conversation_checks import FieldError, check_conversation, parse_json, without_nulls
from iterative_ppo.conversations import Conversation, LogError

BadLines = Literal["error", "skip"]
_CHUNK_BYTES = 1 << 20


def conversation_from_dict(record: object, *, file: str = "<memory>", line: int = 0) -> Conversation:
    """Checks one record of the log format and joins consecutive messages of one side.

    Metadata and unknown keys are kept by reference, not copied.

    Raises:
        LogError: The record is malformed; `file` and `line` are used only to say where.
    """
    try:
        return check_conversation(record)
    except FieldError as error:
        raise LogError(file, line, error.field, error.reason) from None


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """The record that `conversation_from_dict` reads back as an equal conversation.

    Optional keys without a value are left out; `end` is always written, so that a reader need not know its default.
    """
    messages = [
        without_nulls(
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
    return without_nulls(known) | conversation.extra


def _parse(raw: bytes) -> object:
    return parse_json(raw, hint="" if raw.endswith(b"\n") else "; the file ends in this line: was it cut off?")


class Rejects:
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


def read_checked(path: Path, rejects: Rejects | None) -> Iterator[Conversation]:
    """The conversations of one log; a bad line goes to `rejects`, or raises LogError where there is none."""
    with open(path, "rb") as log:
        for line, raw in enumerate(log, start=1):
            try:
                conversation = _conversation(raw, is_first=line == 1)
            except FieldError as error:
                if rejects is None:
                    raise LogError(str(path), line, error.field, error.reason) from None
                rejects.add(raw)
                continue
            if conversation is not None:
                yield conversation


def read_part(path: Path, part: range) -> Iterator[Conversation]:
    """The conversations whose lines begin in a range of a log's bytes: ranges without a gap give the whole log, once.

    Raises:
        LogError: a line is malformed.
    """
    with open(path, "rb") as log:
        if part.start > 0:
            log.seek(part.start - 1)
            log.readline()  # of a line that begins before
        while (start := log.tell()) < part.stop and (raw := log.readline()):
            try:
                conversation = _conversation(raw, is_first=start == 0)
            except FieldError as error:
                raise LogError(str(path), _line_number(path, start), error.field, error.reason) from None
            if conversation is not None:
                yield conversation


def _conversation(raw: bytes, *, is_first: bool) -> Conversation | None:
    """What a line holds; None for a blank one. A byte order mark may stand before the first."""
    body = raw.removeprefix(b"\xef\xbb\xbf") if is_first else raw
    return check_conversation(_parse(body)) if body.strip(b" \t\r\n") else None


def _line_number(path: Path, start: int) -> int:
    """Number of the line that begins at a byte."""
    number = 1
    with open(path, "rb") as log:
        while start > 0:
            chunk = log.read(min(start, _CHUNK_BYTES))
            number += chunk.count(b"\n")
            start -= len(chunk)
    return number


def rejects_path(path: Path) -> Path:
    """Where the bad lines of a log go unless the caller says otherwise."""
    return path.with_name(path.name + ".rejected")


def check_bad_lines(bad_lines: str) -> None:
    """Refuses what a caller without a type checker may pass."""
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
            yield from read_checked(self.path, None)
            return
        rejects = Rejects(self.rejects, [self.path])
        for conversation in read_checked(self.path, rejects):
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
    check_bad_lines(bad_lines)
    path = Path(path)
    return ConversationReader(path, bad_lines=bad_lines, rejects=Path(rejects or rejects_path(path)))


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Writes a log as one whole: after a crash the old file stands, or the new one, never a part.

    Every record is checked as it would be at read, so that a log written here can always be read. `conversations`
    may be a reader of the same path.

    Returns:
        The number of conversations written.

    Raises:
        LogError: A conversation could not be read back; the line is the one it would have had.
    """

    def lines() -> Iterator[bytes]:
        for line, conversation in enumerate(conversations, start=1):
            record = conversation_to_dict(conversation)
            conversation_from_dict(record, file=str(path), line=line)
            yield json.dumps(record, ensure_ascii=False, allow_nan=False).encode()

    return write_lines(path, lines())


def write_lines(path: str | os.PathLike[str], lines: Iterable[bytes]) -> int:
    """Writes lines to a file as one whole, each with its end; returns their number."""
    target = Path(os.path.realpath(path))  # a link to the log stays a link
    if target.exists() and not target.is_file():  # a rename would put a plain file in the place of /dev/null
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    num_written = 0
    try:
        with open(partial, "wb") as log:
            for line in lines:
                log.write(line + b"\n")
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
