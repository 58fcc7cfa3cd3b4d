"""The benchmarks run and end with the line that a reader relies on: smallest sizes, no figure is judged."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from iterative_ppo.environments.rollout import collect_scripted
from iterative_ppo.environments.storefront import Storefront
from iterative_ppo.run_directory import write_log

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def last_line(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["q_fit", "rollout"])
def test_two_ways_side_by_side(script: str):
    result = last_line(script, "--turns", "1", "2", "--conversations", "4", "--repetitions", "1")
    assert [row["turns"] for row in result["rows"]] == [1, 2]
    assert result["ratio"] == result["rows"][-1]["ratio"] > 0


@pytest.mark.slow
def test_what_a_token_takes_of_the_memory():
    result = last_line("host_memory", "--conversations", "5")
    assert result["conversation_tokens"] == pytest.approx(1000, rel=0.05), "as docs/scaling.md assumes"
    size = result["bytes_per_token"]
    assert 4 < size["texts"] < size["fit"] < size["improve"]


@pytest.mark.slow
def test_q_served_under_load():
    result = last_line("serve_q", "--items", "24", "--clients", "8", "--repetitions", "1", "--hidden-size", "32")
    assert [row["way"] for row in result["rows"]] == ["ids", "get_reward"]
    assert result["ratio"] == result["rows"][-1]["ratio"] > 0
    assert result["clients"] == 8


@pytest.mark.slow
def test_what_is_given_away_in_a_log_is_what_lacks_to_the_optimum(tmp_path: Path):
    """The performance difference lemma: the sum of regrets is, on average, the optimum less the seller's own rate."""

    class Naming(Storefront):
        """Half of the messages name a shoe, which is a recommendation unless it is on the table already."""

        def scripted_response(self, messages: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
            text = super().scripted_response(messages, generator)
            shoe = "the premium trail shoe: " if messages[1]["content"].count("trail") else "the basic city shoe: "
            return shoe + text if generator.random() < 0.5 else text

    conversations = list(collect_scripted(Naming, num_conversations=3000, seed=0, max_turns=10))
    write_log(tmp_path / "log.jsonl", conversations)
    [row] = last_line("storefront_regret", str(tmp_path / "log.jsonl"), "--lines", "100000")["rows"]
    rate = np.mean([conversation.outcome for conversation in conversations])
    assert row["conversations"] == 3000
    assert row["regret"] == pytest.approx(Storefront().optimum() - rate, abs=0.03)
    assert sum(part["regret"] for part in row["parts"]) == pytest.approx(row["regret"])
    assert min(part["regret"] for part in row["parts"]) > -1e-12, "nothing is better than the best"


@pytest.mark.slow
def test_where_the_time_of_the_loop_goes():
    small = {
        "policy.scripted_conversations": 64,
        "policy.hidden_size": 32,
        "iterations.conversations": 32,
        "evaluation.conversations": 8,
        "improvement.num_updates": 1,
        "improvement.prompts_per_update": 16,
    }
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    result = last_line("loop", *settings)
    stages = {row["stage"]: row for row in result["stages"]}
    assert list(stages) == ["start", "collect", "fit", "improve", "evaluate", "all"]
    assert all(row["flop"] > 1e6 and row["seconds"] > 0 for row in stages.values())
    assert stages["all"]["flop"] == sum(row["flop"] for name, row in stages.items() if name != "all")
    assert all(row["bound_seconds"] == pytest.approx(row["flop"] / row["flop_per_second"]) for row in stages.values())
    assert result["ratio"] == pytest.approx(stages["all"]["bound_seconds"] / stages["all"]["seconds"])


@pytest.mark.slow
def test_memory_of_one_backbone_and_of_four_models(tmp_path: Path):
    tiny.letter_policy().save(tmp_path / "model")
    result = last_line("memory", "--model", str(tmp_path / "model"), "--checkpoint-activations")
    assert result["rows"].keys() == {"one backbone", "four models"}
    # Four times the weights (Q and the token value have no output embedding), and Adam's two moments of the policy's.
    assert 5 < result["four_models_held_over_weights"] <= 6
    assert result["held_over_weights"] < result["four_models_held_over_weights"]


@pytest.mark.slow
def test_throughput_of_the_parts_of_a_step(tmp_path: Path):
    tiny.letter_policy().save(tmp_path / "model")
    sizes = {"--prompts": 3, "--samples": 2, "--prompt-tokens": 7, "--response-tokens": 5, "--repetitions": 1}
    options = [str(part) for option in sizes.items() for part in option]
    result = last_line("throughput", "--model", str(tmp_path / "model"), *options)
    assert list(result["rows"]) == ["sample", "score under the anchor", "score by Q", "train"]
    for row in result["rows"].values():
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(3 * 7 + 3 * 2 * 5)
    by_flop = {name: row["utilisation"] * row["seconds"] for name, row in result["rows"].items()}
    assert by_flop["train"] == pytest.approx(2 * by_flop["sample"])
    assert by_flop["sample"] == pytest.approx(by_flop["score under the anchor"])
    assert by_flop["sample"] > by_flop["score by Q"] > 0
    assert result["ratio"] == result["rows"]["train"]["utilisation"]
