"""The contract of an improvement step: a policy, prompts and a reward function in, a candidate out.

Nothing here knows that a prompt is part of a conversation: that is the paper's reduction, and
`tests/test_layers.py` holds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds

RewardFunction = Callable[[Sequence[TokenIds], Sequence[TokenIds]], Tensor]
"""reward(prompts, responses) -> [B] float32. Responses end with their end-of-response token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """One update of the improvement step; `docs/algorithm.md` has each formula.

    Example:
        UpdateMetrics(update=3, reward_mean=0.41, kl=0.08, kl_k1=0.07, kl_coefficient=0.05, entropy=1.2,
            clip_fraction=0.06, explained_variance=0.5, response_tokens=8.1, num_passes=2)
    """

    update: int
    reward_mean: float
    """Mean reward of the responses sampled in this update."""
    kl: float
    """KL(policy ‖ anchor) in nats a response, of the policy that sampled this update's responses, by k3."""
    kl_k1: float
    """The same by k1, the plain mean of summed log-ratios: unbiased too, noisier."""
    kl_coefficient: float
    """Beta in this update."""
    entropy: float
    """Mean entropy of the next-token distribution, in nats."""
    clip_fraction: float
    """Share of tokens whose ratio left the clip range in the last pass."""
    explained_variance: float
    """Of the token returns by the token value; NaN without a token value."""
    response_tokens: float
    """Mean response length."""
    num_passes: int
    """Gradient passes made before the approximate-KL stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """The result of an improvement step; the candidate is a policy of its own and the anchor is untouched."""

    candidate: Policy
    updates: tuple[UpdateMetrics, ...]
    kl: float
    """KL(candidate ‖ anchor) in nats a response, measured after the last update on fresh responses."""
    stop_reason: str
    """`updates` (all made), `kl_target` (budget spent), or `collapse: ...`."""
