"""A model made from scratch learns all that logs can teach in the same passes: to answer, and what comes of an answer.

A pretrained model brings a representation; a new one has to get it from the logs. Cloned alone, its trunk knows what
the seller says and little of what that is worth, and a Q-function started on it spends its first fits on learning to
read. So the start policy and the first Q-function are trained together, on one trunk.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from iterative_ppo.config import Config
from iterative_ppo.labelled_sequence import LabelledSequence, responses
from iterative_ppo.losses import token_logprobs
from iterative_ppo.policy import Policy, response_targets
from iterative_ppo.q_fit import Regression
from iterative_ppo.q_function import QFunction
from iterative_ppo.supervised import FitHistory, Progress, fit_passes, hidden_matrices


def clone_with_outcomes(
    policy: Policy,
    sequences: Sequence[LabelledSequence],
    *,
    held_out: Sequence[bool],
    config: Config,
    seed: int,
    progress: Progress,
) -> tuple[QFunction, FitHistory]:
    """Fits responses by maximum likelihood and returns by regression, in the same passes over one trunk.

    Args:
        policy: a model whose logits are its output embeddings times the hidden state; it is changed.
        held_out: the sequences whose likelihood decides which pass is kept.

    Returns:
        The Q-function, which shares the policy's trunk until one of them is saved, and the history of the likelihood.
    """
    q_function = QFunction.on_trunk(
        policy.model,
        link=config.q_function.link,
        num_heads=config.q_function.num_heads,
        pad_id=policy.pad_id,
        seed=seed,
    )
    generator = np.random.default_rng(seed)
    both = _Both(policy, Regression(q_function, sequences, held_out, config.q_function, generator))
    rows = range(len(sequences))
    history = fit_passes(
        both,
        both.loss_sum_and_weight,
        [len(sequence.token_ids) for sequence in sequences],
        train_rows=[row for row in rows if not held_out[row]],
        held_out_rows=[row for row in rows if held_out[row]],
        max_passes=config.policy.clone_passes,
        patience_passes=config.policy.clone_passes,
        learning_rate=config.policy.clone_learning_rate,
        tokens_per_batch=config.compute.tokens_per_batch,
        generator=generator,
        what="clone the start policy",
        progress=progress,
        matrices=hidden_matrices(policy.model),
        # The number of steps, more than that of conversations, decides whether the trunk learns to compare words.
        max_rows_per_step=8,
    )
    both.regression.finish()
    return q_function, history


class _Both(nn.Module):
    """Policy and Q-function on one trunk."""

    def __init__(self, policy: Policy, regression: Regression) -> None:
        super().__init__()
        self.policy = policy
        self.model = policy.model
        self.regression = regression

    def loss_sum_and_weight(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        """−log π summed over the responses' tokens and their number; in training with Q's losses added."""
        sequences = [self.regression.sequences[row] for row in batch]
        targets = response_targets([(sequence.token_ids, sequence.spans) for sequence in sequences])
        read_BT = responses(sequences, targets.token_BT.shape[1])
        hidden_BTD = self.regression.q_function.hidden(targets.token_BT, read_BT)
        precedes_BT = targets.precedes_target_BT.to(hidden_BTD.device)
        logits_NV = self.model.get_output_embeddings()(hidden_BTD[precedes_BT]) / self.policy.temperature
        loss = -token_logprobs(logits_NV, targets.target_N.to(hidden_BTD.device)).sum()
        if self.training:
            q_loss, _ = self.regression.of_hidden(hidden_BTD, batch)
            loss = loss + q_loss / self.regression.q_function.heads.shape[0]
        return loss, precedes_BT.sum()
