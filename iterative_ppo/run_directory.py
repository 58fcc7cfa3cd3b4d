"""A run on disk: one folder an iteration, one folder a stage, each written beside and renamed into place when whole.

A stage folder that exists is complete; one that was being written when the process died carries another name and is
thrown away. That is all that `--resume` needs.

Of several processes the main one writes, and the others go on once it is there: all must see the same folder.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iterative_ppo import config as config_module
from iterative_ppo import distributed
from iterative_ppo.config import Config, ConfigError
from iterative_ppo.conversation_log import write_conversations
from iterative_ppo.conversations import Conversation

SCHEMA = 1
_SECONDS_TO_BE_SEEN = 60.0
_LIBRARIES = ("iterative-ppo", "torch", "transformers", "numpy", "gymnasium")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A finished stage.

    Example:
        Stage(folder=Path("runs/a/iteration-001/fit"), metrics={"passes": 6}, seconds=21.4)
    """

    folder: Path
    metrics: dict[str, Any]
    seconds: float


class RunDirectory:
    """A run's folder. Opening one checks that it belongs to the configuration.

    Args:
        path: the folder; made if it does not exist.
        config: the run's configuration; written to `config.toml`.
        resume: whether stages that are there may be used.

    Raises:
        ConfigError: the folder holds something and `resume` is off, or holds a run of another configuration.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool) -> None:
        self.path = path
        self.config = config
        distributed.on_main(lambda: self._open(resume=resume))

    def _open(self, *, resume: bool) -> None:
        config_file = self.path / "config.toml"
        if config_file.exists() and resume:
            _require_same(config_module.from_dict(config_module.load(config_file)), self.config, self.path)
        elif self.path.exists() and not _is_blank(self.path):
            hint = "add --resume to go on with it, or " if config_file.exists() else ""
            raise ConfigError(f"{self.path}: the folder is not empty; {hint}choose another with --out")
        text = config_module.to_toml(self.config)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(config_file, text)

    def stage(
        self,
        name: str,
        *,
        seed: int,
        parents: Mapping[str, Path],
        make: Callable[[Path], Mapping[str, Any]],
    ) -> Stage:
        """Does a stage, or finds it done.

        Args:
            name: folder below the run's, as `iteration-001/fit`.
            seed: the stage's seed, for the manifest.
            parents: what the stage reads, by role.
            make: writes the stage's files into the folder it is given and returns its metrics. Every process calls it.
        """
        folder = self.path / name
        manifest = folder / "manifest.json"
        if not distributed.from_main(manifest.exists()):
            partial = folder.with_name(f".{folder.name}.partial")
            distributed.on_main(lambda: _make_anew(partial))
            started = time.perf_counter()
            metrics = to_json(make(partial))
            seconds = time.perf_counter() - started
            distributed.wait_for_all()  # one of them may still read what the main process is about to rename
            distributed.on_main(lambda: self._finish(partial, name, seed, parents, metrics, seconds))
        wait_for(manifest)
        done = json.loads(manifest.read_text(encoding="utf-8"))
        return Stage(folder=folder, metrics=done["metrics"], seconds=done["seconds"])

    def _finish(
        self,
        partial: Path,
        name: str,
        seed: int,
        parents: Mapping[str, Path],
        metrics: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Writes the manifest of a stage that is made, and gives its folder the name by which it is found."""
        folder = self.path / name
        write_json(
            partial / "manifest.json",
            {
                "schema": SCHEMA,
                "stage": name,
                "seed": seed,
                "parents": {role: os.path.relpath(parent, self.path) for role, parent in parents.items()},
                "metrics": metrics,
                "seconds": seconds,
                "versions": library_versions(),
                "git_commit": git_commit(),
                "config": to_json(config_module.to_dict(self.config)),
            },
        )
        for file in partial.rglob("*"):
            _sync(file)
        partial.rename(folder)
        _sync(folder.parent)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def wait_for(path: Path) -> None:
    """Waits until a file that the main process has written is there for this one too.

    Raises:
        ConfigError: it does not come, since the processes do not share the folder.
    """
    deadline = time.monotonic() + _SECONDS_TO_BE_SEEN
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{path}: written by the main process and not seen by process {distributed.rank()}: "
                "--out must be on a file system that all machines share"
            )
        time.sleep(0.1)


def write_log(path: Path, conversations: Iterable[Conversation]) -> None:
    """Writes a log. Every process takes part in making the conversations, and can read the log afterwards."""
    if distributed.is_main():
        write_conversations(path, conversations)
    else:
        collections.deque(conversations, maxlen=0)
    distributed.from_main(None)
    wait_for(path)


def _is_blank(path: Path) -> bool:
    """Whether a folder holds nothing but a run whose first stage never came to an end."""
    ours = {"config.toml", ".config.toml.partial"}
    unfinished = {".start.partial"}
    return all(
        file.name in ours or (file.is_dir() and {inner.name for inner in file.iterdir()} <= unfinished)
        for file in path.iterdir()
    )


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON values; NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    match value:
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case Path():
            return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all; of several processes the main one does."""
    write_text(path, json.dumps(to_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; of several processes the main one does."""
    if not distributed.is_main():
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this package is run from; None where it is not one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    is_ours = (here.parent / ".git").exists()
    return result.stdout.strip() if result.returncode == 0 and is_ours else None


def _require_same(known: Config, wanted: Config, path: Path) -> None:
    """The same settings, but for how many iterations: a run may be continued for longer."""
    flat_known, flat_wanted = _flat(known), _flat(wanted)
    for name, value in flat_known.items():
        if name != "iterations.count" and flat_wanted[name] != value:
            raise ConfigError(
                f"{path}: is a run with {name} = {value!r}, not {flat_wanted[name]!r}; choose another --out"
            )


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config_module.to_dict(config).items():
        if name in config_module.SECTIONS:
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
