"""Options that several commands have, and the configuration that they make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from iterative_ppo import config as config_module
from iterative_ppo.config import Config

_Command = TypeVar("_Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def _combined(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line.")
settings = click.option(
    "--set", "assignments", multiple=True, metavar="section.key=value", help="Change a setting; see `ippo config`."
)
config_file = click.option("--config", "config_path", type=FILE, help="TOML file of settings.")
logs = click.option("--logs", required=True, type=FILE, help="Conversations, JSON Lines.")
policy = click.option("--policy", required=True, help="A hub id or a folder.")
bad_lines = click.option(
    "--bad-lines",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Stop at a malformed line, or set it aside in a file and count it.",
)
ray = click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Spread the work over this machine's cores or over a Ray cluster (auto or HOST:PORT). Needs the extra `ray`.",
)
group = click.option("--group", help="Split conversations of one group as one, as metadata.dialogue.")
common = _combined(config_file, settings, json)


def configuration(path: Path | None, assignments: Sequence[str]) -> Config:
    """The settings of a file with those of the command line; ConfigError where one is wrong."""
    return configured(config_module.load(path) if path else {}, assignments)


def configured(tables: Mapping[str, Any], assignments: Sequence[str]) -> Config:
    """The same where the file is read."""
    for assignment in assignments:
        tables = config_module.with_setting(tables, assignment)
    return config_module.from_dict(tables)


def require_readable(logs: Path) -> None:
    """Fails on a missing log before anything slow is loaded."""
    with logs.open("rb"):
        pass
