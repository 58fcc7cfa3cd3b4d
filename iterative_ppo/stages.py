"""The stages of an iteration, each from folders to a folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.conversations import Conversation, turn_rewards
from iterative_ppo.environments import ScriptedEnvironment, TextEnvironment
from iterative_ppo.environments.rollout import RolloutStatistics, collect, collect_scripted
from iterative_ppo.from_logs import improve_from_logs, start_policy
from iterative_ppo.intervals import Interval, clustered_interval, mean_interval
from iterative_ppo.loading import PolicyLoader, load_q_function, require_equipment
from iterative_ppo.policy import Policy
from iterative_ppo.q_from_logs import fit_q_from_logs, reads_frozen_weights
from iterative_ppo.run_directory import RunDirectory, Stage, to_json, write_log
from iterative_ppo.supervised import Progress

_START, _COLLECT, _FIT, _IMPROVE, _EVALUATE, _FINAL = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The gate's evidence: candidate and current policy on the same fresh customers.

    Example:
        Trial(candidate=Interval(mean=.5, low=.47, high=.53), current=Interval(mean=.4, low=.37, high=.43),
              difference=Interval(mean=.1, low=.07, high=.13), decision="promote")
    """

    candidate: Interval
    current: Interval
    difference: Interval
    """Paired by conversation; its `low` is the one-sided lower bound at the configured confidence."""
    decision: str


def gate(candidate_H: Sequence[float], current_H: Sequence[float], *, confidence: float) -> Trial:
    """Promotes the candidate if it is better than the current policy with the given one-sided confidence.

    Args:
        candidate_H, current_H: total reward of conversation i under each policy, on common random numbers.
    """
    difference = np.asarray(candidate_H) - np.asarray(current_H)
    paired = clustered_interval(difference, np.arange(len(difference)), confidence=2 * confidence - 1)
    return Trial(
        candidate=mean_interval(candidate_H),
        current=mean_interval(current_H),
        difference=paired,
        decision="promote" if paired.low > 0 else "hold",
    )


def total_reward(conversation: Conversation) -> float:
    """Sum of a finished conversation's rewards, the outcome included."""
    rewards = turn_rewards(conversation)
    assert rewards is not None
    return sum(rewards)


