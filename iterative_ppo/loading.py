"""Policies and Q-functions from their folders, on the configured device."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from iterative_ppo import distributed
from iterative_ppo.config import Config
from iterative_ppo.improvement import backends
from iterative_ppo.policy import Policy, context_limit
from iterative_ppo.q_function import QFunction, backbone_of
from iterative_ppo.rendering import Renderer


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


class PolicyLoader:
    """Loads the policies of one run. They speak one language, so that they share what is known of its prompts."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._renderer: Renderer | None = None

    def load(self, source: Path) -> Policy:
        """As `load_policy`."""
        policy = load_policy(self.config, source)
        if self._renderer is not None and self._renderer.renders_as(policy.renderer):
            policy.renderer = self._renderer
        self._renderer = policy.renderer
        return policy


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
