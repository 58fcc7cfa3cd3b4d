"""What the arguments of several commands name: policies, logs, environments, folders for results."""

import os
from collections.abc import Callable
from pathlib import Path

from iterative_ppo import distributed
from iterative_ppo.config import Config
from iterative_ppo.conversation_log import BadLines, read_conversations
from iterative_ppo.conversations import Conversation
from iterative_ppo.environments import TextEnvironment, make_environment
from iterative_ppo.loading import load_policy
from iterative_ppo.policy import Policy


def load(config: Config, source: str) -> Policy:
    """A policy from a hub id or a folder; also from a stage's folder that holds one."""
    return load_policy(config, policy_folder(source))


def policy_folder(source: str) -> str:
    """Where a policy's weights are: the source itself, or the `policy` in a stage's folder."""
    inner = Path(source) / "policy"
    return str(inner) if inner.is_dir() else source


def read_log(logs: Path, bad_lines: BadLines) -> list[Conversation]:
    """The conversations of a log; of several processes the main one sets bad lines aside."""
    rejects = None if distributed.is_main() else Path(os.devnull)
    return list(read_conversations(logs, bad_lines=bad_lines, rejects=rejects))


def environment_maker(config: Config) -> Callable[[], TextEnvironment]:
    """Makes the configured environment."""
    return lambda: make_environment(config.environment.entry_point, config.environment.arguments)


def known_optimum(environment: TextEnvironment) -> float | None:
    """The best attainable outcome, where the environment can tell: its method `optimum()`."""
    optimum = getattr(environment, "optimum", None)
    return float(optimum()) if callable(optimum) else None


def empty_folder(path: Path) -> None:
    """Makes a folder for results; ValueError where it already holds something."""

    def make() -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path}: exists and is not an empty folder; choose another with --out")
        path.mkdir(parents=True, exist_ok=True)

    distributed.on_main(make)
