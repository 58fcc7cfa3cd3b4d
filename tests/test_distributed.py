"""Two processes are one: the same losses, weights and conversations, one writer, and an end that can be gone on from."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_worker
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_cli import Finished, run, sets, shop
from test_resume import assert_same_results
from torch.distributed.run import get_args_parser

from iterative_ppo import distributed
from iterative_ppo import policy as policy_module
from iterative_ppo.policy import Policy

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
Results = dict[str, Any]


def start_two(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Starts two processes that work together, in a group of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str], *, timeout: float = 120) -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(code=process.returncode, stdout=stdout, stderr=stderr)


def run_two(*arguments: object, folder: Path) -> Finished:
    return end_of(start_two(*arguments, folder=folder))


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy's folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny.letter_policy().save(folder)
    return folder


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two processes ended with."""
    out = tmp_path_factory.mktemp("two")
    finished = run_two(distributed_worker.__file__, model, out, folder=out)
    assert finished.code == 0, finished.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=False) | {"out": out} for rank in (0, 1)]


def largest_differences(a: Any, b: Any) -> dict[str, float]:
    return {
        name: tiny.largest_difference(a[name], b[name])
        if isinstance(a[name], dict)
        else float(np.abs(np.subtract(a[name], b[name])).max())
        for name in a
        if not isinstance(a[name], str)
    }


def test_there_really_are_two(two: list[Results]) -> None:
    """A launcher that starts one process without a word (as some do on a machine without GPUs) would pass all else."""
    assert [results["world_size"] for results in two] == [2, 2]


@pytest.mark.parametrize(
    "case", ["fit", "squared_error_fit", "read_out_fit", "ppo", "grpo", "sharded_fit", "sharded_ppo", "sharded_grpo"]
)
def test_two_processes_end_with_the_numbers_of_one(case: str, model: Path, two: list[Results]) -> None:
    one = distributed_worker.CASES[case](model)
    differences = largest_differences(one, two[0][case])
    assert max(differences.values()) < TOLERANCE, differences


def test_both_processes_have_the_same_weights_to_the_last_bit(two: list[Results]) -> None:
    for case in (
        "fit",
        "squared_error_fit",
        "read_out_fit",
        "ppo",
        "grpo",
        "sharded_fit",
        "sharded_ppo",
        "sharded_grpo",
    ):
        first, second = (results[case]["weights"] for results in two)
        assert tiny.largest_difference(first, second) == 0, case


def without_logprobs(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record | {"messages": [{**message, "logprob": None} for message in record["messages"]]} for record in log]


def logprobs_of(log: list[dict[str, Any]]) -> list[float]:
    return [message["logprob"] for record in log for message in record["messages"] if "logprob" in message]


def test_rollouts_give_the_log_of_one_process(model: Path, two: list[Results]) -> None:
    """The same words and rewards; a log-probability is rounded as its batch has it, unless the batches are the same."""
    one = distributed_worker.rollouts(model)
    for both in [results[case] for results in two for case in ("rollouts", "sharded_rollouts")]:
        assert without_logprobs(both["log"]) == without_logprobs(one["log"])
        assert logprobs_of(both["log"]) == pytest.approx(logprobs_of(one["log"]), abs=TOLERANCE)
        assert both["scripted"] == one["scripted"]
        assert both["num_turns"] == one["num_turns"]
    first_batches = [two[0]["rollouts"]["log"][:12], one["log"][:12]]
    assert first_batches[0] == first_batches[1], "3 at a time in each process are the batches of one process"


def test_each_process_plays_its_part(two: list[Results]) -> None:
    """13 conversations, 3 at a time: 6, 6 and 1 in both; the first has 3, 3 and none, the second 3, 3 and the last."""
    assert [results["rollouts"]["own_resets"] for results in two] == [6, 7]


def test_a_stage_is_not_renamed_while_a_process_still_reads_it(two: list[Results]) -> None:
    assert [results["late_reader"] for results in two] == ["read in time"] * 2


