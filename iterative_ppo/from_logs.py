"""Two stages on conversations that are in memory: a start policy, an improved policy. (`q_from_logs` is the one between.)

Stages on folders (`stages`), single commands and the step from logs all call these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo.activation_checkpointing import keep_no_activations
from iterative_ppo.adapters import is_frozen
from iterative_ppo.config import Config
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.conversations import (
    Conversation,
    chat_messages,
    decision_points,
    split_by_group,
    turn_rewards,
)
from iterative_ppo.improvement import backends
from iterative_ppo.loading import load_policy, resolve_device
from iterative_ppo.policy import Policy
from iterative_ppo.pretraining import clone_with_outcomes
from iterative_ppo.q_from_logs import labelled
from iterative_ppo.q_function import QFunction, QFunctionCard, TokenValue
from iterative_ppo.q_reward import q_reward
from iterative_ppo.run_directory import to_json, write_json
from iterative_ppo.supervised import Progress
from iterative_ppo.turns_to_tokens import all_prompts, response_sequences, tokenize


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
