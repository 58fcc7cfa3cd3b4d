"""Large models of random weights, for measurements that depend on a model's shape alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from iterative_ppo.config import PolicyConfig
from iterative_ppo.policy import Policy

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
"""Of SmolLM2-135M and Llama-3.2-1B."""


def save_random_model(folder: Path, shape: str) -> None:
    """Such a shape, with the tokenizer of a tiny model: what is measured depends on neither."""
    tiny = Policy.tiny(["a few words to make a tokenizer of"] * 20, PolicyConfig(), seed=0)
    tiny.tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = {"bos_token_id": None, "eos_token_id": tiny.renderer.end_id, "pad_token_id": tiny.pad_id}
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **end)).save_pretrained(folder)
