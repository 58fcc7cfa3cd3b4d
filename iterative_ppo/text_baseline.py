"""The floor of any Q-function on logs: TF-IDF and logistic regression on the first part of a conversation's text."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from iterative_ppo.conversations import Conversation

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of a conversation's messages after which outcomes are predicted."""


def text_after_share(conversation: Conversation, share: float) -> str:
    """The first share of a conversation's messages (rounded up; the system's does not count), one a line."""
    spoken = [message.content for message in conversation.messages if message.role != "system"]
    return "\n".join(spoken[: int(np.ceil(share * len(spoken)))])


def cross_fitted_scores(
    conversations: Sequence[Conversation], is_positive_N: np.ndarray, fold_N: np.ndarray, *, share: float
) -> np.ndarray:
    """Log-odds of a positive outcome for each conversation, by a model fitted to the other folds.

    Word 1- and 2-grams with sublinear counts, logistic regression with scikit-learn's default penalty. NaN in a fold
    whose other folds hold one class only.
    """
    texts = np.array([text_after_share(conversation, share) for conversation in conversations], dtype=object)
    scores_N = np.full(len(texts), np.nan)
    for fold in np.unique(fold_N):
        train, test = fold_N != fold, fold_N == fold
        if len(np.unique(is_positive_N[train])) < 2:
            continue
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
            LogisticRegression(max_iter=1000),
        )
        model.fit(texts[train], is_positive_N[train])
        scores_N[test] = model.decision_function(texts[test])
    return scores_N
