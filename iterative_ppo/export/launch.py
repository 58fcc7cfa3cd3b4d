"""What an exported step's launch script says: settings in groups, each with the reason why it is not the default."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.export.prompts import ExactPrompts

HERE = "$here"
GPUS = "$gpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One improvement step, as a launch script needs to know it.

    Example:
        Job(run="runs/a", improvement=ImprovementConfig(), policy=PolicyConfig(), prompts=ExactPrompts(...), head="score", seed=0)
    """

    run: str
    improvement: ImprovementConfig
    policy: PolicyConfig
    prompts: ExactPrompts
    head: str
    """Name of the critic's value head."""
    seed: int

    @property
    def num_prompts_per_update(self) -> int:
        """No update asks for more prompts than there are."""
        return min(self.improvement.prompts_per_update, len(self.prompts.prompts))

    @property
    def num_prompts_per_minibatch(self) -> int:
        return math.ceil(self.num_prompts_per_update / self.improvement.num_minibatches)

    @property
    def num_prompts_asked(self) -> int:
        """Over all updates."""
        return self.improvement.num_updates * self.num_prompts_per_update

    @property
    def longest_prompt_tokens(self) -> int:
        return max(len(prompt.token_ids) for prompt in self.prompts.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Settings that belong together.

    Example:
        Group(why="The KL is paid in the reward.", lines=(("algorithm.use_kl_in_reward=True",),))
    """

    why: str
    lines: tuple[tuple[str, ...], ...]
    """The words of each line; `HERE` in a word is the export's folder, `GPUS` the number of GPUs."""


def launch_script(*, title: str, command: str, run: str, candidate: str, groups: Sequence[Group]) -> str:
    """A bash script that starts another stack's trainer with the settings, and passes its own arguments on."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {title}",
        f"# Before: ippo serve-q {shlex.quote(run)}; where that is another machine: export IPPO_Q_URL=http://host:8000",
        "# More settings may be given as arguments, and win over those below. NUM_GPUS=8 bash launch.sh ...",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        'gpus="${NUM_GPUS:-1}"',
        "settings=(",
    ]
    for group in groups:
        lines += [f"  # {group.why}", *("  " + " ".join(map(_quoted, line)) for line in group.lines)]
    lines += [
        ")",
        f'{command} "${{settings[@]}}" "$@"',
        f'echo next: ippo import {shlex.quote(run)} --policy "$here/{candidate}"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    return f'"{word}"' if HERE in word or GPUS in word else shlex.quote(word)
