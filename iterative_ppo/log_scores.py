"""Q at every decision point of a log, a piece of the file at a time: no more of it is in memory than that."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from iterative_ppo.config import Config
from iterative_ppo.conversation_log import read_part, write_lines
from iterative_ppo.conversations import Conversation
from iterative_ppo.loading import load_q_and_renderer
from iterative_ppo.q_function import QFunction
from iterative_ppo.rendering import Renderer
from iterative_ppo.supervised import Progress, no_progress
from iterative_ppo.turns_to_tokens import response_sequences, tokenize

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PointScore:
    """Q at one decision point: a line of a file of scores.

    Example:
        PointScore(conversation_id="c-001", turn=0, q_value=0.61, state_value=0.55, reward=0.58)
    """

    conversation_id: str
    turn: int
    """Index among the decision points of the conversation, from 0."""
    q_value: float
    """Of the response; what the one-label checkpoint gives."""
    state_value: float
    """Before the response: what can be said without knowing it."""
    reward: float
    """The ensemble's mean minus `q_function.pessimism` standard deviations: what an improvement step is paid."""


@dataclass(slots=True, kw_only=True)
class ScoreTotals:
    """Counts and sums over scores.

    Example:
        ScoreTotals(num_points=2, q_value=1.2, state_value=1.1, reward=1.1)
    """

    num_points: int = 0
    q_value: float = 0.0
    state_value: float = 0.0
    reward: float = 0.0

    def means(self) -> dict[str, float]:
        """Means over the points; 0 where there are none."""
        sums = {"q_value": self.q_value, "state_value": self.state_value, "reward": self.reward}
        return {f"mean_{name}": total / max(self.num_points, 1) for name, total in sums.items()}


class LogScorer:
    """A Q-function with its tokenizer, and what conversations are read with.

    Args:
        renderer: with the policy's context and room for a response, so that prompts are cut as the policy's are.
        pessimism: standard deviations of the ensemble that the reward lies below its mean.
    """

    def __init__(self, q_function: QFunction, renderer: Renderer, *, pessimism: float, tokens_per_batch: int) -> None:
        self.q_function = q_function
        self.renderer = renderer
        self.pessimism = pessimism
        self.tokens_per_batch = tokens_per_batch

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> "LogScorer":
        """Loads a Q-function's folder; ValueError with one line where it cannot be."""
        q_function, renderer = load_q_and_renderer(folder, config)
        return cls(
            q_function,
            renderer,
            pessimism=config.q_function.pessimism,
            tokens_per_batch=config.compute.tokens_per_batch,
        )

    def score(self, conversations: Iterable[Conversation]) -> list[PointScore]:
        """All decision points of some conversations, in order, in one pass a conversation."""
        rows, positions, points = [], [], []
        for conversation in conversations:
            for sequence in response_sequences(tokenize(conversation, self.renderer)):
                rows.append(sequence.token_ids)
                positions.append([place for start, end in sequence.spans for place in (start - 1, end - 1)])
                points += [(conversation.id, turn) for turn in sequence.turns]
        if not points:
            return []
        members = self.q_function.read_members(rows, positions, tokens_per_batch=self.tokens_per_batch)
        scalar_N2M = torch.cat(members).double().unflatten(0, (-1, 2))
        value_N2 = self.q_function.to_value(scalar_N2M.mean(-1))
        reward_N = self.q_function.pessimistic_value(scalar_N2M[:, 1], pessimism=self.pessimism)
        return [
            PointScore(conversation_id=name, turn=turn, q_value=q_value, state_value=state_value, reward=reward)
            for (name, turn), (state_value, q_value), reward in zip(
                points, value_N2.tolist(), reward_N.tolist(), strict=True
            )
        ]


def pieces(span: range) -> list[range]:
    """A range of a log's bytes in ranges small enough to be scored at once."""
    return [span[start : start + _PIECE_BYTES] for start in range(0, len(span), _PIECE_BYTES)]


def whole(log: Path) -> range:
    """All bytes of a log. Raises ValueError where it is not a file whose size is known."""
    if not log.is_file():
        raise ValueError(f"{log}: must be a regular file")
    return range(log.stat().st_size)


def score_log(scorer: LogScorer, log: Path, *, progress: Progress = no_progress) -> Iterator[PointScore]:
    """The decision points of a log, in its order.

    Raises:
        LogError: a line is malformed.
    """
    span = whole(log)
    for piece in pieces(span):
        yield from scorer.score(read_part(log, piece))
        progress("score", piece.stop, span.stop)


def write_scores(path: str | os.PathLike[str], scores: Iterable[PointScore]) -> ScoreTotals:
    """Writes scores as JSON Lines, whole or not at all, and adds them up."""
    totals = ScoreTotals()

    def lines() -> Iterator[bytes]:
        for score in scores:
            totals.num_points += 1
            totals.q_value += score.q_value
            totals.state_value += score.state_value
            totals.reward += score.reward
            yield json.dumps(asdict(score), ensure_ascii=False, allow_nan=False).encode()

    write_lines(path, lines())
    return totals
