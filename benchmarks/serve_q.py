"""Q as a service under load, against direct batched scoring of the same items.

`ippo serve-q` runs in a process of its own; 64 clients in another send one item a request, as RLHF trainers do, each on a
connection that it keeps, and the next when the last is answered. The other side is one call over all items in this process,
in large micro-batches or in small ones, whichever is faster. The two alternate in each repetition, which has texts of its own
(the server remembers tokens of texts that it has read); every answer is checked against the direct one, and the script stops
at the first that is missing or differs.

    python benchmarks/serve_q.py
    python benchmarks/serve_q.py --hidden-size 256 --num-layers 4 --items 256
    python benchmarks/serve_q.py --q runs/a/iteration-001/fit/q_function

Prints a line for each way to ask, medians over the repetitions, and, last, one JSON object: `ratio` is items a second
served, over items a second scored directly, of OpenRLHF's contract (`get_reward`, texts); `rows` hold all figures.
`processor_ratio` is the processor time of direct scoring over that of the server's process, all of its threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import psutil
import torch

from iterative_ppo.config import PolicyConfig, from_dict
from iterative_ppo.policy import Policy
from iterative_ppo.q_folder import settings_beside
from iterative_ppo.q_function import QFunction, QFunctionCard
from iterative_ppo.q_scoring import Item, QScorer

WORDS = "i you we shoes trail light budget around eighty please think about the colour size blue red maybe later yes no"
LARGEST_DIFFERENCE = 1e-5
TOKENS_PER_BATCH = (16384, 4096)
CLIENTS = Path(__file__).parent / "_serve_q_clients.py"


def make_q_function(folder: Path, hidden_size: int, num_layers: int) -> Path:
    """A Q-function of random weights, its values far from each other, with the default five heads."""
    policy = Policy.tiny([WORDS] * 20, PolicyConfig(hidden_size=hidden_size, num_layers=num_layers), seed=0)
    q_function = QFunction.on_trunk(policy.model, link="logistic", num_heads=5, pad_id=policy.pad_id, seed=0)
    with torch.no_grad():
        q_function.heads.mul_(10)
    card = QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="random", metrics={})
    q_function.save(folder, card, policy.tokenizer)
    return folder


def make_texts(num_items: int, shortest: int, longest: int, scorer: QScorer) -> list[tuple[str, str]]:
    """Prompts of about so many tokens, as evenly spread, and responses of 8 to 32 words."""
    generator = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(generator.choice(WORDS.split(), count))

    def prompt() -> str:
        num_words = int(generator.integers(shortest, longest + 1))
        chat = [{"role": "system", "content": "you sell shoes"}, {"role": "user", "content": words(num_words)}]
        return scorer.renderer.prompt_text(chat)

    return [(prompt(), words(int(generator.integers(8, 33)))) for _ in range(num_items)]


def bodies_of(way: str, texts: Sequence[tuple[str, str]], items: Sequence[Item]) -> list[dict[str, Any]]:
    """One item a request."""
    if way == "get_reward":
        return [{"query": [prompt + response], "prompts": [prompt], "labels": [None]} for prompt, response in texts]
    return [{"items": [{"prompt_ids": item.prompt, "response_ids": item.response}]} for item in items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Example: Server(pid=4711, port=8000)."""

    pid: int
    port: int

    def processor_seconds(self) -> float:
        """Of all its threads so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """`ippo serve-q` on a free port, stopped in the end."""
    command = [sys.executable, "-m", "iterative_ppo", "serve-q", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("serving "):
        raise SystemExit(f"the server did not start: {line}")
    try:
        yield Server(pid=process.pid, port=int(line.rsplit(":", 1)[1]))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextmanager
def clients_of(port: int, path: str, num_clients: int, bodies: Path) -> Iterator[subprocess.Popen[str]]:
    """The clients' process, connected."""
    command = [sys.executable, str(CLIENTS), str(port), path, str(num_clients), str(bodies)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def served(clients: "subprocess.Popen[str]", start: int, expected: Sequence[float]) -> float:
    """Seconds of the requests from `start`, once every answer is found to be right."""
    assert clients.stdin is not None
    assert clients.stdout is not None
    print(start, start + len(expected), file=clients.stdin, flush=True)
    done = json.loads(clients.stdout.readline())
    rewards = [reward for answer in done["answers"] for reward in answer["rewards"]]
    if len(rewards) != len(expected):
        raise SystemExit(f"{len(expected) - len(rewards)} answers are missing")
    difference = float(np.abs(np.subtract(rewards, expected)).max())
    if difference > LARGEST_DIFFERENCE or np.std(expected) < 1000 * LARGEST_DIFFERENCE:
        raise SystemExit(f"the served rewards differ by {difference:.1e} (deviation {np.std(expected):.1e})")
    return float(done["seconds"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """Example: Direct(tokens_per_batch=4096, rewards=[0.61, 0.4], seconds=2.1, processor_seconds=2.1)."""

    tokens_per_batch: int
    rewards: list[float]
    seconds: float
    processor_seconds: float


def directly(scorer: QScorer, items: list[Item], tokens_per_batch: int) -> Direct:
    """One call over all items, in micro-batches of so many padded tokens."""
    started, processor_started = perf_counter(), process_time()
    rewards = scorer.q_function.pessimistic_values(
        [item.prompt for item in items],
        [item.response for item in items],
        pessimism=scorer.pessimism,
        tokens_per_batch=tokens_per_batch,
    ).tolist()
    return Direct(
        tokens_per_batch=tokens_per_batch,
        rewards=rewards,
        seconds=perf_counter() - started,
        processor_seconds=process_time() - processor_started,
    )


def measure(
    way: str, server: Server, bodies: Path, scorer: QScorer, items: list[Item], num_clients: int, num_items: int
) -> dict[str, Any]:
    """The figures of one way to ask; each repetition has `num_items` items of its own."""
    path = {"get_reward": "/get_reward", "ids": "/v1/q"}[way]
    seconds: list[tuple[float, float]] = []
    processor_seconds: list[tuple[float, float]] = []
    chosen: list[int] = []
    with clients_of(server.port, path, num_clients, bodies) as clients:
        for start in range(0, len(items), num_items):
            own = items[start : start + num_items]
            fastest = min((directly(scorer, own, tokens) for tokens in TOKENS_PER_BATCH), key=lambda done: done.seconds)
            served_before = server.processor_seconds()
            served_seconds = served(clients, start, fastest.rewards)
            if start > 0:  # the first warms up
                chosen.append(fastest.tokens_per_batch)
                seconds.append((fastest.seconds, served_seconds))
                processor_seconds.append((fastest.processor_seconds, server.processor_seconds() - served_before))
    ratios = [direct / through for direct, through in seconds]
    return {
        "way": way,
        "direct_tokens_per_batch": sorted(chosen)[len(chosen) // 2],
        "direct_items_per_second": num_items / statistics.median(direct for direct, _ in seconds),
        "served_items_per_second": num_items / statistics.median(through for _, through in seconds),
        "ratio": statistics.median(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "processor_ratio": statistics.median(direct / through for direct, through in processor_seconds),
    }


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--q", type=Path, help="a Q-function's folder; default: one of the tiny model, random weights")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[50, 400], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.q or make_q_function(
            Path(scratch) / "q_function", arguments.hidden_size, arguments.num_layers
        )
        scorer = QScorer.load(folder, from_dict(settings_beside(folder, folder)))
        texts = make_texts(arguments.items * (arguments.repetitions + 1), *arguments.prompt_tokens, scorer)
        encode, response = scorer.renderer.encode, scorer.renderer.response
        items = [scorer.item(encode(prompt), response(answer)) for prompt, answer in texts]
        rows = []
        with serving(folder) as server:
            for way in ("ids", "get_reward"):
                bodies = Path(scratch) / f"{way}.jsonl"
                lines = (json.dumps(body) for body in bodies_of(way, texts, items))
                bodies.write_text("\n".join(lines), encoding="utf-8")
                row = measure(way, server, bodies, scorer, items, arguments.clients, arguments.items)
                rows.append(row)
                print(
                    f"{way}: {row['served_items_per_second']:.0f} items a second served, "
                    f"{row['direct_items_per_second']:.0f} directly (tokens_per_batch {row['direct_tokens_per_batch']}), ratio {row['ratio']:.2f} "
                    f"({row['smallest_ratio']:.2f} - {row['largest_ratio']:.2f}), of processor time {row['processor_ratio']:.2f}",
                    flush=True,
                )
    print(
        json.dumps(
            {
                "num_parameters": sum(p.numel() for p in scorer.q_function.model.parameters()),
                "tokens_per_item": sum(item.num_tokens for item in items) / len(items),
                "clients": arguments.clients,
                "items": arguments.items,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "ratio": rows[-1]["ratio"],
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
