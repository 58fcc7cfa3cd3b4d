"""Ray, on this machine with two processors: the same conversations and the same scores as one process, to the byte."""

import importlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_log_scores import q_function_of, talks
from tiny import policy_config, word_policy

from iterative_ppo import __main__, log_scores
from iterative_ppo.config import ComputeConfig, Config, EnvironmentConfig, IterationsConfig, to_toml
from iterative_ppo.conversation_log import conversation_to_dict, write_conversations
from iterative_ppo.environments import make_environment
from iterative_ppo.environments.rollout import EnvironmentFailure, RolloutStatistics, collect
from iterative_ppo.log_scores import LogScorer, score_log
from iterative_ppo.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
LOCKSTEP = 4
GAME = '''
import os
import pathlib
import time

import gymnasium


class Game(gymnasium.Env):
    """Two to five turns; what is said and paid depends on chance and on the response."""

    def __init__(self, once=""):
        self.once = once

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_turns = int(self.np_random.integers(2, 6))
        return f"customer {self.np_random.integers(1000)}", {"system": "you play"}

    def step(self, action):
        self.num_turns -= 1
        self.happen()
        reward = round(float(self.np_random.normal()) + len(action) / 10, 3)
        return f"word {self.np_random.integers(100)}", reward, self.num_turns == 0, False, {}

    def happen(self):
        pass


class Mortal(Game):
    """Takes its worker with it, once: whoever makes the file `once` is the one."""

    def happen(self):
        try:
            pathlib.Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return
        os._exit(1)


class Doomed(Game):
    """Always."""

    def happen(self):
        os._exit(1)


class Broken(Game):
    def happen(self):
        raise ZeroDivisionError("the shop\\\\nis closed")
'''


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where Ray listens."""
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install -c constraints.txt -e ".[ray]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray leaves one in the home folder
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)  # Ray's own doing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, its Q-function, a game in a module, a log."""
    folder = tmp_path_factory.mktemp("work")
    policy = word_policy(max_response_tokens=6)
    policy.save(folder / "policy")
    q_function_of(policy, folder / "q")
    (folder / "ray_game.py").write_text(GAME, encoding="utf-8")
    write_conversations(folder / "log.jsonl", talks())
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def configuration(game: str, *, num_conversations: int = 22, **arguments: object) -> Config:
    return Config(
        seed=3,
        environment=EnvironmentConfig(entry_point=f"ray_game:{game}", arguments=arguments, max_turns=4),
        policy=policy_config(max_response_tokens=6),
        iterations=IterationsConfig(conversations=num_conversations),
        compute=ComputeConfig(rollout_conversations=LOCKSTEP),
    )


def settings(config: Config, folder: Path) -> list[str]:
    """The same as options of `ippo`."""
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return ["--config", str(folder / "config.toml")]


def in_one_process(config: Config, statistics: RolloutStatistics) -> list[dict[str, Any]]:
    conversations = collect(
        Policy.load("policy", config.policy),
        lambda: make_environment(config.environment.entry_point, config.environment.arguments),
        num_conversations=config.iterations.conversations,
        seed=config.seed,
        max_turns=config.environment.max_turns,
        lockstep=LOCKSTEP,
        name="p",
        statistics=statistics,
    )
    return [conversation_to_dict(conversation) for conversation in conversations]


def with_ray(config: Config, address: str, statistics: RolloutStatistics | None = None) -> list[dict[str, Any]]:
    from iterative_ppo import with_ray

    conversations = with_ray.collect(
        config, "policy", address=address, name="p", statistics=statistics or RolloutStatistics()
    )
    return [conversation_to_dict(conversation) for conversation in conversations]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user's mistake, of `ippo` in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ippo", *arguments])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, lines
    assert len(lines) == 1
    return lines[0]


# ---- collect ----


@pytest.mark.usefixtures("address")
def test_a_worker_that_dies_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """With Mortal: the log, to the last digit, and its counts are those of one process."""
    config = configuration("Mortal", once=str(tmp_path / "died"))
    statistics, expected = RolloutStatistics(), RolloutStatistics()
    conversations = with_ray(config, "local", statistics)
    assert (tmp_path / "died").exists()
    assert conversations == in_one_process(config, expected)
    assert statistics == expected
    assert [c["id"] for c in conversations] == [f"p-{i:06d}" for i in range(22)]


