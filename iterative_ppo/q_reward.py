"""Where the Q-function becomes a reward model: neither it nor the improvement step knows of the other."""

from collections.abc import Sequence

import torch

from iterative_ppo.improvement.base import RewardFunction
from iterative_ppo.q_function import QFunction
from iterative_ppo.rendering import TokenIds


def q_reward(q_function: QFunction, *, pessimism: float, tokens_per_batch: int) -> RewardFunction:
    """Q as the reward function of the single-turn problem."""

    def reward(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> torch.Tensor:
        return q_function.pessimistic_values(prompts, responses, pessimism=pessimism, tokens_per_batch=tokens_per_batch)

    return reward
