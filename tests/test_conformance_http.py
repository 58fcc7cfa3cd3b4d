"""The conformance check of a stack behind a URL: what it is asked, what it may answer, and the example that answers."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import loaded
from fake_q_server import answer, answers, served, sleeps
from test_cli import run
from test_conformance import failed
from transformers import AutoModelForCausalLM, AutoTokenizer

from iterative_ppo import adapters, conformance, conformance_http
from iterative_ppo.config import PolicyConfig
from iterative_ppo.conformance import BackendError, check_backend, logprobs, problems, solve
from iterative_ppo.conformance_http import backend_at
from iterative_ppo.policy import Policy

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "conformance_service" / "service.py"
FEWER = {"num_updates": 80, "num_samples": 64}
"""Half the work of what is suggested."""

service = loaded(EXAMPLE)
Reply = Callable[[BaseHTTPRequestHandler], None]
Step = Callable[[dict[str, Any]], object]


class Asked(list[dict[str, Any]]):
    """The questions that a service was asked, and the headers of the last."""

    url: str
    headers: dict[str, str]


@contextmanager
def serving(step: Step, *replies: Reply) -> Iterator[Asked]:
    """A service that answers with the folder that a step returns; each reply answers one question in its place."""
    left, asked = list(replies), Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            asked.headers = dict(self.headers)
            if left:
                left.pop(0)(self)
            else:
                answer(self, {"policy": step(asked[-1])})

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        asked.url = f"{url}/improve"
        yield asked


def unchanged(question: dict[str, Any]) -> str:
    return str(question["policy"])


def ask(url: str, problem: str = "optimum") -> torch.Tensor:
    return solve(backend_at(url), problems(0)[problem], algorithm="rloo", kl_in="reward", seed=0)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance_http, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(conformance_http, "NUM_ATTEMPTS", 3)


# --- what a service is asked --------------------------------------------------------------------------------


def test_a_question_says_all_that_a_step_needs(monkeypatch: pytest.MonkeyPatch):
    """The policy's folder, its prompts, and the reward of all responses: whose best answer is thereby known."""
    monkeypatch.setenv("IPPO_API_KEY", "secret")
    seen = []

    def look(question: dict[str, Any]) -> str:
        policy = Policy.load(question["policy"], PolicyConfig(max_response_tokens=question["max_response_tokens"]))
        seen.append(logprobs(policy))
        for row in question["rewards"]:
            text = policy.tokenizer.decode(row["prompt"] + row["response"])
            assert policy.tokenizer.encode(text) == row["prompt"] + row["response"]
        assert not Path(question["out"]).exists()
        return unchanged(question)

    with serving(look) as asked:
        candidate_SA = ask(asked.url)
    [question] = asked
    problem = problems(0)["optimum"]
    torch.testing.assert_close(seen[0], problem.anchor_SA)
    torch.testing.assert_close(candidate_SA, problem.anchor_SA)
    assert question["prompts"] == [list(prompt) for prompt in conformance._PROMPTS]
    assert len(question["rewards"]) == len(question["prompts"]) * len(conformance.RESPONSES)
    for row in question["rewards"]:
        assert row["reward"] == float(problem.reward([row["prompt"]], [row["response"]]))
    assert (question["end_id"], question["max_response_tokens"], question["temperature"]) == (0, 3, 1.0)
    assert question["settings"]["kl_coefficient"] == conformance._BETA
    assert question["settings"]["algorithm"] == "rloo"
    assert asked.headers["Authorization"] == "Bearer secret"
    assert not Path(question["policy"]).parent.exists()


def test_the_question_is_the_documented_one():
    """docs/backends.md shows one, with a few of its rows."""
    [shown] = re.findall(r"```json\n(\{\"policy\".*?)```", (ROOT / "docs" / "backends.md").read_text(), re.DOTALL)
    documented = json.loads(shown)
    with serving(unchanged) as asked:
        check_backend(backend_at(asked.url))
    question = asked[0]
    assert documented.keys() == question.keys()
    for name in set(question) - {"policy", "out", "rewards"}:
        assert documented[name] == question[name], name
    assert all(row in question["rewards"] for row in documented["rewards"])


