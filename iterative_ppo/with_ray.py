"""Ray for what is embarrassingly parallel: collecting conversations, and Q at every decision point of a log.

Both are cut into the parts that one process would compute one after the other. A worker computes a part from its place
alone, and the parts come back in order: where arithmetic rounds alike, so do the bytes. Where a worker dies, Ray computes
its part again.
"""

import functools
import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
import ray.data
import torch
from ray.exceptions import RayError, RayTaskError

from iterative_ppo.config import Config, EnvironmentConfig
from iterative_ppo.conversation_log import read_part
from iterative_ppo.conversations import Conversation
from iterative_ppo.environments import TextEnvironment, make_environment
from iterative_ppo.environments.rollout import RolloutStatistics, play
from iterative_ppo.loading import load_policy
from iterative_ppo.log_scores import LogScorer, PointScore, pieces, whole
from iterative_ppo.policy import Policy
from iterative_ppo.supervised import Progress, no_progress

_LOCAL = "local"
_NUM_RETRIES = 3
_MOST_SPANS = 10_000
_CONNECT_SECONDS = 5.0
_TOKEN_HINT = " (where it asks for a token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token)"
_TABLE = pyarrow.schema(
    [
        ("conversation_id", pyarrow.string()),
        ("turn", pyarrow.int64()),
        ("q_value", pyarrow.float64()),
        ("state_value", pyarrow.float64()),
        ("reward", pyarrow.float64()),
        ("stop", pyarrow.int64()),
    ]
)
"""Scores on their way back, with the byte of the log up to which they go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """How many workers there are, and what each has to itself beside one processor core.

    Example:
        _Pool(num_workers=2, num_gpus=0)
    """

    num_workers: int
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Conversations that ran together.

    Example:
        _Block(conversations=(Conversation(id="p-000000", ...),), statistics=RolloutStatistics(num_turns=8))
    """

    conversations: tuple[Conversation, ...]
    statistics: RolloutStatistics


def collect(
    config: Config,
    policy_source: str,
    *,
    address: str,
    name: str,
    statistics: RolloutStatistics,
    progress: Progress = no_progress,
) -> Iterator[Conversation]:
    """Yields what `environments.rollout.collect` does: `iterations.conversations` of a policy, in order.

    Args:
        policy_source: a hub id, or a folder that every worker can read.
        address: `local` starts Ray on this machine; else that of a cluster, `auto` or HOST:PORT, whose workers get a copy of
            the current folder if the environment is the user's own.

    Raises:
        ValueError: there is no such cluster, or what a worker raised.
        RuntimeError: a block was the end of four workers.
    """
    num_conversations, lockstep = config.iterations.conversations, config.compute.rollout_conversations
    todo = [range(start, min(start + lockstep, num_conversations)) for start in range(0, num_conversations, lockstep)]
    folder = str(Path.cwd()) if address == _LOCAL else None
    with _connected(address, takes_folder=_needs_folder(config.environment)):
        pool = _pool(config, len(todo))
        player = ray.remote(_Player).options(
            num_cpus=1, num_gpus=pool.num_gpus, max_restarts=-1, max_task_retries=_NUM_RETRIES
        )
        source = _absolute(policy_source)
        workers = [player.remote(config, source, name, folder) for _ in range(pool.num_workers)]
        num_done = 0
        try:
            for block in _in_order(workers, todo):
                statistics.add(block.statistics)
                num_done += len(block.conversations)
                progress(f"collect {name}", num_done, config.iterations.conversations)
                yield from block.conversations
        finally:
            for worker in workers:
                ray.kill(worker)


def score(
    config: Config, q_folder: Path, log: Path, *, address: str, progress: Progress = no_progress
) -> Iterator[PointScore]:
    """Yields what `log_scores.score_log` does: the decision points of a log, in its order.

    Args:
        q_folder, log: on storage that every worker can read.
        address: as in `collect`; the current folder is not copied.

    Ray Data computes a part again as often as a worker dies over it, and says so on the terminal's error stream.

    Raises:
        ValueError: there is no such cluster, or what a worker raised.
    """
    spans = _spans(whole(log))
    if not spans:
        return
    with _connected(address, takes_folder=False):
        pool = _pool(config, len(spans))
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        rows = [{"start": span.start, "stop": span.stop} for span in spans]
        scores = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _SpanScorer,
            fn_constructor_args=(config, str(q_folder.resolve()), str(log.resolve())),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=pool.num_workers),
            num_cpus=1,
            num_gpus=pool.num_gpus,
        )
        with _as_raised():
            for table in scores.iter_batches(batch_size=None, batch_format="pyarrow"):
                if table.num_rows > 0:
                    progress("score", table["stop"][-1].as_py(), spans[-1].stop)
                yield from (PointScore(**row) for row in table.drop_columns("stop").to_pylist())


