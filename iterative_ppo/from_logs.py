"""One iteration's work on conversations that are in memory: a start policy, a fitted Q, an improved policy.

Stages on folders (`stages`), single commands and the step from logs all call these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from iterative_ppo import distributed
from iterative_ppo.activation_checkpointing import keep_no_activations
from iterative_ppo.adapters import has_adapter, is_frozen
from iterative_ppo.config import Config, QFunctionConfig
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.conversations import (
    Conversation,
    chat_messages,
    decision_points,
    split_by_group,
    turn_rewards,
)
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.improvement import backends
from iterative_ppo.improvement.base import RewardFunction
from iterative_ppo.policy import Policy, context_limit
from iterative_ppo.pretraining import clone_with_outcomes
from iterative_ppo.q_fit import LabelledSequence, Predictions, fit_q_function, predict
from iterative_ppo.q_function import QFunction, QFunctionCard, TokenValue, backbone_of
from iterative_ppo.q_report import QReport, assess
from iterative_ppo.read_out import ReadOutHistory, fit_read_out, read_positions, refit_read_out
from iterative_ppo.rendering import Renderer, TokenIds
from iterative_ppo.run_directory import to_json, write_json
from iterative_ppo.supervised import FitHistory, Progress
from iterative_ppo.turns_to_tokens import (
    all_prompts,
    labelled_sequences,
    response_sequences,
    td_lambda_targets,
    tokenize,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The start policy and, where it was trained with it, a first Q-function."""

    policy: Policy
    q_function: QFunction | None
    metrics: dict[str, Any]

    def save(self, folder: Path, config: Config) -> None:
        """Writes `policy` and, where there is one, `q_function`."""
        self.policy.save(folder / "policy")
        if self.q_function is not None:
            card = QFunctionCard(
                link=config.q_function.link,
                gamma=config.q_function.gamma,
                target="monte_carlo",
                policy="logs",
                metrics={},
            )
            self.q_function.save(folder / "q_function", card, self.policy.tokenizer)


def start_policy(config: Config, logs: Path | None, *, with_outcomes: bool, seed: int, progress: Progress) -> Start:
    """The start policy, cloned from the logs where there are any.

    Args:
        with_outcomes: whether a model made from scratch may learn from the logs' outcomes too, if all are known.
    """
    conversations = list(read_conversations(logs)) if logs else []
    is_new = config.policy.start == "tiny"
    if is_new:
        if not conversations:
            raise ValueError('policy.logs: policy.start = "tiny" needs conversations to learn its language from')
        texts = (message["content"] for c in conversations for message in chat_messages(c.messages))
        policy = Policy.tiny(texts, config.policy, seed=seed, device=resolve_device(config.compute.device))
        if config.compute.checkpoint_activations:
            keep_no_activations(policy.model)
    else:
        policy = load_policy(config, config.policy.start)
        if is_frozen(policy.model):
            # An adapter that changes nothing yet: that is kept, and not one more copy of the weights.
            policy = policy.branch(seed=seed)
    metrics: dict[str, Any] = {"num_parameters": policy.num_parameters}
    if not conversations or config.policy.clone_passes == 0:
        return Start(policy=policy, q_function=None, metrics=metrics)
    if len({c.id for c in conversations if decision_points(c)}) < 2:
        raise ValueError(f"{logs}: fewer than two conversations with an assistant turn: nothing to clone from")
    metrics["num_conversations"] = len(conversations)
    if is_new and with_outcomes and all(map(turn_rewards, conversations)):
        labelled_sequences, _ = labelled(conversations, policy, gamma=config.q_function.gamma)
        q_function, history = clone_with_outcomes(
            policy,
            labelled_sequences,
            held_out=_enough_to_judge([sequence.group for sequence in labelled_sequences], seed),
            config=config,
            seed=seed,
            progress=progress,
        )
        return Start(policy=policy, q_function=q_function, metrics=metrics | {"clone": to_json(history)})
    sequences = [
        (sequence, conversation.id)
        for conversation in conversations
        for sequence in response_sequences(tokenize(conversation, policy.renderer))
    ]
    history = policy.clone(
        [sequence for sequence, _ in sequences],
        held_out=_enough_to_judge([group for _, group in sequences], seed),
        tokens_per_batch=config.compute.tokens_per_batch,
        generator=np.random.default_rng(seed),
        from_scratch=is_new,
        progress=progress,
    )
    return Start(policy=policy, q_function=None, metrics=metrics | {"clone": to_json(history)})


