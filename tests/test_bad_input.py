"""What a user can get wrong ends with exit code 2 and one line; what only looks odd works and is counted."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from logs import write_lines
from test_cli import LOG, START, Finished, Q, run, sets, shop, synthetic_log
from tiny import gpt2, word_policy

POLICY = f"{START}/policy"
ENVIRONMENTS = '''
import gymnasium

class Base(gymnasium.Env):
    """One turn, won by half of the scripted responses."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_turns = 0
        return "red or blue?", {}

    def step(self, action):
        return "bye", float("red" in action), True, False, {}

    def scripted_response(self, messages, generator):
        return str(generator.choice(["red", "blue"]))

class RaisesInReset(Base):
    def reset(self, *, seed=None, options=None):
        raise KeyError("no\\ncustomer")

class RaisesInStep(Base):
    def step(self, action):
        raise ZeroDivisionError("the shop\\nis closed")

class ReturnsNumber(Base):
    def step(self, action):
        return 7, 1.0, True, False, {}

class ResetReturnsNone(Base):
    def reset(self, *, seed=None, options=None):
        return None, {}

class ResetReturnsTextOnly(Base):
    def reset(self, *, seed=None, options=None):
        return "hello"

class ResetInfoIsNone(Base):
    def reset(self, *, seed=None, options=None):
        return "hello", None

class SystemIsNoText(Base):
    def reset(self, *, seed=None, options=None):
        return "hello", {"system": 5}

class StepInfoIsNone(Base):
    def step(self, action):
        return "bye", 1.0, True, False, None

class FourValues(Base):
    def step(self, action):
        return "bye", 1.0, True, {}

class RewardIsNan(Base):
    def step(self, action):
        return "bye", float("nan"), True, False, {}

class RewardIsText(Base):
    def step(self, action):
        return "bye", "1", True, False, {}

class SentIsNoText(Base):
    def step(self, action):
        return "bye", 1.0, True, False, {"sent": 5, "decision": "edited"}

class UnknownDecision(Base):
    def step(self, action):
        return "bye", 1.0, True, False, {"sent": "x", "decision": "shrugged"}

class LoneSurrogate(Base):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "half a \\ud83d", {}

class ScriptedReturnsNone(Base):
    def scripted_response(self, messages, generator):
        return None

class ScriptedRaises(Base):
    def scripted_response(self, messages, generator):
        return messages[99]

class ConstructorFails(Base):
    def __init__(self, size=3):
        raise RuntimeError(f"no shop of size {size}")

class ConstructorFailsByKey(Base):
    def __init__(self):
        {}["catalogue"]

class NoScript(gymnasium.Env):
    reset, step = Base.reset, Base.step

class NoStep:
    def reset(self, *, seed=None, options=None):
        return "", {}

class Negative(Base):
    def step(self, action):
        return "bye", -1.0, True, False, {}

class SilentAtFirst(Base):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "", {}

class Silent(Base):
    def step(self, action):
        self.num_turns += 1
        return "", float("red" in action), self.num_turns == 3, False, {}

class NeverEnds(Base):
    def step(self, action):
        return "and now?", 0.25, False, False, {}

class Talkative(Base):
    def step(self, action):
        self.num_turns += 1
        return "red or blue or green? " * 9, float(self.num_turns == 6 and "red" in action), self.num_turns == 6, False, {}

class Constant(Base):
    def step(self, action):
        return "bye", 1.0, True, False, {}
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with environments and a finished run of one iteration in `run`."""
    folder = shop(tmp_path_factory.mktemp("bad"))
    (folder / "bad.py").write_text(ENVIRONMENTS)
    (folder / "broken.py").write_text("def (")
    (folder / "fails.py").write_text("1 / 0")
    (folder / "imports.py").write_text("import no_such_library_at_all")
    settings = sets(environment__entry_point="bad:Base")
    finished = run("iterate", "--out", "run", *settings, folder=folder)
    assert finished.code == 0, finished.stderr
    return folder


def complaint(finished: Finished) -> str:
    """The one line of a user's mistake."""
    assert "Traceback" not in finished.stderr, finished.stderr.splitlines()[-1]
    assert finished.code == 2, finished.stderr or finished.stdout
    assert len(finished.complaints) == 1, finished.stderr
    assert finished.complaints[0].startswith("ippo: ")
    assert len(finished.complaints[0]) < 400
    return finished.complaints[0]


def iterate(made: Path, out: Path, entry_point: str, *more: str, **changes: object) -> Finished:
    settings = sets(environment__entry_point=entry_point, **changes)
    return run("iterate", "--out", out, "--json", *settings, *more, folder=made)


# ---- Logs ----

