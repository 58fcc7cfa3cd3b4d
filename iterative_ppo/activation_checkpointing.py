"""Activations computed again in the backward pass instead of kept: memory for time (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_no_activations(model: PreTrainedModel) -> None:
    """From now on gradient passes keep what goes into each layer, and nothing of what happens in it.

    A copy of the model has that from it.
    """
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def gradient_pass(model: PreTrainedModel) -> Iterator[None]:
    """Around a forward pass: lets the layers forget in evaluation mode too.

    transformers does it in training mode alone, which would turn dropout on, and a policy is the same function in a
    gradient pass as when it answered.
    """
    modules = model.modules() if torch.is_grad_enabled() else ()
    layers = [
        module
        for module in modules
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and not module.training
    ]
    for layer in layers:
        layer.training = True  # of the layer itself; its dropout modules stay as they are
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
