"""The loop: the order of its stages on a tape of fakes, the gate by hand, what a hold changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from iterative_ppo import config, stages
from iterative_ppo.conversation_log import write_conversations
from iterative_ppo.conversations import Conversation, Message
from iterative_ppo.intervals import Interval
from iterative_ppo.policy_iteration import iterate
from iterative_ppo.run_directory import RunDirectory, Stage
from iterative_ppo.stages import Stages, gate

RATE = {"mean": 0.5, "low": 0.4, "high": 0.6}
BETTER = {"mean": 0.7, "low": 0.6, "high": 0.8}
GAIN = {"mean": 0.2, "low": 0.1, "high": 0.3}


@dataclass
class Tape:
    """Fake stages that note who is called with what; a stage is named after what it would have made."""

    decisions: Sequence[str]
    calls: list[str] = field(default_factory=list)

    def start(self) -> Stage:
        return self._note("start", "pi0")

    def collect(self, iteration: int, policy: Stage) -> Stage:
        return self._note(f"collect {policy.folder}", f"batch{iteration}", num_conversations=100)

    def fit(
        self, iteration: int, policy: Stage, read: Sequence[Stage], unread: Sequence[Stage], previous: Stage
    ) -> Stage:
        known, data = ("+".join(str(batch.folder) for batch in batches) for batches in (read, unread))
        after = f" after {known}" if known else ""
        return self._note(f"fit {policy.folder} on {data}{after} from {previous.folder}", f"q{iteration}")

    def improve(self, iteration: int, policy: Stage, q_function: Stage, batches: Sequence[Stage]) -> Stage:
        data = "+".join(str(batch.folder) for batch in batches)
        what = f"improve {policy.folder} by {q_function.folder} on {data}"
        return self._note(what, f"pi{iteration}", kl=0.1 * iteration)

    def evaluate(self, iteration: int, current: Stage, candidate: Stage | None) -> Stage:
        if candidate is None:
            return self._note(f"evaluate {current.folder}", "test0", current=RATE, num_conversations=10)
        return self._note(
            f"evaluate {candidate.folder} against {current.folder}",
            f"test{iteration}",
            current=RATE,
            candidate=BETTER,
            difference=GAIN,
            decision=self.decisions[iteration - 1],
            num_conversations=20,
        )

    def _note(self, call: str, made: str, **metrics: Any) -> Stage:
        self.calls.append(call)
        return Stage(folder=Path(made), metrics=metrics, seconds=1.0)


def test_after_a_promotion_the_candidate_is_collected_from_and_old_batches_are_dropped() -> None:
    tape = Tape(decisions=["promote", "promote"])
    list(iterate(tape, count=2))
    assert tape.calls == [
        "start",
        "evaluate pi0",
        "collect pi0",
        "fit pi0 on test0+batch1 from pi0",
        "improve pi0 by q1 on test0+batch1",
        "evaluate pi1 against pi0",
        "collect pi1",
        "fit pi1 on test1+batch2 from q1",
        "improve pi1 by q2 on test1+batch2",
        "evaluate pi2 against pi1",
    ]


def test_after_a_hold_the_policy_stays_and_q_goes_on_with_its_new_conversations() -> None:
    tape = Tape(decisions=["hold", "hold", "promote", "hold"])
    list(iterate(tape, count=4))
    assert tape.calls == [
        "start",
        "evaluate pi0",
        "collect pi0",
        "fit pi0 on test0+batch1 from pi0",
        "improve pi0 by q1 on test0+batch1",
        "evaluate pi1 against pi0",
        "collect pi0",
        "fit pi0 on test1+batch2 after test0+batch1 from q1",
        "improve pi0 by q2 on test0+batch1+test1+batch2",
        "evaluate pi2 against pi0",
        "collect pi0",
        "fit pi0 on test2+batch3 after test0+batch1+test1+batch2 from q2",
        "improve pi0 by q3 on test0+batch1+test1+batch2+test2+batch3",
        "evaluate pi3 against pi0",
        "collect pi3",
        "fit pi3 on test3+batch4 from q3",
        "improve pi3 by q4 on test3+batch4",
        "evaluate pi4 against pi3",
    ]


def test_records_say_what_is_in_force_after_the_decision() -> None:
    start, promoted, held = iterate(Tape(decisions=["promote", "hold"]), count=2)
    assert (start.iteration, promoted.iteration, held.iteration) == (0, 1, 2)
    assert (start.decision, promoted.decision, held.decision) == ("start", "promote", "hold")
    assert [str(record.policy.folder) for record in (start, promoted, held)] == ["pi0", "pi1", "pi1"]
    assert start.outcome == held.outcome == Interval(**RATE)
    assert promoted.outcome == Interval(**BETTER)
    assert start.candidate is None
    assert start.difference is None
    assert held.candidate == Interval(**BETTER)
    assert held.difference == Interval(**GAIN)
    assert (start.kl, promoted.kl, held.kl) == (0.0, 0.1, 0.2)
    assert start.stages.keys() == {"start", "evaluate"}
    assert held.stages.keys() == {"collect", "fit", "improve", "evaluate"}


def test_records_count_every_conversation_so_far() -> None:
    # 10 with the start policy; then 100 collected and 2 * 10 at the gate in each iteration.
    records = list(iterate(Tape(decisions=["hold", "promote"]), count=2))
    assert [record.num_conversations for record in records] == [10, 130, 250]


def test_iterations_are_made_one_at_a_time() -> None:
    tape = Tape(decisions=["promote"] * 3)
    loop = iterate(tape, count=3)
    next(loop)
    assert tape.calls == ["start", "evaluate pi0"]
    next(loop)
    assert tape.calls[-1] == "evaluate pi1 against pi0"


# ---- The gate ----


def test_the_gate_promotes_by_the_one_sided_lower_bound() -> None:
    # Differences 1, 1, 1, 0: mean 3/4, standard error sqrt(4/3 * (3/16 + 9/16)) / 4 = 1/4; Student's t at 0.95
    # with 3 degrees of freedom is 2.3534: lower bound 0.75 - 0.5883 = 0.1617.
    trial = gate([1, 1, 1, 1], [0, 0, 0, 1], confidence=0.95)
    assert trial.difference.mean == 0.75
    assert trial.difference.low == pytest.approx(0.1617, abs=1e-4)
    assert trial.decision == "promote"
    # The two-sided bound (t = 3.1824) would lie below zero, and hold.
    assert 0.75 - 3.1824 / 4 < 0


def test_the_gate_holds_what_is_not_better_with_the_confidence() -> None:
    # Differences 1, 1, 0, 0: mean 1/2, standard error sqrt(4/3 * 1) / 4 = 0.2887.
    # At 0.95: 0.5 - 2.3534 * 0.2887 = -0.179; at 0.8: 0.5 - 0.9785 * 0.2887 = 0.218.
    candidate, current = [1, 1, 0, 1], [0, 0, 0, 1]
    strict, lax = gate(candidate, current, confidence=0.95), gate(candidate, current, confidence=0.8)
    assert strict.difference.low == pytest.approx(-0.179, abs=1e-3)
    assert strict.decision == "hold"
    assert lax.difference.low == pytest.approx(0.218, abs=1e-3)
    assert lax.decision == "promote"
    assert strict.candidate.mean == 0.75
    assert strict.current.mean == 0.25


def test_the_gate_holds_an_equal_and_a_worse_candidate() -> None:
    same = [0.0, 1.0, 1.0, 0.0] * 50
    assert gate(same, same, confidence=0.95).decision == "hold"
    assert gate(same, same, confidence=0.5).decision == "hold"
    assert gate([0.0] * 200, same, confidence=0.95).decision == "hold"


def test_pairing_by_customer_finds_what_unpaired_rates_cannot() -> None:
    # Current policy: 10 of 20 buy. The candidate keeps them and wins 3 more. The same two rates, 13/20 and 10/20, with
    # other customers behind them prove nothing.
    candidate = [1.0] * 13 + [0.0] * 7
    paired = gate(candidate, [1.0] * 10 + [0.0] * 10, confidence=0.95)
    unpaired = gate(candidate, [0.0] * 10 + [1.0] * 10, confidence=0.95)
    assert paired.difference.mean == pytest.approx(0.15)
    assert unpaired.difference.mean == pytest.approx(0.15)
    assert paired.decision == "promote"
    assert unpaired.decision == "hold"


def test_the_gate_is_wrong_about_equal_policies_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    promoted = 0
    for _ in range(1000):
        candidate, current = (generator.random((2, 200)) < 0.4).astype(float)
        promoted += gate(candidate, current, confidence=0.9).decision == "promote"
    assert 0.07 < promoted / 1000 < 0.13


# ---- What a hold changes, in the stages themselves ----


@pytest.fixture
def real_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Stages on a real run folder; no policy is loaded."""
    monkeypatch.setattr(Stages, "_load", lambda *_: None)
    directory = RunDirectory(tmp_path / "run", config.Config(), resume=False)
    return Stages(directory, lambda: None, lambda *_: None)


