"""Collects conversations of a policy with a text environment, many at a time in lock-step.

Several processes each play their part of the conversations, and all have all of them afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iterative_ppo import distributed
from iterative_ppo.conversations import Conversation, Message, chat_messages
from iterative_ppo.environments import TextEnvironment
from iterative_ppo.policy import Policy
from iterative_ppo.sharding import gathered
from iterative_ppo.supervised import Progress, no_progress

_SCRIPTED_PER_ROUND = 512
Responder = Callable[[Sequence["Talk"]], list[tuple[str, float | None]]]
"""For each running talk, the response and its log-probability (None where there is none)."""


class EnvironmentFailure(ValueError):  # noqa: N818 - it is the environment's, not ours
    """The environment broke its contract; one line that says where."""


@dataclass(slots=True, kw_only=True)
class Talk:
    """A conversation under way."""

    name: str
    environment: TextEnvironment
    generator: np.random.Generator
    """Randomness of the responses; the environment has its own."""
    messages: list[Message] = field(default_factory=list)
    num_turns: int = 0
    end: str | None = None
    total_reward: float = 0.0

    def say(self, response: str, logprob: float | None, *, max_turns: int) -> None:
        """Sends one response to the environment and notes what comes back."""
        try:
            observation, reward, terminated, truncated, info = self.environment.step(response)
        except Exception as error:
            raise self._failure(f"step raised {type(error).__name__}: {error}") from error
        self._check_text(observation, "step")
        if isinstance(reward, bool) or not isinstance(reward, (int, float, np.number)) or not math.isfinite(reward):
            raise self._failure(f"step returned the reward {reward!r}, not a finite number")
        if not isinstance(info, dict):
            raise self._failure(f"step returned {type(info).__name__} as info, not a dict")
        self.num_turns += 1
        self.total_reward += float(reward)
        if terminated:
            self.end = "terminated"
        elif truncated or self.num_turns >= max_turns:
            self.end = "truncated"
        sent = info.get("sent")
        self.messages.append(
            Message(
                role="assistant",
                content=response if sent is None else sent,
                suggestion=None if sent is None else response,
                decision=info.get("decision"),
                logprob=logprob,
                reward=float(reward) if self.end is None and reward != 0 else None,
            )
        )
        if self.end is None or observation:
            self.messages.append(Message(role="user", content=observation))
        if self.end is not None:
            self._last_reward = float(reward)

    _last_reward: float = 0.0

    def conversation(self, policy_name: str | None) -> Conversation:
        """The finished conversation as a log record: the last turn's reward is the outcome, earlier ones stay beside."""
        assert self.end is not None
        return Conversation(
            id=self.name,
            policy=policy_name,
            messages=tuple(self.messages),
            outcome=self._last_reward,
            end=self.end,
        )

    def _check_text(self, observation: object, where: str) -> None:
        if not isinstance(observation, str):
            raise self._failure(f"{where} returned {type(observation).__name__} as observation, not a string")

    def _failure(self, reason: str) -> EnvironmentFailure:
        name = type(self.environment).__name__
        return EnvironmentFailure(f"environment {name}, conversation {self.name}, turn {self.num_turns + 1}: {reason}")


@dataclass(slots=True, kw_only=True)
class RolloutStatistics:
    """Counts of one collection."""

    num_turns: int = 0
    num_encoded_tokens: int = 0
    """Tokens that the model ran over, prompts and responses together."""
    num_dropped_messages: int = 0
    """Messages left out of prompts because a conversation was longer than the context."""

    def add(self, own: "RolloutStatistics") -> None:
        """Adds the counts of every process."""
        turns, tokens, dropped = distributed.sums(own.num_turns, own.num_encoded_tokens, own.num_dropped_messages)
        self.num_turns += int(turns)
        self.num_encoded_tokens += int(tokens)
        self.num_dropped_messages += int(dropped)


def start_talk(environment: TextEnvironment, *, name: str, seed: int, index: int) -> Talk:
    """Resets the environment for conversation `index` of a collection with this seed."""
    environment_seed, response_seed = np.random.SeedSequence([seed, index]).spawn(2)
    talk = Talk(name=name, environment=environment, generator=np.random.default_rng(response_seed))
    try:
        observation, info = environment.reset(seed=int(environment_seed.generate_state(1)[0] >> 1))
    except Exception as error:
        raise talk._failure(f"reset raised {type(error).__name__}: {error}") from error
    talk._check_text(observation, "reset")
    if not isinstance(info, dict):
        raise talk._failure(f"reset returned {type(info).__name__} as info, not a dict")
    system = info.get("system")
    if system is not None and not isinstance(system, str):
        raise talk._failure(f"reset returned {type(system).__name__} as info['system'], not a string")
    if system:
        talk.messages.append(Message(role="system", content=system))
    if observation:
        talk.messages.append(Message(role="user", content=observation))
    return talk


