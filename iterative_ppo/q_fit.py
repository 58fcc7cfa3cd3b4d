"""Fitting Q by regression on returns, and saying honestly how well: held out, by conversation, against baselines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from iterative_ppo import distributed, losses
from iterative_ppo.batching import own_micro_batches, pad_right, pad_values
from iterative_ppo.config import QFunctionConfig
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.labelled_sequence import LabelledSequence, responses
from iterative_ppo.q_function import Link, QFunction, TokenIds
from iterative_ppo.sharding import gathered
from iterative_ppo.supervised import FitHistory, Progress, fit_passes, no_progress
from iterative_ppo.word_tasks import WordTasks

_NUM_BINS = 51
_HISTOGRAM_RIDGE = 1e-3
_RETURN_RIDGE = 1e-6
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Q and the state's value at decision points, on one row each.

    Example:
        Predictions(q_value=[.6], state_value=[.5], target=[1.], group=["c-001"], turn=[0])
    """

    q_value: np.ndarray
    """Read at the end of the response."""
    state_value: np.ndarray
    """Read at the last token before the response: what can be said without knowing the response."""
    target: np.ndarray
    group: np.ndarray
    turn: np.ndarray


def fit_q_function(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    *,
    held_out: Sequence[bool],
    config: QFunctionConfig,
    is_refit: bool = False,
    tokens_per_batch: int,
    generator: np.random.Generator,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None = None,
    progress: Progress = no_progress,
) -> FitHistory:
    """Regresses Q on the returns, all decision points of a conversation in one pass.

    At each decision point the end of the response weighs 1, the state before it weighs 1, and the tokens in between
    weigh 1 together, so that Q is also a token-level value. Ensemble member m sees each
    conversation with a weight drawn from Poisson(1) (the bootstrap); a single member sees all with weight 1.
    What answers a response, and which of its words have been heard before, are predicted beside; they weigh `next_message_weight`,
    see `WordTasks`.

    Args:
        held_out: the sequences that decide when to stop, always by their returns as given.
        is_refit: whether it has been fitted to an earlier policy's returns.
        retarget: makes new targets of the training sequences from Q's present predictions on them (TD(λ) returns);
            asked before every pass, but not before Q has been fitted once.

    Raises:
        ValueError: returns outside [0, 1] with the logistic link.
    """
    rows = range(len(sequences))
    train_rows = [row for row in rows if not held_out[row]]
    train = [sequences[row] for row in train_rows]
    if _has_units(q_function, config):
        # There is no bias in the heads: left to gradient steps, returns far from 0 would take passes to find.
        _ridge_heads(
            q_function,
            train,
            lambda _, return_N: return_N[:, None].expand(-1, q_function.heads.shape[0]),
            ridge=_RETURN_RIDGE,
            tokens_per_batch=tokens_per_batch,
        )
    regression = Regression(q_function, sequences, held_out, config, generator)

    def read_out() -> None:
        if regression.histogram is not None:
            _read_out(regression.histogram, train, tokens_per_batch=tokens_per_batch)

    def before_pass(pass_: int) -> None:
        if (pass_ > 1 or is_refit) and retarget is not None:
            if pass_ > 1:  # before that a histogram knows nothing, and the heads of a refit do
                read_out()
            new_targets = retarget(
                predict(q_function, train, tokens_per_batch=tokens_per_batch, scale=regression.scale)
            )
            for row, target in zip(train_rows, new_targets, strict=True):
                regression.targets[row] = tuple(np.clip(target, 0, 1)) if q_function.link == "logistic" else target

    history = fit_passes(
        regression,
        regression.loss_sum_and_weight,
        [len(sequence.token_ids) for sequence in sequences],
        train_rows=train_rows,
        held_out_rows=[row for row in rows if held_out[row]],
        max_passes=config.refit_passes if is_refit else config.max_passes,
        patience_passes=config.patience_passes,
        learning_rate=config.learning_rate,
        tokens_per_batch=tokens_per_batch,
        generator=generator,
        what="fit Q",
        progress=progress,
        before_pass=before_pass,
    )
    read_out()
    regression.finish()
    return history


