"""`iterate` and `step`: the loop, and one iteration of it from logs alone."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from iterative_ppo.command_line import options, terminal
from iterative_ppo.config import ConfigError


@click.command()
@click.argument("config_path", required=False, type=options.FILE, metavar="[CONFIG.toml]")
@click.option("--out", type=options.FILE, help="Run folder. Default: a new one below runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@options.settings
@options.json
def iterate(
    config_path: Path | None, out: Path | None, resume: bool, assignments: Sequence[str], as_json: bool
) -> None:
    """Run the loop: collect, fit Q, improve, evaluate, promote or hold."""
    config = options.configuration(config_path, assignments)
    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    name = config.environment.entry_point.rpartition(":")[2].lower()
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    terminal.say_start()
    from iterative_ppo import distributed
    from iterative_ppo.commands.loop import run_iterate

    with distributed.processes(), terminal.progress() as progress:
        result = run_iterate(config, folder, resume=resume, console=terminal.stdout(), progress=progress)
    terminal.finish(result, as_json)


@click.command()
@options.logs
@click.option(
    "--policy", help="A hub id, a folder, or `tiny`: a small model cloned from the logs. Default: policy.start."
)
@click.option("--out", required=True, type=options.FILE, help="Run folder.")
@click.option(
    "--folds", type=click.IntRange(0), default=5, show_default=True, help="Folds of the report on Q; 0: none."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@options.group
@options.bad_lines
@options.common
def step(
    logs: Path,
    policy: str | None,
    out: Path,
    folds: int,
    resume: bool,
    group: str | None,
    bad_lines: Literal["error", "skip"],
    config_path: Path | None,
    assignments: Sequence[str],
    as_json: bool,
) -> None:
    """Make one iteration from logs alone: a candidate policy, a Q-function, and evidence."""
    start = [f"policy.start={json.dumps(policy)}"] if policy else []
    config = options.configuration(config_path, [*assignments, *start])
    options.require_readable(logs)
    terminal.say_start()
    from iterative_ppo import distributed
    from iterative_ppo.commands.loop import run_step

    with distributed.processes(), terminal.progress() as progress:
        result = run_step(
            config,
            logs,
            out,
            num_folds=folds,
            group=group,
            bad_lines=bad_lines,
            resume=resume,
            console=terminal.stdout(),
            progress=progress,
        )
    terminal.finish(result, as_json)