def figures_of(result: Any, name: str = "") -> dict[str, float]:
    """All numbers of a result by where they stand, but for those that depend on the clock or on the batches."""
    if name.rpartition(".")[2] in ("seconds", "num_encoded_tokens"):
        return {}
    if isinstance(result, dict):
        return {key: x for k, item in result.items() for key, x in figures_of(item, f"{name}.{k}").items()}
    if isinstance(result, list):
        return {key: x for i, item in enumerate(result) for key, x in figures_of(item, f"{name}.{i}").items()}
    return {name: result} if isinstance(result, (int, float)) else {}


def test_the_commands_hand_back_the_figures_of_one_process(model: Path, two: list[Results], tmp_path: Path) -> None:
    one = figures_of(distributed_worker.commands_of(model, tmp_path))
    assert len(one) > 100
    for results in two:
        both = figures_of(results["commands"])
        assert both.keys() == one.keys()
        assert [name for name in one if both[name] != pytest.approx(one[name], abs=1e-4, rel=1e-4)] == []


def test_each_process_keeps_half_of_a_sharded_model_and_the_whole_is_saved(model: Path, two: list[Results]) -> None:
    for results in two:
        assert results["saved"]["share"] == pytest.approx([0.5] * 4, abs=0.01), "policy, Q, loaded Q, branch"
        assert tiny.largest_difference(results["saved"]["q_weights"], results["saved"]["q_weights_again"]) == 0
    kept = load_file(two[0]["out"] / "policy/model.safetensors")
    assert tiny.largest_difference(kept, load_file(model / "model.safetensors")) == 0
    config = json.loads((two[0]["out"] / "policy/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_adapters_are_not_sharded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "_SMALLEST_FOR_ADAPTERS", 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"compute\.shard_weights: .*policy\.lora_rank = 0"):
        Policy.load(model, tiny.policy_config(), shard_weights=True)


# --- dealing out --------------------------------------------------------------------------------------------


def test_a_process_by_itself_has_all_of_everything() -> None:
    assert distributed.share_of([3, 1, 2]) == [0, 1, 2]
    assert distributed.part_of(range(4, 9)) == range(4, 9)
    assert distributed.sums(1, 2.5) == [1, 2.5]
    assert distributed.gathered({1: "a"}) == {1: "a"}
    assert distributed.on_main(lambda: "written") == "written"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_shares_cost_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dealt from the dearest there and back: 9 8 7 to the first, second, third, then 5 4 3 from the third on, 1 to the first."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    costs = [1, 9, 4, 7, 3, 8, 5]
    assert [[costs[i] for i in share] for share in distributed.shares(costs)] == [[1, 9, 3], [4, 8], [7, 5]]
    assert distributed.shares([1]) == [[0], [], []]


def test_parts_are_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(distributed.part_of(range(10, 17))))
    assert parts == [[10, 11], [12, 13], [14, 15, 16]]


# --- the loop -----------------------------------------------------------------------------------------------

SETTINGS = sets(environment__entry_point="shop:Shop", iterations__conversations=64, evaluation__conversations=64)
WATCHED = """
import json, os, sys
written = []

def watch(event, arguments):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if changes or opened:
        path = os.path.abspath(os.fspath(arguments[0])) if not isinstance(arguments[0], int) else ""
        if path.startswith(os.path.abspath("run")):
            written.append(path)

sys.addaudithook(watch)
from iterative_ppo.__main__ import main
main()
with open(f"written-{os.environ['RANK']}.json", "w") as file:
    json.dump(written, file)
"""


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loop in one process."""
    folder = shop(tmp_path_factory.mktemp("one"))
    finished = run("iterate", "--out", "run", "--json", *SETTINGS, folder=folder)
    assert finished.code == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def two_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The loop in two, and in `written-0.json` and `written-1.json` what each wrote in the run's folder."""
    folder = shop(tmp_path_factory.mktemp("two"))
    (folder / "watched.py").write_text(WATCHED)
    finished = run_two("watched.py", "iterate", "--out", "run", "--json", *SETTINGS, folder=folder)
    assert finished.code == 0, finished.stderr
    return folder, finished


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loop in two, each with half of the weights."""
    folder = shop(tmp_path_factory.mktemp("sharded"))
    more = ("--set", "compute.shard_weights=true")
    finished = run_two("-m", "iterative_ppo", "iterate", "--out", "run", *SETTINGS, *more, folder=folder)
    assert finished.code == 0, finished.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_the_loop_in_two_processes_is_the_loop_in_one(
    sharded: bool, one_run: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("sharded_run") if sharded else request.getfixturevalue("two_run")[0]
    files = sorted(path.relative_to(one_run) for path in (one_run / "run").rglob("*") if path.is_file())
    made = [path.relative_to(folder) for path in (folder / "run").rglob("*") if path.is_file()]
    assert files == sorted(made)
    for name in files:
        if name.suffix == ".jsonl":
            logs = [read_lines(run_folder / name) for run_folder in (one_run, folder)]
            assert without_logprobs(logs[0]) == without_logprobs(logs[1]), name
        if name.suffix == ".safetensors":
            difference = tiny.largest_difference(load_file(one_run / name), load_file(folder / name))
            assert difference < TOLERANCE, name
    one, both = (json.loads((run_folder / "run/result.json").read_text()) for run_folder in (one_run, folder))
    for mine, other in zip(one["iterations"], both["iterations"], strict=True):
        assert mine["decision"] == other["decision"]
        assert mine["outcome_rate"] == other["outcome_rate"]
        assert mine["kl"] == pytest.approx(other["kl"], abs=TOLERANCE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_main_process_alone_writes_and_speaks(two_run: tuple[Path, Finished]) -> None:
    folder, finished = two_run
    written = [json.loads((folder / f"written-{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("result.json", "config.toml", "conversations.jsonl", "manifest.json", "learning_curve.png"):
        assert any(name in path for path in written[0]), "what is written is seen"
    assert written[1] == []
    assert finished.stdout.count("run folder run") == 1
    assert finished.json["run"] == "run"
    assert not list((folder / "run").rglob(".*"))


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of the launcher's processes."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            environment = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in environment:
            return int(status.parent.name)
    raise AssertionError(f"process {rank} is not there")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes by /proc")
def test_a_process_that_dies_ends_the_job_and_resume_goes_on(two_run: tuple[Path, Finished], tmp_path: Path) -> None:
    expected, _ = two_run
    folder = shop(tmp_path)
    command = ("-m", "iterative_ppo", "iterate", "--out", "run", "--json", *SETTINGS)
    running = start_two(*command, folder=folder)
    deadline = time.monotonic() + 90
    while not (folder / "run/iteration-001/.fit.partial").exists():
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.001)
    os.kill(process_of(running, 1), signal.SIGKILL)
    killed = time.monotonic()
    finished = end_of(running, timeout=60)
    assert time.monotonic() - killed < 45
    assert finished.code != 0
    assert "another process of this job has ended" in finished.stderr
    assert "--resume" in finished.stderr
    assert (folder / "run/iteration-001/collect/manifest.json").is_file()
    assert not (folder / "run/iteration-001/fit").exists()
    resumed = run_two(*command, "--resume", folder=folder)
    assert resumed.code == 0, resumed.stderr
    assert_same_results(folder / "run", expected / "run")


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_said_once(two_run: tuple[Path, Finished]) -> None:
    folder, _ = two_run
    finished = run_two("-m", "iterative_ppo", "iterate", "--out", "run", *SETTINGS, folder=folder)
    assert finished.code != 0
    [complaint] = [line for line in finished.stderr.splitlines() if line.startswith("ippo:")]
    assert "not empty" in complaint


def test_torchrun_takes_every_command_of_the_documents_as_it_stands() -> None:
    """`torchrun` reads abbreviations of its own options among the script's: `--logs` for `--logs-specs`."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    commands = [line.strip() for line in lines if line.startswith("    torchrun ")]
    commands += [command for text in texts for command in re.findall("`(torchrun -[^`]+)`", text)]
    assert any("--logs" in command for command in commands)
    for command in commands:
        arguments = get_args_parser().parse_args(shlex.split(command)[1:])
        assert arguments.module
        assert arguments.training_script == "iterative_ppo", command


def test_what_runs_in_one_process_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "iterative_ppo", "chat", "--policy", "p"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert "chat runs in one process" in done.stderr