class Regression(nn.Module):
    """What a fit trains, the Q-function and the auxiliary heads that end with the fit, and its loss."""

    def __init__(
        self,
        q_function: QFunction,
        sequences: Sequence[LabelledSequence],
        held_out: Sequence[bool],
        config: QFunctionConfig,
        generator: np.random.Generator,
    ) -> None:
        super().__init__()
        returns = np.concatenate([sequence.returns for sequence in sequences])
        require_returns_for(q_function.link, returns)
        self.q_function = q_function
        self.sequences = sequences
        self.targets = [sequence.returns for sequence in sequences]
        self.scale = unit_of(returns) if _has_units(q_function, config) else 1.0
        with torch.no_grad():
            q_function.heads.div_(self.scale)
        self.histogram = _HistogramHeads(q_function, returns) if config.loss == "hl_gauss" else None
        self.element_loss = _element_loss(q_function, self.histogram, config, self.scale)
        self.word_weight = config.next_message_weight
        train = [sequence for sequence, out in zip(sequences, held_out, strict=True) if not out]
        self.words = WordTasks(q_function, train) if self.word_weight > 0 else None
        self.weight_of = bootstrap_weights(sequences, num_heads=q_function.heads.shape[0], generator=generator)

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the heads their units back: while they are fitted, squared errors are in standard deviations of the
        returns, so that a learning rate means the same for any reward."""
        self.q_function.heads.mul_(self.scale)
        self.scale = 1.0

    def loss_sum_and_weight(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        """Sum of the losses of some sequences and of their weights; out of training, of Q at the responses' ends alone."""
        chosen = [self.sequences[row] for row in batch]
        token_BT, _ = pad_right([sequence.token_ids for sequence in chosen])
        return self.of_hidden(self.q_function.hidden(token_BT, responses(chosen, token_BT.shape[1])), batch)

    def of_hidden(self, hidden_BTD: Tensor, batch: list[int]) -> tuple[Tensor, Tensor]:
        """The same from the trunk's hidden states of these sequences."""
        device, width = hidden_BTD.device, hidden_BTD.shape[1]
        chosen = [self.sequences[row] for row in batch]
        weighted = [
            _token_weights(self.sequences[row], self.targets[row], ends_only=not self.training) for row in batch
        ]
        weight_BT = pad_values([weights for weights, _ in weighted], width=width).to(device)
        target_BT = pad_values([targets for _, targets in weighted], width=width).to(device)
        read = weight_BT > 0
        loss_NM = self.element_loss(hidden_BTD[read], target_BT[read])
        if self.training:
            head_weight_BM = torch.stack([self.weight_of[sequence.group] for sequence in chosen]).to(device)
            head_weight_NM = head_weight_BM[:, None, :].expand(-1, width, -1)[read]
        else:
            head_weight_NM = torch.ones_like(loss_NM)
        weight_NM = head_weight_NM * weight_BT[read][:, None]
        loss = (loss_NM * weight_NM).sum()
        if self.training and self.words is not None:
            loss = loss + self.word_weight * loss_NM.shape[1] * self.words(hidden_BTD, chosen)
        return loss, weight_NM.sum()


def require_returns_for(link: Link, returns: np.ndarray) -> None:
    """Raises ValueError where returns lie beyond what the link can give."""
    if link == "logistic" and (returns.min() < 0 or returns.max() > 1):
        raise ValueError(
            f"returns lie in [{returns.min():g}, {returns.max():g}], outside [0, 1]: "
            'use q_function.link = "identity" with q_function.loss = "squared_error"'
        )


def unit_of(returns: np.ndarray) -> float:
    """Their standard deviation, in which squared errors are counted while Q is fitted."""
    return max(float(returns.std()), _SMALLEST_SCALE)