class _Player:
    """Plays blocks of conversations; a process of its own."""

    def __init__(self, config: Config, policy_source: str, name: str, folder: str | None) -> None:
        torch.set_num_threads(1)
        if folder is not None:
            os.chdir(folder)
        self.config = config
        self.policy_source = policy_source
        self.name = name
        self.environments: list[TextEnvironment] = []

    @functools.cached_property
    def policy(self) -> Policy:
        """Loaded with the first block: what a block raises comes to the caller as it is, what a constructor raises does not."""
        return load_policy(self.config, self.policy_source)

    def play(self, indices: range) -> _Block:
        """The conversations with these indices, in lock-step."""
        environment = self.config.environment
        while len(self.environments) < len(indices):
            self.environments.append(make_environment(environment.entry_point, environment.arguments))
        statistics = RolloutStatistics()
        conversations = play(
            self.policy,
            self.environments,
            indices,
            name=self.name,
            seed=self.config.seed,
            max_turns=self.config.environment.max_turns,
            statistics=statistics,
        )
        return _Block(conversations=tuple(conversations), statistics=statistics)


class _SpanScorer:
    """Scores ranges of a log's bytes; a process of its own."""

    def __init__(self, config: Config, q_folder: str, log: str) -> None:
        torch.set_num_threads(1)
        self.config = config
        self.q_folder = q_folder
        self.log = Path(log)

    @functools.cached_property
    def scorer(self) -> LogScorer:
        """Loaded with the first range, for the same reason."""
        return LogScorer.load(self.q_folder, self.config)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pyarrow.Table]:
        """The scores of one range, a table a piece."""
        [start], [stop] = batch["start"].tolist(), batch["stop"].tolist()
        for piece in pieces(range(start, stop)):
            scores = self.scorer.score(read_part(self.log, piece))
            yield pyarrow.Table.from_pylist([asdict(score) | {"stop": piece.stop} for score in scores], schema=_TABLE)


def _in_order(workers: Sequence[Any], todo: Sequence[range]) -> Iterator[_Block]:
    """The blocks as they were asked for; at most two for each worker are under way or waiting for an earlier one."""
    waiting: deque[Any] = deque()
    worker_of: dict[Any, Any] = {}
    idle = list(workers)
    rest = deque(todo)
    while rest or waiting:
        while idle and rest and len(waiting) < 2 * len(workers):
            worker = idle.pop()
            block = worker.play.remote(rest.popleft())
            waiting.append(block)
            worker_of[block] = worker
        if waiting[0] in worker_of:
            for block in ray.wait(list(worker_of))[0]:
                idle.append(worker_of.pop(block))
        else:
            with _as_raised():
                played = ray.get(waiting.popleft())
            yield played


@contextmanager
def _as_raised() -> Iterator[None]:
    """Raises what a worker raised, in the place of Ray's report of it."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"workers died over one part of the work: {reason}") from error


def _needs_folder(environment: EnvironmentConfig) -> bool:
    """Whether a module of the user's is named, in an argument perhaps, as `suggested_response` takes one."""
    return any(":" in str(value) for value in (environment.entry_point, *environment.arguments.values()))


def _spans(log: range) -> list[range]:
    """A log's bytes in ranges of whole pieces, `_MOST_SPANS` at most."""
    parts = pieces(log)
    size = -(-len(parts) // _MOST_SPANS)
    return [range(parts[i].start, parts[min(i + size, len(parts)) - 1].stop) for i in range(0, len(parts), size)]


def _pool(config: Config, num_parts: int) -> _Pool:
    """A worker for each GPU, and where there is none for each processor core; no more than there are parts."""
    device = config.compute.device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"compute.device: {device!r} with --ray: give auto, cpu or cuda, each worker has its own GPU")
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    if device == "cuda" and num_gpus == 0:
        raise ValueError("compute.device: 'cuda', but Ray knows of no GPU")
    uses_gpus = num_gpus > 0 and device != "cpu"
    available = num_gpus if uses_gpus else max(1, int(resources.get("CPU", 1)))
    return _Pool(num_workers=min(available, num_parts), num_gpus=int(uses_gpus))


@contextmanager
def _connected(address: str, *, takes_folder: bool) -> Iterator[None]:
    """Ray while it is used; one that this process has already started is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == _LOCAL:
        ray.init(_LOCAL, include_dashboard=False, **options)
    else:
        if takes_folder:
            options["runtime_env"] = {"working_dir": str(Path.cwd()), "excludes": ["/runs"]}
        _join(address, options)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    """Connects to a cluster, or says in one line, within a minute, why not."""
    if address != "auto":
        _require_listener(address)
    # Tries, of some forty seconds each; by default there are twenty.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        hint = _TOKEN_HINT if isinstance(error, OSError) and address != "auto" else ""
        raise ValueError(f"--ray {address}: {reason}{hint}") from error


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"--ray {address}: must be local, auto or HOST:PORT, of a cluster of which this machine is a node"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(f"--ray {address}: no Ray cluster answers there: {error}") from error


def _absolute(source: str) -> str:
    """A folder by its whole path, since a worker is started elsewhere; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source
