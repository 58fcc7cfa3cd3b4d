"""Fitting Q with all decision points of a conversation in one pass, against one row per turn.

One row per turn is what reward-model training does: a row is a conversation up to the end of one response, and its
value is read at the last token. Both ways start from the same weights and take the same optimizer steps over the same
conversations, in micro-batches of the same number of tokens, sorted by length. That both read the same Q at the same
places is checked first; the two alternate in each repetition. One pass trains more: the state before each response and
the tokens within it as well.

    OMP_NUM_THREADS=1 python benchmarks/q_fit.py
    OMP_NUM_THREADS=1 python benchmarks/q_fit.py --turns 8 --repetitions 11

Prints a line for each number of turns, medians over the repetitions, and, last, one JSON object: `ratio` is seconds of
one row per turn over seconds of one pass, at 8 turns (at the most turns where 8 is not among them); `rows` hold all
figures. `share_of_flop_bound` is the time of the bare arithmetic (6 FLOP a parameter and token, at the rate of a matrix
product of that size measured beside it) over the time that one pass took.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flop_bound import flop_per_second, num_matrix_parameters
from torch import Tensor, nn

from iterative_ppo.batching import pad_right
from iterative_ppo.config import PolicyConfig, QFunctionConfig
from iterative_ppo.conversations import Conversation, Message
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.losses import binary_cross_entropy
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import Regression, predict
from iterative_ppo.q_from_logs import labelled
from iterative_ppo.q_function import QFunction
from iterative_ppo.rendering import TokenIds
from iterative_ppo.supervised import accumulate_gradient

WORDS = "i you we shoes trail light budget around eighty please think about the colour size blue red maybe later yes no"
CONVERSATIONS_PER_STEP = 8
TOKENS_PER_BATCH = 2048
LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to fit: what is trained, the loss of some of its rows, and which rows each conversation has."""

    model: nn.Module
    loss_sum_and_weight: Callable[[list[int]], tuple[Tensor, Tensor]]
    lengths: list[int]
    rows_of_conversation: list[list[int]]
    optimizer: torch.optim.Optimizer


def synthetic_conversations(
    num_conversations: int, num_turns: int, generator: np.random.Generator
) -> list[Conversation]:
    """Twelve random words a message, and an outcome by the toss of a coin."""

    def message(role: str) -> Message:
        return Message(role=role, content=" ".join(generator.choice(WORDS.split(), 12)))

    return [
        Conversation(
            id=str(i),
            messages=tuple(message(role) for _ in range(num_turns) for role in ("user", "assistant")),
            outcome=float(generator.integers(2)),
            end="terminated",
        )
        for i in range(num_conversations)
    ]


def in_one_pass(q_function: QFunction, sequences: Sequence[LabelledSequence]) -> Way:
    """All decision points of a conversation on one row."""
    q_function = copy.deepcopy(q_function)
    config = QFunctionConfig(num_heads=1, next_message_weight=0.0)
    regression = Regression(q_function, sequences, [False] * len(sequences), config, np.random.default_rng(0))
    return Way(
        model=regression.train(),
        loss_sum_and_weight=regression.loss_sum_and_weight,
        lengths=[len(sequence.token_ids) for sequence in sequences],
        rows_of_conversation=[[row] for row in range(len(sequences))],
        optimizer=_optimizer(regression),
    )


