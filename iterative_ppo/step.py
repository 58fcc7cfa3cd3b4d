"""One iteration from logs alone: fit Q, improve, and estimate the gain with a Q that did not train the candidate."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo import distributed
from iterative_ppo.config import ConfigError
from iterative_ppo.conversation_log import BadLines, read_conversations, write_conversations
from iterative_ppo.conversations import Conversation, split_by_group
from iterative_ppo.cross_validation import cross_validate, group_names
from iterative_ppo.from_logs import improve_from_logs, start_policy
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.intervals import clustered_interval
from iterative_ppo.loading import PolicyLoader, load_q_function, require_equipment
from iterative_ppo.policy import Policy
from iterative_ppo.q_from_logs import fit_q_from_logs
from iterative_ppo.q_function import QFunction
from iterative_ppo.run_directory import RunDirectory, Stage, to_json, wait_for, write_json, write_text
from iterative_ppo.supervised import Progress
from iterative_ppo.turns_to_tokens import TokenizedTurns, tokenize

_START, _FIT, _GRADER, _FOLDS, _IMPROVE, _GRADE = range(10, 16)
_LOG = "conversations.jsonl"
_ARGUMENTS = "arguments.json"
_NUM_SAMPLES_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The finished stages of a step by name: start, fit, grader, folds (where asked for), improve, grade."""

    stages: dict[str, Stage]


class Step:
    """The stages of `ippo step`.

    The conversations are halved. Q is fitted to one half and trains the candidate on that half's prompts; a second Q,
    fitted to the other half, grades candidate and policy on the other half's prompts.

    Args:
        directory: the run's folder.
        conversations: the logs, read and checked.
        logs: where they came from, for the clone of a tiny start policy and for the record.
        group: what is split as one, as `metadata.dialogue`; None: each conversation by itself.
    """

    def __init__(
        self,
        directory: RunDirectory,
        conversations: Sequence[Conversation],
        logs: Path,
        *,
        group: str | None,
        progress: Progress,
    ) -> None:
        self.directory = directory
        self.config = directory.config
        self._policies = PolicyLoader(self.config)
        self.logs = logs
        self.progress = progress
        require_equipment(self.config)  # what is not there is found before any work is done
        self.conversations = list(conversations)
        self.groups = group_names(self.conversations, group)
        is_grader = split_by_group(self.groups, held_out_share=0.5, seed=self._seed(0))
        self.halves = np.flatnonzero(~is_grader).tolist(), np.flatnonzero(is_grader).tolist()

    def run(self, *, num_folds: int) -> StepResult:
        """Does all stages, or finds them done; no folds with `num_folds` 0."""
        stages = self._fits(num_folds)
        start = stages["start"]
        stages["improve"] = self._stage(
            "improve",
            _IMPROVE,
            {"policy": start, "q_function": stages["fit"]},
            lambda folder: self._improve(folder, stages),
        )
        stages["grade"] = self._stage(
            "grade",
            _GRADE,
            {"candidate": stages["improve"], "grader": stages["grader"]},
            lambda f: self._grade(f, stages),
        )
        return StepResult(stages=stages)

    def _fits(self, num_folds: int) -> dict[str, Stage]:
        """The start, and all fits to the logs, which share the features of frozen weights."""
        features = FeatureCache()
        start = self._stage("start", _START, {}, self._start)
        stages = {"start": start}
        for name, key, half in (("fit", _FIT, 0), ("grader", _GRADER, 1)):

            def fit(folder: Path, half: int = half, name: str = name) -> dict[str, Any]:
                return self._fit(folder, start, self.halves[half], name, features)

            stages[name] = self._stage(name, key, {"policy": start}, fit)
        if num_folds:
            stages["folds"] = self._stage(
                "folds", _FOLDS, {"policy": start}, lambda _: self._cross_validate(start, num_folds, features)
            )
        return stages

    def _start(self, folder: Path) -> dict[str, Any]:
        logs = self.directory.path / _LOG if self.config.policy.start == "tiny" else None
        # Without outcomes: what a Q is graded on must not be in the weights that it starts from.
        start = start_policy(self.config, logs, with_outcomes=False, seed=self._seed(_START), progress=self.progress)
        start.save(folder, self.config)
        return start.metrics

    def _fit(
        self, folder: Path, start: Stage, half: Sequence[int], name: str, features: FeatureCache
    ) -> dict[str, Any]:
        fitted = fit_q_from_logs(
            self.config,
            self._load(start),
            [self.conversations[i] for i in half],
            name=str(self.logs),
            seed=self._seed(_FIT if name == "fit" else _GRADER),
            progress=self.progress,
            groups=[self.groups[i] for i in half],
            features=features,
        )
        fitted.save(folder)
        return fitted.metrics() | {"report": to_json(fitted.report)}

    def _cross_validate(self, start: Stage, num_folds: int, features: FeatureCache) -> dict[str, Any]:
        result = cross_validate(
            self.config,
            self._load(start),
            self.conversations,
            num_folds=num_folds,
            groups=self.groups,
            seed=self._seed(_FOLDS),
            features=features,
            progress=self.progress,
        )
        metrics: dict[str, Any] = to_json(result)
        return metrics

    def _improve(self, folder: Path, stages: dict[str, Stage]) -> dict[str, Any]:
        policy = self._load(stages["start"])
        return improve_from_logs(
            self.config,
            policy,
            self._q_function(stages["fit"], policy),
            [self.conversations[i] for i in self.halves[0]],
            folder,
            seed=self._seed(_IMPROVE),
            progress=self.progress,
        )

    def _grade(self, folder: Path, stages: dict[str, Stage]) -> dict[str, Any]:
        """Both policies answer the same prompts with the same luck; both Q-functions score the answers."""
        policy, candidate = self._load(stages["start"]), self._load(stages["improve"])
        generator = np.random.default_rng(self._seed(_GRADE))
        order = generator.permutation(self.halves[1]).tolist()
        tokenized: list[tuple[int, TokenizedTurns]] = []
        num_prompts = 0
        for i in order:
            turns = tokenize(self.conversations[i], policy.renderer)
            tokenized.append((i, turns))
            num_prompts += len(turns.prompts)
            if num_prompts >= self.config.evaluation.conversations:
                break
        prompts = [prompt for _, turns in tokenized for prompt in turns.prompts]
        groups = [self.groups[i] for i, turns in tokenized for _ in turns.prompts]
        uniforms_BT = generator.random((len(prompts), self.config.policy.max_response_tokens))
        before = policy.respond(prompts, uniforms_BT, progress=self.progress, what="answer as the policy")
        after = candidate.respond(prompts, uniforms_BT, progress=self.progress, what="answer as the candidate")
        gains = {}
        q_values = {}
        for role, name in (("other_half", "grader"), ("trained_on", "fit")):
            q_function = self._q_function(stages[name], policy)
            q_values[role] = [
                q_function.values(prompts, answers, tokens_per_batch=self.config.compute.tokens_per_batch).numpy()
                for answers in (before, after)
            ]
            gains[role] = clustered_interval(q_values[role][1] - q_values[role][0], groups)
        shown = np.linspace(0, len(prompts) - 1, min(_NUM_SAMPLES_SHOWN, len(prompts))).astype(int).tolist()
        write_text(
            folder / "samples.md",
            _samples(
                policy.tokenizer.decode,
                [prompts[i] for i in shown],
                [policy.renderer.response_text(before[i]) for i in shown],
                [policy.renderer.response_text(after[i]) for i in shown],
                [(float(q_values["other_half"][0][i]), float(q_values["other_half"][1][i])) for i in shown],
            ),
        )
        return {
            "num_prompts": len(prompts),
            "num_conversations": len(tokenized),
            "q_policy": float(q_values["other_half"][0].mean()),
            "q_candidate": float(q_values["other_half"][1].mean()),
            "q_gain": to_json(gains["other_half"]),
            "q_gain_by_own_q": to_json(gains["trained_on"]),
        }

    def _load(self, stage: Stage) -> Policy:
        return self._policies.load(stage.folder / "policy")

    def _q_function(self, stage: Stage, policy: Policy) -> QFunction:
        return load_q_function(stage.folder / "q_function", policy)

    def _seed(self, key: int) -> int:
        return int(np.random.SeedSequence([self.config.seed, 0, key]).generate_state(1)[0])

    def _stage(self, name: str, key: int, parents: dict[str, Stage], make: Callable[[Path], dict[str, Any]]) -> Stage:
        folders = {role: parent.folder for role, parent in parents.items()}
        return self.directory.stage(name, seed=self._seed(key), parents=folders, make=make)


