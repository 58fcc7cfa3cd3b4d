"""Q fitted to conversations that are in memory, with its held-out report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo.adapters import has_adapter, is_frozen
from iterative_ppo.config import Config, QFunctionConfig
from iterative_ppo.conversation_features import ResponseMarks
from iterative_ppo.conversations import Conversation, split_by_group
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.loading import load_q_function
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import Predictions, fit_q_function, predict
from iterative_ppo.q_function import QFunction, QFunctionCard
from iterative_ppo.q_report import QReport, assess
from iterative_ppo.read_out import ReadOutHistory, fit_read_out, read_positions, refit_read_out
from iterative_ppo.run_directory import to_json, write_json
from iterative_ppo.supervised import FitHistory, Progress
from iterative_ppo.turns_to_tokens import labelled_sequences, td_lambda_targets, tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedQ:
    """A Q-function with its held-out report."""

    q_function: QFunction
    policy: Policy
    card: QFunctionCard
    report: QReport
    counts: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the checkpoint and the report."""
        self.q_function.save(folder / "q_function", self.card, self.policy.tokenizer)
        write_json(folder / "report.json", self.report)

    def metrics(self) -> dict[str, Any]:
        """What the manifest and the tables show."""
        return {**self.counts, **self.card.metrics, "warnings": list(self.report.warnings)}


def fit_q_from_logs(
    config: Config,
    policy: Policy,
    conversations: Sequence[Conversation],
    *,
    start: Path | None = None,
    name: str,
    seed: int,
    progress: Progress,
    groups: Sequence[str] | None = None,
    features: FeatureCache | None = None,
) -> FittedQ:
    """Fits Q to labelled conversations and assesses it on those held out, to which a read-out is fitted too after that.

    Args:
        start: folder of the Q-function whose weights it starts from. Default: the policy's weights. A read-out of frozen
            weights has no use for it: it is fitted to its end each time.
        name: what the checkpoint calls the policy that it evaluates.
        groups: one a conversation; conversations of one group fall on one side of the split. Default: their ids.
        features: of frozen weights, where fits before or after this one read the same conversations.
    """
    sequences, counts = labelled(conversations, policy, gamma=config.q_function.gamma, groups=groups)
    return fit_q(
        config,
        policy,
        sequences,
        start=start,
        counts=counts,
        name=name,
        seed=seed,
        progress=progress,
        features=features,
    )


def fit_q(
    config: Config,
    policy: Policy,
    sequences: Sequence[LabelledSequence],
    *,
    start: Path | None = None,
    counts: dict[str, Any],
    name: str,
    seed: int,
    progress: Progress,
    features: FeatureCache | None = None,
) -> FittedQ:
    """`fit_q_from_logs` of conversations that are labelled sequences already, with counts of what was left out of them."""
    q_config = config.q_function
    if len({sequence.group for sequence in sequences}) < 4:
        raise ValueError("fewer than four conversations with a known outcome: no Q-function can be fitted")
    held_out = split_by_group(
        [sequence.group for sequence in sequences], held_out_share=q_config.held_out_share, seed=seed
    )
    train = [sequence for sequence, out in zip(sequences, held_out, strict=True) if not out]

    def retarget(predictions: Predictions) -> list[tuple[float, ...]]:
        return td_lambda_targets(train, predictions, gamma=q_config.gamma, lambda_=q_config.return_lambda)

    features = (features or FeatureCache()) if reads_frozen_weights(config, policy) else None
    q_function, history = _fit(
        config,
        policy,
        sequences,
        held_out=held_out.tolist(),
        start=start,
        seed=seed,
        features=features,
        retarget=None if q_config.return_lambda == 1 else retarget,
        progress=progress,
    )
    test = [sequence for sequence, out in zip(sequences, held_out, strict=True) if out]
    report = assess(
        predict(q_function, test, tokens_per_batch=config.compute.tokens_per_batch, features=features),
        constant=_mean_return(train),
        loss="cross_entropy" if q_config.loss == "binary_cross_entropy" else "squared_error",
    )
    card = _card(q_config, history, report, name)
    if features is not None and isinstance(history, ReadOutHistory) and history.best_pass > 0:
        _refit(config, q_function, sequences, history.penalty, features, seed=seed, progress=progress)
    return FittedQ(q_function=q_function, policy=policy, card=card, report=report, counts=counts)


def labelled(
    conversations: Sequence[Conversation], policy: Policy, *, gamma: float, groups: Sequence[str] | None = None
) -> tuple[list[LabelledSequence], dict[str, Any]]:
    """All labelled sequences of conversations, and counts of what was left out and why."""
    sequences: list[LabelledSequence] = []
    num_unlabelled = num_dropped = num_cut = 0
    for i, conversation in enumerate(conversations):
        turns = tokenize(conversation, policy.renderer)
        num_dropped += turns.num_dropped_messages
        num_cut += turns.num_cut_messages
        group = groups[i] if groups is not None else f"{i}:{conversation.id}"
        own = labelled_sequences(conversation, turns, gamma=gamma, index=i, group=group)
        num_unlabelled += not own
        sequences += own
    counts = {
        "num_conversations": len(conversations),
        "num_unlabelled": num_unlabelled,
        "num_dropped_messages": num_dropped,
        "num_cut_messages": num_cut,
    }
    return sequences, counts