def row_per_turn(
    q_function: QFunction, sequences: Sequence[LabelledSequence], rows: Sequence[TokenIds], targets: Sequence[float]
) -> Way:
    """Each decision point on a row of its own, which ends with its response."""
    q_function = copy.deepcopy(q_function)

    def loss_sum_and_weight(batch: list[int]) -> tuple[Tensor, Tensor]:
        token_BT, mask_BT = pad_right([rows[row] for row in batch])
        is_end_BT = mask_BT & (mask_BT.cumsum(1) == mask_BT.sum(1, keepdim=True))
        hidden_BD = q_function.hidden(token_BT, is_end_BT)[is_end_BT]
        target_B1 = torch.tensor([[targets[row]] for row in batch])
        loss_B1 = binary_cross_entropy(hidden_BD @ q_function.heads.T, target_B1)
        return loss_B1.sum(), torch.tensor(float(len(batch)))

    ends = np.cumsum([len(sequence.spans) for sequence in sequences]).tolist()
    return Way(
        model=q_function.train(),
        loss_sum_and_weight=loss_sum_and_weight,
        lengths=[len(row) for row in rows],
        rows_of_conversation=[list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)],
        optimizer=_optimizer(q_function),
    )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def seconds_of_pass(way: Way) -> float:
    """One gradient pass over all conversations."""
    parameters = [p for p in way.model.parameters() if p.requires_grad]
    started = time.perf_counter()
    for start in range(0, len(way.rows_of_conversation), CONVERSATIONS_PER_STEP):
        chosen = way.rows_of_conversation[start : start + CONVERSATIONS_PER_STEP]
        rows = [row for conversation in chosen for row in conversation]
        lengths = [way.lengths[row] for row in rows]
        accumulate_gradient(way.loss_sum_and_weight, rows, lengths, parameters, tokens_per_batch=TOKENS_PER_BATCH)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        way.optimizer.step()
        way.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def check_same_values(q_function: QFunction, sequences: Sequence[LabelledSequence], rows: Sequence[TokenIds]) -> None:
    """Stops where the two ways do not read the same Q at the ends of the responses."""
    in_one = predict(q_function, sequences, tokens_per_batch=TOKENS_PER_BATCH).q_value
    read = q_function.read(rows, [[len(row) - 1] for row in rows], tokens_per_batch=TOKENS_PER_BATCH)
    by_row = q_function.to_value(torch.tensor(read, dtype=torch.float64))[:, 0].numpy()
    difference = float(np.abs(in_one - by_row).max())
    if difference > LARGEST_DIFFERENCE or in_one.std() < 10 * LARGEST_DIFFERENCE:
        raise SystemExit(f"the two ways read Q differently, by {difference:.1e} of a deviation of {in_one.std():.1e}")


def measure(policy: Policy, num_turns: int, num_conversations: int, num_repetitions: int) -> dict[str, float]:
    """The figures of one number of turns."""
    conversations = synthetic_conversations(num_conversations, num_turns, np.random.default_rng(num_turns))
    sequences, _ = labelled(conversations, policy, gamma=1.0)
    assert len(sequences) == num_conversations, "a conversation does not fit into the context"
    rows = [sequence.token_ids[:end] for sequence in sequences for _, end in sequence.spans]
    targets = [target for sequence in sequences for target in sequence.returns]
    q_function = QFunction.on_trunk(policy.model, link="logistic", num_heads=1, pad_id=policy.pad_id, seed=0)
    check_same_values(q_function, sequences, rows)
    ways = in_one_pass(q_function, sequences), row_per_turn(q_function, sequences, rows, targets)
    hidden_size = policy.config.hidden_size
    seconds = []
    bound_seconds = []
    num_tokens = sum(ways[0].lengths)
    for repetition in range(num_repetitions + 1):
        pair = [seconds_of_pass(way) for way in ways]
        rate = flop_per_second(TOKENS_PER_BATCH, hidden_size, 3 * hidden_size)
        if repetition > 0:  # the first warms up
            seconds.append(pair)
            bound_seconds.append(6 * num_matrix_parameters(q_function.model.base_model) * num_tokens / rate)
    one_pass_seconds, row_seconds = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "turns": num_turns,
        "tokens": num_tokens / num_conversations,
        "row_per_turn_tokens": sum(ways[1].lengths) / num_conversations,
        "seconds": one_pass_seconds,
        "row_per_turn_seconds": row_seconds,
        "ratio": statistics.median(row / one for one, row in seconds),
        "smallest_ratio": min(row / one for one, row in seconds),
        "largest_ratio": max(row / one for one, row in seconds),
        "share_of_flop_bound": statistics.median(b / one for b, (one, _) in zip(bound_seconds, seconds, strict=True)),
    }


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    config = PolicyConfig(hidden_size=128, num_layers=4, context_tokens=2048, max_response_tokens=64)
    policy = Policy.tiny([WORDS] * 20, config, seed=0)
    rows = []
    for num_turns in arguments.turns:
        row = measure(policy, num_turns, arguments.conversations, arguments.repetitions)
        rows.append(row)
        print(
            f"{num_turns} turns: {row['tokens']:.0f} tokens a conversation against {row['row_per_turn_tokens']:.0f}; "
            f"{row['seconds']:.3f} s a pass against {row['row_per_turn_seconds']:.3f} s, ratio {row['ratio']:.2f} "
            f"({row['smallest_ratio']:.2f} - {row['largest_ratio']:.2f}); "
            f"{row['share_of_flop_bound']:.0%} of the FLOP bound",
            flush=True,
        )
    ratio = next((row["ratio"] for row in rows if row["turns"] == 8), rows[-1]["ratio"])
    print(json.dumps({"num_parameters": policy.num_parameters, "ratio": ratio, "rows": rows}))


if __name__ == "__main__":
    main()