GOOD = {"id": "a", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize(
    ("second_line", "reason"),
    [
        ("{broken", "log.jsonl:2: not valid JSON"),
        (
            '{"id": "b", "messages": [{"role": "assistant", "content": "x"}], "outcome": NaN}',
            "log.jsonl:2: field `outcome`",
        ),
        ({**GOOD, "outcome": "won"}, "log.jsonl:2: field `outcome`"),
        ({**GOOD, "messages": []}, "log.jsonl:2: field `messages`"),
        (b'{"id": "\xff\xfe"}', "log.jsonl:2: not UTF-8"),
        (b"\0\0\0\0", "log.jsonl:2: NUL byte"),
        ("[1, 2]", "log.jsonl:2: "),
    ],
)
def test_a_malformed_line_is_named(made: Path, tmp_path: Path, second_line: bytes | str | dict, reason: str) -> None:
    log = write_lines(tmp_path / "log.jsonl", GOOD, second_line)
    out = tmp_path / "q"
    assert reason in complaint(run("fit", "--logs", log, "--policy", POLICY, "--out", out, *sets(), folder=made))
    assert not out.exists()


@pytest.mark.parametrize("command", ["fit", "improve", "step"])
@pytest.mark.parametrize("content", ["empty", "no assistant", "one conversation"])
def test_a_log_with_nothing_to_learn_from(made: Path, tmp_path: Path, command: str, content: str) -> None:
    log = tmp_path / "log.jsonl"
    match content:
        case "empty":
            log.write_bytes(b"")
        case "no assistant":
            record = {"messages": [{"role": "user", "content": "hi"}], "outcome": 1.0}
            write_lines(log, *({**record, "id": str(i)} for i in range(9)))
        case "one conversation":
            write_lines(log, {**GOOD, "outcome": 1.0})
    more: Sequence[object] = {
        "fit": ("--policy", POLICY),
        "improve": ("--policy", POLICY, "--q", Q),
        "step": ("--policy", "tiny", "--folds", 0),
    }[command]
    finished = run(command, "--logs", log, "--out", tmp_path / "out", *more, *sets(), folder=made)
    if (command, content) == ("improve", "one conversation"):
        assert finished.code == 0, "one prompt is enough to improve on"
        return
    assert complaint(finished)


@pytest.mark.parametrize("folds", [0, 2])
@pytest.mark.parametrize("what", [{"outcome": None}, {"end": "censored"}])
def test_no_known_outcome(made: Path, tmp_path: Path, what: dict, folds: int) -> None:
    records = ({**GOOD, "id": str(i), "outcome": 1.0, "end": "terminated", **what} for i in range(12))
    log = write_lines(tmp_path / "log.jsonl", *records)
    command = ("fit", "--logs", log, "--policy", POLICY, "--out", tmp_path / "q", "--folds", folds)
    said = complaint(run(*command, *sets(), folder=made))
    assert "outcome" in said


def test_a_constant_outcome_is_fitted_with_a_warning(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 30, outcomes=(1.0,))
    command = ("fit", "--logs", log, "--policy", POLICY, "--out", tmp_path / "q", "--json")
    finished = run(*command, *sets(), folder=made)
    assert finished.code == 0, finished.stderr
    assert finished.json["report"]["discrimination"] is None
    assert any("has learnt nothing" in warning for warning in finished.json["report"]["warnings"])


def test_a_constant_outcome_in_folds(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 30, outcomes=(1.0,))
    command = ("fit", "--logs", log, "--policy", POLICY, "--folds", 2, "--json")
    finished = run(*command, *sets(), folder=made)
    assert finished.code == 0, finished.stderr
    assert set(finished.json["auc"].values()) == {None}


def test_a_result_folder_in_use_is_refused_before_the_folds_are_fitted(made: Path, tmp_path: Path) -> None:
    log = synthetic_log(tmp_path / "log.jsonl", 30)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/thesis.txt").write_text("mine")
    command = ("fit", "--logs", log, "--policy", POLICY, "--folds", 2, "--out", tmp_path / "q")
    finished = run(*command, *sets(), folder=made)
    assert "not an empty folder" in complaint(finished)
    assert "TF-IDF" not in finished.stdout, "the report was made, and its JSON lost"
    assert (tmp_path / "q/thesis.txt").read_text() == "mine"


def test_tiny_needs_more_than_one_conversation(made: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log.jsonl", {**GOOD, "outcome": 1.0})
    said = complaint(iterate(made, tmp_path / "out", "bad:Base", policy__logs=log))
    assert "fewer than two conversations" in said


def test_a_log_that_is_missing(made: Path, tmp_path: Path) -> None:
    said = complaint(iterate(made, tmp_path / "out", "bad:Base", policy__logs="nowhere.jsonl"))
    assert "nowhere.jsonl" in said


def test_conversations_longer_than_the_context_work_and_are_counted(made: Path, tmp_path: Path) -> None:
    changes = {"policy__context_tokens": 64, "policy__max_response_tokens": 8}
    finished = iterate(made, tmp_path / "out", "bad:Talkative", **changes)
    assert finished.code == 0, finished.stderr
    for stage in ("collect", "fit"):
        metrics = json.loads((tmp_path / f"out/iteration-001/{stage}/manifest.json").read_text())["metrics"]
        assert metrics["num_dropped_messages"] > 0


def test_messages_longer_than_the_context_work(tmp_path: Path) -> None:
    """On a model with absolute positions, where one token too many is an error and no extrapolation."""
    word_policy(gpt2).save(tmp_path / "policy")
    messages = [{"role": "user", "content": "word " * 700}, {"role": "assistant", "content": "reply " * 700}]
    records = ({"id": str(i), "messages": messages, "outcome": float(i % 2)} for i in range(12))
    write_lines(tmp_path / "log.jsonl", *records)
    command = ("fit", "--logs", "log.jsonl", "--policy", "policy", "--out", "q")
    finished = run(*command, *sets(), folder=tmp_path)
    assert finished.code == 0, finished.stderr


def test_a_context_without_room_for_a_response(made: Path, tmp_path: Path) -> None:
    changes = {"policy__context_tokens": 16, "policy__max_response_tokens": 16}
    assert "context" in complaint(iterate(made, tmp_path / "out", "bad:Base", **changes))


# ---- Environments ----


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RaisesInReset", "reset raised KeyError"),
        ("RaisesInStep", "turn 1: step raised ZeroDivisionError: the shop is closed"),
        ("ReturnsNumber", "step returned int as observation, not a string"),
        ("ResetReturnsNone", "reset returned NoneType as observation"),
        ("ResetReturnsTextOnly", "reset"),
        ("ResetInfoIsNone", "reset returned NoneType as info"),
        ("SystemIsNoText", "system"),
        ("StepInfoIsNone", "step returned NoneType as info"),
        ("FourValues", "step"),
        ("RewardIsNan", "step returned the reward nan, not a finite number"),
        ("RewardIsText", "step returned the reward '1', not a finite number"),
        ("SentIsNoText", ""),
        ("UnknownDecision", "decision"),
        ("LoneSurrogate", ""),
        ("ScriptedReturnsNone", "scripted_response"),
        ("ScriptedRaises", "scripted_response"),
        ("NoScript", "policy.logs"),
        ("ConstructorFails", "no shop of size 3"),
        ("ConstructorFailsByKey", "catalogue"),
        ("NoStep", "lacks reset or step"),
        ("Missing", "no class Missing"),
        ("Negative", 'use q_function.link = "identity"'),
    ],
)
def test_an_environment_that_breaks_its_contract(made: Path, tmp_path: Path, name: str, reason: str) -> None:
    said = complaint(iterate(made, tmp_path / "out", f"bad:{name}"))
    assert reason in said
    assert not (tmp_path / "out/result.json").exists()


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("no_such_module:Shop", "cannot import no_such_module"),
        ("storefrnt", "neither storefront, suggested_response nor a class"),
        ("imports:Shop", "no_such_library_at_all"),
        ("broken:Shop", "broken"),
        ("fails:Shop", "fails"),
    ],
)
def test_an_environment_that_cannot_be_imported(made: Path, tmp_path: Path, entry_point: str, reason: str) -> None:
    assert reason in complaint(iterate(made, tmp_path / "out", entry_point))
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_arguments_that_the_environment_does_not_take(made: Path, tmp_path: Path) -> None:
    said = complaint(iterate(made, tmp_path / "out", "shop:Shop", environment__arguments="{ colour = 1 }"))
    assert "colour" in said


