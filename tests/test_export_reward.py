"""The exported reward file: what it asks the Q server, and what it does when that is down, slow, full or wrong."""

import ast
import asyncio
import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exports import length, loaded, rows_of
from fake_q_server import QServer, answers, q_server, sleeps

from iterative_ppo.export import reward as reward_module


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The exported file, loaded as the stacks load it: by its path. It waits little."""
    shutil.copyfile(str(reward_module.__file__), tmp_path / "reward.py")
    module = loaded(tmp_path / "reward.py")
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(module, "LONGEST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(module, "NUM_ATTEMPTS", 3)
    return module


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[QServer]:
    with q_server(length) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        yield server


def test_the_exported_reward_file_is_ours_and_needs_the_standard_library_alone(exported: Path) -> None:
    source = (exported / "verl/reward.py").read_text()
    assert source == (exported / "openrlhf/reward.py").read_text()
    assert source == Path(str(reward_module.__file__)).read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_verls_reward_function_sends_the_prompts_token_ids(
    reward: ModuleType, server: QServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPPO_API_KEY", "secret")
    extra_info = {"prompt_ids": np.array([5, 6, 7]), "index": 0, "num_turns": 2}
    score = reward.compute_score(
        data_source="iterative_ppo", solution_str="hello", ground_truth="0:c:0", extra_info=extra_info, more="ignored"
    )
    assert score == 5.0
    [(path, body, headers)] = server.questions
    assert path == "/v1/q"
    assert body == {"items": [{"prompt_ids": [5, 6, 7], "response": "hello"}]}
    assert headers["Authorization"] == "Bearer secret"


def test_a_key_is_sent_byte_by_byte(reward: ModuleType, server: QServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `curl` sends it and `ippo serve-q` compares it: in UTF-8, whatever a header's alphabet, and without blanks around it."""
    monkeypatch.setenv("IPPO_API_KEY", " schlüssel €\n")
    reward.ask("/v1/q", {"items": [{"prompt_ids": [5], "response": "hello"}]}, num_rewards=1)
    [(_, _, headers)] = server.questions
    assert headers["Authorization"].encode("latin-1") == "Bearer schlüssel €".encode()


def test_an_address_that_is_none_is_said_at_once(reward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPPO_Q_URL", "localhost:8000")
    with pytest.raises(reward.RewardError, match="IPPO_Q_URL: localhost:8000/v1/q is no URL"):
        reward.ask("/v1/q", {}, num_rewards=0)


def openrlhf_rewards(endpoint: str, query: str, prompt: str, label: str) -> dict[str, Any]:
    """OpenRLHF 0.11.2's side of the protocol (`openrlhf/utils/agent.py`, SingleTurnAgentExecutor): one response at a time;
    a file's `reward_func` in a thread, or a POST to a URL; then tensors of what came back."""
    if endpoint.endswith(".py"):
        answer = asyncio.run(asyncio.to_thread(loaded(Path(endpoint)).reward_func, [query], [prompt], [label]))
    else:
        body = json.dumps({"query": [query], "prompts": [prompt], "labels": [label]}).encode()
        request = urllib.request.Request(endpoint, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    scores = answer.get("scores")
    return {
        "rewards": torch.tensor([answer["rewards"]]),
        "scores": torch.tensor([answer["rewards"] if scores is None else scores]),
        **{key: torch.tensor([value]) for key, value in (answer.get("extra_logs") or {}).items()},
    }


def test_openrlhf_gets_the_same_reward_from_the_file_and_from_the_url(exported: Path, server: QServer) -> None:
    row = rows_of(exported, "openrlhf")[0]
    arguments = (row["prompt"] + "sure<|end|>", row["prompt"], row["id"])
    by_file = openrlhf_rewards(str(exported / "openrlhf/reward.py"), *arguments)
    by_url = openrlhf_rewards(f"{server.url}/get_reward", *arguments)
    assert by_file.keys() == by_url.keys()
    for name in by_file:
        assert torch.equal(by_file[name], by_url[name])
    assert by_file["rewards"].reshape(-1).tolist() == [len(arguments[0])]
    assert server.questions[0][:2] == server.questions[1][:2]
    assert server.questions[0][1] == {"query": [arguments[0]], "prompts": [arguments[1]], "labels": [arguments[2]]}


def test_a_server_that_is_full_is_asked_again(reward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(reward, "LONGEST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr(reward.time, "sleep", waits.append)
    full = answers("busy", status=429, Retry_After="7")
    with q_server(length, mishaps=[full, answers("starting", status=503)]) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url + "/")
        assert reward.reward_func(["abc", "de"], ["a", "d"], ["0", "1"])["rewards"] == [3.0, 2.0]
    assert len(server.questions) == 3
    assert 7 <= waits[0] <= 7 * 1.2, "as long as it asked for"
    assert waits[1] < 1


def test_a_server_that_is_slow_once_is_asked_again(reward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "TIMEOUT_SECONDS", 0.2)
    with q_server(length, mishaps=[sleeps(0.5)]) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        assert reward.ask("/v1/q", {"items": [{"response": "abc"}]}, num_rewards=1) == [3.0]


def test_a_server_that_is_down_fails_with_its_url_and_the_reason(
    reward: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with q_server(length) as server:
        pass
    monkeypatch.setenv("IPPO_Q_URL", server.url)
    with pytest.raises(reward.RewardError, match=r"3 attempts.*refused") as caught:
        reward.ask("/v1/q", {"items": []}, num_rewards=1)
    assert f"{server.url}/v1/q" in str(caught.value)


def test_a_server_that_stays_slow_or_broken_fails(reward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "TIMEOUT_SECONDS", 0.1)
    with q_server(length, mishaps=[sleeps(0.3)] * 3) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        with pytest.raises(reward.RewardError, match=r"3 attempts.*timed out"):
            reward.ask("/v1/q", {"items": []}, num_rewards=1)
    with q_server(length, mishaps=[answers("out of memory", status=500)] * 3) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        with pytest.raises(reward.RewardError, match=r"3 attempts.*HTTP 500 out of memory"):
            reward.ask("/v1/q", {"items": []}, num_rewards=1)


def test_a_refusal_is_not_asked_again(reward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with q_server(length, mishaps=[answers("wrong key", status=401)]) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        with pytest.raises(reward.RewardError, match="HTTP 401 wrong key"):
            reward.ask("/v1/q", {"items": []}, num_rewards=1)
    assert len(server.questions) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"rewards": [float("nan")]}, "nan is not a reward"),
        ({"rewards": [float("-inf")]}, "-inf is not a reward"),
        ({"rewards": [None]}, "None is not a reward"),
        ({"rewards": ["0.5"]}, "0.5 is not a reward"),
        ({"rewards": [True]}, "True is not a reward"),
        ({"rewards": [0.1, 0.2]}, "asked for 1 rewards and got 2"),
        ({"rewards": []}, "asked for 1 rewards and got 0"),
        ({"rewards": 0.5}, "asked for 1 rewards and got 0.5"),
        ({"scores": [0.5]}, "holds no rewards"),
        ([0.5], "holds no rewards"),
        ("<html>", "holds no rewards"),
    ],
)
def test_what_is_no_reward_is_never_passed_on(
    body: object, reason: str, reward: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with q_server(length, mishaps=[answers(body)]) as server:
        monkeypatch.setenv("IPPO_Q_URL", server.url)
        with pytest.raises(reward.RewardError, match=reason) as caught:
            reward.compute_score("iterative_ppo", "a", "0:c:0", {"prompt_ids": [1]})
    assert server.url in str(caught.value)
    assert len(server.questions) == 1
