"""The command line `ippo`. Imports lazily: `ippo --help` and a mistake in a configuration load no torch."""

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import click
from rich.console import Console
from safetensors import SafetensorError

from iterative_ppo import __version__
from iterative_ppo import config as config_module
from iterative_ppo.config import Config, ConfigError

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
_EXIT_FAILED, _EXIT_USER_MISTAKE, _EXIT_INTERRUPTED = 1, 2, 130
_IN_SEVERAL_PROCESSES = ("iterate", "step", "fit", "improve", "collect", "evaluate")
_SECONDS_TO_BE_ENDED = 10.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Align language models to what happens at the end of a conversation (Iterative PPO)."""
    command = str(context.invoked_subcommand)
    if _num_processes() > 1 and command not in _IN_SEVERAL_PROCESSES:
        raise click.UsageError(f"{command} runs in one process: start it without torchrun")


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line.")
_settings = click.option(
    "--set", "assignments", multiple=True, metavar="section.key=value", help="Change a setting; see `ippo config`."
)
_config_file = click.option("--config", "config_path", type=_FILE, help="TOML file of settings.")
_logs = click.option("--logs", required=True, type=_FILE, help="Conversations, JSON Lines.")
_policy = click.option("--policy", required=True, help="A hub id or a folder.")
_bad_lines = click.option(
    "--bad-lines",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Stop at a malformed line, or set it aside in a file and count it.",
)
_ray = click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Spread the work over this machine's cores or over a Ray cluster (auto or HOST:PORT). Needs the extra `ray`.",
)
_group = click.option("--group", help="Split conversations of one group as one, as metadata.dialogue.")
_common = _options(_config_file, _settings, _json)


@cli.command()
@click.argument("config_path", required=False, type=_FILE, metavar="[CONFIG.toml]")
@click.option("--out", type=_FILE, help="Run folder. Default: a new one below runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@_settings
@_json
def iterate(
    config_path: Path | None, out: Path | None, resume: bool, assignments: Sequence[str], as_json: bool
) -> None:
    """Run the loop: collect, fit Q, improve, evaluate, promote or hold."""
    config = _configuration(config_path, assignments)
    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    name = config.environment.entry_point.rpartition(":")[2].lower()
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _say_start()
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_iterate(config, folder, resume=resume, console=_stdout(), progress=progress)
    _finish(result, as_json)


@cli.command()
@_logs
@click.option(
    "--policy", help="A hub id, a folder, or `tiny`: a small model cloned from the logs. Default: policy.start."
)
@click.option("--out", required=True, type=_FILE, help="Run folder.")
@click.option(
    "--folds", type=click.IntRange(0), default=5, show_default=True, help="Folds of the report on Q; 0: none."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@_group
@_bad_lines
@_common
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
    config = _configuration(config_path, [*assignments, *start])
    _require_readable(logs)
    _say_start()
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_step(
            config,
            logs,
            out,
            num_folds=folds,
            group=group,
            bad_lines=bad_lines,
            resume=resume,
            console=_stdout(),
            progress=progress,
        )
    _finish(result, as_json)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
@_bad_lines
@_json
def validate(files: Sequence[Path], bad_lines: Literal["error", "skip"], as_json: bool) -> None:
    """Check logs and show what is in them."""
    from iterative_ppo.log_summary import summarize
    from iterative_ppo.tables import summary_table

    summary = summarize(files, bad_lines=bad_lines)
    _stdout().print(summary_table(summary))
    _finish(summary.to_dict(), as_json)


@cli.command()
@_policy
@click.option("--out", required=True, type=_FILE, help="Log to write.")
@_ray
@_common
def collect(
    policy: str, out: Path, ray: str | None, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Write conversations of a policy with the environment (iterations.conversations of them)."""
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_collect(config, policy, out, ray=ray, progress=progress, console=_stdout())
    _finish(result, as_json)


@cli.command()
@_logs
@click.option("--q", "q_function", required=True, type=_FILE, help="Folder of a Q-function.")
@click.option("--out", required=True, type=_FILE, help="File of scores to write, JSON Lines.")
@_ray
@_common
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
    config = _configuration(config_path, assignments)
    _require_readable(logs)
    from iterative_ppo import commands

    with _progress() as progress:
        result = commands.run_score(config, logs, q_function, out, ray=ray, progress=progress, console=_stdout())
    _finish(result, as_json)


