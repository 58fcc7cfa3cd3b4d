"""One update of token-level PPO, ours against TRL's trainer; the same of RLOO and GRPO.

TRL 1.12.0 is the last that has a PPO trainer (`trl.experimental.ppo`); RLOO and GRPO are those of TRL 1.16.0. Each
version lives in a virtual environment that this script makes, with the same PyTorch and transformers as here.

Both sides do the same work: 16 prompts, or 4 prompts with 4 responses each in RLOO and GRPO; responses of exactly 32
tokens from a Llama of 0.9 million random weights; a KL to the start policy; a reward model (ours: Q) and, in PPO, a
token value that is trained as well, of the same size; 2 gradient passes in PPO and 1 in the others, each with one
optimizer step; float32 on one thread. Each worker is a process of its own that times its updates after two that warm
up. Workers alternate, five times.

    python benchmarks/ppo_update.py
    python benchmarks/ppo_update.py --prompt-tokens 64 --algorithms ppo

Prints a line for each algorithm, medians over the repetitions, and, last, one JSON object: `ratio` is seconds of an
update of TRL over seconds of ours, of the first algorithm; `rows` hold all figures. `cpu_ratio` is the same of the
processor's time, which other processes on the machine disturb less. Memory is the most that the worker's process held
until its last update, libraries included; `imports_mib` of it were there before the models. `flop_bound_seconds` is the
bare arithmetic of an update: 2 FLOP a parameter and token for sampling and for each scoring, 6 for each training pass,
at the rates of matrix products of those sizes (sampling: of one token a response).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ppo_task import NUM_PPO_PASSES, NUM_RESPONSES, NUM_SAMPLES, RESPONSE_TOKENS
from flop_bound import flop_per_second, num_matrix_parameters

from iterative_ppo.config import PolicyConfig
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, QFunctionCard

TRL_VERSION = {"ppo": "1.12.0", "rloo": "1.16.0", "grpo": "1.16.0"}
# The versions behind the figures in docs/performance.md; PyTorch and transformers are those of constraints.txt.
PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "numpy==2.4.6"]
WORDS = "i you we shoes trail light budget around eighty please think about the colour size blue red maybe later yes no"
NUM_PROMPTS = 64


def environment(folder: Path, trl_version: str) -> Path:
    """The Python of a virtual environment with TRL, made where there is none."""
    folder = folder / f"trl-{trl_version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"trl=={trl_version}", *PACKAGES], check=True, stdout=subprocess.DEVNULL)
    return python


def make_task(folder: Path, num_prompt_tokens: int) -> Policy:
    """Writes the models and the prompts that both sides read."""
    config = PolicyConfig(hidden_size=128, num_layers=4, max_response_tokens=RESPONSE_TOKENS)
    policy = Policy.tiny([WORDS] * 20, config, seed=0)
    policy.save(folder / "policy")
    q_function = QFunction.from_policy(
        policy.model, link="identity", num_heads=1, pad_id=policy.pad_id, lora_rank=0, seed=0
    )
    card = QFunctionCard(link="identity", gamma=1.0, target="none", policy="random", metrics={})
    q_function.save(folder / "q_function", card, policy.tokenizer)
    generator = np.random.default_rng(0)
    words = WORDS.split()
    prompts = [" ".join([words[0], *generator.choice(words[1:], num_prompt_tokens - 1)]) for _ in range(NUM_PROMPTS)]
    assert {len(tokens) for tokens in policy.tokenizer(prompts).input_ids} == {num_prompt_tokens}
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return policy


def run_worker(python: Path, worker: str, algorithm: str, folder: Path, num_updates: int) -> dict[str, Any]:
    """The measurement of one worker process."""
    command = [str(python), str(Path(__file__).with_name(worker)), algorithm, str(folder), str(num_updates)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{worker} {algorithm} failed:\n{result.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def flop_bound_seconds(policy: Policy, algorithm: str, num_prompt_tokens: int) -> float:
    """The time of the arithmetic of one update, at measured rates."""
    layers = num_matrix_parameters(policy.model.base_model)
    vocabulary = policy.model.get_output_embeddings().weight.numel()
    num_passes = NUM_PPO_PASSES if algorithm == "ppo" else 1
    num_prompts = NUM_RESPONSES if algorithm == "ppo" else NUM_RESPONSES // NUM_SAMPLES
    response_tokens = NUM_RESPONSES * RESPONSE_TOKENS
    # A prompt is computed once for all its responses.
    tokens = num_prompts * num_prompt_tokens + response_tokens
    sampling = 2 * (layers + vocabulary) * response_tokens
    encoding = 2 * layers * num_prompts * num_prompt_tokens
    anchor = 2 * layers * tokens + 2 * vocabulary * response_tokens
    reward = 2 * layers * tokens
    training = 3 * num_passes * anchor
    value = (1 + 3 * num_passes) * reward if algorithm == "ppo" else 0
    width = policy.config.hidden_size
    return sampling / flop_per_second(NUM_RESPONSES, width, 3 * width) + (
        encoding + anchor + reward + training + value
    ) / flop_per_second(tokens, width, 3 * width)


def measure(algorithm: str, folder: Path, trl_python: Path, num_updates: int, num_repetitions: int) -> dict[str, Any]:
    """The figures of one algorithm: workers of both sides by turns."""
    ours, theirs = [], []
    for _ in range(num_repetitions):
        ours.append(run_worker(Path(sys.executable), "_ours_worker.py", algorithm, folder, num_updates))
        theirs.append(run_worker(trl_python, "_trl_worker.py", algorithm, folder, num_updates))
    ratios = [their["seconds"] / our["seconds"] for our, their in zip(ours, theirs, strict=True)]
    cpu_ratios = [their["cpu_seconds"] / our["cpu_seconds"] for our, their in zip(ours, theirs, strict=True)]
    return {
        "algorithm": algorithm,
        "trl_version": TRL_VERSION[algorithm],
        "ratio": statistics.median(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        **{key: statistics.median(run[key] for run in ours) for key in ours[0]},
        **{f"trl_{key}": statistics.median(run[key] for run in theirs) for key in theirs[0]},
    }


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--venv", type=Path, default=cache / "iterative-ppo-benchmarks", help="folder of the environments with TRL"
    )
    parser.add_argument("--algorithms", nargs="+", choices=list(TRL_VERSION), default=list(TRL_VERSION))
    parser.add_argument("--prompt-tokens", type=int, default=16, help="length of a prompt")
    parser.add_argument("--updates", type=int, default=10, help="timed updates of each worker")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        policy = make_task(Path(folder), arguments.prompt_tokens)
        for algorithm in arguments.algorithms:
            row = measure(
                algorithm,
                Path(folder),
                environment(arguments.venv, TRL_VERSION[algorithm]),
                arguments.updates,
                arguments.repetitions,
            )
            row["flop_bound_seconds"] = flop_bound_seconds(policy, algorithm, arguments.prompt_tokens)
            rows.append(row)
            print(
                f"{algorithm}: {row['seconds']:.3f} s an update against {row['trl_seconds']:.3f} s of TRL "
                f"{row['trl_version']}, ratio {row['ratio']:.2f} ({row['smallest_ratio']:.2f} - "
                f"{row['largest_ratio']:.2f}; of processor time {row['cpu_ratio']:.2f}); FLOP bound {row['flop_bound_seconds']:.3f} s; memory "
                f"{row['peak_mib']:.0f} MiB against {row['trl_peak_mib']:.0f} (before the models "
                f"{row['imports_mib']:.0f} and {row['trl_imports_mib']:.0f})",
                flush=True,
            )
    print(
        json.dumps(
            {
                "num_parameters": policy.num_parameters,
                "prompt_tokens": arguments.prompt_tokens,
                "ratio": rows[0]["ratio"],
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
