"""Scores of a log: what the fit and the improvement step read at the same places, in the log's order."""

import json
from pathlib import Path

import pytest
import torch
from logs import assistant, conversation, user
from tiny import PAD, policy_config, word_policy

from iterative_ppo import log_scores
from iterative_ppo.config import Config, QFunctionConfig
from iterative_ppo.conversation_log import write_conversations
from iterative_ppo.conversations import Conversation
from iterative_ppo.log_scores import LogScorer, PointScore, score_log, write_scores
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import predict
from iterative_ppo.q_function import QFunction, QFunctionCard
from iterative_ppo.turns_to_tokens import labelled_sequences, tokenize

CONFIG = Config(policy=policy_config(), q_function=QFunctionConfig(pessimism=2.0))
TOKENS = CONFIG.compute.tokens_per_batch


def q_function_of(policy: Policy, folder: Path) -> QFunction:
    """A Q-function whose values differ from each other, and its folder."""
    q_function = QFunction.from_policy(policy.model, link="logistic", num_heads=3, pad_id=PAD, lora_rank=4, seed=0)
    with torch.no_grad():
        q_function.heads.mul_(10)
    card = QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="logs", metrics={})
    q_function.save(folder, card, policy.tokenizer)
    return q_function


def talks() -> list[Conversation]:
    """Of many lengths; one without an outcome, one without a decision point, one in which the policy abstained."""
    long = [
        conversation(
            *(
                message
                for turn in range(i % 4 + 1)
                for message in (user(f"word {i} {turn}"), assistant(f"sure {turn}"))
            ),
            id=f"c{i}",
            outcome=float(i % 2),
        )
        for i in range(9)
    ]
    odd = [
        conversation(user("hi"), assistant("hello"), user("bye"), id="censored", end="censored"),
        conversation(user("nobody answers"), id="silent", outcome=0.0),
        conversation(user("hi"), assistant("", suggestion=""), user("hm"), assistant("x"), id="quiet", outcome=1.0),
    ]
    return [*long[:5], *odd, *long[5:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("q")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return word_policy()


@pytest.fixture(scope="module")
def q_function(policy: Policy, folder: Path) -> QFunction:
    return q_function_of(policy, folder)


@pytest.fixture(scope="module")
def scorer(q_function: QFunction, folder: Path) -> LogScorer:
    del q_function  # it is in the folder now
    return LogScorer.load(folder, CONFIG)


def test_scores_are_what_the_fit_reads(scorer: LogScorer, policy: Policy, q_function: QFunction):
    labelled = [c for c in talks() if c.end == "terminated"]
    sequences = [
        sequence
        for i, c in enumerate(labelled)
        for sequence in labelled_sequences(c, tokenize(c, policy.renderer), gamma=1.0, index=i, group=c.id)
    ]
    expected = predict(q_function, sequences, tokens_per_batch=TOKENS)
    scores = scorer.score(labelled)
    assert [(s.conversation_id, s.turn) for s in scores] == list(zip(expected.group, expected.turn, strict=True))
    assert [s.q_value for s in scores] == pytest.approx(expected.q_value, abs=1e-6)
    assert [s.state_value for s in scores] == pytest.approx(expected.state_value, abs=1e-6)
    assert max(abs(s.q_value - s.state_value) for s in scores) > 1e-3, "or the two could be swapped"


def test_the_reward_is_what_an_improvement_step_is_paid(scorer: LogScorer, policy: Policy, q_function: QFunction):
    scores = scorer.score(talks())
    turns = [tokenize(c, policy.renderer) for c in talks()]
    prompts, responses = (sum((getattr(t, name) for t in turns), ()) for name in ("prompts", "responses"))
    rewards = q_function.pessimistic_values(prompts, responses, pessimism=2.0, tokens_per_batch=TOKENS)
    assert [s.reward for s in scores] == pytest.approx(rewards.tolist(), abs=1e-5)
    assert all(s.reward < s.q_value + 1e-3 for s in scores)


def test_every_decision_point_has_a_score_in_the_order_of_the_log(scorer: LogScorer):
    expected = [
        (c.id, turn) for c in talks() for turn in range(sum(message.role == "assistant" for message in c.messages))
    ]
    assert [(s.conversation_id, s.turn) for s in scorer.score(talks())] == expected
    assert ("censored", 0) in expected
    assert scorer.score([]) == []


def test_the_size_of_the_pieces_makes_no_difference(scorer: LogScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = tmp_path / "log.jsonl"
    write_conversations(log, talks())
    whole = list(score_log(scorer, log))
    monkeypatch.setattr(log_scores, "_PIECE_BYTES", 300)
    seen: list[int] = []
    in_pieces = list(score_log(scorer, log, progress=lambda _, done, __: seen.append(done)))
    assert len(seen) > 5
    assert seen[-1] == log.stat().st_size
    assert [(s.conversation_id, s.turn) for s in in_pieces] == [(s.conversation_id, s.turn) for s in whole]
    assert [s.q_value for s in in_pieces] == pytest.approx([s.q_value for s in whole], abs=1e-5)


def test_scores_are_written_whole_and_added_up(tmp_path: Path):
    a = PointScore(conversation_id="é", turn=0, q_value=0.25, state_value=0.5, reward=-1.0)
    b = PointScore(conversation_id="b", turn=1, q_value=0.75, state_value=0.5, reward=0.0)
    totals = write_scores(tmp_path / "scores.jsonl", [a, b])
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [PointScore(**json.loads(line)) for line in lines] == [a, b]
    assert totals.num_points == 2
    assert totals.means() == {"mean_q_value": 0.5, "mean_state_value": 0.5, "mean_reward": -0.5}
    assert write_scores(tmp_path / "none.jsonl", []).means()["mean_q_value"] == 0.0


def test_a_log_whose_size_is_not_known_is_refused(scorer: LogScorer):
    with pytest.raises(ValueError, match="/dev/null: must be a regular file"):
        next(score_log(scorer, Path("/dev/null")))


def test_a_folder_without_a_q_function_is_named(policy: Policy, tmp_path: Path):
    policy.save(tmp_path)
    with pytest.raises(ValueError, match="no Q-function checkpoint"):
        LogScorer.load(tmp_path, CONFIG)
