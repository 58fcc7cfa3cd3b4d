"""A run that was killed inside a stage ends with the bytes of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import Finished, run, sets, shop, start

SETTINGS = sets(environment__entry_point="shop:Shop", iterations__conversations=64, evaluation__conversations=64)
CHANGING = ("manifest.json", "result.json", "learning_curve.svg", "learning_curve.png")
STAGES = ["iteration-000/start", *(f"iteration-001/{name}" for name in ("collect", "fit", "improve", "evaluate"))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration in a Python of its own, with another hash seed and other paths."""
    folder = shop(tmp_path_factory.mktemp("uninterrupted"))
    command = [sys.executable, "-P", "-m", "iterative_ppo", "iterate", "--out", "run", "--json", *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    return tmp_path / "copy"


def results(run_folder: Path) -> dict[str, Any]:
    """Every file whose bytes must not depend on when the run was made, and the figures of the others."""
    files: dict[str, Any] = {}
    for path in sorted(run_folder.rglob("*")):
        name = str(path.relative_to(run_folder))
        if path.is_file() and path.name not in CHANGING:
            files[name] = path.read_bytes()
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            files[name] = {key: value for key, value in manifest.items() if key != "seconds"}
    files["result.json"] = without_seconds(json.loads((run_folder / "result.json").read_text()))
    return files


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    result = {**result, "seconds": 0}
    result["iterations"] = [{**record, "seconds": sorted(record["seconds"])} for record in result["iterations"]]
    return result


def assert_same_results(one: Path, other: Path) -> None:
    a, b = results(one), results(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def kill_within(stage: str, folder: Path) -> bool:
    """Starts a run and kills it inside a stage; whether it was still in it."""
    head, name = stage.split("/")
    partial = folder / "run" / head / f".{name}.partial"
    running = start("iterate", "--out", "run", "--json", *SETTINGS, folder=folder)
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert time.monotonic() < deadline, f"{partial} never came"
        time.sleep(0.0005)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    return partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_inside_a_stage_and_resumed(stage: str, uninterrupted: Path, tmp_path: Path) -> None:
    folder = shop(tmp_path / "killed")
    for _ in range(5):
        if kill_within(stage, folder):
            break
        shutil.rmtree(folder / "run")
    assert not (folder / "run" / stage).exists()
    assert not (folder / "run/result.json").exists()
    done = [s for s in STAGES if (folder / "run" / s).exists()]
    assert done == STAGES[: STAGES.index(stage)], "the stages before it are whole"
    resumed = run("iterate", "--out", "run", "--json", "--resume", *SETTINGS, folder=folder)
    assert resumed.code == 0, resumed.stderr
    assert_same_results(folder / "run", uninterrupted / "run")
    expected = json.loads((uninterrupted / "stdout").read_text().splitlines()[-1])
    assert without_seconds(resumed.json) == without_seconds(expected)
    assert not list((folder / "run").rglob(".*.partial"))


def test_the_run_holds_weights_to_compare(uninterrupted: Path) -> None:
    names = [name for name in results(uninterrupted / "run") if name.endswith(".safetensors")]
    assert names == [
        "iteration-000/start/policy/model.safetensors",
        "iteration-000/start/q_function/heads.safetensors",
        "iteration-000/start/q_function/model.safetensors",
        "iteration-001/fit/q_function/heads.safetensors",
        "iteration-001/fit/q_function/model.safetensors",
        "iteration-001/improve/policy/model.safetensors",
    ]


def test_another_seed_is_another_run(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shop(tmp_path / "other")
    assert run("iterate", "--out", "run", *SETTINGS, "--set", "seed=1", folder=folder).code == 0
    a, b = results(uninterrupted / "run"), results(folder / "run")
    same = [name for name in a if name.endswith(".safetensors") and a[name] == b[name]]
    assert same == []


def test_resuming_a_finished_run_changes_nothing(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "run").rglob("manifest.json")}
    resumed = run("iterate", "--out", "run", "--json", "--resume", *SETTINGS, folder=copy)
    assert resumed.code == 0, resumed.stderr
    expected = json.loads((copy / "stdout").read_text().splitlines()[-1])
    assert {**resumed.json, "seconds": 0} == {**expected, "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in (copy / "run").rglob("manifest.json")} == before


def test_a_finished_run_goes_on_for_more_iterations(copy: Path, uninterrupted: Path) -> None:
    more = [*SETTINGS, "--set", "iterations.count=2"]
    resumed = run("iterate", "--out", "run", "--json", "--resume", *more, folder=copy)
    assert resumed.code == 0, resumed.stderr
    assert [record["iteration"] for record in resumed.json["iterations"]] == [0, 1, 2]
    expected = json.loads((uninterrupted / "stdout").read_text().splitlines()[-1])
    assert resumed.json["iterations"][:2] == expected["iterations"]
    assert "count = 2" in (copy / "run/config.toml").read_text()


def refused(finished: Finished) -> str:
    assert finished.code == 2
    [complaint] = finished.complaints
    return complaint


def test_another_configuration_is_refused_by_the_name_of_the_setting(copy: Path, uninterrupted: Path) -> None:
    other = [*SETTINGS, "--set", "q_function.gamma=0.5"]
    complaint = refused(run("iterate", "--out", "run", "--resume", *other, folder=copy))
    assert "q_function.gamma = 1.0, not 0.5" in complaint
    assert_same_results(copy / "run", uninterrupted / "run")
    assert "gamma = 1.0" in (copy / "run/config.toml").read_text(), "the refused configuration is not written"


def test_a_folder_that_holds_something_is_refused(copy: Path, tmp_path: Path) -> None:
    assert "--resume" in refused(run("iterate", "--out", "run", *SETTINGS, folder=copy))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not touch")
    for resume in ([], ["--resume"]):
        complaint = refused(run("iterate", "--out", "mine", *resume, *SETTINGS, folder=shop(tmp_path)))
        assert "mine" in complaint
        assert "not empty" in complaint
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resume_needs_a_folder(tmp_path: Path) -> None:
    assert "--out" in refused(run("iterate", "--resume", *SETTINGS, folder=shop(tmp_path)))


def test_a_run_that_has_not_begun_can_be_resumed(tmp_path: Path) -> None:
    """Killed before its configuration was in place: the folder holds at most a part of it."""
    folder = shop(tmp_path)
    (folder / "run").mkdir()
    (folder / "run/.config.toml.partial").write_text("seed =")
    finished = run("iterate", "--out", "run", "--resume", *SETTINGS, folder=folder)
    assert finished.code == 0, finished.stderr