def reads_frozen_weights(config: Config, policy: Policy) -> bool:
    """Whether Q is a read-out of the weights below a policy's adapter (`q_function.trunk`).

    Raises:
        ValueError: it is to be, and the policy's weights are not frozen.
    """
    has_frozen = is_frozen(policy.model) or has_adapter(policy.model)
    if config.q_function.trunk == "frozen" and not has_frozen:
        raise ValueError(
            'q_function.trunk: "frozen" is for policies that are trained through adapters, which models of less than 10 '
            "million parameters are not"
        )
    if config.q_function.trunk == "auto":
        return has_frozen and config.improvement.backend != "external"
    return config.q_function.trunk == "frozen"


def read_frozen_weights(
    config: Config,
    policy: Policy,
    sequences: Sequence[LabelledSequence],
    features: FeatureCache,
    *,
    progress: Progress,
) -> FeatureCache | None:
    """The features of some sequences, in one pass over those that are not known yet; None where Q's trunk is trained."""
    if not reads_frozen_weights(config, policy):
        return None
    features.of(
        _unfitted_read_out(config, policy),
        [sequence.token_ids for sequence in sequences],
        [read_positions(sequence) for sequence in sequences],
        tokens_per_batch=config.compute.tokens_per_batch,
        progress=progress,
    )
    return features


def _fit(
    config: Config,
    policy: Policy,
    sequences: Sequence[LabelledSequence],
    *,
    held_out: Sequence[bool],
    start: Path | None,
    seed: int,
    features: FeatureCache | None,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None,
    progress: Progress,
) -> tuple[QFunction, FitHistory]:
    """A read-out of frozen weights where there is a cache for their features, else a Q-function with a trained trunk."""
    q_config, generator = config.q_function, np.random.default_rng(seed)
    if features is not None:
        q_function = _unfitted_read_out(config, policy)
        return q_function, fit_read_out(
            q_function,
            sequences,
            held_out=held_out,
            config=q_config,
            features=features,
            tokens_per_batch=config.compute.tokens_per_batch,
            generator=generator,
            retarget=retarget,
            progress=progress,
        )
    q_function = _start_of_fit(config, policy, start, seed=seed)
    return q_function, fit_q_function(
        q_function,
        sequences,
        held_out=held_out,
        config=q_config,
        is_refit=start is not None,
        tokens_per_batch=config.compute.tokens_per_batch,
        generator=generator,
        retarget=retarget,
        progress=progress,
    )


def _unfitted_read_out(config: Config, policy: Policy) -> QFunction:
    return QFunction.on_base(
        policy.model,
        depth=config.q_function.frozen_depth,
        link=config.q_function.link,
        num_heads=config.q_function.num_heads,
        marks=ResponseMarks(opening=policy.renderer.generation_prompt, end_id=policy.renderer.end_id),
    )


def _refit(
    config: Config,
    q_function: QFunction,
    sequences: Sequence[LabelledSequence],
    penalty: float,
    features: FeatureCache,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Fits a read-out once more, to the held-out conversations too: of a thousand conversations each counts."""
    q_config, tokens_per_batch = config.q_function, config.compute.tokens_per_batch
    targets = [sequence.returns for sequence in sequences]
    if q_config.return_lambda < 1:
        predictions = predict(q_function, sequences, tokens_per_batch=tokens_per_batch, features=features)
        targets = td_lambda_targets(sequences, predictions, gamma=q_config.gamma, lambda_=q_config.return_lambda)
    refit_read_out(
        q_function,
        sequences,
        targets,
        penalty=penalty,
        config=q_config,
        features=features,
        tokens_per_batch=tokens_per_batch,
        generator=np.random.default_rng(seed),
        progress=progress,
    )


def _start_of_fit(config: Config, policy: Policy, start: Path | None, *, seed: int) -> QFunction:
    """What a fit with a trained trunk starts from."""
    if start is not None:
        return load_q_function(start, policy)
    return QFunction.from_policy(
        policy.model,
        link=config.q_function.link,
        num_heads=config.q_function.num_heads,
        pad_id=policy.pad_id,
        lora_rank=config.policy.lora_rank,
        seed=seed,
    )


def _card(config: QFunctionConfig, history: FitHistory, report: QReport, name: str) -> QFunctionCard:
    return QFunctionCard(
        link=config.link,
        gamma=config.gamma,
        target="monte_carlo" if config.return_lambda == 1 else f"td_lambda {config.return_lambda:g}",
        policy=name,
        metrics=to_json(
            {
                "num_passes": len(history.train_losses),
                "best_pass": history.best_pass,
                "held_out_losses": history.held_out_losses,
                "loss": report.loss,
                "constant_loss": report.constant_loss,
                "state_only_loss": report.state_only_loss,
                "state_only_gain": report.state_only_gain,
                report.measure: report.discrimination,
                "ece": report.ece,
                **({"penalty": history.penalty} if isinstance(history, ReadOutHistory) else {}),
            }
        ),
    )


def _mean_return(sequences: Sequence[LabelledSequence]) -> float:
    targets = [t for s in sequences for t, (start, end) in zip(s.returns, s.spans, strict=True) if end > start]
    return float(np.mean(targets))