def finished(stages_: Stages, name: str, ids: Sequence[str]) -> Stage:
    """A stage with a log of conversations of these ids."""
    folder = stages_.directory.path / name
    folder.mkdir(parents=True)
    messages = (Message(role="user", content="hi"), Message(role="assistant", content="ho"))
    conversations = [Conversation(id=i, messages=messages, outcome=1.0, end="terminated") for i in ids]
    write_conversations(folder / "log.jsonl", conversations)
    return Stage(folder=folder, metrics={"log": "log.jsonl"}, seconds=0.0)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_q_goes_on_from_the_previous_q_and_a_read_out_is_fitted_anew_to_all(
    real_stages: Stages, monkeypatch: pytest.MonkeyPatch, is_frozen: bool
) -> None:
    seen: list[tuple[list[str], Path]] = []

    class Fitted:
        def save(self, folder: Path) -> None:
            pass

        def metrics(self) -> dict[str, Any]:
            return {}

    def fake(
        _: object, __: object, conversations: Sequence[Conversation], *, start: Path | None, **___: object
    ) -> Fitted:
        seen.append(([conversation.id for conversation in conversations], start))
        return Fitted()

    monkeypatch.setattr(stages, "fit_q_from_logs", fake)
    monkeypatch.setattr(stages, "reads_frozen_weights", lambda _, __: is_frozen)
    policy = finished(real_stages, "policy", [])
    first, second = finished(real_stages, "first", ["a", "b"]), finished(real_stages, "second", ["c"])
    q_function = real_stages.fit(1, policy, [], [first], policy)
    (q_function.folder / "q_function").mkdir()
    real_stages.fit(2, policy, [first], [second], q_function)
    assert seen == [
        (["a", "b"], None),
        (["a", "b", "c"] if is_frozen else ["c"], q_function.folder / "q_function"),
    ]


