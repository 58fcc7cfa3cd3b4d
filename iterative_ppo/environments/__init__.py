"""Simulated customers: the Gymnasium API with text, built-in or any class that the user names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from iterative_ppo.entry_points import import_named


@runtime_checkable
class TextEnvironment(Protocol):
    """One conversation at a time: the observation is the customer's message, the action is the response."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a conversation; `info` may carry `system`, the seller's instruction."""
        ...

    def step(self, action: str, /) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer a response; `info` may carry `sent` and `decision` where a person stands in between."""
        ...


@runtime_checkable
class ScriptedEnvironment(TextEnvironment, Protocol):
    """An environment with a seller of its own, who can write the first logs."""

    def scripted_response(self, messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
        """The scripted seller's next message, from the chat alone."""
        ...


@runtime_checkable
class BranchingEnvironment(TextEnvironment, Protocol):
    """An environment whose running conversation can be continued many times over."""

    def branch(self, generator: np.random.Generator) -> TextEnvironment:
        """A copy whose hidden state is drawn anew given all that was said; `generator` is its randomness."""
        ...


def make_environment(entry_point: str, arguments: Mapping[str, Any] | None = None) -> TextEnvironment:
    """Build an environment.

    Args:
        entry_point: `storefront`, `suggested_response`, or a class as `package.module:ClassName`, which may
            also lie in the current folder.
        arguments: keyword arguments of its constructor.

    Raises:
        ValueError: the entry point names no usable class, or the class does not take the arguments.
    """
    arguments = dict(arguments or {})
    match entry_point:
        case "storefront":
            from iterative_ppo.environments.storefront import Storefront

            constructor: Callable[..., object] = Storefront
        case "suggested_response":
            from iterative_ppo.environments.suggested_response import SuggestedResponse

            constructor = SuggestedResponse
        case _:
            constructor = import_named(
                entry_point, what="environment", known="neither storefront, suggested_response", kind="class"
            )
    try:
        environment = constructor(**arguments)
    except Exception as error:  # a user's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"environment {entry_point!r} cannot be built with {arguments}: {reason}") from error
    if not isinstance(environment, TextEnvironment):
        raise ValueError(f"environment {entry_point!r} lacks reset or step: it must have both, as in Gymnasium")
    return environment
