"""The entry point `ippo`. Imports lazily: `ippo --help` and a mistake in a configuration load no torch."""

import os
import signal
import sys
import time
from types import FrameType

import click
from safetensors import SafetensorError

from iterative_ppo import __version__
from iterative_ppo.command_line import exchange, inspection, loop, single_stages
from iterative_ppo.command_line.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_MISTAKE
from iterative_ppo.command_line.torchrun import is_main, local_rank, num_processes
from iterative_ppo.memory import keep_freed_memory

_COMMANDS = (
    loop.iterate,
    loop.step,
    single_stages.collect,
    single_stages.fit,
    single_stages.improve,
    single_stages.evaluate,
    inspection.validate,
    inspection.score,
    inspection.rank,
    inspection.conformance,
    inspection.chat,
    inspection.show_config,
    exchange.export,
    exchange.import_,
    exchange.merge,
    exchange.serve_q,
)
_IN_SEVERAL_PROCESSES = ("iterate", "step", "fit", "improve", "collect", "evaluate")
_SECONDS_TO_BE_ENDED = 10.0


@click.group(commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Align language models to what happens at the end of a conversation (Iterative PPO)."""
    command = str(context.invoked_subcommand)
    if num_processes() > 1 and command not in _IN_SEVERAL_PROCESSES:
        raise click.UsageError(f"{command} runs in one process: start it without torchrun")


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    if num_processes() > 1:
        signal.signal(signal.SIGTERM, _end_with_the_others)
    keep_freed_memory()
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _let_the_first_speak()
        error.show()
        sys.exit(EXIT_USER_MISTAKE)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted; finished stages are kept", EXIT_INTERRUPTED)
    except (ValueError, OSError, SafetensorError) as error:  # the last: weights that cannot be read or written
        _fail(str(error), EXIT_USER_MISTAKE)
    except (RuntimeError, MemoryError) as error:
        _fail(f"{type(error).__name__}: {error}", EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    _let_the_first_speak()
    who = "" if is_main() else f"process {os.environ['RANK']}: "
    click.echo(f"ippo: {who}" + " ".join(message.split()), err=True)
    sys.exit(code)


def _let_the_first_speak() -> None:
    """A mistake that all processes find is said once: when the first on a machine ends, `torchrun` ends the others."""
    if num_processes() > 1:
        if local_rank() != "0":
            time.sleep(_SECONDS_TO_BE_ENDED)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_the_others(_signal: int, _frame: FrameType | None) -> None:
    """`torchrun` ends all processes when one has ended badly."""
    if local_rank() == "0":
        said = "ippo: another process of this job has ended; finished stages are kept, and --resume goes on with them\n"
        os.write(sys.stderr.fileno(), said.encode())  # no buffer, which may be in the middle of a line
    os._exit(EXIT_FAILED)  # whatever a library is waiting for


if __name__ == "__main__":
    main()
