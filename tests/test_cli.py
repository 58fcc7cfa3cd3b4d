"""Every command of `ippo` on tiny inputs, in processes of its own.

Loading torch takes seconds, so the commands run in forks of one process that has loaded the libraries; `run` is also
what test_resume.py and test_bad_input.py use.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from logs import DATA, write_lines

from iterative_ppo.command_line import terminal

TINY = {
    "policy.hidden_size": 32,
    "policy.num_layers": 1,
    "policy.vocabulary_size": 400,
    "policy.scripted_conversations": 64,
    "policy.clone_passes": 1,
    "policy.max_response_tokens": 12,
    "environment.max_turns": 6,
    "iterations.count": 1,
    "iterations.conversations": 32,
    "evaluation.conversations": 16,
    "q_function.max_passes": 1,
    "q_function.num_heads": 2,
    "improvement.num_updates": 1,
    "improvement.prompts_per_update": 16,
}
SHOP = '''
import gymnasium

class Shop(gymnasium.Env):
    """The README's hat shop."""

    def __init__(self, last_words="no, bye"):
        self.last_words = last_words

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.wants_red = bool(self.np_random.random() < 0.5)
        return f"hello, i like {'red' if self.wants_red else 'blue'}", {"system": "you sell hats"}

    def step(self, action):
        sold = ("red" in action) == self.wants_red
        return "i take it" if sold else self.last_words, float(sold), True, False, {}

    def scripted_response(self, messages, generator):
        return str(generator.choice(["a red hat?", "a blue hat?"]))