def test_a_run_that_never_finished_its_first_stage_can_be_begun_anew(tmp_path: Path) -> None:
    """A mistake in the settings ends the first stage after the folder was made; the corrected call must not be refused."""
    folder = tmp_path / "run"
    RunDirectory(folder, config.Config(), resume=False)
    (folder / "iteration-000/.start.partial").mkdir(parents=True)
    corrected = config.from_dict({"policy": {"logs": "right.jsonl"}})
    directory = RunDirectory(folder, corrected, resume=False)
    assert 'logs = "right.jsonl"' in (folder / "config.toml").read_text()
    directory.stage("iteration-000/start", seed=1, parents={}, make=lambda _: {})
    with pytest.raises(config.ConfigError, match="not empty"):
        RunDirectory(folder, corrected, resume=False)


def test_the_gate_gives_both_policies_the_same_customers_and_new_ones_each_iteration(
    real_stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def fake(_: Stages, file: Path, policy: Stage, *, num_conversations: int, seed: int) -> dict[str, Any]:
        seeds.append(seed)
        rate = float(policy.folder.name == "good")
        messages = (Message(role="user", content="hi"), Message(role="assistant", content="ho"))
        conversation = Conversation(id="c", messages=messages, outcome=rate, end="terminated")
        write_conversations(file, [conversation] * num_conversations)
        return {}

    monkeypatch.setattr(Stages, "_collect", fake)
    good, poor = finished(real_stages, "good", []), finished(real_stages, "poor", [])
    promoted = real_stages.evaluate(1, poor, good)
    held = real_stages.evaluate(2, good, poor)
    assert seeds[0] == seeds[1]
    assert seeds[2] == seeds[3]
    assert seeds[0] != seeds[2]
    assert promoted.metrics["decision"] == "promote"
    assert held.metrics["decision"] == "hold"
    # The log that a stage is remembered by is that of the policy in force.
    assert promoted.metrics["log"] == "candidate.jsonl"
    assert held.metrics["log"] == "current.jsonl"


def test_policies_of_a_run_share_what_is_known_of_prompts_where_they_render_alike(tmp_path: Path) -> None:
    """Each stage loads its policy anew; what the same chats are in tokens need not be found out again."""
    run = Stages(RunDirectory(tmp_path / "run", config.Config(), resume=False), lambda: None, lambda *_: None)
    [first, second, other] = (Stage(folder=tmp_path / name, metrics={}, seconds=0.0) for name in "abc")
    for stage in (first, second):
        tiny.word_policy().save(stage.folder / "policy")
    changed = tiny.word_policy()
    changed.tokenizer.chat_template = "customer: " + changed.tokenizer.chat_template
    changed.save(other.folder / "policy")
    policies = [run._load(stage) for stage in (first, second, other, first)]
    assert policies[0].renderer is policies[1].renderer
    prompts = [policy.renderer.prompt([{"role": "user", "content": "hi"}]).token_ids for policy in policies]
    assert prompts[0] == prompts[1] == prompts[3] != prompts[2]
    assert policies[1].branch(seed=1).renderer is policies[1].renderer


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", config.Config(), resume=False)
    calls: list[str] = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder.name)
        (folder / "file").write_text("x")
        return {"value": 1.5, "infinite": np.inf}

    first = directory.stage("iteration-001/fit", seed=1, parents={}, make=make)
    second = directory.stage("iteration-001/fit", seed=1, parents={}, make=make)
    assert calls == [".fit.partial"]
    assert first == second
    assert second.metrics == {"value": 1.5, "infinite": None}


def test_what_an_interrupted_stage_left_is_thrown_away(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", config.Config(), resume=False)

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise ValueError("environment broke")

    with pytest.raises(ValueError, match="environment broke"):
        directory.stage("fit", seed=1, parents={}, make=fail)
    assert not (tmp_path / "run/fit").exists()
    stage = directory.stage("fit", seed=1, parents={}, make=lambda _: {})
    assert [file.name for file in stage.folder.iterdir()] == ["manifest.json"]
