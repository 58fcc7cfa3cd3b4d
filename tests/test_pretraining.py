"""Start policy and first Q-function on one trunk."""

import numpy as np
import pytest
import tiny
from test_q_function import answered_logs

from iterative_ppo.config import Config, PolicyConfig, QFunctionConfig
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.pretraining import clone_with_outcomes
from iterative_ppo.q_fit import predict
from iterative_ppo.q_function import QFunction, QFunctionCard

CONFIG = Config(
    policy=PolicyConfig(clone_passes=6, clone_learning_rate=5e-3),
    q_function=QFunctionConfig(num_heads=2, next_message_weight=0.5),
)
CARD = QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="logs", metrics={})


def pleasing_sells(num_conversations: int) -> list[LabelledSequence]:
    """Who hears an `a` or a `b` buys."""
    return [
        LabelledSequence(**{**fields(sequence), "returns": (float(sequence.next_messages[0][0] == tiny.F),)})
        for sequence in answered_logs(num_conversations, seed=0)
    ]


def fields(sequence: LabelledSequence) -> dict[str, object]:
    return {name: getattr(sequence, name) for name in LabelledSequence.__slots__}


def test_policy_and_q_function_are_learnt_together(tmp_path):
    policy = tiny.letter_policy()
    sequences = pleasing_sells(600)
    held_out = [row >= 540 for row in range(600)]
    q_function, history = clone_with_outcomes(
        policy, sequences, held_out=held_out, config=CONFIG, seed=0, progress=lambda *_: None
    )
    assert history.held_out_losses[history.best_pass] < history.held_out_losses[0] - 0.5
    assert q_function.model.base_model is policy.model.base_model

    read = predict(q_function, sequences[540:], tokens_per_batch=1024)
    assert ((read.q_value > 0.5) == (read.target > 0.5)).mean() > 0.9

    prompts = [s.token_ids[: s.spans[0][0]] for s in sequences[540:]]
    responses = [s.token_ids[s.spans[0][0] : s.spans[0][1]] for s in sequences[540:]]
    logprobs = policy.logprobs(prompts, responses, tokens_per_batch=1024)
    loss = -sum(map(sum, logprobs)) / sum(map(len, logprobs))
    assert loss == pytest.approx(history.held_out_losses[history.best_pass], abs=1e-4)

    q_function.save(tmp_path / "q", CARD, policy.tokenizer)
    policy.save(tmp_path / "policy")
    loaded = QFunction.load(tmp_path / "q")
    np.testing.assert_allclose(
        predict(loaded, sequences[:9], tokens_per_batch=1024).q_value,
        predict(q_function, sequences[:9], tokens_per_batch=1024).q_value,
        atol=1e-6,
    )
