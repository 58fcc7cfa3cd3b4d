"""Suggested Response: a business user stands between the agent and the customer.

The agent suggests; the business accepts, edits, rejects or ignores the suggestion, and what the business sends goes
to the customer. Works around any environment with the text API.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from iterative_ppo.environments import BranchingEnvironment, ScriptedEnvironment, make_environment

SHOP_TOPIC = (
    "price cost budget spend pay order buy purchase discount deal offer percent coupon cheaper kind type use need "
    "looking recommend basic premium durable last strong warranty return exchange refund size swap fit break "
    "tough wear pack take ring check ready"
)
"""The words that a shop's business user takes as to the point."""

PUSHY = re.compile(r"\b(hurry|immediately|urgent|must|last chance|act now|limited time|do not miss|don't miss)\b")
STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "the and you your for with can may are was that this have has will would shall what which how who not but "
        "let here there its now today very",
    )
)
POLITE_OPENINGS = ("sure, ", "well, ", "okay, ")
NEUTRAL_MESSAGES = ("how can i help you?", "can you tell me more?", "what would you like to do?")
"""What the business writes where the environment has no scripted seller."""

ACCEPTANCE_LEFT_BY_FLAW = 0.3
"""What every flaw of a suggestion leaves of the probability that it is accepted."""
NOT_ACCEPTED = {
    "fine": {"edited": 0.5, "rejected": 0.25, "ignored": 0.25},
    "fixable": {"edited": 0.6, "rejected": 0.25, "ignored": 0.15},
    "off topic": {"edited": 0.05, "rejected": 0.5, "ignored": 0.45},
}
"""What becomes of a suggestion that is not accepted: too long or pushy a text can be fixed."""
EDIT_REPLACES_PROBABILITY = 0.15
"""How often an edit leaves nothing of the suggestion."""
DRAFTS_AFTER_REJECTION = 3


class Flaws(NamedTuple):
    """What the business dislikes about a suggestion, e.g. `Flaws(long=True, pushy=False, off_topic=False)`."""

    long: bool
    pushy: bool
    off_topic: bool


