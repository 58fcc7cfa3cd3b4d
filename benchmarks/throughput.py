"""Tokens a second, share of the arithmetic and memory of each part of an improvement step, on the device that is there.

A Llama of random weights in the shape of SmolLM2-135M (or of a 1B model, or a folder's), trained through LoRA adapters: what
an update samples, scores under the anchor, scores by Q and trains on. Each part alternates with the others.

    python benchmarks/throughput.py --dtype bfloat16
    python benchmarks/throughput.py --dtype bfloat16 --shape llama-1b --prompts 64 --prompt-tokens 512 --response-tokens 128

Prints a line a part, medians over the repetitions, and, last, one JSON object. `tokens` are those that a part reads or writes,
prompts once for all their responses. `utilisation` is 2 FLOP a parameter and token that is sampled or scored, and 4 that is trained on (weights
that are frozen need no gradient), over the seconds and the rate of a large square matrix product in the same type, which is
measured beside it; the vocabulary's product is counted at the responses alone, attention not at all. `peak_mib` is the most
that was allocated on a GPU; on a CPU, the most that the process held. `ratio` is the utilisation of the training pass.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ppo_task import never_end
from _random_models import SHAPES, save_random_model
from flop_bound import num_matrix_parameters
from transformers.utils import logging as transformers_logging

from iterative_ppo import policy as policy_module
from iterative_ppo.config import PolicyConfig
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction

transformers_logging.disable_progress_bar()
_SIZE_OF_A_PRODUCT = {"cpu": 1024, "cuda": 8192}
_MIB = 2**20


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done with it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size = _SIZE_OF_A_PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(seconds[2:])


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parts_of(policy: Policy, q_function: QFunction, arguments: argparse.Namespace) -> dict[str, tuple[Any, int, float]]:
    """Each part as what is called, its tokens and its FLOP."""
    generator = np.random.default_rng(0)
    words = policy.model.config.vocab_size
    draws = generator.integers(words, size=(arguments.prompts, arguments.prompt_tokens)).tolist()
    prompts = [tuple(draw) for draw in draws for _ in range(arguments.samples)]
    responses = [
        tuple(draw) for draw in generator.integers(words, size=(len(prompts), arguments.response_tokens)).tolist()
    ]
    uniforms_BT = generator.random((len(prompts), arguments.response_tokens))
    budget = arguments.tokens_per_batch

    def train() -> None:
        for logits in policy.response_logits(prompts, responses, tokens_per_batch=budget):
            (-logits.logprobs()[logits.mask_BT].mean()).backward()
        policy.model.zero_grad()

    layers = num_matrix_parameters(policy.model.base_model)
    vocabulary = policy.model.get_output_embeddings().weight.numel()
    written = len(prompts) * arguments.response_tokens
    tokens = arguments.prompts * arguments.prompt_tokens + written
    scoring = 2 * (layers * tokens + vocabulary * written)
    return {
        "sample": (lambda: policy.sample(prompts, uniforms_BT), tokens, scoring),
        "score under the anchor": (
            lambda: policy.logprobs(prompts, responses, tokens_per_batch=budget),
            tokens,
            scoring,
        ),
        "score by Q": (
            lambda: q_function.values(prompts, responses, tokens_per_batch=budget),
            tokens,
            2 * layers * tokens,
        ),
        "train": (train, tokens, 2 * scoring),
    }


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model, in place of random weights")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of frozen weights")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    policy_module._SMALLEST_FOR_ADAPTERS = 0  # a small --model, too, is to be trained through adapters
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            save_random_model(Path(scratch), arguments.shape)
        config = PolicyConfig(max_response_tokens=arguments.response_tokens)
        policy = Policy.load(arguments.model or Path(scratch), config, dtype=dtype, device=arguments.device).branch(
            seed=0
        )
    never_end(policy.model, policy.tokenizer)
    q_function = QFunction.from_policy(
        policy.model, link="identity", num_heads=1, pad_id=policy.pad_id, lora_rank=config.lora_rank, seed=0
    )
    parts = parts_of(policy, q_function, arguments)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(arguments.repetitions + 1):  # the first warms up
        for name, (work, _, _) in parts.items():
            took = timed(work, device)
            if repetition:
                seconds[name].append(took)
    rate = product_rate(device, dtype)
    rows = {}
    for name, (_, tokens, flop) in parts.items():
        median = statistics.median(seconds[name])
        rows[name] = {"seconds": median, "tokens_per_second": tokens / median, "utilisation": flop / median / rate}
        print(
            f"{name}: {median:.3f} s, {rows[name]['tokens_per_second']:,.0f} tokens/s, {rows[name]['utilisation']:.0%} of "
            f"{rate / 1e12:.3g} TFLOP/s"
        )
    peak = peak_bytes(device) / _MIB
    print(f"{policy.num_parameters / 1e6:.0f}M parameters, {arguments.dtype}, {device}: peak {peak:,.0f} MiB")
    print(
        json.dumps(
            {
                "ratio": rows["train"]["utilisation"],
                "num_parameters": policy.num_parameters,
                "flop_per_second": rate,
                "peak_mib": peak,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
