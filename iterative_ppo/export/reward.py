"""Q as the reward of verl (`compute_score`) and OpenRLHF (`reward_func`): asks the server that `ippo serve-q` starts.

`ippo export` writes this file as it is. It runs in the other stack's environment and needs the standard library alone.

    IPPO_Q_URL      where the server is; default http://127.0.0.1:8000
    IPPO_API_KEY    its key, where it asks for one

A server that is down, slow or full is asked again, a little later each time, and in the end the error says what it was.
An answer that is no reward (not a number, too many, too few) is never passed on.
"""

import http.client
import json
import math
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

NUM_ATTEMPTS = 8
TIMEOUT_SECONDS = 60.0
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
_FULL = 429


class RewardError(RuntimeError):
    """There is no reward; the message names the server and the reason."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: object
) -> float:
    """verl's reward function: Q of one response. `extra_info` holds the prompt's token ids."""
    del data_source, ground_truth  # verl hands them over; Q needs neither
    prompt_ids = [int(token) for token in extra_info["prompt_ids"]]
    [reward] = ask("/v1/q", {"items": [{"prompt_ids": prompt_ids, "response": solution_str}]}, num_rewards=1)
    return reward


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: object) -> dict[str, Any]:
    """OpenRLHF's reward function: Q of each response; a query is a prompt and its response, special tokens spelt out."""
    question = {"query": list(queries), "prompts": list(prompts), "labels": list(labels)}
    rewards = ask("/get_reward", question, num_rewards=len(queries))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def ask(path: str, question: dict[str, Any], *, num_rewards: int) -> list[float]:
    """Posts a question to the server and checks its rewards.

    Raises:
        RewardError: no answer after `NUM_ATTEMPTS`, a refusal, or an answer that is not `num_rewards` finite numbers.
    """
    url = (os.environ.get("IPPO_Q_URL") or "http://127.0.0.1:8000").rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise RewardError(f"IPPO_Q_URL: {url} is no URL, as http://127.0.0.1:8000")
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("IPPO_API_KEY", "").strip()
    if key:  # a header's bytes are spelt in Latin-1, whatever they mean
        headers["Authorization"] = f"Bearer {key}".encode().decode("latin-1")
    request = urllib.request.Request(url, data=json.dumps(question).encode(), headers=headers)
    reason = ""
    for attempt in range(NUM_ATTEMPTS):
        wait = FIRST_WAIT_SECONDS * 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                return _rewards(url, response.read(), num_rewards)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.read(500).decode(errors='replace')}".strip()
            if error.code != _FULL and error.code < 500:
                raise RewardError(f"{url}: {reason}") from error
            wait = max(wait, _seconds(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if attempt + 1 < NUM_ATTEMPTS:
            time.sleep(min(wait, LONGEST_WAIT_SECONDS) * random.uniform(1.0, 1.2))  # not all workers at once
    raise RewardError(f"{url}: no answer in {NUM_ATTEMPTS} attempts; the last: {reason}")


def _rewards(url: str, body: bytes, num_rewards: int) -> list[float]:
    try:
        rewards = json.loads(body)["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(f"{url}: the answer holds no rewards: {body[:200].decode(errors='replace')}") from error
    if not isinstance(rewards, list) or len(rewards) != num_rewards:
        found = len(rewards) if isinstance(rewards, list) else repr(rewards)
        raise RewardError(f"{url}: asked for {num_rewards} rewards and got {found}")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise RewardError(f"{url}: {reward} is not a reward, which must be a finite number")
    return [float(reward) for reward in rewards]


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