def copy_log(logs: Path, directory: RunDirectory, *, bad_lines: BadLines) -> list[Conversation]:
    """Keeps what was read in the run's folder, whole; a resumed step must be given the same.

    Raises:
        ConfigError: the run was begun with other conversations.
    """
    copy = directory.path / _LOG

    def keep() -> None:
        found = read_conversations(logs, bad_lines=bad_lines, rejects=directory.path / "rejected.jsonl")
        if not copy.exists():
            write_conversations(copy, found)
        elif list(read_conversations(copy)) != list(found):
            raise ConfigError(
                f"{logs}: not the conversations that {directory.path} was begun with; choose another --out"
            )

    distributed.on_main(keep)
    wait_for(copy)
    return list(read_conversations(copy))


def keep_arguments(directory: RunDirectory, arguments: Mapping[str, object]) -> None:
    """Notes in the run's folder how the step was called; a resumed step must be called the same.

    Raises:
        ConfigError: the step was begun with other arguments.
    """
    file = directory.path / _ARGUMENTS

    def keep() -> dict[str, object]:
        if not file.exists():
            write_json(file, arguments)
        kept: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
        return kept

    kept = distributed.on_main(keep)
    for name, value in arguments.items():
        if kept[name] != value:
            raise ConfigError(
                f"{directory.path}: is a step with --{name} {kept[name]}, not {value}; choose another --out"
            )


def _samples(
    decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Sequence[int]],
    before: Sequence[str],
    after: Sequence[str],
    q_values: Sequence[tuple[float, float]],
) -> str:
    """Answers before and after, side by side, with their Q by the grader."""
    lines = ["# Answers before and after, with the Q of the other half", ""]
    for i, (prompt, old, new, (old_q, new_q)) in enumerate(zip(prompts, before, after, q_values, strict=True)):
        quoted = "\n".join(f"> {line}" for line in decode(prompt)[-600:].splitlines())
        lines += [f"## {i + 1}", "", quoted, "", "| | Q | answer |", "|---|---|---|"]
        lines += [f"| before | {old_q:.3f} | {_cell(old)} |", f"| after | {new_q:.3f} | {_cell(new)} |", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "*(nothing)*"
