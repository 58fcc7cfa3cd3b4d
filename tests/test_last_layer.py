"""The last layer's feed-forward block at the tokens that are read: the same numbers, from fewer of them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from iterative_ppo.activation_checkpointing import gradient_pass, keep_no_activations
from iterative_ppo.adapters import add_adapter
from iterative_ppo.last_layer import extend_cache, hidden_states

TOKEN_BT = torch.randint(5, 12, (3, 11), generator=torch.Generator().manual_seed(0))
READ_BT = torch.rand((3, 11), generator=torch.Generator().manual_seed(1)) < 0.4
SIZES = {
    "vocab_size": 12,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "pad_token_id": tiny.PAD,
}


def family(config: str, **settings: object) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(getattr(transformers, config)(**(SIZES | settings))).eval()

    return make


def with_adapter() -> PreTrainedModel:
    model = tiny.llama(12)
    model.requires_grad_(False)
    add_adapter(model, rank=4, seed=0)
    return model


PLAIN = {
    "llama": lambda: tiny.llama(12),
    "adapter": with_adapter,
    "gpt2": lambda: tiny.gpt2(12),
    "qwen3": family("Qwen3Config", num_key_value_heads=2, head_dim=8),
    "gemma2": family("Gemma2Config", num_key_value_heads=2, head_dim=8),
    "gemma3": family("Gemma3TextConfig", num_key_value_heads=2, head_dim=8),
    "phi": family("PhiConfig"),
    "gpt_neox": family("GPTNeoXConfig"),
}
EXPERTS = {
    "mixtral": family("MixtralConfig", num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": family(
        "Qwen3MoeConfig",
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "gpt_oss": family("GptOssConfig", num_key_value_heads=2, head_dim=8, num_local_experts=4),
}


def read_and_gradients(model: PreTrainedModel, read_BT: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Hidden states at the tokens that are read, and the gradients of all weights from a function of those."""
    with gradient_pass(model):
        hidden_ND = hidden_states(model, read_BT, input_ids=TOKEN_BT)[READ_BT]
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(hidden_ND.sin().sum(), weights, allow_unused=True)
    return hidden_ND.detach(), [gradient for gradient in gradients if gradient is not None]


def last_block(model: PreTrainedModel) -> nn.Module:
    [layers] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and hasattr(module[0], "mlp")]
    return layers[-1].mlp


def tokens_seen(model: PreTrainedModel, run: Callable[[], object]) -> int:
    """Tokens that go through the activation of the last feed-forward block meanwhile."""
    seen = 0

    def count(_: nn.Module, arguments: tuple[Tensor], __: object) -> None:
        nonlocal seen
        seen += arguments[0].shape[:-1].numel()

    activation = next(child for name, child in last_block(model).named_children() if "act" in name)
    handle = activation.register_forward_hook(count)
    run()
    handle.remove()
    return seen


def tokens_seen_where(model: PreTrainedModel, read_BT: Tensor | None) -> int:
    return tokens_seen(model, lambda: hidden_states(model, read_BT, input_ids=TOKEN_BT))


@pytest.mark.parametrize("name", [*PLAIN, *EXPERTS])
def test_what_is_read_and_its_gradients_are_those_of_the_whole_layer(name: str):
    model = (PLAIN | EXPERTS)[name]()
    whole, part = read_and_gradients(model, None), read_and_gradients(model, READ_BT)
    torch.testing.assert_close(part[0], whole[0], rtol=0, atol=1e-5)
    assert len(part[1]) == len(whole[1]) > 0
    for ours, theirs in zip(part[1], whole[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", PLAIN)
def test_the_block_is_computed_at_the_tokens_that_are_read_alone(name: str):
    model = PLAIN[name]()
    assert tokens_seen_where(model, None) == TOKEN_BT.numel()
    assert tokens_seen_where(model, READ_BT) == READ_BT.sum()
    whole_BTD, part_BTD = (hidden_states(model, read_BT, input_ids=TOKEN_BT) for read_BT in (None, READ_BT))
    assert not torch.allclose(part_BTD[~READ_BT], whole_BTD[~READ_BT], atol=1e-3)


@pytest.mark.parametrize("name", [*PLAIN, *EXPERTS])
def test_a_cache_is_extended_with_nothing_of_the_last_block(name: str):
    model = (PLAIN | EXPERTS)[name]()
    whole, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TOKEN_BT, past_key_values=whole)
        for token_BT in (TOKEN_BT[:, :6], TOKEN_BT[:, 6:]):
            extend_cache(model, ours, input_ids=token_BT)
    for layer, same in zip(whole.layers, ours.layers, strict=True):
        torch.testing.assert_close(same.keys, layer.keys)
        torch.testing.assert_close(same.values, layer.values)
    if name in PLAIN:
        cache = DynamicCache(config=model.config)
        assert tokens_seen(model, lambda: extend_cache(model, cache, input_ids=TOKEN_BT)) == 0


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_see_all_tokens(name: str):
    """They are routed, and their blocks return more than hidden states: nothing is left out."""
    model = EXPERTS[name]()
    whole_BTD, same_BTD = (hidden_states(model, read_BT, input_ids=TOKEN_BT) for read_BT in (None, READ_BT))
    torch.testing.assert_close(same_BTD, whole_BTD, rtol=0, atol=0)


def test_activations_that_are_computed_again_are_those_of_all_tokens():
    """The backward pass computes the layer again when the forward pass is over."""
    kept, forgotten = tiny.llama(12), tiny.llama(12)
    keep_no_activations(forgotten)
    for ours, theirs in zip(read_and_gradients(forgotten, READ_BT)[1], read_and_gradients(kept, None)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), gradient_pass(forgotten):
        assert tokens_seen_where(forgotten, READ_BT) == READ_BT.sum(), "without a gradient nothing is computed again"


def test_threads_that_share_a_model_read_what_they_asked_for():
    """As the Q server's threads do: other tokens, other shapes, and all tokens, at the same time."""
    model = tiny.llama(12)
    generator = torch.Generator().manual_seed(0)
    token_BT = [torch.randint(5, 12, (2, 5 + i), generator=generator) for i in range(8)]
    read_BT = [torch.rand(token.shape, generator=generator) < 0.1 + 0.1 * i for i, token in enumerate(token_BT)]
    barrier = threading.Barrier(len(token_BT))

    def largest_error(i: int) -> float:
        with torch.no_grad():
            whole_ND = hidden_states(model, None, input_ids=token_BT[i])[read_BT[i]]
            barrier.wait()
            asked = read_BT[i] if i % 4 else None
            parts = [hidden_states(model, asked, input_ids=token_BT[i])[read_BT[i]] for _ in range(200)]
        return max([float((part - whole_ND).abs().max()) for part in parts if part.numel()], default=0.0)

    with ThreadPoolExecutor(len(token_BT)) as threads:
        assert max(threads.map(largest_error, range(len(token_BT)))) < 1e-5


def test_nothing_is_left_on_the_model_when_a_pass_fails():
    model = tiny.llama(12)
    with pytest.raises(IndexError):
        hidden_states(model, READ_BT, input_ids=TOKEN_BT + 100)
    assert tokens_seen_where(model, None) == TOKEN_BT.numel()
