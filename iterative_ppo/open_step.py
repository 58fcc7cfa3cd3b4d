"""The improvement step at which a run stands: what another stack needs to make it, and where its result belongs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_ppo import config as config_module
from iterative_ppo.config import Config
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.conversations import Conversation
from iterative_ppo.run_directory import RunDirectory
from iterative_ppo.step import Step
from iterative_ppo.supervised import no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStep:
    """The improvement step after a run's newest fit.

    Example:
        OpenStep(run=Path("runs/a"), config=Config(), name="iteration-001/improve", seed=7, parents={
            "policy": Path("runs/a/iteration-000/start"), "q_function": Path("runs/a/iteration-001/fit"),
            "batch_0": Path("runs/a/iteration-000/evaluate"), "batch_1": Path("runs/a/iteration-001/collect")})
    """

    run: Path
    config: Config
    name: str
    """Its stage's folder, below the run's."""
    seed: int
    """The fit's, which decides what the measurements of an imported candidate sample."""
    parents: dict[str, Path]
    """Folders of the stages that it starts from, by role."""

    @property
    def policy(self) -> Path:
        """Folder of the policy in force: the step's start and its anchor."""
        return self.parents["policy"] / "policy"

    @property
    def q_function(self) -> Path:
        """Folder of the Q-function that is its reward."""
        return self.parents["q_function"] / "q_function"

    @property
    def is_from_logs(self) -> bool:
        """Whether the run is one of `ippo step`: its conversations are halved, and there are no batches."""
        return not any(role.startswith("batch_") for role in self.parents)

    def arguments(self) -> dict[str, Any]:
        """How `ippo step` was called: its group and its number of folds."""
        return _read_json(self.run / "arguments.json")

    def conversations(self) -> list[Conversation]:
        """The conversations whose prompts the step improves on: those that Q was fitted to."""
        if self.is_from_logs:
            log = self.run / "conversations.jsonl"
            directory = RunDirectory(self.run, self.config, resume=True)
            group = self.arguments()["group"]
            step = Step(directory, list(read_conversations(log)), log, group=group, progress=no_progress)
            return [step.conversations[i] for i in step.halves[0]]
        batches = [folder for role, folder in self.parents.items() if role.startswith("batch_")]
        logs = [folder / _read_json(folder / "manifest.json")["metrics"]["log"] for folder in batches]
        return [conversation for log in logs for conversation in read_conversations(log)]


def find_open_step(run: Path) -> OpenStep:
    """The step after the newest fit of a run of `ippo iterate` or `ippo step`, whether it is still to be made or not.

    Raises:
        ValueError: the folder holds no run, or one that has not come to a fit.
    """
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run}: not the folder of a run (config.toml is missing)")
    fits = [run / "fit", *sorted(run.glob("iteration-*/fit"), key=_iteration)]
    fits = [fit for fit in fits if (fit / "manifest.json").is_file()]
    if not fits:
        raise ValueError(f"{run}: no Q-function is fitted yet; go on with it by --resume until its first fit")
    fit = fits[-1]
    manifest = _read_json(fit / "manifest.json")
    parents = {role: run / parent for role, parent in manifest["parents"].items()}
    batches = {role: folder for role, folder in parents.items() if role.startswith("batch_")}
    return OpenStep(
        run=run,
        config=config_module.from_dict(config_module.load(run / "config.toml")),
        name=str((fit.parent / "improve").relative_to(run)),
        seed=manifest["seed"],
        parents={"policy": parents["policy"], "q_function": fit, **batches},
    )


def _iteration(fit: Path) -> int:
    return int(fit.parent.name.removeprefix("iteration-"))


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