@pytest.mark.parametrize(
    ("name", "num_turns", "end"),
    [("SilentAtFirst", 1, "terminated"), ("Silent", 3, "terminated"), ("NeverEnds", 6, "truncated")],
)
def test_an_odd_environment_works(made: Path, tmp_path: Path, name: str, num_turns: int, end: str) -> None:
    settings = {"q_function__link": "identity", "q_function__loss": "squared_error"}
    finished = iterate(made, tmp_path / "out", f"bad:{name}", **settings)
    assert finished.code == 0, finished.stderr
    log = tmp_path / "out/iteration-001/collect/conversations.jsonl"
    records = [json.loads(line) for line in log.open(encoding="utf-8")]
    assert len(records) == 32
    for record in records:
        assert record["end"] == end
        assert sum(message["role"] == "assistant" for message in record["messages"]) == num_turns


def test_rewards_of_a_truncated_conversation_add_up(made: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = ("collect", "--policy", POLICY, "--out", log, "--json")
    finished = run(*command, *sets(environment__entry_point="bad:NeverEnds"), folder=made)
    assert finished.json["outcome"]["mean"] == pytest.approx(6 * 0.25)
    record = json.loads(log.read_text().splitlines()[0])
    assert [message.get("reward") for message in record["messages"] if message["role"] == "assistant"] == [0.25] * 5 + [
        None
    ]
    assert record["outcome"] == 0.25


def test_an_environment_in_which_everyone_wins_holds(made: Path, tmp_path: Path) -> None:
    finished = iterate(made, tmp_path / "out", "bad:Constant")
    assert finished.code == 0, finished.stderr
    assert finished.json["iterations"][1]["decision"] == "hold"
    assert "has learnt nothing" in finished.stdout


def test_what_was_finished_before_a_failure_is_kept(made: Path, tmp_path: Path) -> None:
    records = [{**GOOD, "id": str(i), "outcome": float(i % 2)} for i in range(40)]
    log = write_lines(tmp_path / "log.jsonl", *records)
    assert complaint(iterate(made, tmp_path / "out", "bad:Negative", policy__logs=log))
    done = sorted(path.parent.name for path in (tmp_path / "out").rglob("manifest.json"))
    assert done == ["collect", "evaluate", "start"]


# ---- Configuration ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[iterations]\ncuont = 3\n", "unknown setting iterations.cuont; the nearest known one is iterations.count"),
        ("sed = 3\n", "unknown setting sed; the nearest known one is seed"),
        ("[iterations]\ncount = 0\n", "iterations.count: must be at least 1, not 0"),
        ("[iterations\n", "run.toml: not a TOML file"),
        ("[environment]\narguments = { day = 2024-01-01 }\n", "day"),
    ],
)
def test_a_configuration_with_a_mistake(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert reason in complaint(run("iterate", "run.toml", "--out", "out", "--set", "seed=1", folder=tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_missing_or_no_text(tmp_path: Path) -> None:
    assert "gone.toml" in complaint(run("iterate", "gone.toml", folder=tmp_path))
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    assert "run.toml: not a TOML file" in complaint(run("iterate", "run.toml", folder=tmp_path))
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in complaint(run("iterate", "folder.toml", folder=tmp_path))


# ---- Models ----


def test_a_model_that_is_not_there(made: Path, tmp_path: Path) -> None:
    for source in ("nobody/no-such-model", "no/such/folder/at-all", "run"):
        command = ("collect", "--policy", source, "--out", tmp_path / "log.jsonl")
        assert source in complaint(run(*command, *sets(environment__entry_point="bad:Base"), folder=made))
    assert "nobody/no-such-model" in complaint(
        iterate(made, tmp_path / "out", "bad:Base", policy__start="nobody/no-such-model")
    )


def test_a_model_whose_weights_are_cut_off(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / POLICY, tmp_path / "policy")
    weights = tmp_path / "policy/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command = ("collect", "--policy", tmp_path / "policy", "--out", tmp_path / "log.jsonl")
    assert "policy" in complaint(run(*command, *sets(environment__entry_point="bad:Base"), folder=made))


def test_a_policy_where_a_q_function_belongs(made: Path, tmp_path: Path) -> None:
    command = ("improve", "--logs", LOG, "--policy", POLICY, "--q", POLICY, "--out", tmp_path / "out")
    assert "q_function.json is missing" in complaint(run(*command, *sets(), folder=made))


# ---- Disks ----


def test_a_result_folder_that_cannot_be_written(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert "file" in complaint(iterate(made, out, "bad:Base"))
        command = ("fit", "--logs", LOG, "--policy", POLICY, "--out", out)
        assert "file" in complaint(run(*command, *sets(), folder=made))
    command = ("collect", "--policy", POLICY, "--out", tmp_path / "file/log.jsonl")
    assert "file" in complaint(run(*command, *sets(environment__entry_point="bad:Base"), folder=made))
    assert (tmp_path / "file").read_text() == "a file, no folder"


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("largest_file", [3_000, 20_000])
def test_no_room_on_the_disk(made: Path, tmp_path: Path, largest_file: int) -> None:
    """A limit on the size of files stands for a full disk: the same failed writes, a log's and then the weights'."""
    settings = sets(environment__entry_point="bad:Base")
    command = ("iterate", "--out", tmp_path / "out", *settings)
    assert complaint(run(*command, folder=made, largest_file=largest_file))
    assert not list((tmp_path / "out").rglob("manifest.json"))
    resumed = run(*command, "--resume", folder=made)
    assert resumed.code == 0, resumed.stderr
