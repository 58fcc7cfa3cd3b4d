"""`validate`, `score`, `rank`, `conformance`, `chat`, `config`: a look at one thing, which is left as it is."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from iterative_ppo import config as config_module
from iterative_ppo.command_line import options, terminal
from iterative_ppo.config import ConfigError
from iterative_ppo.extras import require_extra


@click.command()
@click.argument("files", nargs=-1, required=True, type=options.FILE, metavar="FILE...")
@options.bad_lines
@options.json
def validate(files: Sequence[Path], bad_lines: Literal["error", "skip"], as_json: bool) -> None:
    """Check logs and show what is in them."""
    from iterative_ppo.log_summary import summarize
    from iterative_ppo.tables import summary_table

    summary = summarize(files, bad_lines=bad_lines)
    terminal.stdout().print(summary_table(summary))
    terminal.finish(summary.to_dict(), as_json)


@click.command()
@options.logs
@click.option("--q", "q_function", required=True, type=options.FILE, help="Folder of a Q-function.")
@click.option("--out", required=True, type=options.FILE, help="File of scores to write, JSON Lines.")
@options.ray
@options.common
def score(
    logs: Path,
    q_function: Path,
    out: Path,
    ray: str | None,
    config_path: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    """Write Q, the state's value and the reward of every decision point of a log."""
    config = options.configuration(config_path, assignments)
    options.require_readable(logs)
    if out.exists() and out.samefile(logs):
        raise ConfigError(f"--out: {out} is the log itself, which the scores would take the place of")
    if ray is not None:
        require_extra("ray", needed_by="--ray")
    from iterative_ppo.commands.inspection import run_score

    with terminal.progress() as progress:
        result = run_score(config, logs, q_function, out, ray=ray, progress=progress, console=terminal.stdout())
    terminal.finish(result, as_json)


@click.command()
@options.policy
@click.option("--q", "q_function", required=True, type=options.FILE, help="Folder of a Q-function.")
@click.option(
    "--states", type=click.IntRange(1), default=64, show_default=True, help="Conversations to take a state from."
)
@click.option("--responses", type=click.IntRange(2), default=6, show_default=True, help="Responses to rank in each.")
@click.option("--rollouts", type=click.IntRange(2), default=32, show_default=True, help="Rollouts of each response.")
@options.common
def rank(
    policy: str,
    q_function: Path,
    states: int,
    responses: int,
    rollouts: int,
    config_path: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    """Measure how well Q ranks responses to the same prompt, against rollouts in the simulator."""
    config = options.configuration(config_path, assignments)
    from iterative_ppo.commands.inspection import run_rank

    with terminal.progress() as progress:
        result = run_rank(
            config,
            policy,
            str(q_function),
            num_states=states,
            num_responses=responses,
            num_rollouts=rollouts,
            progress=progress,
            console=terminal.stdout(),
        )
    terminal.finish(result, as_json)


@click.command()
@click.option(
    "--backend",
    default="native",
    show_default=True,
    metavar="native|trl|URL|package.module:function",
    help="The improvement step to check: ours, TRL's, a service (docs/backends.md), or a function (`iterative_ppo.conformance.Backend`).",
)
@options.common
def conformance(backend: str, config_path: Path | None, assignments: Sequence[str], as_json: bool) -> None:
    """Check an improvement step against problems whose best policy is known. Exit code 1 where it fails."""
    config = options.configuration(config_path, assignments)
    from iterative_ppo.commands.inspection import run_conformance

    with terminal.progress() as progress:
        result = run_conformance(config, backend, progress=progress, console=terminal.stdout())
    terminal.finish(result, as_json)
    if not result["passed"]:
        sys.exit(terminal.EXIT_FAILED)


@click.command()
@options.policy
@click.option("--q", "q_function", type=options.FILE, help="Folder of a Q-function; shows Q of each reply.")
@click.option("--system", help="System message.")
@options.config_file
@options.settings
def chat(
    policy: str, q_function: Path | None, system: str | None, config_path: Path | None, assignments: Sequence[str]
) -> None:
    """Talk to a policy, as the customer. An empty line ends the talk."""
    config = options.configuration(config_path, assignments)
    from iterative_ppo.commands.inspection import run_chat

    def ask() -> str | None:
        try:
            return input("you: ").strip() or None
        except EOFError:
            return None

    q_source = str(q_function) if q_function else None
    run_chat(config, policy, q_source, system, ask=ask, console=terminal.stdout())


@click.command(name="config")
@click.argument("config_path", required=False, type=options.FILE, metavar="[CONFIG.toml]")
@options.settings
def show_config(config_path: Path | None, assignments: Sequence[str]) -> None:
    """Print every setting with its documentation, as a TOML file."""
    click.echo(config_module.to_toml(options.configuration(config_path, assignments), documented=True), nl=False)