def collect(
    policy: Policy,
    make_environment: Callable[[], TextEnvironment],
    *,
    num_conversations: int,
    seed: int,
    max_turns: int,
    lockstep: int,
    name: str,
    statistics: RolloutStatistics | None = None,
    progress: Progress = no_progress,
) -> Iterator[Conversation]:
    """Yields conversations of a policy in order; `lockstep` of them run at a time.

    Conversation i has a random stream of its own for the environment and one for the responses, both derived from
    (seed, i): two policies evaluated with the same seed meet the same customers and the same luck.
    """
    environments: list[TextEnvironment] = []
    for indices in _rounds(num_conversations, lockstep):
        own = distributed.part_of(indices)
        while len(environments) < len(own):
            environments.append(make_environment())
        counts = RolloutStatistics()
        with gathered(policy.model):
            conversations = play(
                policy, environments, own, name=name, seed=seed, max_turns=max_turns, statistics=counts
            )
        if statistics is not None:
            statistics.add(counts)
        progress(f"collect {name}", indices.stop, num_conversations)
        yield from _in_order(own, conversations)


def play(
    policy: Policy,
    environments: Sequence[TextEnvironment],
    indices: range,
    *,
    name: str,
    seed: int,
    max_turns: int,
    statistics: RolloutStatistics,
) -> list[Conversation]:
    """The conversations with these indices of a collection, in lock-step, each in an environment of its own."""
    talks = [
        start_talk(environment, name=f"{name}-{index:06d}", seed=seed, index=index)
        for environment, index in zip(environments, indices, strict=False)
    ]
    finish(policy, talks, max_turns=max_turns, statistics=statistics)
    return [talk.conversation(name) for talk in talks]


def collect_scripted(
    make_environment: Callable[[], TextEnvironment],
    *,
    num_conversations: int,
    seed: int,
    max_turns: int,
    name: str = "scripted",
) -> Iterator[Conversation]:
    """Conversations of the environment's own scripted seller, its method `scripted_response(messages, generator)`."""
    environment: Any = make_environment()

    def conversation(index: int) -> Conversation:
        talk = start_talk(environment, name=f"{name}-{index:06d}", seed=seed, index=index)
        while talk.end is None:
            try:
                response = environment.scripted_response(chat_messages(talk.messages), talk.generator)
            except Exception as error:
                raise talk._failure(f"scripted_response raised {type(error).__name__}: {error}") from error
            if not isinstance(response, str):
                raise talk._failure(f"scripted_response returned {type(response).__name__}, not a string")
            talk.say(response, None, max_turns=max_turns)
        return talk.conversation(name)

    for indices in _rounds(num_conversations, _SCRIPTED_PER_ROUND):
        own = distributed.part_of(indices)
        yield from _in_order(own, [conversation(index) for index in own])


def _rounds(num_conversations: int, per_process: int) -> Iterator[range]:
    """The indices of all conversations, as many at a time as the processes have room for."""
    size = per_process * distributed.world_size()
    for first in range(0, num_conversations, size):
        yield range(first, min(first + size, num_conversations))


def _in_order(own: range, conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """The conversations of all processes, by their indices."""
    everyone = distributed.gathered(dict(zip(own, conversations, strict=True)))
    return (everyone[index] for index in sorted(everyone))


def finish(
    policy: Policy,
    talks: Sequence[Talk],
    *,
    max_turns: int,
    statistics: RolloutStatistics,
) -> None:
    """Lets the policy speak in all talks, in lock-step, until each has ended.

    Where they have grown so long that memory does not hold the keys and values of all, some wait until the others have
    ended, and are encoded anew then.
    """
    waiting = [talk for talk in talks if talk.end is None]
    while waiting:
        cache = policy.conversation_cache()
        running, waiting = waiting, []
        while running:
            prompts = [policy.renderer.prompt(chat_messages(talk.messages)) for talk in running]
            room = policy.rows_in_memory(max(len(prompt.token_ids) for prompt in prompts))
            if room < len(running):
                waiting += running[room:]
                running, prompts = running[:room], prompts[:room]
                cache.keep(range(room))
            uniforms_BT = np.stack([talk.generator.random(policy.config.max_response_tokens) for talk in running])
            sampled = cache.sample([prompt.token_ids for prompt in prompts], uniforms_BT)
            for talk, token_ids, logprobs in zip(running, sampled.token_ids, sampled.token_logprobs, strict=True):
                talk.say(policy.renderer.response_text(token_ids), min(0.0, sum(logprobs)), max_turns=max_turns)
            statistics.num_turns += len(running)
            statistics.num_dropped_messages += sum(prompt.num_dropped_messages for prompt in prompts)
            kept = [row for row, talk in enumerate(running) if talk.end is None]
            if len(kept) < len(running):
                cache.keep(kept)
                running = [running[row] for row in kept]
        statistics.num_encoded_tokens += cache.num_encoded_tokens
