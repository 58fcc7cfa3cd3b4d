"""Who does the improvement step: `improvement.backend`."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from iterative_ppo import distributed
from iterative_ppo.config import ConfigError, ImprovementConfig
from iterative_ppo.extras import require_extra
from iterative_ppo.improvement import native
from iterative_ppo.improvement.base import Improvement, RewardFunction
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.supervised import Progress, no_progress


class ExternalStepError(ValueError):
    """The improvement step is another stack's to make: a run stops before it, and goes on when it is imported."""


def require_backend(config: ImprovementConfig) -> None:
    """Raises ValueError where the backend is an outside stack that is not installed, or cannot work in several processes."""
    if config.backend != "trl":
        return
    require_extra("trl", needed_by="improvement.backend")
    if distributed.world_size() > 1:
        raise ConfigError('improvement.backend: "trl" works in one process here; under torchrun use "native"')


def improve(
    policy: Policy,
    prompts: Sequence[TokenIds],
    reward: RewardFunction,
    config: ImprovementConfig,
    *,
    token_value: nn.Module,
    generator: np.random.Generator,
    tokens_per_batch: int,
    progress: Progress = no_progress,
) -> Improvement:
    """One improvement step from `policy` by the backend of the configuration; arguments as in `native.improve`.

    Raises:
        ExternalStepError: the backend is `external`.
    """
    require_backend(config)
    match config.backend:
        case "native":
            return native.improve(
                policy,
                prompts,
                reward,
                config,
                token_value=token_value,
                generator=generator,
                tokens_per_batch=tokens_per_batch,
                progress=progress,
            )
        case "trl":
            from iterative_ppo.improvement import with_trl

            return with_trl.improve(
                policy,
                prompts,
                reward,
                config,
                generator=generator,
                tokens_per_batch=tokens_per_batch,
                progress=progress,
            )
        case "external":
            raise ExternalStepError(
                'improvement.backend = "external": this step is made by another stack; see `ippo export`'
            )
