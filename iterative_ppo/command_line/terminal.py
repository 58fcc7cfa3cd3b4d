"""What a command tells: lines, a progress bar, a JSON object, an exit code. Of several processes the main one speaks."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from iterative_ppo.command_line.torchrun import is_main

_SECONDS_BETWEEN_LINES = 30.0
EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130


def stdout() -> Console:
    """For what a person reads."""
    return Console(soft_wrap=True, quiet=not is_main())


def say_start() -> None:
    """Before the libraries, which take seconds."""
    if is_main():
        click.echo("loading libraries ...", err=True)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The object of `--json`, on the last line."""
    if as_json and is_main():
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal's error stream; where that is no terminal, a line every half minute."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=not is_main())
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("start", total=None)
        kind = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal kind
            if what.partition(" (")[0] != kind:
                kind = what.partition(" (")[0]
                bar.reset(task, description=what, total=total)
            bar.update(task, description=what, completed=done, total=total)

        yield show


def _lines(console: Console) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{what}: {done:,} of {total:,}", soft_wrap=True, markup=False, highlight=False)

    return show
