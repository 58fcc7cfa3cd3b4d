"""Activations computed again instead of kept: the same gradients from less memory, and dropout stays off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_improvement import PROMPTS
from torch import Tensor

from iterative_ppo import config as config_module
from iterative_ppo.loading import load_policy, load_q_function
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, QFunctionCard

TOKENS = 4096
RESPONSES = [(tiny.A, tiny.B, tiny.END), (tiny.C, tiny.END)] * (len(PROMPTS) // 2)
CARD = QFunctionCard(link="identity", gamma=1.0, target="monte_carlo", policy="logs", metrics={})


@pytest.fixture(params=[tiny.llama, tiny.gpt2], ids=lambda model: model.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A policy and a Q-function on its trunk. GPT-2 has dropout, which would show."""
    policy = tiny.letter_policy(request.param)
    policy.save(tmp_path / "policy")
    q_function = QFunction.from_policy(
        policy.model, link="identity", num_heads=2, pad_id=policy.pad_id, lora_rank=0, seed=0
    )
    q_function.save(tmp_path / "q_function", CARD, policy.tokenizer)
    return tmp_path


def roles(folder: Path, *, checkpoint_activations: bool) -> tuple[Policy, QFunction]:
    config = config_module.from_dict(
        {"compute": {"checkpoint_activations": checkpoint_activations}, "policy": {"lora_rank": 0}}
    )
    policy = load_policy(config, folder / "policy")
    return policy, load_q_function(folder / "q_function", policy)


def policy_loss(policy: Policy, _: QFunction) -> Tensor:
    batches = policy.response_logits(PROMPTS, RESPONSES, tokens_per_batch=TOKENS)
    return torch.stack([batch.logprobs().sum() for batch in batches]).sum()


def q_loss(_: Policy, q_function: QFunction) -> Tensor:
    width = max(map(len, PROMPTS))
    return q_function(torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in PROMPTS])).square().sum()


def gradients_and_kept_bytes(
    loss_of: Callable[[Policy, QFunction], Tensor], policy: Policy, q_function: QFunction
) -> tuple[list[Tensor], int]:
    """Gradients of all weights, and the bytes of what the forward pass kept, weights left out."""
    weights = {p.data_ptr(): p for model in (policy.model, q_function) for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(policy, q_function)
    num_bytes = sum(kept.values())
    loss.backward()
    return [p.grad for p in weights.values() if p.grad is not None], num_bytes


@pytest.mark.parametrize("loss_of", [policy_loss, q_loss])
def test_the_same_gradients_with_less_kept(folder: Path, loss_of: Callable[[Policy, QFunction], Tensor]):
    kept, plain = (gradients_and_kept_bytes(loss_of, *roles(folder, checkpoint_activations=on)) for on in (True, False))
    assert len(plain[0]) > 5
    for ours, right in zip(kept[0], plain[0], strict=True):
        torch.testing.assert_close(ours, right)
    assert kept[1] < 0.7 * plain[1]


def test_it_is_off_by_default_and_does_not_touch_sampling(folder: Path):
    default = load_policy(config_module.from_dict({}), folder / "policy")
    policy, q_function = roles(folder, checkpoint_activations=True)
    assert not default.model.is_activation_checkpointing
    assert policy.model.is_activation_checkpointing
    assert q_function.model.is_activation_checkpointing
    assert policy.branch(seed=0).model.is_activation_checkpointing
    uniforms_BT = np.random.default_rng(0).random((len(PROMPTS), 8))
    assert policy.sample(PROMPTS, uniforms_BT) == default.sample(PROMPTS, uniforms_BT)
