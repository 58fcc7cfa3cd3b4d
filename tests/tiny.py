"""Tokenizers and random models small enough to be tested in milliseconds.

`letters`: a vocabulary of single letters, for what is checked by listing every response. `words`: byte-level BPE,
for what must hold for any text. Each can be put under a Llama, a Llama with grouped-query attention, or a GPT-2
(absolute positions, no padding token of its own).
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from iterative_ppo.config import PolicyConfig
from iterative_ppo.conversation_features import ResponseMarks
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds

SPECIAL = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
PAD, END, SYSTEM, USER, ASSISTANT = range(5)
MARKS = ResponseMarks(opening=(ASSISTANT,), end_id=END)
LETTERS = "abcdefg"
A, B, C, D, E, F, G = range(5, 12)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    "hello, which trail shoes do you have?",
    "We have light shoes at 80 euro. What is your budget?",
    "around 80, thank you very much",
    "Then I recommend the light ones. Shall I order them for you?",
]


def letter_tokenizer(num_letters: int = len(LETTERS)) -> PreTrainedTokenizerFast:
    """Five special tokens and the first letters of the alphabet, a token each; anything else is dropped."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS[:num_letters]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )


def byte_tokenizer(
    template: str = TEMPLATE,
    special: Iterable[str] = SPECIAL,
    *,
    eos: str = "<end>",
    pad: str | None = "<pad>",
    bos: str | None = None,
    num_merges: int = 60,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2 and its descendants, with a family's special tokens and chat template."""
    special, alphabet = list(special), pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + num_merges,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=bos, chat_template=template
    )


def llama(vocab_size: int, *, num_kv_heads: int = 4, context_tokens: int = 512, seed: int = 0) -> PreTrainedModel:
    """Hidden size 32, two layers, four heads; weights large enough that its distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=context_tokens,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return _seeded(lambda: LlamaForCausalLM(config), seed)


def grouped_query_llama(vocab_size: int, *, context_tokens: int = 512, seed: int = 0) -> PreTrainedModel:
    """Four query heads on two key-value heads."""
    return llama(vocab_size, num_kv_heads=2, context_tokens=context_tokens, seed=seed)


def gpt2(vocab_size: int, *, context_tokens: int = 512, seed: int = 0) -> PreTrainedModel:
    """Absolute positions: a position beyond the context is an error, not an extrapolation."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=context_tokens,
        initializer_range=0.2,
        bos_token_id=END,
        eos_token_id=END,
    )
    return _seeded(lambda: GPT2LMHeadModel(config), seed)


def letter_policy(
    model: Callable[..., PreTrainedModel] = llama,
    *,
    num_letters: int = len(LETTERS),
    seed: int = 0,
    **settings: object,
) -> Policy:
    """A random policy over letters."""
    tokenizer = letter_tokenizer(num_letters)
    return Policy(model(len(tokenizer), seed=seed), tokenizer, policy_config(**settings))


def word_policy(model: Callable[..., PreTrainedModel] = llama, *, seed: int = 0, **settings: object) -> Policy:
    """A random policy over byte-level BPE tokens."""
    tokenizer = byte_tokenizer()
    return Policy(model(len(tokenizer), seed=seed), tokenizer, policy_config(**settings))


def policy_config(**settings: object) -> PolicyConfig:
    return PolicyConfig(**({"context_tokens": 512, "max_response_tokens": 8} | settings))


def random_rows(generator: np.random.Generator, lengths: Sequence[int], *, low: int, high: int) -> list[TokenIds]:
    """Token rows of the given lengths, drawn from low..high-1."""
    return [tuple(generator.integers(low, high, length).tolist()) for length in lengths]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights."""
    return copy.deepcopy(module.state_dict())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all weights of two modules."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _seeded(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()
