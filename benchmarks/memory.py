"""Memory of an improvement step through adapters: four roles on one set of frozen weights, against four copies.

The roles are policy, anchor, token value (trained too) and Q as the reward; one update of PPO. Every figure is the
largest resident size of a process of its own (Linux), less what the libraries take.

    python benchmarks/memory.py                                   # random weights of SmolLM2-135M's shape
    python benchmarks/memory.py --policy FOLDER --dtype bfloat16

Prints a line a way and, last, one JSON object: `ratio` is the peak of four copies over ours; `weights_ratio` is our peak, less
the activations of one gradient pass, over the size of the weights.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.from_logs import q_reward
from iterative_ppo.improvement.native import improve
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, TokenValue

_MIB = 2**20
_WAYS = ("shared", "checkpointed", "copies")
_NUM_PROMPTS, _PROMPT_TOKENS, _TOKENS_PER_BATCH = 16, 64, 1024


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Starts a new measurement of the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(folder: str, dtype: str, way: str) -> dict[str, int]:
    """Bytes beyond those of the libraries: of the roles once loaded, and at most during the step."""
    libraries = resident("VmRSS")
    config = PolicyConfig(max_response_tokens=16)
    policy = Policy.load(folder, config, dtype=getattr(torch, dtype), checkpoint_activations=way == "checkpointed")
    q_function = QFunction.from_policy(
        policy.model, link="logistic", num_heads=5, pad_id=policy.pad_id, lora_rank=config.lora_rank, seed=0
    )
    generator = np.random.default_rng(0)
    prompts = [tuple(row) for row in generator.integers(100, 1000, (_NUM_PROMPTS, _PROMPT_TOKENS)).tolist()]
    roles = resident("VmRSS")
    forget_peak()
    improve(
        policy,
        prompts,
        q_reward(q_function, pessimism=1.0, tokens_per_batch=_TOKENS_PER_BATCH),
        ImprovementConfig(
            num_updates=1, prompts_per_update=_NUM_PROMPTS, num_samples=1, token_value_learning_rate=1e-4, kl_target=1e9
        ),
        token_value=TokenValue(q_function),
        generator=generator,
        tokens_per_batch=_TOKENS_PER_BATCH,
    )
    return {
        "roles": roles - libraries,
        "peak": resident("VmHWM") - libraries,
        "activations": activations(policy, prompts),
    }


def activations(policy: Policy, prompts: list[tuple[int, ...]]) -> int:
    """Bytes that one gradient pass over the largest micro-batch keeps for its way back."""
    branch = policy.branch(seed=0)
    weights = {p.untyped_storage().data_ptr() for p in branch.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    responses = [prompt[:16] for prompt in prompts]
    largest = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for batch in branch.response_logits(prompts, responses, tokens_per_batch=_TOKENS_PER_BATCH):
            logprobs = batch.logprobs()
            largest = max(largest, sum(kept.values()))
            del logprobs
            kept.clear()
    return largest


def random_model(folder: Path) -> None:
    """A Llama of SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    Policy.tiny(["a b c"], PolicyConfig(), seed=0).tokenizer.save_pretrained(folder)


def main() -> None:
    """Runs the measurement, each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="a hub id or a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        if arguments.way == "copies":
            with (
                mock.patch("iterative_ppo.adapters.copy_sharing_frozen", copy.deepcopy),
                mock.patch("iterative_ppo.q_function.copy_sharing_frozen", copy.deepcopy),
                mock.patch("iterative_ppo.improvement.native.copy_sharing_frozen", copy.deepcopy),
            ):
                figures = measure(arguments.policy, arguments.dtype, arguments.way)
        else:
            figures = measure(arguments.policy, arguments.dtype, arguments.way)
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.policy
        if folder is None:
            folder = scratch
            random_model(Path(scratch))
        num_parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        rows = {}
        for way in _WAYS:
            command = [sys.executable, __file__, "--policy", folder, "--dtype", arguments.dtype, "--way", way]
            rows[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    weights = num_parameters * torch.finfo(getattr(torch, arguments.dtype)).bits // 8
    print(f"weights: {num_parameters / 1e6:.0f}M parameters, {weights / _MIB:.0f} MiB of {arguments.dtype}")
    for way, figures in rows.items():
        print(f"{way:<13}" + ", ".join(f"{name} {value / _MIB:,.0f} MiB" for name, value in figures.items()))
    shared = rows["shared"]
    result = {
        "ratio": rows["copies"]["peak"] / shared["peak"],
        "weights_ratio": (shared["peak"] - shared["activations"]) / weights,
        "weights": weights,
        **rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
