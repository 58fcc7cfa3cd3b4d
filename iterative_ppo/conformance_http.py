"""An improvement step behind a URL, for the conformance check: a stack on its own machines, in its own environment.

One POST a problem says everything that a step needs; the answer names the folder of the candidate. `docs/backends.md` has the
contract, `examples/conformance_service` a stack that keeps it.
"""

import dataclasses
import http.client
import itertools
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iterative_ppo.adapters import has_adapter
from iterative_ppo.compatibility import architecture_difference, tokenizer_difference
from iterative_ppo.config import ImprovementConfig
from iterative_ppo.conformance import RESPONSES, Backend, BackendError
from iterative_ppo.improvement.base import RewardFunction
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds

TIMEOUT_SECONDS = 1800.0
"""For one problem, all attempts together."""
NUM_ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
_FULL = 429
_LARGEST_ANSWER_BYTES = 64 * 1024


def backend_at(url: str) -> Backend:
    """The improvement step that a service makes.

    Raises:
        ValueError: the URL names no host. The backend raises `BackendError` where the service cannot be reached, refuses, takes
            longer than `TIMEOUT_SECONDS`, or answers with no policy of the kind that it was given.
    """
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of the brackets
        is_address = False
    if not is_address or any(character <= " " for character in url):
        raise ValueError(f"backend {url!r} is no URL of a service, as http://127.0.0.1:8123/improve")

    def backend(
        policy: Policy, prompts: Sequence[TokenIds], reward: RewardFunction, config: ImprovementConfig, seed: int
    ) -> Policy:
        # A service may run as another user, whose files cannot be removed from here.
        with tempfile.TemporaryDirectory(prefix="ippo-conformance-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            policy.save(folder / "policy")
            question = {
                "policy": str(folder / "policy"),
                "out": str(folder / "candidate"),
                "prompts": prompts,
                "rewards": _table(prompts, reward),
                "end_id": policy.renderer.end_id,
                "max_response_tokens": policy.config.max_response_tokens,
                "temperature": policy.temperature,
                "seed": seed,
                "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "backend"},
            }
            return _candidate(_ask(url, question), policy, prompts)

    return backend


def _table(prompts: Sequence[TokenIds], reward: RewardFunction) -> list[dict[str, Any]]:
    """The reward of every response to every prompt."""
    rows = list(itertools.product(prompts, RESPONSES))
    rewards = reward([prompt for prompt, _ in rows], [response for _, response in rows]).tolist()
    return [
        {"prompt": prompt, "response": response, "reward": value}
        for (prompt, response), value in zip(rows, rewards, strict=True)
    ]


def _ask(url: str, question: dict[str, Any]) -> bytes:
    """The body of the answer. A service that is down, full or broken is asked again; one that is slow is not."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("IPPO_API_KEY", "").strip()
    if key:  # a header's bytes are spelt in Latin-1, whatever they mean
        headers["Authorization"] = f"Bearer {key}".encode().decode("latin-1")
    request = urllib.request.Request(url, data=json.dumps(question).encode(), headers=headers)
    give_up_at = time.monotonic() + TIMEOUT_SECONDS
    for attempt in itertools.count(1):
        wait = FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
        try:
            with urllib.request.urlopen(request, timeout=max(give_up_at - time.monotonic(), 0.001)) as response:
                return response.read(_LARGEST_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {_start(error.read(_LARGEST_ANSWER_BYTES))}".strip()
            if error.code != _FULL and error.code < 500:
                raise BackendError(f"the service refused: {reason}") from error
            wait = max(wait, _seconds(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise BackendError(f"no answer within {TIMEOUT_SECONDS:g} s: {cause}") from error
            reason = str(cause) or type(cause).__name__
        if attempt == NUM_ATTEMPTS or time.monotonic() + wait >= give_up_at:
            break
        time.sleep(wait)
    raise BackendError(f"no answer: {reason} (attempt {attempt} of {NUM_ATTEMPTS}, the last)")


def _candidate(body: bytes, policy: Policy, prompts: Sequence[TokenIds]) -> Policy:
    """The policy that an answer names."""
    try:
        source = json.loads(body)["policy"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f'the answer is no JSON object with a "policy": {_start(body)}') from error
    if not isinstance(source, str) or not Path(source).is_dir():
        raise BackendError(f"the answer's policy {source!r} is no folder that can be seen from here")
    try:
        candidate = Policy.load(source, policy.config)
    except ValueError as error:
        raise BackendError(str(error)) from error
    if has_adapter(candidate.model):
        candidate = candidate.merged()
    difference = architecture_difference(policy.model, candidate.model) or tokenizer_difference(
        policy.tokenizer, candidate.tokenizer, texts=[policy.tokenizer.decode(prompt) for prompt in prompts]
    )
    if difference:
        raise BackendError(f"the candidate {source} is of another kind than the policy: {difference}")
    return candidate


def _start(body: bytes) -> str:
    return body[:200].decode(errors="replace")


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