@pytest.mark.usefixtures("address")
def test_what_an_environment_raises_comes_back_as_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration("Broken", num_conversations=LOCKSTEP)
    with pytest.raises(EnvironmentFailure) as expected:
        in_one_process(config, RolloutStatistics())
    command = ["collect", "--policy", "policy", "--out", "new.jsonl", "--ray", "local", *settings(config, tmp_path)]
    said = complaint(capsys, *command)
    wanted = str(expected.value).replace("conversation p-", "conversation policy-").replace("\n", " ")
    assert said == f"ippo: {wanted}"
    assert not Path("new.jsonl").exists()


@pytest.mark.usefixtures("address")
def test_a_block_that_kills_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from iterative_ppo import with_ray as module

    monkeypatch.setattr(module, "_NUM_RETRIES", 0)
    with pytest.raises(RuntimeError, match="workers died over one part of the work"):
        with_ray(configuration("Doomed", num_conversations=LOCKSTEP), "local")


def test_a_cluster_gets_the_current_folder(address: str, folder: Path, tmp_path: Path) -> None:
    """Another process joins by the address; the workers find ray_game.py in their copy of the folder."""
    config = configuration("Game", num_conversations=LOCKSTEP)
    out = tmp_path / "new.jsonl"
    command = [
        "collect",
        "--policy",
        "policy",
        "--out",
        str(out),
        "--ray",
        address,
        "--json",
        *settings(config, tmp_path),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "iterative_ppo", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    statistics = RolloutStatistics()
    expected = in_one_process(config, statistics)
    for record in expected:
        record.update(id=record["id"].replace("p-", "policy-"), policy="policy")
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected
    assert json.loads(result.stdout.splitlines()[-1])["statistics"]["num_turns"] == statistics.num_turns


# ---- score ----


@pytest.mark.usefixtures("address")
def test_scores_are_those_of_one_process_though_a_worker_dies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iterative_ppo import with_ray

    config = Config(policy=policy_config())
    log = tmp_path / "log.jsonl"
    write_conversations(log, [replace(talk, id=f"{talk.id} {i}") for i in range(60) for talk in talks()])
    monkeypatch.setattr(log_scores, "_PIECE_BYTES", 2_000)
    expected = list(score_log(LogScorer.load(folder / "q", config), log))
    done: list[int] = []

    def kill_a_worker(_: str, byte: int, __: int) -> None:
        if not done:
            children = psutil.Process().children(recursive=True)
            next(child for child in children if "MapWorker" in " ".join(child.cmdline())).kill()
        done.append(byte)

    scores = list(with_ray.score(config, Path("q"), log, address="local", progress=kill_a_worker))
    assert scores == expected
    assert len(done) > 20
    assert done == sorted(done)


@pytest.mark.usefixtures("address")
def test_a_bad_line_is_named_as_in_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes((folder / "log.jsonl").read_bytes() + b"{broken\n")
    command = ["score", "--logs", str(log), "--q", "q", "--out", str(tmp_path / "scores.jsonl")]
    alone = complaint(capsys, *command)
    assert f"log.jsonl:{len(talks()) + 1}: not valid JSON" in alone
    assert complaint(capsys, *command, "--ray", "local") == alone
    assert not (tmp_path / "scores.jsonl").exists()


# ---- no cluster ----


@pytest.mark.parametrize(
    "address", ["nowhere", "ray://127.0.0.1:10001", "127.0.0.1:70000", "closed", "name.invalid:6379"]
)
def test_an_address_without_a_cluster_is_one_line_within_seconds(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from iterative_ppo import with_ray

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free_port = listener.getsockname()[1]
    wanted = f"127.0.0.1:{free_port}" if address == "closed" else address
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"--ray {wanted}: (must be local|no Ray cluster answers)") as error:
        with_ray._join(wanted, {})
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 10


def test_one_module_imports_ray() -> None:
    """An outside library's backend is one file."""
    package = Path(importlib.import_module("iterative_ppo").__file__ or "").parent
    importing = [path.name for path in package.rglob("*.py") if "import ray" in path.read_text(encoding="utf-8")]
    assert importing == ["with_ray.py"]
