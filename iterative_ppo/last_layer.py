"""A trunk's last hidden states, with no more of its last layer computed than is read.

After attention in the last layer has taken keys and values, what a token holds goes to whoever reads its hidden state
and nowhere else. The feed-forward block that follows, two thirds of a layer's arithmetic, is left out at tokens that
nobody reads: the prompts, mostly.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def hidden_states(model: PreTrainedModel, read_BT: Tensor | None, **inputs: Any) -> Tensor:
    """The trunk's last hidden states [B, T, D].

    Args:
        read_BT: True at the tokens that are read; what stands at the others means nothing. Default: all are read.
        inputs: of the trunk, token ids [B, T] first of all.
    """
    with nullcontext() if read_BT is None else _feed_forward_at(model, read_BT):
        hidden_BTD: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden_BTD


def extend_cache(model: PreTrainedModel, cache: Cache, *, input_ids: Tensor, **inputs: Any) -> None:
    """Takes the keys and values of tokens [B, T] into a cache; their hidden states nobody reads."""
    with _feed_forward_at(model, torch.zeros(input_ids.shape, dtype=torch.bool)):
        model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=True, **inputs)


def layer_list(model: PreTrainedModel) -> str | None:
    """The name, within the trunk, of the list of its layers; None where no list is that of all layers and nothing else."""
    trunk = model.base_model
    num_layers = trunk.config.get_text_config().num_hidden_layers
    names = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    return names[0] if len(names) == 1 else None


@contextmanager
def _feed_forward_at(model: PreTrainedModel, read_BT: Tensor) -> Iterator[None]:
    """Around a forward pass: the last layer's feed-forward block is computed at some tokens, and gives 0 at the others."""
    block = None if read_BT.all() else _last_feed_forward(model)
    if block is None:
        yield
        return
    place_N = read_BT.flatten().nonzero().squeeze(1).to(model.device)
    thread = threading.get_ident()  # others may run the same model meanwhile, as the Q server's do

    def take(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        if threading.get_ident() != thread:
            return None
        [x_BTD] = arguments
        return (x_BTD.flatten(0, 1).index_select(0, place_N)[None],)

    def put_back(_: nn.Module, __: tuple[Tensor], y_1ND: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        nothing_SD = y_1ND.new_zeros(read_BT.numel(), y_1ND.shape[-1])
        return nothing_SD.index_copy(0, place_N, y_1ND[0]).unflatten(0, tuple(read_BT.shape))

    hooks = [block.register_forward_pre_hook(take), block.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """The block, where it is known to treat every token by itself and is computed once."""
    name = layer_list(model)
    if name is None:
        return None
    layers = model.base_model.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    last = layers[-1]
    if isinstance(last, GradientCheckpointingLayer) and last.gradient_checkpointing and torch.is_grad_enabled():
        return None  # computed again in the backward pass, after the hooks have gone
    block = getattr(last, "mlp", None)
    # Experts' weights have three dimensions, and what routes tokens to them returns more than hidden states; so do convolutions' over tokens.
    is_plain = isinstance(block, nn.Module) and all(p.ndim <= 2 for p in block.parameters())
    return block if is_plain else None