def test_the_candidate_may_be_an_adapter():
    """Of rank 1 on all matrices, at random: not the policy, and as it is without peft."""
    expected = []

    def adapt(question: dict[str, Any]) -> object:
        policy = Policy.load(question["policy"], PolicyConfig(context_tokens=32, max_response_tokens=3))
        adapters.add_adapter(policy.model, rank=1, seed=0)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        policy.save(Path(question["out"]))
        expected.append(logprobs(policy))
        return question["out"]

    with serving(adapt) as asked:
        candidate_SA = ask(asked.url)
    torch.testing.assert_close(candidate_SA, expected[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(candidate_SA, problems(0)["optimum"].anchor_SA, atol=0.1)


# --- what may go wrong --------------------------------------------------------------------------------------


def test_a_service_that_is_full_or_broken_for_a_while_is_asked_again():
    with serving(unchanged, answers("busy", status=429, Retry_After="0"), answers("loading", status=503)) as asked:
        ask(asked.url)
    assert len(asked) == 3


def test_a_service_that_is_down_is_named_with_the_reason():
    with serving(unchanged) as asked:
        pass
    with pytest.raises(BackendError, match=r"no answer: \[Errno 111\] Connection refused \(attempt 3 of 3"):
        ask(asked.url)


def test_a_service_that_stays_broken_is_given_up():
    broken = [answers("out of memory", status=500)] * 4
    with (
        serving(unchanged, *broken) as asked,
        pytest.raises(BackendError, match=r"HTTP 500 out of memory \(attempt 3 "),
    ):
        ask(asked.url)
    assert len(asked) == 3


def test_a_service_that_wants_more_time_than_there_is_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conformance_http, "TIMEOUT_SECONDS", 5.0)
    full = answers("busy", status=429, Retry_After="60")
    with serving(unchanged, full) as asked, pytest.raises(BackendError, match=r"HTTP 429 busy \(attempt 1 of 3"):
        ask(asked.url)


def test_a_slow_service_has_a_limit_and_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conformance_http, "TIMEOUT_SECONDS", 0.2)
    started = time.monotonic()
    with serving(unchanged, sleeps(2)) as asked:
        with pytest.raises(BackendError, match=r"no answer within 0\.2 s: timed out"):
            ask(asked.url)
        assert time.monotonic() - started < 2
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answers("no such page", status=404), "the service refused: HTTP 404 no such page"),
        (answers("<html>"), 'no JSON object with a "policy": <html>'),
        (answers(["candidate"]), 'no JSON object with a "policy": ["candidate"]'),
        (answers({"candidate": "x"}), 'no JSON object with a "policy": {"candidate": "x"}'),
        (answers({"policy": float("nan")}), "policy nan is no folder"),
        (answers({"policy": "/no/such/folder"}), "policy '/no/such/folder' is no folder that can be seen from here"),
        (answers({"policy": str(ROOT)}), f"policy {str(ROOT)!r} cannot be loaded"),
    ],
)
def test_an_answer_that_names_no_policy_fails_at_once(reply: Reply, reason: str):
    with serving(unchanged, reply) as asked, pytest.raises(BackendError, match=re.escape(reason)):
        ask(asked.url)
    assert len(asked) == 1


def other_tokens(_: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["d"])


def other_width(model: Any, _: Any) -> None:
    model.resize_token_embeddings(8)


def other_template(_: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


def diverged(model: Any, _: Any) -> None:
    model.lm_head.weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_tokens, "candidate is of another kind than the policy: the token 'd' has id 4, not none"),
        (other_width, "the weight model.embed_tokens.weight has shape (8, 32), not (4, 32)"),
        (other_template, "the chat template is another"),
        (diverged, "log-probabilities are not finite"),
    ],
)
def test_a_candidate_that_is_no_kin_of_the_policy_is_refused(change: Callable[[Any, Any], None], reason: str):
    def changed(question: dict[str, Any]) -> object:
        model = AutoModelForCausalLM.from_pretrained(question["policy"])
        tokenizer = AutoTokenizer.from_pretrained(question["policy"])
        change(model, tokenizer)
        model.save_pretrained(question["out"])
        tokenizer.save_pretrained(question["out"])
        return question["out"]

    with serving(changed) as asked, pytest.raises(BackendError, match=re.escape(reason)):
        ask(asked.url)


@pytest.mark.parametrize("url", ["http://", "http://:8123", "http://host:port", "http://[::1", "http://a b"])
def test_what_is_no_address_is_not_asked(url: str):
    with pytest.raises(ValueError, match="is no URL of a service"):
        backend_at(url)


def test_the_command_says_url_and_reason(tmp_path: Path):
    """Exit code 2 where there is nothing to judge, 1 where a policy is judged and fails."""
    with serving(unchanged, answers("no\nsuch page", status=404)) as asked:
        done = run("conformance", "--backend", asked.url, folder=tmp_path)
        assert done.code == 2
        assert done.complaints == [f"ippo: {asked.url}: the service refused: HTTP 404 no such page"]
        done = run("conformance", "--backend", asked.url, "--json", folder=tmp_path)
    assert done.code == 1
    assert done.json["passed"] is False
    assert done.json["share_of_gain"] == pytest.approx(0, abs=1e-6)


# --- the example --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_finds_the_optimum():
    """Started as its documentation says."""
    command = [sys.executable, EXAMPLE, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert failed(backend_at(process.stdout.readline().split()[-1]), "optimum") == set()
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "problem", "caught_by"),
    [
        (None, "length", set()),
        (None, "end", set()),
        ("anchor", "anchor", {"anchor"}),
        ("discount", "length", {"token_discount"}),
        ("end", "end", {"end_of_response"}),
    ],
)
def test_each_mistake_of_the_example_is_found(mistake: str | None, problem: str, caught_by: set[str]):
    def step(question: dict[str, Any]) -> object:
        question["settings"] |= FEWER
        return service.improve(question, mistake)

    with serving(step) as asked:
        assert failed(backend_at(asked.url), problem) == caught_by


def test_the_example_needs_nothing_of_ours():
    assert "iterative_ppo" not in EXAMPLE.read_text()


def test_the_examples_returns():
    """β log-ratios .1, .2, .3 as prices, reward 1 at the last token; a discount of 1/2 halves what follows a token.

    Three tokens:  1 − .3 = .7;   .7 − .2 = .5;    .5 − .1 = .4   |  .35 − .2 = .15;  .075 − .1 = −.025
    One token:     1 − .1 = .9, whatever the discount
    """
    reward_B, price_BT = torch.ones(2), torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.0, 0.0]])
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    undiscounted_BT = service.returns(reward_B, price_BT, mask_BT, 1.0)
    discounted_BT = service.returns(reward_B, price_BT, mask_BT, 0.5)
    torch.testing.assert_close(undiscounted_BT[0], torch.tensor([0.4, 0.5, 0.7]))
    torch.testing.assert_close(discounted_BT[0], torch.tensor([-0.025, 0.15, 0.7]))
    assert float(undiscounted_BT[1, 0]) == float(discounted_BT[1, 0]) == pytest.approx(0.9)
