"""Objects of a user's own, named as `package.module:name`."""

import importlib
import sys
from pathlib import Path
from typing import Any, Literal

_PLACEHOLDERS = {"class": "ClassName", "function": "function"}


def import_named(entry_point: str, *, what: str, known: str, kind: Literal["class", "function"]) -> Any:
    """Imports what an entry point names, also from the current folder.

    Args:
        entry_point: `package.module:name`.
        what: what it is to be, for messages: `environment`.
        known: the names that need no import, as `neither a, b`, for messages.
        kind: what it must be; a function may be anything that can be called.

    Raises:
        ValueError: with one line where there is no such object.
    """
    module_name, _, name = entry_point.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ValueError(f"{what} {entry_point!r} is {known} nor a {kind} as package.module:{_PLACEHOLDERS[kind]}")
    # At the end of the path, so that no file of the current folder hides an installed library.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        found = vars(importlib.import_module(module_name)).get(name)
    except Exception as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {entry_point!r}: cannot import {module_name}: {reason}") from error
    if not (isinstance(found, type) if kind == "class" else callable(found)):
        raise ValueError(f"{what} {entry_point!r}: module {module_name} has no {kind} {name}")
    return found
