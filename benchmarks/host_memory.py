"""What a token of the log takes of the processor's memory while Q is fitted, and while a policy is improved.

Conversations of random words with the sizes that scaling_arithmetic.py assumes, in Python's own count of what it allocates:
texts and sequences for the fit, texts and prompts for the improvement step. Weights and optimizer states are not in it.

    python benchmarks/host_memory.py

Prints a line and, last, one JSON object: bytes a token of the log.
"""

import argparse
import json
import tracemalloc

import numpy as np

from iterative_ppo.config import PolicyConfig
from iterative_ppo.conversations import Conversation, Message
from iterative_ppo.policy import Policy
from iterative_ppo.q_from_logs import labelled
from iterative_ppo.turns_to_tokens import all_prompts, tokenize


def word_list(generator: np.random.Generator, num_words: int) -> list[str]:
    """Words of five letters, each a token or so of a tokenizer trained on them."""
    letters = generator.integers(97, 123, (num_words, 5)).astype(np.uint8)
    return [row.tobytes().decode() for row in letters]


def talk(words: list[str], generator: np.random.Generator, name: str) -> Conversation:
    """200 tokens of a system message, then eight turns of 40 and 60."""

    def message(role: str, num_words: int) -> Message:
        return Message(role=role, content=" ".join(generator.choice(words, num_words)))

    turns = [message(role, size) for _ in range(8) for role, size in (("user", 36), ("assistant", 57))]
    return Conversation(id=name, messages=(message("system", 190), *turns), outcome=1.0, end="terminated")


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=100)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    words = word_list(generator, 3000)
    config = PolicyConfig(context_tokens=4096, hidden_size=32, num_layers=1, vocabulary_size=8000)
    policy = Policy.tiny([" ".join(words)] * 5, config, seed=0)

    def allocated() -> int:
        # Caches of bounded size, which these few conversations would not fill.
        policy.renderer._pieces.clear()
        policy.renderer._prompts.clear()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = allocated()
    conversations = [talk(words, generator, f"c{i}") for i in range(arguments.conversations)]
    texts = allocated() - before
    sequences, _ = labelled(conversations, policy, gamma=1.0)
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    fit = allocated() - before
    del sequences
    prompts = all_prompts(tokenize(conversation, policy.renderer) for conversation in conversations)
    improve = allocated() - before
    del prompts
    per_token = {name: size / num_tokens for name, size in (("texts", texts), ("fit", fit), ("improve", improve))}
    print(
        f"{num_tokens / len(conversations):.0f} tokens a conversation; bytes a token: {per_token['texts']:.1f} as texts, "
        f"{per_token['fit']:.1f} in the fit, {per_token['improve']:.1f} in the improvement step"
    )
    print(json.dumps({"conversation_tokens": num_tokens / len(conversations), "bytes_per_token": per_token}))


if __name__ == "__main__":
    main()