@cli.command()
@_logs
@_policy
@click.option("--out", type=_FILE, help="Folder for the Q-function fitted to all conversations.")
@click.option("--folds", type=click.IntRange(0), default=0, show_default=True, help="Report on Q by cross-validation.")
@_group
@_bad_lines
@_common
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
    config = _configuration(config_path, assignments)
    if out is None and not folds:
        raise ConfigError("fit: give --out for a Q-function, --folds for a report on what Q can tell, or both")
    if folds == 1:
        raise ConfigError("--folds: must be 0 or at least 2")
    _require_readable(logs)
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_fit(
            config,
            logs,
            policy,
            out,
            num_folds=folds,
            group=group,
            bad_lines=bad_lines,
            progress=progress,
            console=_stdout(),
        )
    _finish(result, as_json)


@cli.command()
@_logs
@_policy
@click.option("--q", "q_function", required=True, type=_FILE, help="Folder of a Q-function.")
@click.option("--out", required=True, type=_FILE, help="Folder for the candidate.")
@_bad_lines
@_common
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
    config = _configuration(config_path, assignments)
    _require_readable(logs)
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_improve(
            config, logs, policy, str(q_function), out, bad_lines=bad_lines, progress=progress, console=_stdout()
        )
    _finish(result, as_json)


@cli.command()
@click.argument("stack", type=click.Choice(["verl", "openrlhf", "trl"]))
@click.argument("run", type=_FILE, metavar="RUN")
@click.option("--out", required=True, type=_FILE, help="Folder for the export.")
@_json
def export(stack: Literal["verl", "openrlhf", "trl"], run: Path, out: Path, as_json: bool) -> None:
    """Write a run's next improvement step as a folder from which another RLHF stack makes it."""
    from iterative_ppo import commands

    _finish(commands.run_export(stack, run, out, console=_stdout()), as_json)


@cli.command(name="import")
@click.argument("run", type=_FILE, metavar="RUN")
@click.option("--policy", required=True, type=_FILE, help="Folder of the policy that the other stack trained.")
@_json
def import_(run: Path, policy: Path, as_json: bool) -> None:
    """Take a policy that another RLHF stack trained into its run, as the candidate of the iteration."""
    from iterative_ppo import commands

    _finish(commands.run_import(run, policy, console=_stdout()), as_json)


@cli.command()
@click.argument("folder", type=_FILE, metavar="FOLDER")
@click.option("--out", required=True, type=_FILE, help="Folder for the plain model.")
@_common
def merge(folder: Path, out: Path, config_path: Path | None, assignments: Sequence[str], as_json: bool) -> None:
    """Write the adapter of a policy or a Q-function and its base model as one plain model."""
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands

    _finish(commands.run_merge(config, folder, out, console=_stdout()), as_json)