class Stages:
    """The stages of one run; every one is done once and found done afterwards.

    Args:
        directory: the run's folder, which holds its configuration.
        make_environment: makes the simulator.
        progress: shows what is going on.
    """

    def __init__(
        self, directory: RunDirectory, make_environment: Callable[[], TextEnvironment], progress: Progress
    ) -> None:
        self.directory = directory
        self.config: Config = directory.config
        self.make_environment = make_environment
        self.progress = progress
        self._policies = PolicyLoader(self.config)
        require_equipment(self.config)  # what is not there is found before any work is done

    def start(self) -> Stage:
        """π_0: a model cloned from logs, or a pretrained one as it is."""
        config = self.config

        def make(folder: Path) -> dict[str, Any]:
            logs = Path(config.policy.logs) if config.policy.logs else None
            if logs is None and config.policy.start == "tiny":
                logs = folder / "scripted.jsonl"
                self._write_scripted(logs)
            start = start_policy(config, logs, with_outcomes=True, seed=self._seed(0, _START), progress=self.progress)
            start.save(folder, config)
            return start.metrics

        return self._stage(0, "start", _START, {}, make)

    def collect(self, iteration: int, policy: Stage) -> Stage:
        """Conversations of the current policy: the batch that its Q-function is fitted to."""

        def make(folder: Path) -> dict[str, Any]:
            metrics = self._collect(
                folder / "conversations.jsonl",
                policy,
                num_conversations=self.config.iterations.conversations,
                seed=self._seed(iteration, _COLLECT),
            )
            return metrics | {"log": "conversations.jsonl"}

        return self._stage(iteration, "collect", _COLLECT, {"policy": policy}, make)

    def fit(
        self, iteration: int, policy: Stage, read: Sequence[Stage], unread: Sequence[Stage], previous: Stage
    ) -> Stage:
        """Q of the current policy, by regression on the returns of its own conversations.

        It starts from the Q-function in the stage `previous`, or from the policy if there is none.

        Args:
            read: batches that this Q-function has been fitted to. Gradient steps go on from there; a read-out of frozen
                weights is fitted anew, to all.
            unread: batches that it has not.
        """

        q_folder = previous.folder / "q_function"

        def make(folder: Path) -> dict[str, Any]:
            current = self._load(policy)
            fitted = fit_q_from_logs(
                self.config,
                current,
                _read_batches((*read, *unread) if reads_frozen_weights(self.config, current) else unread),
                start=q_folder if q_folder.exists() else None,
                name=str(policy.folder.relative_to(self.directory.path)),
                seed=self._seed(iteration, _FIT),
                progress=self.progress,
            )
            fitted.save(folder)
            return fitted.metrics()

        parents = {"policy": policy, **{f"batch_{i}": batch for i, batch in enumerate((*read, *unread))}}
        return self._stage(iteration, "fit", _FIT, parents | {"start": previous}, make)

    def improve(self, iteration: int, policy: Stage, q_function: Stage, batches: Sequence[Stage]) -> Stage:
        """The single-turn step: token-level RL from the current policy on its own prompts, Q as the reward."""

        def make(folder: Path) -> dict[str, Any]:
            current = self._load(policy)
            return improve_from_logs(
                self.config,
                current,
                load_q_function(q_function.folder / "q_function", current),
                _read_batches(batches),
                folder,
                seed=self._seed(iteration, _IMPROVE),
                progress=self.progress,
            )

        parents = {"policy": policy, "q_function": q_function, **{f"batch_{i}": b for i, b in enumerate(batches)}}
        return self._stage(iteration, "improve", _IMPROVE, parents, make)

    def evaluate(self, iteration: int, current: Stage, candidate: Stage | None) -> Stage:
        """Candidate and current policy on fresh customers, the same for both; the gate's decision."""
        seed = self._seed(iteration, _EVALUATE)

        def rewards(file: Path, policy: Stage) -> list[float]:
            self._collect(file, policy, num_conversations=self.config.evaluation.conversations, seed=seed)
            return [total_reward(conversation) for conversation in read_conversations(file)]

        def make(folder: Path) -> dict[str, Any]:
            current_rewards = rewards(folder / "current.jsonl", current)
            num_conversations = len(current_rewards)
            if candidate is None:
                trial = {"current": to_json(mean_interval(current_rewards))}
                return trial | {"num_conversations": num_conversations, "log": "current.jsonl"}
            candidate_rewards = rewards(folder / "candidate.jsonl", candidate)
            result = gate(candidate_rewards, current_rewards, confidence=self.config.evaluation.confidence)
            log = "candidate.jsonl" if result.decision == "promote" else "current.jsonl"
            return to_json(result) | {"num_conversations": 2 * num_conversations, "log": log}

        parents = {"current": current} | ({"candidate": candidate} if candidate else {})
        return self._stage(iteration, "evaluate", _EVALUATE, parents, make)

    def final(self, iteration: int, policy: Stage) -> Stage:
        """The last policy once more on fresh customers, whom no gate has seen: an estimate free of selection."""

        def make(folder: Path) -> dict[str, Any]:
            file = folder / "conversations.jsonl"
            num_conversations = self.config.evaluation.conversations
            self._collect(file, policy, num_conversations=num_conversations, seed=self._seed(iteration, _FINAL))
            return to_json(mean_interval([total_reward(conversation) for conversation in read_conversations(file)]))

        return self._stage(iteration, "final", _FINAL, {"policy": policy}, make)

    def _stage(
        self,
        iteration: int,
        name: str,
        seed_key: int,
        parents: dict[str, Stage],
        make: Callable[[Path], dict[str, Any]],
    ) -> Stage:
        return self.directory.stage(
            f"iteration-{iteration:03d}/{name}",
            seed=self._seed(iteration, seed_key),
            parents={role: parent.folder for role, parent in parents.items()},
            make=make,
        )

    def _seed(self, iteration: int, stage: int) -> int:
        return int(np.random.SeedSequence([self.config.seed, iteration, stage]).generate_state(1)[0])

    def _load(self, stage: Stage) -> Policy:
        return self._policies.load(stage.folder / "policy")

    def _collect(self, file: Path, policy: Stage, *, num_conversations: int, seed: int) -> dict[str, Any]:
        statistics = RolloutStatistics()
        write_log(
            file,
            collect(
                self._load(policy),
                self.make_environment,
                num_conversations=num_conversations,
                seed=seed,
                max_turns=self.config.environment.max_turns,
                lockstep=self.config.compute.rollout_conversations,
                name=policy.folder.parent.name,
                statistics=statistics,
                progress=self.progress,
            ),
        )
        return {"num_conversations": num_conversations, **to_json(statistics)}

    def _write_scripted(self, file: Path) -> None:
        environment = self.make_environment()
        if not isinstance(environment, ScriptedEnvironment):
            raise ValueError(
                f"environment {type(environment).__name__} has no scripted_response(messages, generator) to write the "
                "first conversations: give some in policy.logs, or a pretrained model as policy.start"
            )
        conversations = collect_scripted(
            self.make_environment,
            num_conversations=self.config.policy.scripted_conversations,
            seed=self._seed(0, _START),
            max_turns=self.config.environment.max_turns,
        )
        write_log(file, conversations)


def _read_batches(batches: Iterable[Stage]) -> list[Conversation]:
    """The conversations of each batch's own log, the one that the policy in force wrote."""
    return [c for batch in batches for c in read_conversations(batch.folder / batch.metrics["log"])]
