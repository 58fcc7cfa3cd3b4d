"""Memory of one PPO update: four roles on one frozen backbone (LoRA) against four models of their own.

Policy, KL anchor, token value and reward model Q, a Llama of SmolLM2-135M's shape with random weights unless --model
names one. Q has an adapter too, as with `q_function.trunk = "trained"`; a read-out of the frozen weights needs none. Each way is a process of its own, which makes the same update: 8 prompts of 64 tokens, 2 responses each.

    python benchmarks/memory.py
    python benchmarks/memory.py --model FOLDER --dtype bfloat16 --checkpoint-activations

Prints a line for each way, and, last, one JSON object. `held` is what stays between two updates: parameters, of all
roles and each counted once, and the optimizer's state. `peak` is the most that the process held until the end of the
update, less what it held before it made a model; what is above `held` are activations, gradients and what the libraries
keep. `ratio` is the peak of four models over ours, and `held_over_weights` ours over the weights of one model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _random_models import save_random_model
from torch import nn
from transformers.utils import logging as transformers_logging

from iterative_ppo import policy as policy_module
from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.improvement import native
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, TokenValue
from iterative_ppo.q_reward import q_reward

transformers_logging.disable_progress_bar()

WAYS = {"one backbone": 16, "four models": 0}
"""Rank of the adapters; 0: every role has all weights to itself."""
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 32
TOKENS_PER_BATCH = 1024
MIB = 2**20


def bytes_of(*modules: nn.Module) -> int:
    """Memory of all parameters of some modules, each tensor counted once."""
    storages = {p.data_ptr(): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    return sum(storages.values())


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, way: str, dtype: str, checkpoint_activations: bool) -> dict[str, Any]:
    """One update; the figures of this process."""
    lora_rank = WAYS[way]
    policy_module._SMALLEST_FOR_ADAPTERS = 0  # a small --model, too, is to be trained through adapters
    before = peak_bytes()
    config = PolicyConfig(lora_rank=lora_rank, max_response_tokens=RESPONSE_TOKENS)
    policy = Policy.load(folder, config, dtype=getattr(torch, dtype), checkpoint_activations=checkpoint_activations)
    weights = bytes_of(policy.model)
    if lora_rank:
        policy = policy.branch(seed=0)
    q_function = QFunction.from_policy(
        policy.model, link="identity", num_heads=1, pad_id=policy.pad_id, lora_rank=lora_rank, seed=0
    )
    learners: list[native._Learner] = []

    class Learner(native._Learner):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            learners.append(self)

    native._Learner = Learner  # type: ignore[misc]
    figures: dict[str, Any] = {}

    def note(*_: object) -> None:
        [learner] = learners
        assert learner.token_value is not None
        held = bytes_of(policy.model, learner.policy.model, learner.token_value, q_function)
        state = bytes_of_state(learner.policy_optimizer)
        figures.update(weights=weights, parameters=held, optimizer=state, held=held + state, peak=peak_bytes() - before)

    draws = [np.random.default_rng(i).integers(policy.model.config.vocab_size, size=PROMPT_TOKENS) for i in range(8)]
    native.improve(
        policy,
        [tuple(draw.tolist()) for draw in draws],
        q_reward(q_function, pessimism=0.0, tokens_per_batch=TOKENS_PER_BATCH),
        ImprovementConfig(num_updates=1, prompts_per_update=8, num_samples=2, num_minibatches=1, kl_target=1e6),
        token_value=TokenValue(q_function),
        generator=np.random.default_rng(0),
        tokens_per_batch=TOKENS_PER_BATCH,
        on_update=note,
    )
    return figures


def main() -> None:
    """Both ways, in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of frozen weights")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        figures = measure(arguments.model, arguments.way, arguments.dtype, arguments.checkpoint_activations)
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            save_random_model(Path(scratch), "smollm2-135m")
        folder = str(arguments.model or scratch)
        rows = {}
        options = ["--model", folder, "--dtype", arguments.dtype]
        options += ["--checkpoint-activations"] if arguments.checkpoint_activations else []
        for way in WAYS:
            command = [sys.executable, __file__, *options, "--way", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[way] = json.loads(done.stdout.splitlines()[-1])
            figures = {name: f"{size / MIB:,.0f}" for name, size in rows[way].items()}
            print(
                f"{way}: weights {figures['weights']} MiB, held {figures['held']} (parameters {figures['parameters']}, "
                f"optimizer {figures['optimizer']}), peak {figures['peak']}",
                flush=True,
            )
    ours, theirs = rows["one backbone"], rows["four models"]
    print(
        json.dumps(
            {
                "ratio": theirs["peak"] / ours["peak"],
                "held_over_weights": ours["held"] / ours["weights"],
                "four_models_held_over_weights": theirs["held"] / theirs["weights"],
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
