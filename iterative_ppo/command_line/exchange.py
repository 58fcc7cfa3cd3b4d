"""`export`, `import`, `merge`, `serve-q`: exchange with other stacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from iterative_ppo import config as config_module
from iterative_ppo.command_line import options, terminal
from iterative_ppo.extras import require_extra


@click.command()
@click.argument("stack", type=click.Choice(["verl", "openrlhf", "trl"]))
@click.argument("run", type=options.FILE, metavar="RUN")
@click.option("--out", required=True, type=options.FILE, help="Folder for the export.")
@options.json
def export(stack: Literal["verl", "openrlhf", "trl"], run: Path, out: Path, as_json: bool) -> None:
    """Write a run's next improvement step as a folder from which another RLHF stack makes it."""
    from iterative_ppo.commands.exchange import run_export

    terminal.finish(run_export(stack, run, out, console=terminal.stdout()), as_json)


@click.command(name="import")
@click.argument("run", type=options.FILE, metavar="RUN")
@click.option("--policy", required=True, type=options.FILE, help="Folder of the policy that the other stack trained.")
@options.json
def import_(run: Path, policy: Path, as_json: bool) -> None:
    """Take a policy that another RLHF stack trained into its run, as the candidate of the iteration."""
    from iterative_ppo.commands.exchange import run_import

    terminal.finish(run_import(run, policy, console=terminal.stdout()), as_json)


@click.command()
@click.argument("folder", type=options.FILE, metavar="FOLDER")
@click.option("--out", required=True, type=options.FILE, help="Folder for the plain model.")
@options.common
def merge(folder: Path, out: Path, config_path: Path | None, assignments: Sequence[str], as_json: bool) -> None:
    """Write the adapter of a policy or a Q-function and its base model as one plain model."""
    config = options.configuration(config_path, assignments)
    from iterative_ppo.commands.exchange import run_merge

    terminal.finish(run_merge(config, folder, out, console=terminal.stdout()), as_json)


@click.command()
@click.argument("run", type=options.FILE, metavar="RUN")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: one that is free.")
@options.common
def serve_q(
    run: Path, host: str, port: int, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Serve a Q-function over HTTP as a reward model.

    RUN is a run's folder (its newest Q-function), a stage's, or a Q-function's own. Settings are those of the run.
    With the environment variable IPPO_API_KEY, requests need it as their bearer token.
    """
    require_extra("serve", needed_by="serve-q")
    from iterative_ppo import q_folder

    folder = q_folder.find_q_function(run)
    tables = config_module.load(config_path) if config_path else q_folder.settings_beside(run, folder)
    config = options.configured(tables, assignments)
    terminal.say_start()
    from iterative_ppo.commands.exchange import run_serve_q

    terminal.finish(run_serve_q(config, folder, host=host, port=port, console=terminal.stdout()), as_json)
