"""Fitting a read-out of a frozen trunk: heads alone, on features that one pass over the logs gives.

The trunk says at every token what it makes of the conversation, h_t and means of h over what that token sees; what it says
does not change, so every ensemble member, penalty, fold and TD(lambda) return is a regression on the same numbers, and on
the customer's words. N positions that are read, D the width of h, W words, F = 4 D + W features, M ensemble members.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from iterative_ppo import distributed
from iterative_ppo.config import QFunctionConfig
from iterative_ppo.conversation_features import word_shares
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.q_fit import Predictions, bootstrap_weights, predict, require_returns_for, unit_of
from iterative_ppo.q_function import QFunction, TokenIds
from iterative_ppo.read_out_regression import PENALTIES, Heads, Points, Regression
from iterative_ppo.supervised import FitHistory, Progress, no_progress

_Found = TypeVar("_Found")

_MOST_WORDS = 1536
_FEWEST_CONVERSATIONS_OF_A_WORD = 5
_LARGEST_SHARE_OF_A_WORD = 0.9
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOutHistory(FitHistory):
    """Losses by pass, of which there is one but for TD(lambda), and how the penalty was chosen.

    Example:
        ReadOutHistory(train_losses=(0.58,), held_out_losses=(0.69, 0.61), best_pass=1, penalty=1.0,
                       penalty_losses={"10": 0.64, "1": 0.61, "0.1": 0.63})

    `held_out_losses` are of the ensemble's Q, and begin with the constant: the mean return of each member's conversations.
    """

    penalty: float
    penalty_losses: dict[str, float]
    """Cross-validated loss on the training conversations by penalty, from `inf`, the constant, to the weakest."""


def read_positions(sequence: LabelledSequence) -> list[int]:
    """Where a sequence is read: each state, the middle of each response, and its end."""
    return [position for position, *_ in _places(sequence)]


def fit_read_out(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    *,
    held_out: Sequence[bool],
    config: QFunctionConfig,
    features: FeatureCache,
    tokens_per_batch: int,
    generator: np.random.Generator,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None = None,
    progress: Progress = no_progress,
) -> ReadOutHistory:
    """Regresses Q's heads, and what words are worth, on the returns by L-BFGS: mean loss + penalty/2 |weights|², in
    standardised features, those of means times their reliability.

    The end of a response, the state before it and one token in between weigh the same, as in `fit_q_function`, where all
    tokens in between weigh that together. Q is fitted to all of the training conversations, and the ensemble's members are
    around it as far as bootstraps of them lead. HL-Gauss, which is a way to train a trunk, is squared error here. The penalty
    is that of the lowest loss at the ends of responses of conversations left out, in folds of the training conversations;
    where none is below that of the mean return, Q is the mean return.

    Args:
        q_function: a read-out of a frozen trunk; its heads and words are set.
        held_out: the sequences that decide between passes, always by their returns as given.
        features: what is known of the trunk's features; what is lacking is computed and kept there.
        retarget: makes new targets of the training sequences from Q's present predictions on them (TD(λ) returns);
            asked before every pass but the first, of `max_passes` at most.

    Raises:
        ValueError: returns outside [0, 1] with the logistic link.
    """
    require_returns_for(q_function.link, np.concatenate([sequence.returns for sequence in sequences]))
    assert any(held_out), "nothing to decide by"
    weight_of = bootstrap_weights(sequences, num_heads=q_function.heads.shape[0], generator=generator)
    read = _read(q_function, sequences, features, tokens_per_batch=tokens_per_batch, progress=progress)

    def fit() -> ReadOutHistory:
        training = [row for row, out in enumerate(held_out) if not out]
        fitting = _Fitting(q_function, sequences, read, training, weight_of, config)
        return fitting.fit(
            [row for row, out in enumerate(held_out) if out],
            generator,
            retarget,
            lambda train: predict(q_function, train, tokens_per_batch=tokens_per_batch, features=features),
            progress,
        )

    return _on_main(q_function, fit)


def refit_read_out(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    targets: Sequence[tuple[float, ...]],
    *,
    penalty: float,
    config: QFunctionConfig,
    features: FeatureCache,
    tokens_per_batch: int,
    generator: np.random.Generator,
    progress: Progress = no_progress,
) -> None:
    """The same regression with a penalty that has been chosen, on all sequences: those held out have done their work.

    Args:
        targets: of each sequence, one a span.
    """
    weight_of = bootstrap_weights(sequences, num_heads=q_function.heads.shape[0], generator=generator)
    read = _read(q_function, sequences, features, tokens_per_batch=tokens_per_batch, progress=progress)

    def refit() -> None:
        _Fitting(q_function, sequences, read, range(len(sequences)), weight_of, config).refit(targets, penalty)

    _on_main(q_function, refit)


def _on_main(q_function: QFunction, fit: Callable[[], _Found]) -> _Found:
    """What a fit finds in the main process, with the Q-function that it leaves in all of them."""

    def fitted() -> tuple[_Found, Tensor, Tensor]:
        found = fit()
        return found, q_function.heads.detach().cpu(), q_function.word_values.cpu()

    found, heads, word_values = distributed.on_main(fitted)
    with torch.no_grad():
        q_function.heads.copy_(heads)
        q_function.word_values.copy_(word_values)
    return found


def _read(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    features: FeatureCache,
    *,
    tokens_per_batch: int,
    progress: Progress,
) -> list[Tensor]:
    return features.of(
        q_function,
        [sequence.token_ids for sequence in sequences],
        [read_positions(sequence) for sequence in sequences],
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What is read at N places: hidden state, means and shares of words [N, 4 D + W], and the reliabilities of the means over
    all tokens and over the others' (of which the words are)."""

    feature_NF: Tensor
    of_all_N1: Tensor
    of_others_N1: Tensor

    def means(self, num_states: int) -> Tensor:
        """Of all tokens, and of the recent ones: a view."""
        return self.feature_NF[:, num_states : 3 * num_states]

    def of_others(self, num_states: int) -> Tensor:
        """The others' mean and words: a view."""
        return self.feature_NF[:, 3 * num_states :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Units:
    """Where standardised features have their zero and their one.

    Means and words are multiplied by their reliability after that, in units in which they vary by 1 all the same: a penalty
    means the same for short conversations. A word's unit is the root of its deviation, between a unit for each, in which the
    rare words drown the others, and one for all, in which the frequent ones do; all words together vary as much as a state.
    """

    mean_F: Tensor
    unit_F: Tensor
    num_states: int

    @classmethod
    def of(cls, said: _Said, num_states: int) -> "_Units":
        variance_F, mean_F = torch.var_mean(said.feature_NF, dim=0, correction=0)
        unit_F = variance_F.sqrt()
        word_W = unit_F[4 * num_states :]
        if len(word_W):
            word_W.copy_((word_W * word_W.mean() * len(word_W) / num_states).sqrt())
        unit_F = unit_F.where(unit_F > _SMALLEST_DEVIATION, 1.0)
        unit_F[num_states : 3 * num_states] *= said.of_all_N1.square().mean().sqrt()
        unit_F[3 * num_states :] *= said.of_others_N1.square().mean().sqrt()
        return cls(mean_F=mean_F, unit_F=unit_F, num_states=num_states)

    def standardised(self, said: _Said) -> Tensor:
        """What is read in the fit's units [N, F]; in place."""
        said.feature_NF.sub_(self.mean_F).div_(self.unit_F)
        said.means(self.num_states).mul_(said.of_all_N1)
        said.of_others(self.num_states).mul_(said.of_others_N1)
        return said.feature_NF

    def unstandardised(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Heads [M, 4 D + 3] for the features as they are read, and what each word is worth [M, W]."""
        weight_MF = heads.weight_MF / self.unit_F
        of_mean_MF = -weight_MF * self.mean_F
        of_states_M, of_all_M, of_others_M = (
            part_MF.sum(1) for part_MF in of_mean_MF.tensor_split((self.num_states, 3 * self.num_states), dim=1)
        )
        constants_M3 = torch.stack([of_all_M, of_others_M, heads.bias_M + of_states_M], dim=1)
        num_read = 4 * self.num_states
        return torch.cat([weight_MF[:, :num_read], constants_M3], dim=1), weight_MF[:, num_read:]


class _Fitting:
    """A Q-function's regression on some of the sequences."""

    def __init__(
        self,
        q_function: QFunction,
        sequences: Sequence[LabelledSequence],
        read: Sequence[Tensor],
        training: Sequence[int],
        weight_of: dict[str, Tensor],
        config: QFunctionConfig,
    ) -> None:
        self.q_function = q_function
        self.sequences = sequences
        self.read = read
        self.config = config
        returns = np.concatenate([sequence.returns for sequence in sequences])
        self.return_unit = 1.0 if q_function.link == "logistic" else unit_of(returns)
        self.train = [sequences[row] for row in training]
        self.num_states = q_function.model.config.get_text_config().hidden_size
        self.words = _words(q_function, self.train)
        said = self._said(training)
        self.units = _Units.of(said, self.num_states)
        self.regression = Regression(
            Points(
                feature_NF=self.units.standardised(said),
                member_weight_NM=torch.stack([weight_of[s.group] for s in self.train for _ in _places(s)]),
                target_N=self._targets([sequence.returns for sequence in self.train]),
                is_end_N=torch.tensor([is_end for s in self.train for *_, is_end in _places(s)]),
                group_N=[s.group for s in self.train for _ in _places(s)],
            ),
            is_logistic=q_function.link == "logistic",
            is_cross_entropy=config.loss == "binary_cross_entropy",
        )

    def refit(self, targets: Sequence[tuple[float, ...]], penalty: float) -> None:
        """Leaves the Q-function with the heads of one penalty and the training sequences' targets."""
        self._set(self.regression.minimised(self.regression.constant(), self._targets(targets), penalty))

    def fit(
        self,
        held_out: Sequence[int],
        generator: np.random.Generator,
        retarget: Callable[[Predictions], list[tuple[float, ...]]] | None,
        predict_on: Callable[[Sequence[LabelledSequence]], Predictions],
        progress: Progress,
    ) -> ReadOutHistory:
        """Leaves the Q-function with the best pass's heads; the constant's, where none is better."""
        regression = self.regression
        said = self._said(held_out)
        is_end_N = torch.tensor([is_end for row in held_out for *_, is_end in _places(self.sequences[row])])
        feature_NF = self.units.standardised(said)[is_end_N]
        target_N = torch.cat([_targets(s, s.returns) for s in map(self.sequences.__getitem__, held_out)])[is_end_N]

        def held_out_loss(heads: Heads) -> float:
            scalar_N = heads.mean().scalars(feature_NF)[:, 0]
            return float(regression.element_loss(scalar_N, target_N / self.return_unit).mean())

        constant = regression.constant()
        penalty_losses = regression.penalty_losses(generator, progress)
        penalty = min(PENALTIES, key=penalty_losses.__getitem__)
        train_target_N = regression.points.target_N
        heads = regression.minimised(constant, train_target_N, penalty)
        held_out_losses = [held_out_loss(constant), held_out_loss(heads)]
        train_losses = [regression.train_loss(heads, train_target_N)]
        best_pass = int(penalty_losses[penalty] < penalty_losses[float("inf")])
        best = heads if best_pass else constant
        self._set(heads)
        for pass_ in range(2, self.config.max_passes + 1):
            if retarget is None:
                break
            train_target_N = self._targets(retarget(predict_on(self.train)))
            heads = regression.minimised(heads, train_target_N, penalty)
            self._set(heads)
            train_losses.append(regression.train_loss(heads, train_target_N))
            held_out_losses.append(held_out_loss(heads))
            if held_out_losses[-1] < held_out_losses[best_pass]:
                best_pass, best = pass_, heads
            elif pass_ - max(best_pass, 1) >= self.config.patience_passes:
                break
        self._set(best)
        return ReadOutHistory(
            train_losses=tuple(train_losses),
            held_out_losses=tuple(held_out_losses),
            best_pass=best_pass,
            penalty=penalty,
            penalty_losses={f"{tried:g}": loss for tried, loss in penalty_losses.items()},
        )

    def _said(self, rows: Sequence[int]) -> _Said:
        """What is read in some sequences, in one matrix: it is the largest thing here."""
        marks = self.q_function.marks
        assert marks is not None
        num_read = 4 * self.num_states
        feature_NF = torch.empty(sum(len(self.read[row]) for row in rows), num_read + len(self.words))
        start = 0
        for row in rows:
            token_ids, own = self.sequences[row].token_ids, slice(start, start + len(self.read[row]))
            feature_NF[own, :num_read] = self.read[row][:, :num_read]
            feature_NF[own, num_read:] = word_shares(token_ids, read_positions(self.sequences[row]), self.words, marks)
            start = own.stop
        of_all_N1, of_others_N1, _ = torch.cat([self.read[row][:, num_read:] for row in rows]).split(1, dim=1)
        said = _Said(feature_NF=feature_NF, of_all_N1=of_all_N1, of_others_N1=of_others_N1)
        said.means(self.num_states).div_(of_all_N1)
        said.of_others(self.num_states)[:, : self.num_states].div_(of_others_N1.clamp(min=_SMALLEST_DEVIATION))
        return said

    @torch.no_grad()
    def _set(self, heads: Heads) -> None:
        """Gives the Q-function heads for features and returns in their own units."""
        head_MF, word_MW = self.units.unstandardised(heads)
        self.q_function.heads.copy_(self.return_unit * head_MF)
        self.q_function.set_words(torch.tensor(self.words, dtype=torch.long), self.return_unit * word_MW.T)

    def _targets(self, targets: Sequence[tuple[float, ...]]) -> Tensor:
        """Of every training point, in the fit's unit."""
        target_N = torch.cat([_targets(s, target) for s, target in zip(self.train, targets, strict=True)])
        return target_N.clamp(0, 1) if self.q_function.link == "logistic" else target_N / self.return_unit


def _words(q_function: QFunction, sequences: Sequence[LabelledSequence]) -> TokenIds:
    """The tokens that others said in the most conversations, but for those in nearly all or hardly any of them."""
    assert q_function.marks is not None
    said_in: dict[str, set[int]] = {}
    for sequence in sequences:
        token_T = torch.tensor(sequence.token_ids)
        said_in.setdefault(sequence.group, set()).update(token_T[q_function.marks.others(token_T[None])[0]].tolist())
    num_conversations = Counter(token for said in said_in.values() for token in said)
    most = _LARGEST_SHARE_OF_A_WORD * len(said_in)
    kept = [
        (-count, token)
        for token, count in num_conversations.items()
        if _FEWEST_CONVERSATIONS_OF_A_WORD <= count <= most
    ]
    return tuple(token for _, token in sorted(kept)[:_MOST_WORDS])


def _places(sequence: LabelledSequence) -> Iterator[tuple[int, int, bool]]:
    """Position, span, and whether it is the end of a response, of all that is read."""
    for span, (start, end) in enumerate(sequence.spans):
        yield start - 1, span, False
        if end > start + 1:
            yield round((start - 1 + end - 1) / 2), span, False
        if end > start:
            yield end - 1, span, True


def _targets(sequence: LabelledSequence, targets: tuple[float, ...]) -> Tensor:
    return torch.tensor([targets[span] for _, span, _ in _places(sequence)], dtype=torch.float64)
