"""`collect`, `fit`, `improve`, `evaluate`: one stage of an iteration by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from iterative_ppo.command_line import options, terminal
from iterative_ppo.config import ConfigError
from iterative_ppo.extras import require_extra


@click.command()
@options.policy
@click.option("--out", required=True, type=options.FILE, help="Log to write.")
@options.ray
@options.common
def collect(
    policy: str, out: Path, ray: str | None, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Write conversations of a policy with the environment (iterations.conversations of them)."""
    config = options.configuration(config_path, assignments)
    if ray is not None:
        require_extra("ray", needed_by="--ray")
    from iterative_ppo import distributed
    from iterative_ppo.commands.single_stages import run_collect

    with distributed.processes(), terminal.progress() as progress:
        result = run_collect(config, policy, out, ray=ray, progress=progress, console=terminal.stdout())
    terminal.finish(result, as_json)


@click.command()
@options.logs
@options.policy
@click.option("--out", type=options.FILE, help="Folder for the Q-function fitted to all conversations.")
@click.option("--folds", type=click.IntRange(0), default=0, show_default=True, help="Report on Q by cross-validation.")
@options.group
@options.bad_lines
@options.common
def fit(
    logs: Path,
    policy: str,
    out: Path | None,
    folds: int,
    group: str | None,
    bad_lines: Literal["error", "skip"],
    config_path: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    """Fit a Q-function to logged conversations, starting from a policy's weights."""
    config = options.configuration(config_path, assignments)
    if out is None and not folds:
        raise ConfigError("fit: give --out for a Q-function, --folds for a report on what Q can tell, or both")
    if folds == 1:
        raise ConfigError("--folds: must be 0 or at least 2")
    options.require_readable(logs)
    from iterative_ppo import distributed
    from iterative_ppo.commands.single_stages import run_fit

    with distributed.processes(), terminal.progress() as progress:
        result = run_fit(
            config,
            logs,
            policy,
            out,
            num_folds=folds,
            group=group,
            bad_lines=bad_lines,
            progress=progress,
            console=terminal.stdout(),
        )
    terminal.finish(result, as_json)


@click.command()
@options.logs
@options.policy
@click.option("--q", "q_function", required=True, type=options.FILE, help="Folder of a Q-function.")
@click.option("--out", required=True, type=options.FILE, help="Folder for the candidate.")
@options.bad_lines
@options.common
def improve(
    logs: Path,
    policy: str,
    q_function: Path,
    out: Path,
    bad_lines: Literal["error", "skip"],
    config_path: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    """Make one single-turn improvement step on the prompts of logs, with Q as the reward."""
    config = options.configuration(config_path, assignments)
    options.require_readable(logs)
    from iterative_ppo import distributed
    from iterative_ppo.commands.single_stages import run_improve

    with distributed.processes(), terminal.progress() as progress:
        result = run_improve(
            config,
            logs,
            policy,
            str(q_function),
            out,
            bad_lines=bad_lines,
            progress=progress,
            console=terminal.stdout(),
        )
    terminal.finish(result, as_json)


@click.command()
@options.policy
@click.option("--against", help="Another policy, compared on the same customers.")
@options.common
def evaluate(
    policy: str, against: str | None, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Measure a policy's true outcome in the environment (evaluation.conversations of them)."""
    config = options.configuration(config_path, assignments)
    from iterative_ppo import distributed
    from iterative_ppo.commands.single_stages import run_evaluate

    with distributed.processes(), terminal.progress() as progress:
        result = run_evaluate(config, policy, against, progress=progress, console=terminal.stdout())
    terminal.finish(result, as_json)