def _enough_to_judge(groups: Sequence[str], seed: int) -> list[bool]:
    """Holds out a tenth of the groups, at most 256: what it takes to tell one pass of cloning from another."""
    share = min(0.1, 256 / len(set(groups)))
    held_out: list[bool] = split_by_group(groups, held_out_share=share, seed=seed).tolist()
    return held_out


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
    q_config = config.q_function
    sequences, counts = labelled(conversations, policy, gamma=q_config.gamma, groups=groups)
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
        q_function = QFunction.on_base(
            policy.model, depth=q_config.frozen_depth, link=q_config.link, num_heads=q_config.num_heads
        )
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
        QFunction.on_base(policy.model, depth=config.q_function.frozen_depth, link=config.q_function.link, num_heads=1),
        [sequence.token_ids for sequence in sequences],
        [read_positions(sequence) for sequence in sequences],
        tokens_per_batch=config.compute.tokens_per_batch,
        progress=progress,
    )
    return features


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


def improve_from_logs(
    config: Config,
    policy: Policy,
    q_function: QFunction,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """One improvement step on the conversations' prompts; writes candidate and updates into the folder.

    Raises:
        backends.ExternalStepError: with `improvement.backend = "external"`.
    """
    tokens_per_batch = config.compute.tokens_per_batch
    prompts = all_prompts(tokenize(conversation, policy.renderer) for conversation in conversations)
    if not prompts:
        raise ValueError("the conversations hold no assistant turn: there is no prompt to improve on")
    improvement = backends.improve(
        policy,
        prompts,
        q_reward(q_function, pessimism=config.q_function.pessimism, tokens_per_batch=tokens_per_batch),
        config.improvement,
        token_value=TokenValue(q_function),
        generator=np.random.default_rng(seed),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    improvement.candidate.save(folder / "policy")
    write_json(folder / "updates.json", improvement.updates)
    first, last = improvement.updates[0], improvement.updates[-1]
    return {
        "num_prompts": len(prompts),
        "num_updates": len(improvement.updates),
        "stop_reason": improvement.stop_reason,
        "kl": improvement.kl,
        "kl_target": config.improvement.kl_target,
        "reward_first": first.reward_mean,
        "reward_last": last.reward_mean,
        "entropy_first": first.entropy,
        "entropy_last": last.entropy,
    }


def q_reward(q_function: QFunction, *, pessimism: float, tokens_per_batch: int) -> RewardFunction:
    """Q as the reward function of the single-turn problem."""

    def reward(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> torch.Tensor:
        return q_function.pessimistic_values(prompts, responses, pessimism=pessimism, tokens_per_batch=tokens_per_batch)

    return reward


def load_policy(config: Config, source: str | Path) -> Policy:
    """A policy from a hub id or a folder, on the configured device."""
    return Policy.load(
        source,
        config.policy,
        device=resolve_device(config.compute.device),
        dtype=getattr(torch, config.compute.dtype),
        checkpoint_activations=config.compute.checkpoint_activations,
        shard_weights=config.compute.shard_weights,
    )


def load_q_function(folder: str | Path, policy: Policy) -> QFunction:
    """A Q-function from its folder, beside a policy and on its frozen weights where it was fitted on them."""
    return QFunction.load(folder, device=str(policy.device), backbone=policy.model)


def load_q_and_renderer(folder: str | Path, config: Config) -> tuple[QFunction, Renderer]:
    """A Q-function by itself, and the renderer of the policy that it evaluates, from the tokenizer in its folder.

    The renderer has the policy's context and room for a response, so that prompts are cut as the policy's are. Frozen
    weights below an adapter or a read-out are in `compute.dtype`.

    Raises:
        ValueError: with one line where the folder holds no Q-function, or no tokenizer.
    """
    base = backbone_of(folder)
    q_function = QFunction.load(
        folder,
        device=resolve_device(config.compute.device),
        backbone=None if base is None else load_policy(config, base).model,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error
    renderer = Renderer(
        tokenizer,
        context_tokens=context_limit(q_function.model, config.policy),
        max_response_tokens=config.policy.max_response_tokens,
    )
    return q_function, renderer


def require_equipment(config: Config) -> None:
    """Raises ValueError where the configured device or backend is not there."""
    resolve_device(config.compute.device)
    backends.require_backend(config.improvement)


def resolve_device(device: str) -> str:
    """A device's name, each process's own GPU where there are several; ValueError where the device does not exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if distributed.world_size() == 1:
            return device
    if distributed.world_size() > 1 and device.startswith("cuda:"):
        raise ValueError(f'compute.device: {device!r} is one device for several processes; write "cuda"')
    if distributed.world_size() > 1 and device == "cuda":
        device = f"cuda:{distributed.local_rank()}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"compute.device: {device!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def _mean_return(sequences: Sequence[LabelledSequence]) -> float:
    targets = [t for s in sequences for t, (start, end) in zip(s.returns, s.spans, strict=True) if end > start]
    return float(np.mean(targets))