def bootstrap_weights(
    sequences: Sequence[LabelledSequence], *, num_heads: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """The weight [M] of each group for each ensemble member: Poisson(1), and 1 for a single member."""
    groups = sorted({sequence.group for sequence in sequences})
    weight_GM = generator.poisson(1.0, (len(groups), num_heads)) if num_heads > 1 else np.ones((len(groups), 1))
    return dict(zip(groups, torch.from_numpy(weight_GM.astype(np.float32)), strict=True))


def predict(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    *,
    tokens_per_batch: int,
    scale: float = 1.0,
    features: FeatureCache | None = None,
) -> Predictions:
    """Q and the state's value at every decision point.

    Args:
        scale: the unit of a Q that is being fitted.
        features: of a frozen trunk, from which Q is read without another pass.
    """
    points = [
        (row, turn, start, end, target)
        for row, s in enumerate(sequences)
        for turn, (start, end), target in zip(s.turns, s.spans, s.returns, strict=True)
        if end > start
    ]
    positions: list[list[int]] = [[] for _ in sequences]
    for row, _, start, end, _ in points:
        positions[row] += [start - 1, end - 1]
    rows = [s.token_ids for s in sequences]
    read = _read(q_function, rows, positions, tokens_per_batch=tokens_per_batch, features=features)
    scalar_N = torch.tensor([x for row in read for x in row], dtype=torch.float64)
    value_N2 = scale * q_function.to_value(scalar_N).view(-1, 2)
    return Predictions(
        q_value=value_N2[:, 1].numpy(),
        state_value=value_N2[:, 0].numpy(),
        target=np.array([target for *_, target in points], dtype=np.float64),
        group=np.array([sequences[row].group for row, *_ in points]),
        turn=np.array([turn for _, turn, *_ in points]),
    )


def predict_after_share(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    share: float,
    *,
    tokens_per_batch: int,
    features: FeatureCache | None = None,
) -> dict[int, float]:
    """Expected outcome of each conversation once a share of its messages has been seen, by `conversation`.

    Where the last message seen is the policy's, Q of that response; where it is the customer's, the state's value.

    Args:
        features: see `predict`.
    """
    rows: list[TokenIds] = []
    positions: list[list[int]] = []
    conversations: list[int] = []
    for sequence in sequences:
        wanted = int(np.ceil(share * sequence.num_messages))
        for seen, (start, end) in zip(sequence.messages_seen, sequence.spans, strict=True):
            if seen == wanted or (end > start and seen + 1 == wanted):
                rows.append(sequence.token_ids)
                positions.append([start - 1 if seen == wanted else end - 1])
                conversations.append(sequence.conversation)
                break
    read = _read(q_function, rows, positions, tokens_per_batch=tokens_per_batch, features=features)
    values = q_function.to_value(torch.tensor([value for [value] in read], dtype=torch.float64)).tolist()
    return dict(zip(conversations, values, strict=True))


def _read(
    q_function: QFunction,
    rows: Sequence[TokenIds],
    positions: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int,
    features: FeatureCache | None,
) -> list[list[float]]:
    """`QFunction.read`, from features where there are any."""
    if features is None:
        return q_function.read(rows, positions, tokens_per_batch=tokens_per_batch)
    with torch.no_grad():
        return [
            q_function.scalars_at(row, places, feature_PF).mean(-1).tolist()
            for row, places, feature_PF in zip(
                rows,
                positions,
                features.of(q_function, rows, positions, tokens_per_batch=tokens_per_batch),
                strict=True,
            )
        ]


def _token_weights(
    sequence: LabelledSequence, targets: tuple[float, ...], *, ends_only: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Loss weight and target of each token position of a sequence."""
    weight_T = np.zeros(len(sequence.token_ids), dtype=np.float32)
    target_T = np.zeros(len(sequence.token_ids), dtype=np.float32)
    for (start, end), target in zip(sequence.spans, targets, strict=True):
        before = slice(start - 1, max(end - 1, start))
        target_T[start - 1 : max(end, start)] = target
        if not ends_only:
            weight_T[before] = 1.0 / (before.stop - before.start)
            weight_T[start - 1] = 1.0
        if end > start:
            weight_T[end - 1] = 1.0
    return weight_T, target_T


def _has_units(q_function: QFunction, config: QFunctionConfig) -> bool:
    """Whether Q is fitted in units of the returns' deviation."""
    return q_function.link == "identity" and config.loss == "squared_error"


def _element_loss(
    q_function: QFunction, histogram: "_HistogramHeads | None", config: QFunctionConfig, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss from features [N, F] and targets [N] to [N, M]."""
    if histogram is not None:
        return histogram.loss
    if config.loss == "binary_cross_entropy":
        return lambda feature_NF, target_N: losses.binary_cross_entropy(
            feature_NF @ q_function.heads.T, target_N[:, None].expand(-1, q_function.heads.shape[0])
        )
    return lambda feature_NF, target_N: losses.squared_error(
        q_function.to_value(feature_NF @ q_function.heads.T), target_N[:, None] / scale
    )


class _HistogramHeads(nn.Module):
    """HL-Gauss: every ensemble member predicts a histogram of the return while the trunk is trained."""

    def __init__(self, q_function: QFunction, returns: np.ndarray) -> None:
        super().__init__()
        self.q_function = q_function
        low, high = float(returns.min()), float(returns.max())
        margin = 0.1 * max(high - low, 1e-3)
        edges = torch.linspace(low - margin, high + margin, _NUM_BINS + 1)
        self.edges: Tensor
        self.register_buffer("edges", edges)
        self.sigma = 0.75 * float(edges[1] - edges[0])
        num_heads, num_features = q_function.heads.shape
        # From the returns' own histogram, and not from nothing: otherwise the fit sits on the mean for so many passes
        # that it stops there.
        histogram_K = losses.hl_gauss_target(torch.from_numpy(returns).float(), edges, sigma=self.sigma).mean(0)
        self.bins = nn.Linear(num_features, num_heads * _NUM_BINS)
        nn.init.normal_(self.bins.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.bins.bias.copy_((histogram_K + 1e-6).log().repeat(num_heads))
        self.to(q_function.device)

    def bin_logits(self, feature_NF: Tensor) -> Tensor:
        return self.bins(feature_NF).unflatten(-1, (-1, _NUM_BINS))

    def loss(self, feature_NF: Tensor, target_N: Tensor) -> Tensor:
        return losses.hl_gauss(self.bin_logits(feature_NF), target_N[:, None], self.edges, sigma=self.sigma)


def _read_out(heads: _HistogramHeads, sequences: Sequence[LabelledSequence], *, tokens_per_batch: int) -> None:
    """Replaces the histograms by scalar heads: ridge regression from features to the histograms' means.

    The checkpoint then has one label, as every reward model has, and all held-out figures are those of the scalar.
    """

    def histogram_means(feature_NF: Tensor, _: Tensor) -> Tensor:
        mean_NM = losses.hl_gauss_mean(heads.bin_logits(feature_NF), heads.edges)
        return mean_NM.clamp(0.01, 0.99).logit() if heads.q_function.link == "logistic" else mean_NM

    _ridge_heads(
        heads.q_function, sequences, histogram_means, ridge=_HISTOGRAM_RIDGE, tokens_per_batch=tokens_per_batch
    )


@torch.no_grad()
def _ridge_heads(
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    scalar_NM: Callable[[Tensor, Tensor], Tensor],
    *,
    ridge: float,
    tokens_per_batch: int,
) -> None:
    """Sets the heads by ridge regression from the trunk's features to scalars, at every position that is trained.

    Args:
        scalar_NM: the members' scalars, from features [N, F] and returns [N].
    """
    num_heads, size = q_function.heads.shape
    gram_FF = torch.zeros(size, size, dtype=torch.float64)
    moment_FM = torch.zeros(size, num_heads, dtype=torch.float64)
    num_positions = 0.0
    with gathered(q_function):
        for batch in own_micro_batches([len(s.token_ids) for s in sequences], tokens_per_batch=tokens_per_batch):
            chosen = [sequences[b] for b in batch]
            token_BT, _ = pad_right([sequence.token_ids for sequence in chosen])
            weighted = [_token_weights(sequence, sequence.returns, ends_only=False) for sequence in chosen]
            weight_BT, return_BT = (
                pad_values([pair[i] for pair in weighted], width=token_BT.shape[1]).to(q_function.device)
                for i in (0, 1)
            )
            feature_NF = q_function.features(token_BT, weight_BT > 0)[weight_BT > 0]
            target_NM = scalar_NM(feature_NF, return_BT[weight_BT > 0]).double().cpu()
            feature_NF = feature_NF.double().cpu()
            gram_FF += feature_NF.T @ feature_NF
            moment_FM += feature_NF.T @ target_NM
            num_positions += len(feature_NF)
    distributed.add_up(gram_FF)
    distributed.add_up(moment_FM)
    [num_positions] = distributed.sums(num_positions)
    ridge_FF = ridge * num_positions * torch.eye(size, dtype=torch.float64)
    q_function.heads.copy_(torch.linalg.solve(gram_FF + ridge_FF, moment_FM).T.float())
