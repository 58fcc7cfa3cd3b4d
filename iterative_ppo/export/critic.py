"""Q as the start of another stack's critic: a token classifier that says values in the reward's units."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from iterative_ppo.losses import explained_variance
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction
from iterative_ppo.rendering import TokenIds

_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A saved critic: V = slope · (Q before its link) + bias.

    Example:
        Critic(head="score", slope=0.21, bias=0.5, explained_variance=0.99)
    """

    head: str
    """Name of the linear layer that is its value head."""
    slope: float
    bias: float
    """OpenRLHF's critics have none: a constant less, which normalised advantages do not see where lambda is 1."""
    explained_variance: float
    """Share of the variance of Q's own reading, link included, that the critic explains."""


def save_critic(
    q_function: QFunction, policy: Policy, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], folder: Path
) -> Critic:
    """Writes the token-level value that PPO starts from: Q read at the tokens before each response token.

    Outside critics are linear in the last hidden state, as Q is before its link. The line that comes closest to the link
    on some responses of the policy (least squares) puts Q's log-odds into the reward's units.

    Args:
        q_function: a plain model, without an adapter.
    """
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    before = [range(len(prompt) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    read = q_function.read(rows, before, tokens_per_batch=_TOKENS_PER_BATCH)
    scalar_N = torch.tensor([scalar for row in read for scalar in row], dtype=torch.float64)
    value_N = q_function.to_value(scalar_N)
    centred_N = scalar_N - scalar_N.mean()
    slope = float((centred_N * value_N).sum() / centred_N.square().sum().clamp(min=1e-12))
    bias = float(value_N.mean() - slope * scalar_N.mean())
    classifier, head = _token_classifier(q_function, slope=slope, bias=bias)
    classifier.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    explained = explained_variance(slope * scalar_N + bias, value_N)
    return Critic(head=head, slope=slope, bias=bias, explained_variance=explained)


def _token_classifier(q_function: QFunction, *, slope: float, bias: float) -> tuple[PreTrainedModel, str]:
    """A token classifier with one label on Q's trunk, the same and not a copy, and the name of its head."""
    model = q_function.model
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    try:
        with torch.device("meta"):
            classifier = AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"{type(config).__name__}: transformers has no token classifier of this architecture, which is what the "
            "critics of verl and OpenRLHF are; `ippo export trl` needs none"
        ) from error
    [name] = [name for name, child in classifier.named_children() if isinstance(child, nn.Linear)]
    head = nn.Linear(q_function.heads.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(slope * q_function.heads.mean(0, keepdim=True))
        head.bias.fill_(bias)
    setattr(classifier, name, head)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    return classifier, name