class SuggestedResponse(gymnasium.Env[str, str]):
    """The same conversation, in which the response is only a suggestion to the business.

    `info` has, at each step, what the inner environment says, and `sent` (the message that went to the customer) and
    `decision` (accepted, edited, rejected or ignored). An empty suggestion is an abstention: the business writes its
    own message, and the decision is `ignored`.

    Args:
        environment: the customer's environment, as `make_environment` takes it.
        arguments: its constructor's keyword arguments.
        acceptance: the probability that a suggestion without flaws is sent as it stands.
        max_words: a longer suggestion is too long for the business.
        topic: words that are to the point even if nobody has used them yet, in one text; a suggestion that shares a word neither
            with these nor with the conversation is off topic.
    """

    def __init__(
        self,
        environment: str = "storefront",
        arguments: dict[str, Any] | None = None,
        acceptance: float = 0.7,
        max_words: int = 20,
        topic: str = SHOP_TOPIC,
    ) -> None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance must be a probability, not {acceptance}")
        if max_words < 1:
            raise ValueError(f"max_words must be at least 1, not {max_words}")
        self.inner = make_environment(environment, arguments)
        self._is_scripted = isinstance(self.inner, ScriptedEnvironment)  # looks at every attribute: once
        self.acceptance = acceptance
        self.max_words = max_words
        self.topic = content_stems(topic)
        self.action_space = Text(400, min_length=0, charset=_PRINTABLE)
        self.observation_space = Text(4000, min_length=0, charset=_PRINTABLE)
        if isinstance(self.inner, gymnasium.Env):
            self.action_space = self.inner.action_space
            self.observation_space = self.inner.observation_space
        self._messages: list[dict[str, str]] = []
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a conversation; the inner environment is seeded from this one."""
        super().reset(seed=seed, options=options)
        observation, info = self.inner.reset(seed=int(self.np_random.integers(2**31)), options=options)
        self._messages = [{"role": "system", "content": info["system"]}] if "system" in info else []
        self._messages.append({"role": "user", "content": observation})
        self._running = True
        return observation, dict(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The business decides about the suggestion, and the customer answers what the business sends.

        Raises:
            ResetNeeded: before the first `reset` and after the end of a conversation.
        """
        if not self._running:
            raise ResetNeeded("the conversation has not begun or is over: call reset() first")
        decision = self._decide(action)
        match decision:
            case "accepted":
                sent = action
            case "edited":
                sent = self._edit(action)
            case "rejected":
                sent = self._other_message(action)
            case _:
                sent = self.scripted_response(self._messages, self.np_random)
        observation, reward, terminated, truncated, info = self.inner.step(sent)
        self._messages.append({"role": "assistant", "content": sent})
        self._messages.append({"role": "user", "content": observation})
        self._running = not (terminated or truncated)
        info = {**info, "sent": sent, "decision": decision}
        return observation, float(reward), terminated, truncated, info

    def scripted_response(self, messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
        """The inner environment's scripted message, or a neutral one where it has none."""
        if self._is_scripted:
            return cast(ScriptedEnvironment, self.inner).scripted_response(messages, generator)
        return NEUTRAL_MESSAGES[generator.integers(len(NEUTRAL_MESSAGES))]

    def branch(self, generator: np.random.Generator) -> "SuggestedResponse":
        """A copy of the running conversation around a branch of the inner environment.

        Raises:
            ValueError: the inner environment has no `branch`.
        """
        if not isinstance(self.inner, BranchingEnvironment):
            raise ValueError(f"{type(self.inner).__name__} has no branch(), so a conversation in it cannot be branched")
        other = copy.copy(self)
        other.inner = self.inner.branch(generator)
        other.np_random = generator
        other._messages = list(self._messages)
        return other

    def flaws(self, suggestion: str) -> Flaws:
        """What the business dislikes about a suggestion at this point of the conversation."""
        said = content_stems(" ".join(message["content"] for message in self._messages))
        return Flaws(
            long=len(suggestion.split()) > self.max_words,
            pushy=bool(PUSHY.search(suggestion.lower()) or suggestion.count("!") > 1 or _shouts(suggestion)),
            off_topic=not content_stems(suggestion) & (self.topic | said),
        )

    def decision_probabilities(self, suggestion: str) -> dict[str, float]:
        """How probably the business accepts, edits, rejects or ignores a suggestion."""
        if not suggestion.strip():
            return {"accepted": 0.0, "edited": 0.0, "rejected": 0.0, "ignored": 1.0}
        flaws = self.flaws(suggestion)
        accepted = self.acceptance * ACCEPTANCE_LEFT_BY_FLAW ** sum(flaws)
        kind = "off topic" if flaws.off_topic else "fixable" if any(flaws) else "fine"
        return {"accepted": accepted} | {name: (1 - accepted) * share for name, share in NOT_ACCEPTED[kind].items()}

    def _decide(self, suggestion: str) -> str:
        probabilities = self.decision_probabilities(suggestion)
        return list(probabilities)[self.np_random.choice(len(probabilities), p=list(probabilities.values()))]

    def _edit(self, suggestion: str) -> str:
        """The suggestion shortened and calmed if need be, else with a polite opening; sometimes replaced."""
        edited = " ".join(suggestion.split()[: self.max_words])
        if self.flaws(suggestion).pushy:
            edited = " ".join(PUSHY.sub("", edited.lower()).replace("!", ".").split())
        if not content_stems(edited) or self.np_random.random() < EDIT_REPLACES_PROBABILITY:
            edited = self.scripted_response(self._messages, self.np_random)
        if edited == suggestion:
            edited = POLITE_OPENINGS[self.np_random.integers(len(POLITE_OPENINGS))] + suggestion
        return edited

    def _other_message(self, suggestion: str) -> str:
        """The business's own message, unlike the suggestion that it has just read and rejected."""
        drafts = [self.scripted_response(self._messages, self.np_random) for _ in range(DRAFTS_AFTER_REJECTION)]
        return min(drafts, key=lambda draft: len(content_stems(draft) & content_stems(suggestion)))


_PRINTABLE = frozenset(chr(code) for code in range(32, 127))


def content_stems(text: str) -> frozenset[str]:
    """The content words of a text, cut to four letters, so that `return` and `returns` are one."""
    words = re.findall("[a-z]{3,}", text.lower())
    return frozenset(word[:4] for word in words if word not in STOP_WORDS)


def _shouts(text: str) -> bool:
    return any(len(word) >= 4 and word.isupper() for word in re.findall("[A-Za-z]+", text))
