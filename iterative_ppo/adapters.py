"""LoRA adapters: policy, anchor, token value and Q as module trees of their own over one set of frozen weights.

LoRA (Hu et al. 2021, arXiv 2106.09685) trains y = W x + (alpha / r) B A x with W frozen and B = 0 at the start. A copy
of a model that shares its frozen weights costs its adapters alone, so each role has a whole model to itself and none
has to be switched before use.
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftConfig, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from iterative_ppo.sharding import sharded_copy, sharded_models

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_Module = TypeVar("_Module", bound=nn.Module)
_Model = TypeVar("_Model", bound=PreTrainedModel)


def copy_sharing_frozen(module: _Module) -> _Module:
    """A deep copy in which parameters that are not trained, and buffers, are the same tensors.

    A sharded model's copy has all weights for itself.
    """
    frozen = [p for p in module.parameters() if not p.requires_grad] + list(module.buffers())
    copies = {id(model): sharded_copy(model) for model in sharded_models(module)}
    return copy.deepcopy(module, {id(tensor): tensor for tensor in frozen} | copies)


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter is trained."""
    return not any(p.requires_grad for p in module.parameters())


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether LoRA layers are in the model."""
    return next(_lora_layers(model), None) is not None


def add_adapter(model: PreTrainedModel, *, rank: int, seed: int) -> None:
    """Puts new LoRA layers on all linear layers of the trunk; they alone are trained, in float32.

    Args:
        model: changed in place; its outputs stay as they are, since B starts at 0.
        rank: of each update; alpha is twice the rank.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, config)


def save_adapter(model: PreTrainedModel, folder: Path, *, heads: dict[str, Tensor] | None = None) -> None:
    """Writes a peft folder that names the model whose frozen weights it belongs to.

    Args:
        heads: weights of new heads by module name, as `score`, for a sequence classifier.
    """
    trunk = model.base_model
    weights = {
        f"{_PREFIX}{model.base_model_prefix}.{name}": weight
        for name, weight in get_peft_model_state_dict(trunk).items()
    } | {f"{_PREFIX}{name}.weight": weight for name, weight in (heads or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
        folder / _WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    config = copy.deepcopy(trunk.peft_config["default"])
    config.base_model_name_or_path = name_of(model)
    config.target_modules = {name.rpartition(".")[2] for name in config.target_modules}
    config.inference_mode = True
    config.task_type = TaskType.SEQ_CLS if heads else TaskType.CAUSAL_LM
    config.modules_to_save = sorted(heads) if heads else None
    config.save_pretrained(str(folder))


def name_of(model: PreTrainedModel) -> str:
    """The hub id or absolute folder that a model's weights were loaded from."""
    name = model.config.name_or_path
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def base_of(folder: str | Path) -> str | None:
    """The name of the model that an adapter folder belongs to; None where the folder holds no adapter."""
    if not (Path(folder) / _CONFIG_FILE).is_file():
        return None
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"{Path(folder) / _CONFIG_FILE}: base_model_name_or_path is missing")
    return str(base)


def is_of_classifier(folder: str | Path) -> bool:
    """Whether an adapter folder is that of a Q-function or another model that scores texts."""
    return PeftConfig.from_pretrained(str(folder)).task_type == TaskType.SEQ_CLS


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Puts the adapter of a folder on a model without one; it can be trained further.

    Raises:
        ValueError: the adapter's weights are not those of such a model.
    """
    config = PeftConfig.from_pretrained(str(folder))
    heads = (
        tuple(f"{_PREFIX}{name}." for name in config.modules_to_save or ())
        if config.task_type == TaskType.SEQ_CLS
        else ()
    )
    config.inference_mode = False
    config.modules_to_save = None

    def in_trunk(name: str) -> str:  # peft may have written whole paths, from the model's root
        return name.removeprefix(f"{model.base_model_prefix}.")

    if isinstance(config.target_modules, set):
        config.target_modules = set(map(in_trunk, config.target_modules))
    config.rank_pattern = {in_trunk(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {in_trunk(name): alpha for name, alpha in config.alpha_pattern.items()}
    _inject(model, config)
    prefix = f"{_PREFIX}{model.base_model_prefix}."
    saved = load_file(Path(folder) / _WEIGHTS_FILE)
    outside = sorted(name for name in saved if not name.startswith((prefix, *heads)))
    if outside:
        raise ValueError(
            f"{Path(folder) / _WEIGHTS_FILE}: holds {outside[0]}, and only adapters of the layers below the head can be loaded; "
            "merge it into a plain model with peft"
        )
    weights = {name.removeprefix(prefix): weight for name, weight in saved.items() if name.startswith(prefix)}
    expected = get_peft_model_state_dict(model.base_model)
    if weights.keys() != expected.keys() or any(weights[name].shape != expected[name].shape for name in weights):
        raise ValueError(f"{Path(folder) / _WEIGHTS_FILE}: not the adapter of {name_of(model)}")
    set_peft_model_state_dict(model.base_model, weights)


def without_adapter(model: _Model) -> _Model:
    """The model as it was before its adapter, over the same frozen weights."""
    bare = copy_sharing_frozen(model)
    _unwrap(bare)
    return bare


def merged(model: _Model) -> _Model:
    """A plain model with the adapter added into weights of its own."""
    whole = copy.deepcopy(model)
    for layer in _lora_layers(whole):
        layer.merge()
    _unwrap(whole)
    return whole.requires_grad_(True)


def _inject(model: PreTrainedModel, config: PeftConfig) -> None:
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # GPT-2's layers are transposed; peft sees to it
        inject_adapter_in_model(config, model.base_model)
    for name, parameter in model.named_parameters():
        is_adapter = "lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


def _unwrap(model: PreTrainedModel) -> None:
    """Takes the LoRA layers out, in place, and leaves what they were put on."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model.base_model, "peft_config"):
        del model.base_model.peft_config


def _lora_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