'''
SERVER = """
import json, os, signal, sys, traceback
import matplotlib.pyplot
import iterative_ppo.log_summary, iterative_ppo.tables
from iterative_ppo.commands import exchange, inspection, loop, single_stages
from iterative_ppo.__main__ import main

def work(job):
    for number, (file, mode) in enumerate([(job["stdin"], "r"), (job["stdout"], "w"), (job["stderr"], "w")]):
        os.dup2(os.open(file, os.O_RDONLY if mode == "r" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.chdir(job["folder"])
    if job["largest_file"]:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    signal.alarm(120)
    sys.argv = ["ippo", *job["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        work(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Example: Finished(code=0, stdout="...", stderr="loading libraries ...")."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The last line of the output."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line and line != "loading libraries ..."]


class Running:
    """A command under way."""

    def __init__(self, server: subprocess.Popen[str], pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder

    def wait(self) -> Finished:
        assert self.server.stdout is not None
        return Finished(
            code=int(self.server.stdout.readline()),
            stdout=(self.folder / ".stdout").read_text(encoding="utf-8"),
            stderr=(self.folder / ".stderr").read_text(encoding="utf-8"),
        )


@functools.cache
def server() -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, "-P", "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def start(*arguments: object, folder: Path, stdin: str = "", largest_file: int = 0) -> Running:
    """Starts `ippo` in a folder; what it prints goes to .stdout and .stderr there."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    (folder / ".stdin").write_text(stdin, encoding="utf-8")
    job = {"arguments": [str(a) for a in arguments], "folder": str(folder), "largest_file": largest_file}
    files = {name: str(folder / f".{name}") for name in ("stdin", "stdout", "stderr")}
    process.stdin.write(json.dumps(job | files) + "\n")
    process.stdin.flush()
    return Running(process, int(process.stdout.readline()), folder)


def run(*arguments: object, folder: Path, stdin: str = "", largest_file: int = 0) -> Finished:
    """Runs `ippo` in a folder to its end."""
    return start(*arguments, folder=folder, stdin=stdin, largest_file=largest_file).wait()


def sets(settings: Mapping[str, object] = {}, **changes: object) -> list[str]:
    """The tiny settings as `--set` options; in `changes` a section's dot is written as two underscores."""
    changed = TINY | dict(settings) | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in ("--set", f"{name}={value}")]


def shop(folder: Path) -> Path:
    """A folder in which `environment.entry_point=shop:Shop` works."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shop.py").write_text(SHOP, encoding="utf-8")
    return folder


def synthetic_log(path: Path, num_conversations: int, outcomes: Sequence[float | None] = (0.0, 1.0)) -> Path:
    """Conversations whose outcome can be read off the customer's first word."""
    lines = []
    for i in range(num_conversations):
        outcome = outcomes[i % len(outcomes)]
        messages = [
            {"role": "user", "content": f"{'no' if outcome == outcomes[0] else 'yes'} {i}"},
            {"role": "assistant", "content": f"a hat number {i % 7}?"},
            {"role": "user", "content": "hm"},
            {"role": "assistant", "content": "please"},
        ]
        lines.append({"id": f"c{i}", "messages": messages, "outcome": outcome, "end": "terminated"})
    return write_lines(path, *lines)


@pytest.fixture(scope="module")
def storefront_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    folder = tmp_path_factory.mktemp("storefront")
    return folder, run("iterate", "--out", "run", "--json", *sets(), folder=folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shop.py and a finished run of one iteration in `run`."""
    folder = shop(tmp_path_factory.mktemp("shop"))
    finished = run("iterate", "--out", "run", *sets(environment__entry_point="shop:Shop"), folder=folder)
    assert finished.code == 0, finished.stderr
    return folder


START, Q, LOG = (
    "run/iteration-000/start",
    "run/iteration-001/fit/q_function",
    "run/iteration-001/collect/conversations.jsonl",
)
SHOP_SETTINGS = sets(environment__entry_point="shop:Shop")


# ---- iterate ----


def test_iterate_ends_with_the_json_object_that_the_readme_promises(storefront_run: tuple[Path, Finished]) -> None:
    folder, finished = storefront_run
    assert finished.code == 0, finished.stderr
    result = finished.json
    assert {"run", "optimum", "seconds", "iterations"} <= result.keys()
    assert result["run"] == "run"
    assert 0.85 < result["optimum"] < 1
    assert result["seconds"] > 0
    assert [record["iteration"] for record in result["iterations"]] == [0, 1]
    keys = {"iteration", "outcome_rate", "low", "high", "num_conversations", "kl", "decision", "seconds"}
    for record in result["iterations"]:
        assert keys <= record.keys()
        assert record["low"] <= record["outcome_rate"] <= record["high"]
    first, second = result["iterations"]
    assert first["decision"] == "start"
    assert second["decision"] in ("promote", "hold")
    assert first["seconds"].keys() == {"start", "evaluate"}
    assert second["seconds"].keys() == {"collect", "fit", "improve", "evaluate"}
    assert second["num_conversations"] == 16 + 32 + 2 * 16
    assert json.loads((folder / "run/result.json").read_text()) == result


def test_iterate_draws_the_learning_curve(storefront_run: tuple[Path, Finished]) -> None:
    folder, finished = storefront_run
    assert (folder / "run/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "run/learning_curve.svg").read_text()
    assert "optimum" in finished.stdout
    assert "┤" in finished.stdout


def test_a_run_can_be_read_without_the_process_that_made_it(made: Path) -> None:
    stages = ["iteration-000/start", "iteration-000/evaluate"]
    stages += [f"iteration-001/{name}" for name in ("collect", "fit", "improve", "evaluate", "final")]
    for stage in stages:
        manifest = json.loads((made / "run" / stage / "manifest.json").read_text())
        assert manifest["stage"] == stage
        assert {
            "schema",
            "seed",
            "parents",
            "metrics",
            "seconds",
            "versions",
            "git_commit",
            "config",
        } <= manifest.keys()
        for parent in manifest["parents"].values():
            assert (made / "run" / parent / "manifest.json").is_file()
    assert not list((made / "run").rglob(".*"))


# ---- validate ----


def test_validate_shows_a_table_and_json(tmp_path: Path) -> None:
    synthetic_log(tmp_path / "log.jsonl", 6)
    finished = run("validate", "log.jsonl", "--json", folder=tmp_path)
    assert finished.code == 0, finished.stderr
    table = finished.stdout.splitlines()[:-1]
    assert any(line.split()[:2] == ["conversations", "6"] for line in table), finished.stdout
    assert finished.json["num_conversations"] == 6


def test_validate_names_file_line_and_field(tmp_path: Path) -> None:
    good = {"id": "a", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    bad = {"id": "b", "messages": [{"role": "user", "content": "hi"}, {"role": "robot", "content": "ho"}]}
    write_lines(tmp_path / "log.jsonl", good, bad)
    finished = run("validate", "log.jsonl", folder=tmp_path)
    assert finished.code == 2
    [complaint] = finished.complaints
    assert "log.jsonl:2: field `messages[1].role`" in complaint


def test_validate_sets_bad_lines_aside(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", "{broken", {"id": "a", "messages": [{"role": "assistant", "content": "ho"}]})
    finished = run("validate", "log.jsonl", "--bad-lines", "skip", "--json", folder=tmp_path)
    assert finished.code == 0, finished.stderr
    assert (tmp_path / "log.jsonl.rejected").read_bytes() == b"{broken\n"


# ---- the single stages ----


def test_collect_writes_a_log_of_its_own_policy(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.jsonl"
    finished = run("collect", "--policy", START, "--out", out, "--json", *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json.keys() == {"out", "outcome", "seconds", "statistics"}
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 32
    mean = sum(record["outcome"] for record in records) / 32
    assert finished.json["outcome"]["mean"] == pytest.approx(mean)


def test_fit_reports_what_q_can_tell_in_folds(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 40)
    command = ("fit", "--logs", log, "--policy", START, "--folds", 2, "--out", tmp_path / "q", "--json")
    finished = run(*command, *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    result = finished.json
    assert result["auc"].keys() == {"25", "50", "75", "100"}
    assert all(0 <= value <= 1 for value in result["auc"].values() if value is not None)
    assert result["spearman"] == {}, "the outcome is binary"
    assert 0 <= result["ece"] <= 1
    assert result["seconds"] > 0
    assert result["num_conversations"] == 40
    assert result["tfidf_auc"]["25"] == 1.0, "the first word tells the outcome"
    assert (tmp_path / "q/q_function/q_function.json").is_file()
    assert (tmp_path / "q/calibration.png").is_file()


def test_fit_on_graded_outcomes_reports_rank_correlations(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 30, outcomes=(-1.0, 0.0, 3.0))
    settings = sets(q_function__link="identity", q_function__loss="squared_error")
    finished = run("fit", "--logs", log, "--policy", START, "--folds", 2, "--json", *settings, folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json["spearman"].keys() == {"25", "50", "75", "100"}


def test_score_writes_q_of_every_decision_point(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 5)
    out = tmp_path / "scores.jsonl"
    finished = run("score", "--logs", log, "--q", Q, "--out", out, "--json", *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(s["conversation_id"], s["turn"]) for s in scores] == [(f"c{i}", turn) for i in range(5) for turn in (0, 1)]
    assert all(0 < s["q_value"] < 1 and 0 < s["state_value"] < 1 and s["reward"] <= s["q_value"] + 0.01 for s in scores)
    assert finished.json["num_points"] == 10
    assert finished.json["mean_q_value"] == pytest.approx(sum(s["q_value"] for s in scores) / 10)


def test_scores_do_not_take_the_place_of_their_log(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 1)
    before = log.read_bytes()
    finished = run("score", "--logs", log, "--q", Q, "--out", log, *SHOP_SETTINGS, folder=made)
    assert finished.code == 2
    assert "is the log itself" in finished.stderr
    assert log.read_bytes() == before


def test_fit_needs_something_to_do(made: Path) -> None:
    finished = run("fit", "--logs", LOG, "--policy", START, folder=made)
    assert finished.code == 2
    assert len(finished.complaints) == 1


def test_improve_makes_a_candidate_that_can_be_evaluated_against_its_policy(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "candidate"
    command = ("improve", "--logs", LOG, "--policy", START, "--q", Q, "--out", out, "--json")
    finished = run(*command, *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json["num_updates"] == 1
    assert finished.json["num_prompts"] == 32
    assert finished.json["kl"] >= 0
    assert (out / "policy/model.safetensors").is_file()
    command = ("evaluate", "--policy", out, "--against", START, "--json")
    finished = run(*command, *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    trial = finished.json["trial"]
    assert trial["decision"] in ("promote", "hold")
    assert trial["difference"]["mean"] == pytest.approx(trial["candidate"]["mean"] - trial["current"]["mean"])
    assert finished.json["outcome"] == trial["candidate"]
    assert finished.json["optimum"] is None, "the shop cannot tell it"


def test_a_policy_against_itself_is_held(made: Path) -> None:
    finished = run("evaluate", "--policy", START, "--against", START, "--json", *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json["trial"]["decision"] == "hold"
    assert finished.json["trial"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_rank_measures_within_states(made: Path) -> None:
    sizes = ("--states", 2, "--responses", 3, "--rollouts", 2)
    finished = run("rank", "--policy", START, "--q", Q, *sizes, "--json", *SHOP_SETTINGS, folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json["num_states"] == 2
    assert -1 <= finished.json["kendall_tau"]["mean"] <= 1
    assert finished.json["exact_branches"] is False
    assert "branch(generator)" in finished.stdout


def test_conformance_of_a_step_of_ones_own(tmp_path: Path) -> None:
    """One that hands the policy back is stopped by its exit code; one that is broken by a line that says what it did."""
    (tmp_path / "mine.py").write_text(
        "def nothing(policy, prompts, reward, config, seed):\n"
        "    assert reward(prompts[:1], [(0,)]).shape == (1,)\n"
        "    return policy\n"
        "def lost(policy, prompts, reward, config, seed):\n"
        "    reward(prompts[:1], [(9, 9)])\n"
        "def folder(policy, prompts, reward, config, seed):\n"
        "    return 'runs/candidate'\n"
        "def ends(policy, prompts, reward, config, seed):\n"
        "    raise SystemExit(0)\n",
        encoding="utf-8",
    )
    done = run("conformance", "--backend", "mine:nothing", "--json", folder=tmp_path)
    assert done.code == 1
    assert done.json["passed"] is False
    assert done.json["share_of_gain"] == pytest.approx(0, abs=1e-6)
    assert {check["name"] for check in done.json["checks"] if check["passed"]} == {"anchor", "token_discount"}
    assert "FAILED  share_of_gain" in done.stdout
    for backend, reason in [
        ("mine:lost", "asked about the tokens [9, 9]"),
        ("mine:folder", "gave back str"),
        ("mine:ends", "the backend failed: SystemExit: 0"),
        ("mine:none", "has no function none"),
        ("natve", "neither native, trl, a URL nor a function"),
    ]:
        done = run("conformance", "--backend", backend, folder=tmp_path)
        assert done.code == 2
        [line] = done.complaints
        assert reason in line


def test_chat_answers_every_line_until_an_empty_one(made: Path) -> None:
    command = ("chat", "--policy", START, "--q", Q, "--system", "you sell hats", *SHOP_SETTINGS)
    finished = run(*command, folder=made, stdin="hello\nred please\n\nnot read\n")
    assert finished.code == 0, finished.stderr
    assert finished.stdout.count("policy: ") == 2
    assert finished.stdout.count("  (Q 0.") == 2, "after each answer, whatever ends the lines in it"


# ---- step ----


@pytest.mark.slow
def test_step_from_real_logs_is_resumable(tmp_path: Path) -> None:
    source = DATA / "persuasionforgood/conversations.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    lines = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines[:40]))
    command = ("step", "--logs", "log.jsonl", "--policy", "tiny", "--out", "run", "--folds", 2, "--json", *sets())
    first = run(*command, folder=tmp_path)
    assert first.code == 0, first.stderr
    result = first.json
    assert {"run", "candidate", "seconds", "start", "fit", "grader", "folds", "improve", "grade"} <= result.keys()
    assert (tmp_path / result["candidate"] / "model.safetensors").is_file()
    assert (tmp_path / "run/grade/samples.md").is_file()
    assert {"mean", "low", "high"} == result["grade"]["q_gain"].keys()
    assert "cannot be measured from logs alone" in first.stdout
    again = run(*command, folder=tmp_path)
    assert again.code == 2
    assert "--resume" in again.complaints[0]
    resumed = run(*command, "--resume", folder=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert {**resumed.json, "seconds": 0} == {**result, "seconds": 0}


def test_step_clones_from_the_lines_that_are_left_when_bad_ones_are_skipped(tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 40)
    log.write_bytes(b"{broken\n" + log.read_bytes())
    command = ("step", "--logs", log, "--policy", "tiny", "--out", "run", "--folds", 0, "--bad-lines", "skip", "--json")
    finished = run(*command, *sets(), folder=tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.json["start"]["num_conversations"] == 40
    assert (tmp_path / "run/rejected.jsonl").read_bytes() == b"{broken\n"


def test_step_does_not_go_on_with_other_logs(tmp_path: Path) -> None:
    synthetic_log(tmp_path / "a.jsonl", 40)
    synthetic_log(tmp_path / "b.jsonl", 30)
    options = ("--policy", "tiny", "--out", "run", "--folds", 0, *sets())
    assert run("step", "--logs", "a.jsonl", *options, folder=tmp_path).code == 0
    finished = run("step", "--logs", "b.jsonl", *options, "--resume", folder=tmp_path)
    assert finished.code == 2
    assert len(finished.complaints) == 1


# ---- config, help, imports ----


def test_config_prints_a_configuration_that_it_reads_back(tmp_path: Path) -> None:
    finished = run("config", "--set", "iterations.count=9", folder=tmp_path)
    assert finished.code == 0, finished.stderr
    (tmp_path / "run.toml").write_text(finished.stdout)
    assert "\ncount = 9\n" in finished.stdout
    assert run("config", "run.toml", folder=tmp_path).stdout == finished.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["iterate", "--help"], 0),
        (["config"], 0),
        (["iterate", "--set", "iterations.cuont=3"], 2),
        (["iterate", "missing.toml"], 2),
        (["step", "--logs", "missing.jsonl", "--out", "x"], 2),
        (["fit", "--logs", "missing.jsonl", "--policy", "p", "--out", "x"], 2),
        (["serve-q", "--help"], 0),
        (["serve-q", "missing"], 2),
    ],
)
def test_what_needs_no_torch_loads_none(arguments: list[str], code: int, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['ippo', *sys.argv[1:]]\n"
        "from iterative_ppo.__main__ import main\n"
        "try:\n    main()\n    code = 0\nexcept SystemExit as stop:\n    code = stop.code or 0\n"
        "slow = {'torch', 'transformers', 'sklearn', 'matplotlib', 'scipy', 'gymnasium', 'fastapi'} & set(sys.modules)\n"
        "print('loaded', sorted(slow), code)"
    )
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"loaded [] {code}"


def test_without_a_terminal_progress_is_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with terminal.progress() as show:
        for done in range(1, 8):
            now += 10.0
            show("fit Q, fold [1] of 5", done * 1000, 7000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["fit Q, fold [1] of 5: 3,000 of 7,000", "fit Q, fold [1] of 5: 6,000 of 7,000"]
