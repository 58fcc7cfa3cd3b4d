"""Large models in several processes: each keeps a part of every weight, and a layer's are gathered when it is computed.

PyTorch's FSDP2 (Zhao et al. 2023, arXiv 2304.11277; `fully_shard`), on each layer and on what is around the layers. All
processes must gather at the same time, hence two ways to compute: gradient passes make the same number of forward and
backward passes in every process, and passes without a gradient are made with all weights gathered, as many as it takes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from iterative_ppo import distributed

_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=PreTrainedModel)
_templates: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""For each sharded model, what it was before, with no memory behind its weights."""
_gathered: set[nn.Module] = set()


def shard(model: PreTrainedModel, device: str | torch.device) -> None:
    """Spreads the weights of a model over the processes, in place, each process's part on its device."""
    device = torch.device(device)
    without_weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    template = copy.deepcopy(model, dict(without_weights))
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts: list[FSDPModule] = [fully_shard(layer, mesh=mesh) for layer in layers]
    # What is around the layers stays gathered until the backward pass: it is used again right away.
    parts = [fully_shard(model, mesh=mesh, reshard_after_forward=False), *parts]
    for part, before in zip(parts, [parts[-1], *parts[:-1]], strict=True):
        part.set_gradient_divide_factor(1.0)  # gradients are sums, as everywhere here
        part.set_force_sum_reduction_for_comms(True)
        # Said, and not left to FSDP: it goes by the last forward passes, and those without a gradient differ in number.
        part.set_modules_to_backward_prefetch([before])
    model.call_within = _call
    register_fsdp_forward_method(model, "call_within")
    model.to(device)
    _templates[model] = template


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are spread over the processes."""
    return model in _templates


def has_shards(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether some of the parameters are spread over the processes."""
    return any(isinstance(p, DTensor) for p in parameters)


def sharded_models(module: nn.Module) -> list[PreTrainedModel]:
    """The sharded models in a module."""
    if not _templates:
        return []
    return [model for model in module.modules() if isinstance(model, PreTrainedModel) and is_sharded(model)]


def within(model: PreTrainedModel, work: Callable[[], _T]) -> _T:
    """What `work` returns, which calls parts of the model by themselves: the weights around its layers are gathered."""
    if not is_sharded(model):
        return work()
    result: _T = model.call_within(work)
    return result


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it all weights of a module's models are in every process, for passes without a gradient."""
    models = [model for model in sharded_models(module) if model not in _gathered]
    for model in models:
        _reshard_after_forward(model, False)
        for part in _parts(model):
            part.unshard()
    _gathered.update(models)
    try:
        yield
    finally:
        _gathered.difference_update(models)
        for model in models:
            for part in _parts(model):
                part.reshard()
            _reshard_after_forward(model, True)


def whole(model: _Model) -> _Model:
    """A model with all weights, for the processor's memory: a copy of a sharded one, and any other itself.

    All processes call it; in those that do not write, a copy's weights have no memory behind them.
    """
    return _whole_copy(model, keep=distributed.is_main()) if is_sharded(model) else model


def unsharded_copy(model: _Model) -> _Model:
    """A whole copy of a sharded model, in the processor's memory of every process."""
    return _whole_copy(model, keep=True)


def sharded_copy(model: _Model) -> _Model:
    """A copy of a sharded model, sharded too."""
    made = _whole_copy(model, keep=True)
    shard(made, model.device)
    return made


@torch.no_grad()
def _whole_copy(model: _Model, *, keep: bool) -> _Model:
    template = _templates[model]
    assert isinstance(template, PreTrainedModel)
    weights = {}
    for (name, p), (template_name, empty) in zip(model.named_parameters(), template.named_parameters(), strict=True):
        assert name == template_name
        assert isinstance(p, DTensor)
        full = p.full_tensor()
        if keep:
            weights[id(empty)] = nn.Parameter(full.cpu(), requires_grad=p.requires_grad)
    made: _Model = copy.deepcopy(template, weights)
    return made


def adamw(parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with its fused step, which takes sharded parameters and others in groups of their own."""
    sharded: list[nn.Parameter] = [p for p in parameters if isinstance(p, DTensor)]
    others = [p for p in parameters if not isinstance(p, DTensor)]
    groups = [{"params": group} for group in (others, sharded) if group]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scales all gradients so that their norm, over the shards of all processes, is at most `max_norm`."""
    if not has_shards(parameters):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    common = [g for g in gradients if not isinstance(g, DTensor)]
    [square] = distributed.sums(_square(own))
    norm = (square + _square(common)) ** 0.5
    for gradient in [*own, *common]:
        gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(x.square().sum()) for x in tensors)


def _call(work: Callable[[], _T]) -> _T:
    return work()


def _parts(model: nn.Module) -> list[FSDPModule]:
    """The model and its layers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard_after_forward(model: nn.Module, does: bool) -> None:
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(does)
    model.set_reshard_after_forward(False, recurse=False)
