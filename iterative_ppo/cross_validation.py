"""What Q can tell about logged conversations that it was not fitted to, by share of the conversation, in folds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.conversations import Conversation, folds_by_group, turn_rewards
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import Predictions, predict, predict_after_share
from iterative_ppo.q_from_logs import fit_q, labelled, read_frozen_weights
from iterative_ppo.q_report import calibration_bins, discrimination, expected_calibration_error, is_binary, measure_of
from iterative_ppo.supervised import Progress
from iterative_ppo.text_baseline import SHARES, cross_fitted_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """Held-out discrimination after each share of the messages; keys are percentages.

    Example:
        CrossValidation(num_conversations=1017, num_folds=5, auc={"25": .55, "50": .62, "75": .66, "100": .69},
            spearman={}, tfidf_auc={"25": .52, "50": .64, "75": .68, "100": .71}, ece=.06, seconds=310.0)
    """

    num_conversations: int
    num_folds: int
    auc: dict[str, float | None]
    """Of the outcome; of the outcome being above the median where it is graded."""
    spearman: dict[str, float | None]
    """Rank correlation with the outcome, where it is graded; empty where it is binary."""
    tfidf_auc: dict[str, float | None]
    """The floor: TF-IDF and logistic regression on the same messages, in the same folds."""
    ece: float
    """Expected calibration error of Q over all decision points."""
    seconds: float


def cross_validate(
    config: Config,
    policy: Policy,
    conversations: Sequence[Conversation],
    *,
    num_folds: int,
    groups: Sequence[str],
    seed: int,
    features: FeatureCache,
    progress: Progress,
) -> CrossValidation:
    """Fits Q `num_folds` times, each time to the other folds, and predicts the fold left out.

    Args:
        groups: one a conversation; conversations of one group fall into one fold.
        features: where Q reads frozen weights, of these or other conversations; those of all folds are kept there.
    """
    started = time.perf_counter()
    outcomes = {i: sum(rewards) for i, c in enumerate(conversations) if (rewards := turn_rewards(c))}
    if len({groups[i] for i in outcomes}) < num_folds:
        raise ValueError(f"fewer than {num_folds} conversations (or groups) with a known outcome: no {num_folds} folds")
    conversations, groups = [conversations[i] for i in outcomes], [groups[i] for i in outcomes]
    outcome_N = np.array(list(outcomes.values()))
    fold_N = folds_by_group(groups, outcome_N.tolist(), num_folds=num_folds, seed=seed)
    share_NS, predictions = _predict_folds(
        config, policy, conversations, groups, fold_N, seed=seed, features=features, progress=progress
    )
    is_positive_N = outcome_N == outcome_N.max() if is_binary(outcome_N) else outcome_N > np.median(outcome_N)
    keys = [f"{share:.0%}".removesuffix("%") for share in SHARES]
    return CrossValidation(
        num_conversations=len(conversations),
        num_folds=num_folds,
        auc={key: _known(share_NS[:, s], is_positive_N) for s, key in enumerate(keys)},
        spearman={} if is_binary(outcome_N) else {key: _known(share_NS[:, s], outcome_N) for s, key in enumerate(keys)},
        tfidf_auc={
            key: _known(cross_fitted_scores(conversations, is_positive_N, fold_N, share=share), is_positive_N)
            for key, share in zip(keys, SHARES, strict=True)
        },
        ece=expected_calibration_error(
            calibration_bins(
                np.concatenate([p.q_value for p in predictions]), np.concatenate([p.target for p in predictions])
            )
        ),
        seconds=time.perf_counter() - started,
    )


def _predict_folds(
    config: Config,
    policy: Policy,
    conversations: Sequence[Conversation],
    groups: Sequence[str],
    fold_N: np.ndarray,
    *,
    seed: int,
    features: FeatureCache,
    progress: Progress,
) -> tuple[np.ndarray, list[Predictions]]:
    """What a Q fitted to the other folds says: of each conversation after each share of its messages, and at all of its
    decision points, a fold's together."""
    num_folds, tokens_per_batch = int(fold_N.max()) + 1, config.compute.tokens_per_batch
    sequences, _ = labelled(conversations, policy, gamma=config.q_function.gamma, groups=groups)
    known = read_frozen_weights(config, policy, sequences, features, progress=progress)
    share_NS = np.full((len(conversations), len(SHARES)), np.nan)
    predictions: list[Predictions] = []
    for fold in range(num_folds):

        def show(what: str, done: int, total: int, fold: int = fold) -> None:
            progress(f"{what}, fold {fold + 1} of {num_folds}", fold * total + done, num_folds * total)

        train = [sequence for sequence in sequences if fold_N[sequence.conversation] != fold]
        fitted = fit_q(
            config, policy, train, counts={}, name="folds", seed=seed + fold, progress=show, features=features
        )
        test = [sequence for sequence in sequences if fold_N[sequence.conversation] == fold]
        predictions.append(predict(fitted.q_function, test, tokens_per_batch=tokens_per_batch, features=known))
        for s, share in enumerate(SHARES):
            values = predict_after_share(
                fitted.q_function, test, share, tokens_per_batch=tokens_per_batch, features=known
            )
            for conversation, value in values.items():
                share_NS[conversation, s] = value
    return share_NS, predictions


def group_names(conversations: Sequence[Conversation], key: str | None) -> list[str]:
    """The group of each conversation: a key of it, as `metadata.dialogue`, or itself.

    Raises:
        ValueError: a conversation lacks the key.
    """
    if key is None:
        return [f"{i}:{conversation.id}" for i, conversation in enumerate(conversations)]
    names = []
    for conversation in conversations:
        value: Any = {"metadata": conversation.metadata, **conversation.extra}
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise ValueError(f"--group {key}: conversation {conversation.id} has no such key")
        names.append(str(value))
    return names


def _known(predicted_N: np.ndarray, target_N: np.ndarray) -> float | None:
    known_N = np.isfinite(predicted_N)
    return discrimination(predicted_N[known_N], target_N[known_N], measure=measure_of(target_N))