@cli.command()
@_policy
@click.option("--against", help="Another policy, compared on the same customers.")
@_common
def evaluate(
    policy: str, against: str | None, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Measure a policy's true outcome in the environment (evaluation.conversations of them)."""
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands, distributed

    with distributed.processes(), _progress() as progress:
        result = commands.run_evaluate(config, policy, against, progress=progress, console=_stdout())
    _finish(result, as_json)


@cli.command()
@_policy
@click.option("--q", "q_function", required=True, type=_FILE, help="Folder of a Q-function.")
@click.option(
    "--states", type=click.IntRange(1), default=64, show_default=True, help="Conversations to take a state from."
)
@click.option("--responses", type=click.IntRange(2), default=6, show_default=True, help="Responses to rank in each.")
@click.option("--rollouts", type=click.IntRange(2), default=32, show_default=True, help="Rollouts of each response.")
@_common
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
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands

    with _progress() as progress:
        result = commands.run_rank(
            config,
            policy,
            str(q_function),
            num_states=states,
            num_responses=responses,
            num_rollouts=rollouts,
            progress=progress,
            console=_stdout(),
        )
    _finish(result, as_json)


@cli.command()
@click.option(
    "--backend",
    default="native",
    show_default=True,
    metavar="native|trl|URL|package.module:function",
    help="The improvement step to check: ours, TRL's, a service (docs/backends.md), or a function (`iterative_ppo.conformance.Backend`).",
)
@_common
def conformance(backend: str, config_path: Path | None, assignments: Sequence[str], as_json: bool) -> None:
    """Check an improvement step against problems whose best policy is known. Exit code 1 where it fails."""
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands

    with _progress() as progress:
        result = commands.run_conformance(config, backend, progress=progress, console=_stdout())
    _finish(result, as_json)
    if not result["passed"]:
        sys.exit(_EXIT_FAILED)


@cli.command()
@_policy
@click.option("--q", "q_function", type=_FILE, help="Folder of a Q-function; shows Q of each reply.")
@click.option("--system", help="System message.")
@_config_file
@_settings
def chat(
    policy: str, q_function: Path | None, system: str | None, config_path: Path | None, assignments: Sequence[str]
) -> None:
    """Talk to a policy, as the customer. An empty line ends the talk."""
    config = _configuration(config_path, assignments)
    from iterative_ppo import commands

    def ask() -> str | None:
        try:
            return input("you: ").strip() or None
        except EOFError:
            return None

    q_source = str(q_function) if q_function else None
    commands.run_chat(config, policy, q_source, system, ask=ask, console=_stdout())


@cli.command()
@click.argument("run", type=_FILE, metavar="RUN")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: one that is free.")
@_common
def serve_q(
    run: Path, host: str, port: int, config_path: Path | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Serve a Q-function over HTTP as a reward model.

    RUN is a run's folder (its newest Q-function), a stage's, or a Q-function's own. Settings are those of the run.
    With the environment variable IPPO_API_KEY, requests need it as their bearer token.
    """
    _require_installed("serve-q", "serve", "fastapi", "uvicorn", "prometheus_client")
    from iterative_ppo import q_folder

    folder = q_folder.find_q_function(run)
    tables = config_module.load(config_path) if config_path else q_folder.settings_beside(run, folder)
    config = _configured(tables, assignments)
    _say_start()
    from iterative_ppo import commands

    _finish(commands.run_serve_q(config, folder, host=host, port=port, console=_stdout()), as_json)


@cli.command(name="config")
@click.argument("config_path", required=False, type=_FILE, metavar="[CONFIG.toml]")
@_settings
def show_config(config_path: Path | None, assignments: Sequence[str]) -> None:
    """Print every setting with its documentation, as a TOML file."""
    click.echo(config_module.to_toml(_configuration(config_path, assignments), documented=True), nl=False)


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    if _num_processes() > 1:
        signal.signal(signal.SIGTERM, _end_with_the_others)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _let_the_first_speak()
        error.show()
        sys.exit(_EXIT_USER_MISTAKE)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted; finished stages are kept", _EXIT_INTERRUPTED)
    except (ValueError, OSError, SafetensorError) as error:  # the last: weights that cannot be read or written
        _fail(str(error), _EXIT_USER_MISTAKE)
    except (RuntimeError, MemoryError) as error:
        _fail(f"{type(error).__name__}: {error}", _EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    _let_the_first_speak()
    who = "" if _is_main() else f"process {os.environ['RANK']}: "
    click.echo(f"ippo: {who}" + " ".join(message.split()), err=True)
    sys.exit(code)


def _let_the_first_speak() -> None:
    """A mistake that all processes find is said once: when the first on a machine ends, `torchrun` ends the others."""
    if _num_processes() > 1:
        if _local_rank() != "0":
            time.sleep(_SECONDS_TO_BE_ENDED)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_the_others(_signal: int, _frame: FrameType | None) -> None:
    """`torchrun` ends all processes when one has ended badly."""
    if _local_rank() == "0":
        said = "ippo: another process of this job has ended; finished stages are kept, and --resume goes on with them\n"
        os.write(sys.stderr.fileno(), said.encode())  # no buffer, which may be in the middle of a line
    os._exit(_EXIT_FAILED)  # whatever a library is waiting for


def _configuration(path: Path | None, assignments: Sequence[str]) -> Config:
    return _configured(config_module.load(path) if path else {}, assignments)


def _configured(tables: Mapping[str, Any], assignments: Sequence[str]) -> Config:
    for assignment in assignments:
        tables = config_module.with_setting(tables, assignment)
    return config_module.from_dict(tables)


def _require_installed(command: str, extra: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f'{command}: {module} is not installed: pip install -c constraints.txt -e ".[{extra}]"')


def _require_readable(logs: Path) -> None:
    """Fails on a missing log before anything slow is loaded."""
    with logs.open("rb"):
        pass


def _stdout() -> Console:
    return Console(soft_wrap=True, quiet=not _is_main())


def _say_start() -> None:
    if _is_main():
        click.echo("loading libraries ...", err=True)


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json and _is_main():
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


def _num_processes() -> int:
    """How many processes `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _local_rank() -> str:
    """Which of its machine's processes this is."""
    return os.environ.get("LOCAL_RANK", "0")


def _is_main() -> bool:
    return _num_processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal's error stream; where that is no terminal, nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=not _is_main())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal) as bar:
        task = bar.add_task("start", total=None)
        kind = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal kind
            if what.partition(" (")[0] != kind:
                kind = what.partition(" (")[0]
                bar.reset(task, description=what, total=total)
            bar.update(task, description=what, completed=done, total=total)

        yield show


if __name__ == "__main__":
    main()
