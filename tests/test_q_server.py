"""Q over HTTP: the same numbers as without, whoever asks and in whatever words; bounds, keys, and nothing lost at the end."""

import asyncio
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tiny
import torch
from test_cli import run

from iterative_ppo.config import Config, PolicyConfig, QFunctionConfig, to_toml
from iterative_ppo.conversations import Message, chat_messages
from iterative_ppo.http_guard import MAX_BODY_BYTES
from iterative_ppo.policy import Policy
from iterative_ppo.q_folder import find_q_function, settings_beside
from iterative_ppo.q_function import QFunction, QFunctionCard
from iterative_ppo.q_requests import parse_q, parse_reward
from iterative_ppo.q_scoring import Item, QScorer, Reading
from iterative_ppo.q_server import Service, make_app, serve
from iterative_ppo.rendering import TokenIds

TOLERANCE = 1e-5
CONFIG = Config(
    policy=PolicyConfig(context_tokens=128, max_response_tokens=8), q_function=QFunctionConfig(pessimism=0.5)
)
CHAT = [
    {"role": "system", "content": "You sell shoes."},
    {"role": "user", "content": "hello, which trail shoes do you have?"},
    {"role": "assistant", "content": "We have light shoes."},
    {"role": "user", "content": "around 80, thank you"},
]
CARD = QFunctionCard(link="logistic", gamma=0.9, target="monte_carlo", policy="week-11", metrics={})
KEY = "sésame, ouvre-toi"


def save_q_function(folder: Path, *, num_heads: int = 3, seed: int = 0) -> Path:
    """A random Q-function whose values differ from each other."""
    policy = tiny.word_policy(seed=seed)
    q_function = QFunction.from_policy(
        policy.model, link="logistic", num_heads=num_heads, pad_id=policy.pad_id, lora_rank=4, seed=seed
    )
    with torch.no_grad():
        q_function.heads.mul_(10)
    folder.mkdir(parents=True)
    q_function.save(folder, CARD, policy.tokenizer)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> QScorer:
    return QScorer.load(save_q_function(tmp_path_factory.mktemp("q") / "q_function"), CONFIG)


def random_items(scorer: QScorer, num_items: int, *, seed: int = 0, longest: int = 100) -> list[Item]:
    generator = np.random.default_rng(seed)
    prompts = tiny.random_rows(generator, generator.integers(1, longest, num_items).tolist(), low=5, high=300)
    responses = tiny.random_rows(generator, generator.integers(0, 7, num_items).tolist(), low=5, high=300)
    return [scorer.item(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def direct(scorer: QScorer, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> tuple[list[float], list[float]]:
    """Rewards and Q values, each pair by itself, as an improvement step would be given them."""
    q_function, rewards, q_values = scorer.q_function, [], []
    for prompt, response in pairs:
        rewards += q_function.pessimistic_values([prompt], [response], pessimism=0.5, tokens_per_batch=4096).tolist()
        q_values += q_function.values([prompt], [response], tokens_per_batch=4096).tolist()
    return rewards, q_values


def as_json(item: Item) -> dict[str, Any]:
    return {"prompt_ids": list(item.prompt), "response_ids": list(item.response)}


@contextmanager
def served(scorer: Any, *, api_key: str | None = None, room: int = 1000) -> Iterator[Callable[..., httpx2.Response]]:
    """The service in this process; gives a function that makes one request."""
    service = Service(scorer, name="my-q", max_queued_items=room)
    app = make_app(service, api_key=api_key)

    async def request(method: str, path: str, **rest: Any) -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://q") as client:
            return await client.request(method, path, **rest)

    def ask(method: str, path: str, **rest: Any) -> httpx2.Response:
        return asyncio.run(request(method, path, **rest))

    try:
        yield ask
    finally:
        asyncio.run(service.close())


# ---- the same numbers ----


def test_an_answer_does_not_depend_on_what_it_was_batched_with(scorer: QScorer) -> None:
    items = random_items(scorer, 60)
    rewards, q_values = direct(scorer, [(item.prompt, item.response) for item in items])
    assert np.std(rewards) > 0.05, "values that differ"
    assert np.abs(np.subtract(rewards, q_values)).max() > 0.01, "pessimism that shows"
    for batch in (1, 7, 60):
        readings = [r for start in range(0, 60, batch) for r in scorer.read(items[start : start + batch])]
        np.testing.assert_allclose([r.reward for r in readings], rewards, atol=TOLERANCE)
        np.testing.assert_allclose([r.q_value for r in readings], q_values, atol=TOLERANCE)


def test_v1_q_answers_with_reward_and_q_value(scorer: QScorer) -> None:
    items = random_items(scorer, 20, seed=1)
    rewards, q_values = direct(scorer, [(item.prompt, item.response) for item in items])
    with served(scorer) as ask:
        answer = ask("POST", "/v1/q", json={"items": [as_json(item) for item in items]})
    assert answer.status_code == 200
    assert answer.json().keys() == {"rewards", "q_values"}
    np.testing.assert_allclose(answer.json()["rewards"], rewards, atol=TOLERANCE)
    np.testing.assert_allclose(answer.json()["q_values"], q_values, atol=TOLERANCE)


def test_text_ids_and_messages_are_one_and_the_same(scorer: QScorer) -> None:
    renderer = scorer.renderer
    prompt, response = renderer.prompt(CHAT), renderer.response("Then I recommend these.")
    prompts = [
        {"prompt": renderer.prompt_text(CHAT)},
        {"prompt_ids": list(prompt.token_ids)},
        {"messages": CHAT},
    ]
    responses = [
        {"response": "Then I recommend these."},
        {"response_ids": list(response)},
        {"response_ids": list(response[:-1])},
    ]
    items = [p | r for p in prompts for r in responses]
    asked = parse_q(json.dumps({"items": items}).encode(), scorer)
    assert asked.items == [Item(prompt=prompt.token_ids, response=response)] * 9
    with served(scorer) as ask:
        given = ask("POST", "/v1/q", json={"items": items}).json()
        alone = ask("POST", "/v1/q", json={"items": items[:1]}).json()
    [reward], [q_value] = direct(scorer, [(prompt.token_ids, response)])
    for answer in (given, alone):
        np.testing.assert_allclose(answer["rewards"], reward, atol=TOLERANCE)
        np.testing.assert_allclose(answer["q_values"], q_value, atol=TOLERANCE)


def test_messages_are_read_as_a_log_is(scorer: QScorer) -> None:
    """Messages of one side are joined, and what was sent instead of a suggestion is part of the state."""
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "user", "content": "anybody there?"},
        {"role": "assistant", "content": "Yes.", "suggestion": "Yes, and you?", "decision": "edited"},
        {"role": "user", "content": "good"},
    ]
    asked = parse_q(json.dumps({"items": [{"messages": messages, "response": ""}]}).encode(), scorer)
    logged = chat_messages(
        [
            Message(role="user", content="hello\nanybody there?"),
            Message(role="assistant", content="Yes.", suggestion="Yes, and you?", decision="edited"),
            Message(role="user", content="good"),
        ]
    )
    assert asked.items[0].prompt == scorer.renderer.prompt(logged).token_ids


def test_nobody_ends_a_response_by_spelling_its_end(scorer: QScorer) -> None:
    asked = parse_q(b'{"items": [{"prompt": "<user>hi<end><assistant>", "response": "no<end>"}]}', scorer)
    [item] = asked.items
    assert item.prompt[:1] == (tiny.USER,)
    assert item.prompt[-2:] == (tiny.END, tiny.ASSISTANT), "an exact prompt is taken as it is"
    assert item.response.count(tiny.END) == 1
    assert item.response[-1] == tiny.END


# ---- OpenRLHF and vLLM ----


async def openrlhf_reward(client_of: Callable[[], httpx2.AsyncClient], query: str, prompt: str) -> dict[str, Any]:
    """One query a request, a new session each, five tries: what OpenRLHF's rollout workers do."""
    payload = {"query": [query], "prompts": [prompt], "labels": [None]}
    for _ in range(5):
        try:
            async with client_of() as client:
                response = await client.post("/get_reward", json=payload)
                response.raise_for_status()
                return response.json()
        except httpx2.HTTPError:
            await asyncio.sleep(1)
    raise RuntimeError("no reward after 5 tries")


def queries(scorer: QScorer, num_queries: int) -> list[tuple[str, str, Item]]:
    """Query, prompt and the item that they are: 4 responses to each prompt."""
    made = []
    for i in range(num_queries):
        prompt = scorer.renderer.prompt_text([{"role": "user", "content": f"hello {i // 4}, have you shoes?"}])
        response = f"We have {i} light shoes"
        item = scorer.item(scorer.renderer.encode(prompt), scorer.renderer.response(response))
        made.append((prompt + response + "<end>" * (i % 2), prompt, item))
    return made


def test_openrlhf_gets_the_reward_of_each_query(scorer: QScorer) -> None:
    asked = queries(scorer, 40)
    service = Service(scorer, name="q")
    app = make_app(service)

    def client() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://q")

    async def rollouts() -> list[dict[str, Any]]:
        return await asyncio.gather(*(openrlhf_reward(client, query, prompt) for query, prompt, _ in asked))

    answers = asyncio.run(rollouts())
    asyncio.run(service.close())
    rewards, q_values = direct(scorer, [(item.prompt, item.response) for _, _, item in asked])
    for answer, reward, q_value in zip(answers, rewards, q_values, strict=True):
        assert answer.keys() == {"rewards", "scores", "extra_logs"}
        assert answer["rewards"] == answer["scores"] == pytest.approx([reward], abs=TOLERANCE)
        assert answer["extra_logs"] == {"q_value": pytest.approx([q_value], abs=TOLERANCE)}


def test_a_query_is_read_the_same_with_and_without_its_prompt(scorer: QScorer) -> None:
    """A query that does not begin with its prompt (the client has cut it) is read as one text."""
    asked = queries(scorer, 8)
    texts = [query for query, _, _ in asked]
    rewards, _ = direct(scorer, [(item.prompt, item.response) for _, _, item in asked])
    for rest in ({}, {"prompts": [p for _, p, _ in asked]}, {"prompts": ["something else"] * 8}):
        parsed = parse_reward(json.dumps({"query": texts} | rest).encode(), scorer)
        assert [i.prompt + i.response for i in parsed.items] == [i.prompt + i.response for _, _, i in asked]
        np.testing.assert_allclose([r.reward for r in scorer.read(parsed.items)], rewards, atol=TOLERANCE)


def test_classify_speaks_as_vllm_does(scorer: QScorer) -> None:
    asked = queries(scorer, 3)
    _, q_values = direct(scorer, [(item.prompt, item.response) for _, _, item in asked])
    with served(scorer) as ask:
        many = ask("POST", "/classify", json={"model": "q", "input": [query for query, _, _ in asked]}).json()
        one = ask("POST", "/classify", json={"input": asked[0][0]}).json()
    assert many["object"] == "list"
    assert (many["model"], one["model"]) == ("q", "my-q")
    assert [row["index"] for row in many["data"]] == [0, 1, 2]
    assert all((row["label"], row["num_classes"]) == ("Q", 1) for row in many["data"])
    np.testing.assert_allclose([row["probs"] for row in many["data"]], [[q] for q in q_values], atol=TOLERANCE)
    assert one["data"][0]["probs"] == pytest.approx([q_values[0]], abs=TOLERANCE)
    assert many["usage"]["total_tokens"] == sum(item.num_tokens for _, _, item in asked)


# ---- what is too long ----


def test_the_beginning_of_a_long_prompt_is_cut_as_the_policys_is(scorer: QScorer) -> None:
    """Of messages, whole ones go; of an exact text or ids, tokens. The context holds 128: 119 before a response of 8."""
    long_chat = [CHAT[0], *(CHAT[1:3] * 30), CHAT[3]]
    text = scorer.renderer.prompt_text(long_chat)
    ids = scorer.renderer.encode(text)
    items = [{"messages": long_chat}, {"prompt": text}, {"prompt_ids": list(ids)}]
    asked = parse_q(json.dumps({"items": [item | {"response": "ok"} for item in items]}).encode(), scorer).items
    assert len(ids) > 700
    rendered = scorer.renderer.prompt(long_chat)
    assert rendered.num_dropped_messages > 50
    assert asked[0].prompt == rendered.token_ids
    assert asked[1].prompt == asked[2].prompt == ids[-119:]
    query = parse_reward(json.dumps({"query": [text + "ok"]}).encode(), scorer).items[0]
    assert query.num_tokens == 128
    assert query.prompt + query.response == (*ids, *scorer.renderer.response("ok"))[-128:]
    with served(scorer) as ask:
        answer = ask("POST", "/v1/q", json={"items": [item | {"response": "ok"} for item in items]})
    rewards, _ = direct(scorer, [(item.prompt, item.response) for item in asked])
    np.testing.assert_allclose(answer.json()["rewards"], rewards, atol=TOLERANCE)


def test_a_long_response_takes_the_room_that_it_needs(scorer: QScorer) -> None:
    item = scorer.item(tuple(range(5, 105)), (9,) * 60)
    assert item.num_tokens == 128
    assert item.prompt == tuple(range(38, 105))
    assert scorer.item((5, 6, 7), (9,) * 126) == Item(prompt=(7,), response=(*(9,) * 126, tiny.END))


# ---- what is wrong ----


GOOD = {"prompt": "hi", "response": "ho"}
BAD_BODIES: list[tuple[str, Any, str]] = [
    ("/v1/q", b"", "body: not valid JSON at column 1, near the end of the line"),
    ("/v1/q", b"{'items': 1}", "body: not valid JSON at column 2"),
    ("/v1/q", b'{"items": [\n{"prompt" "hi"}]}', "body: not valid JSON at line 2, column 11"),
    ("/v1/q", b'{"items": "\xff"}', "body: not UTF-8: byte 0xff"),
    ("/v1/q", b"[" * 100_000, "body: not readable: nested too deeply"),
    ("/v1/q", b'{"items": [], "items": []}', "items: the key stands more than once"),
    ("/v1/q", [], "body: must be an object, not a list"),
    ("/v1/q", {}, "items: is missing"),
    ("/v1/q", {"items": []}, "items: must not be empty"),
    ("/v1/q", {"items": GOOD}, "items: must be a list, not an object"),
    ("/v1/q", {"items": [GOOD], "n": 1}, "n: is not a known key"),
    ("/v1/q", {"items": [GOOD, None]}, r"items[1]: must be an object, not null"),
    ("/v1/q", {"items": [GOOD, GOOD | {"respnse": ""}]}, "items[1].respnse: is not a known key"),
    ("/v1/q", {"items": [{"prompt": "hi"}]}, "items[0]: give exactly one of response, response_ids, not none"),
    ("/v1/q", {"items": [{"response": "hi"}]}, "items[0]: give exactly one of prompt, prompt_ids, messages, not none"),
    (
        "/v1/q",
        {"items": [GOOD | {"prompt_ids": [5]}]},
        "items[0]: give exactly one of prompt, prompt_ids, messages, not prompt and prompt_ids",
    ),
    ("/v1/q", {"items": [{"prompt": 5, "response": ""}]}, "items[0].prompt: must be a string, not a number"),
    ("/v1/q", {"items": [{"prompt": "", "response": ""}]}, "items[0].prompt: holds no token"),
    ("/v1/q", {"items": [{"prompt": "hi", "response": ["x"]}]}, "items[0].response: must be a string, not a list"),
    ("/v1/q", b'{"items": [{"prompt": "hi", "response": "\\ud83d"}]}', "items[0].response: lone surrogate"),
    ("/v1/q", {"items": [{"prompt": "hi", "response_ids": "x"}]}, "items[0].response_ids: must be a list of token ids"),
    (
        "/v1/q",
        {"items": [GOOD] * 3 + [{"prompt": "hi", "response_ids": [5, 10**6]}]},
        "items[3].response_ids[1]: must be from 0 to 320, not 1000000",
    ),
    ("/v1/q", {"items": [{"prompt_ids": [-1], "response": ""}]}, "items[0].prompt_ids[0]: must be from 0 to"),
    ("/v1/q", {"items": [{"prompt_ids": [5.0], "response": ""}]}, "items[0].prompt_ids[0]: must be a token id"),
    ("/v1/q", {"items": [{"prompt_ids": [True], "response": ""}]}, "items[0].prompt_ids[0]: must be a token id"),
    ("/v1/q", {"items": [{"prompt_ids": [], "response": ""}]}, "items[0].prompt_ids: holds no token"),
    ("/v1/q", {"items": [{"messages": [], "response": ""}]}, "items[0].messages: must not be empty"),
    ("/v1/q", {"items": [{"messages": "hi", "response": ""}]}, "items[0].messages: must be a list"),
    (
        "/v1/q",
        {"items": [{"messages": [{"role": "customer", "content": "hi"}], "response": ""}]},
        "items[0].messages[0].role: must be one of system, user, assistant, not 'customer'; did you mean `user`?",
    ),
    (
        "/v1/q",
        {"items": [{"messages": [{"role": "user"}], "response": ""}]},
        "items[0].messages[0].content: is missing",
    ),
    (
        "/v1/q",
        {"items": [{"messages": [{"role": "user", "content": "x", "nmae": 1}], "response": ""}]},
        "items[0].messages[0].nmae: is not a known key",
    ),
    (
        "/v1/q",
        {"items": [{"prompt": "hi", "response_ids": [9] * 200}]},
        "items[0].response_ids: the response has 201 tokens, its end included: it must be shorter than the model's context of 128",
    ),
    ("/v1/q", {"items": [{"prompt": "hi", "response": "x" * 500}]}, "items[0].response: the response has"),
    ("/get_reward", {"query": []}, "query: must not be empty"),
    ("/get_reward", {"query": "hi"}, "query: must be a list, not a string"),
    ("/get_reward", {"query": ["hi", 5]}, "query[1]: must be a string, not a number"),
    ("/get_reward", {"query": ["hi", ""]}, "query[1]: the text holds no token"),
    ("/get_reward", {"query": ["hi"], "prompts": ["a", "b"]}, "prompts: must be as many as the queries, 1, not 2"),
    ("/get_reward", {"query": ["hi"], "prompts": [["a"]]}, "prompts[0]: must be a string, not a list"),
    ("/get_reward", {"queries": ["hi"]}, "queries: is not a known key"),
    ("/get_reward", {"query": ["hi" + "x" * 500], "prompts": ["hi"]}, "query[0]: the response has"),
    ("/classify", {"model": "q"}, "input: is missing"),
    ("/classify", {"input": []}, "input: must not be empty"),
    ("/classify", {"input": ["hi", None]}, "input[1]: must be a string, not null"),
    ("/classify", {"input": ""}, "input[0]: the text holds no token"),
    ("/classify", {"input": "hi", "model": 5}, "model: must be a string, not a number"),
]


def test_every_bad_body_gets_one_line_that_says_what_and_where(scorer: QScorer) -> None:
    with served(scorer) as ask:
        for path, body, line in BAD_BODIES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = ask("POST", path, content=content)
            assert answer.status_code == 422, (path, body, answer.text)
            assert answer.json()["detail"].startswith(line), (path, body, answer.text)
            assert "\n" not in answer.json()["detail"]
        assert ask("POST", "/v1/q", json={"items": [GOOD]}).status_code == 200, "and the next request is well"


def test_other_paths_and_methods_are_refused(scorer: QScorer) -> None:
    with served(scorer) as ask:
        assert ask("GET", "/v1/q").status_code == 405
        assert ask("POST", "/v2/q").status_code == 404
        assert ask("GET", "/docs").status_code == 404


def test_a_body_over_the_bound_is_not_read(scorer: QScorer) -> None:
    """By what it declares, and where it declares nothing by what comes."""
    num_read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_read
        while num_read < 10 * MAX_BODY_BYTES:
            num_read += 1 << 20
            yield b" " * (1 << 20)

    with served(scorer) as ask:
        declared = ask("POST", "/v1/q", content=b"{}", headers={"Content-Length": str(MAX_BODY_BYTES + 1)})
        streamed = ask("POST", "/v1/q", content=endless())
        largest = json.dumps({"items": [GOOD]}).encode().ljust(MAX_BODY_BYTES)
        assert ask("POST", "/v1/q", content=largest).status_code == 200
    for answer in (declared, streamed):
        assert answer.status_code == 413
        assert answer.json() == {"detail": f"body: larger than {MAX_BODY_BYTES} bytes"}
    assert num_read <= MAX_BODY_BYTES + (1 << 20)


class Slow:
    """A scorer that waits until it is let through."""

    def __init__(self, scorer: QScorer) -> None:
        self.scorer = scorer
        self.began = threading.Event()
        self.opened = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def read(self, items: Sequence[Item]) -> list[Reading]:
        self.began.set()
        assert self.opened.wait(timeout=20)
        return self.scorer.read(items)


def test_a_full_queue_turns_away_and_goes_on(scorer: QScorer) -> None:
    slow = Slow(scorer)
    with ThreadPoolExecutor() as pool, served(slow, room=2) as ask:
        computing = pool.submit(ask, "POST", "/v1/q", json={"items": [GOOD]})
        assert slow.began.wait(timeout=10)
        waiting = pool.submit(ask, "POST", "/v1/q", json={"items": [GOOD, GOOD]})
        while "ippo_q_queue_items 2.0" not in ask("GET", "/metrics").text:
            time.sleep(0.01)
        refused = ask("POST", "/v1/q", json={"items": [GOOD]})
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json() == {"detail": "the queue is full: 2 items wait, of at most 2; try again"}
        health = ask("GET", "/health")
        assert (health.status_code, health.json()["ready"]) == (503, False)
        slow.opened.set()
        assert computing.result().status_code == waiting.result().status_code == 200
        assert ask("POST", "/v1/q", json={"items": [GOOD]}).status_code == 200
        never = ask("POST", "/v1/q", json={"items": [GOOD] * 3})
        assert never.status_code == 413
        assert never.json() == {"detail": "body: 3 items are more than the queue holds, 2"}


def test_who_goes_away_takes_nobody_along(scorer: QScorer) -> None:
    """Three clients wait for the batch before theirs; the one in the middle hangs up."""
    slow = Slow(scorer)
    items = random_items(scorer, 4, seed=3)
    service = Service(slow, name="q")  # type: ignore[arg-type]
    app = make_app(service)

    async def scenario() -> list[Any]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://q") as client:

            def asking(item: Item) -> "asyncio.Task[httpx2.Response]":
                return asyncio.create_task(client.post("/v1/q", json={"items": [as_json(item)]}))

            tasks = [asking(items[0])]
            assert await asyncio.to_thread(slow.began.wait, 10)
            tasks += [asking(item) for item in items[1:]]
            while service.batcher.num_queued_items < 3:
                await asyncio.sleep(0.01)
            tasks[2].cancel()
            await asyncio.sleep(0)
            slow.opened.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(scenario())
    asyncio.run(service.close())
    assert isinstance(answers[2], asyncio.CancelledError)
    rewards, _ = direct(scorer, [(item.prompt, item.response) for item in items])
    for place in (0, 1, 3):
        assert answers[place].json()["rewards"] == pytest.approx([rewards[place]], abs=TOLERANCE)


def test_a_q_that_is_no_number_is_said_and_not_sent(scorer: QScorer) -> None:
    class Broken(Slow):
        def read(self, items: Sequence[Item]) -> list[Reading]:
            bad = scorer.renderer.response("bad")
            return [
                dataclasses.replace(reading, reward=float("nan"), q_value=float("inf"))
                if item.response == bad
                else reading
                for item, reading in zip(items, scorer.read(items), strict=True)
            ]

    with served(Broken(scorer)) as ask:
        answer = ask("POST", "/v1/q", json={"items": [GOOD, GOOD | {"response": "bad"}]})
        assert answer.status_code == 500
        assert answer.json() == {"detail": "Q of item 1 is not a finite number (inf)"}
        assert ask("POST", "/v1/q", json={"items": [GOOD]}).status_code == 200


def test_a_batch_that_fails_is_an_error_of_one_line(scorer: QScorer) -> None:
    class Failing(Slow):
        def read(self, items: Sequence[Item]) -> list[Reading]:
            if len(items) > 1:
                raise RuntimeError("out of memory\nall of it")
            return scorer.read(items)

    with served(Failing(scorer)) as ask:
        answer = ask("POST", "/get_reward", json={"query": ["a", "b"]})
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the batch could not be computed: RuntimeError: out of memory all of it"}
        assert ask("POST", "/get_reward", json={"query": ["a"]}).status_code == 200


# ---- key, health, metrics ----


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {KEY}x".encode()}, 401),
        ({"Authorization": f"Basic {KEY}".encode()}, 401),
        ({"Authorization": KEY.encode()}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": f"Bearer {KEY}".encode()}, 200),
        ({"Authorization": f"bearer  {KEY}".encode()}, 200),
    ],
)
def test_the_key_opens_every_route(scorer: QScorer, header: dict[str, Any], status: int) -> None:
    with served(scorer, api_key=KEY) as ask:
        assert ask("POST", "/v1/q", json={"items": [GOOD]}, headers=header).status_code == status
        assert ask("POST", "/get_reward", json={"query": ["hi"]}, headers=header).status_code == status
        assert ask("POST", "/classify", json={"input": "hi"}, headers=header).status_code == status
        assert ask("GET", "/metrics", headers=header).status_code == status
        assert ask("GET", "/nowhere", headers=header).status_code == (404 if status == 200 else 401)
        assert ask("GET", "/health", headers=header).status_code == 200


def test_health_says_what_is_served(scorer: QScorer) -> None:
    with served(scorer) as ask:
        assert ask("GET", "/health").json() == {
            "ready": True,
            "q_function": "my-q",
            "link": "logistic",
            "gamma": 0.9,
            "policy": "week-11",
            "pessimism": 0.5,
            "context_tokens": 128,
            "queued_items": 0,
        }


def test_metrics_count_requests_batches_and_tokens(scorer: QScorer) -> None:
    items = random_items(scorer, 5, seed=2)
    with served(scorer) as ask:
        ask("POST", "/v1/q", json={"items": [as_json(item) for item in items]})
        ask("POST", "/v1/q", json={"items": []})
        ask("POST", "/wp-login.php", json={})
        answer = ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'ippo_q_requests_total{route="/v1/q",status="200"} 1.0' in lines
    assert 'ippo_q_requests_total{route="/v1/q",status="422"} 1.0' in lines
    assert 'ippo_q_requests_total{route="other",status="404"} 1.0' in lines
    assert 'ippo_q_request_seconds_count{route="/v1/q"} 2.0' in lines
    assert "ippo_q_batch_items_sum 5.0" in lines
    assert f"ippo_q_tokens_total {float(sum(item.num_tokens for item in items))}" in lines
    assert "ippo_q_queue_items 0.0" in lines


# ---- which Q-function, with which settings ----


def test_a_q_function_is_found_in_a_run_a_stage_or_its_folder(tmp_path: Path) -> None:
    def touch(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "q_function.json").touch()
        return folder

    loop, step = tmp_path / "loop", tmp_path / "step"
    touch(loop / "iteration-000/start/q_function")
    touch(loop / "iteration-002/fit/q_function")
    newest = touch(loop / "iteration-010/fit/q_function")
    (loop / "iteration-011/collect").mkdir(parents=True)  # of an iteration under way
    own = touch(step / "fit/q_function")
    for path, folder in [(loop, newest), (step, own), (step / "fit", own), (own, own), (newest.parent, newest)]:
        assert find_q_function(path) == folder
    with pytest.raises(ValueError, match="holds no Q-function"):
        find_q_function(tmp_path)


def test_settings_are_those_of_the_run_or_of_the_stage(tmp_path: Path) -> None:
    config = Config(q_function=QFunctionConfig(pessimism=2.5))
    stage = tmp_path / "run/iteration-001/fit"
    stage.mkdir(parents=True)
    (tmp_path / "run/config.toml").write_text(to_toml(config))
    q_function = stage / "q_function"
    assert settings_beside(tmp_path / "run", q_function)["q_function"]["pessimism"] == 2.5
    assert settings_beside(q_function, q_function) == {}
    (stage / "manifest.json").write_text(json.dumps({"config": {"q_function": {"pessimism": 3.0}}}))
    assert settings_beside(q_function, q_function) == settings_beside(stage, q_function)
    assert settings_beside(stage, q_function)["q_function"]["pessimism"] == 3.0
    (stage / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json: not a stage's manifest"):
        settings_beside(stage, q_function)


def test_an_adapters_q_function_is_served_on_its_base(tmp_path: Path) -> None:
    """From the frozen weights that its folder names, as in the improvement step."""
    tiny.word_policy(seed=3).save(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", tiny.policy_config())
    policy.model.requires_grad_(False)
    q_function = QFunction.from_policy(
        policy.model, link="logistic", num_heads=3, pad_id=policy.pad_id, lora_rank=4, seed=0
    )
    with torch.no_grad():
        q_function.heads.mul_(10)
        for name, parameter in q_function.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    (tmp_path / "q").mkdir()
    q_function.save(tmp_path / "q", CARD, policy.tokenizer)
    assert (tmp_path / "q/adapter_config.json").is_file()
    loaded = QScorer.load(tmp_path / "q", CONFIG)
    items = random_items(loaded, 10)
    expected = q_function.pessimistic_values(
        [item.prompt for item in items], [item.response for item in items], pessimism=0.5, tokens_per_batch=4096
    )
    np.testing.assert_allclose([reading.reward for reading in loaded.read(items)], expected, atol=TOLERANCE)


def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    folder = save_q_function(tmp_path / "q")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        QScorer.load(folder, CONFIG)
    (folder / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match="Q-function cannot be loaded"):
        QScorer.load(folder, CONFIG)


def test_an_empty_key_is_no_key_and_not_no_lock(monkeypatch: pytest.MonkeyPatch, scorer: QScorer) -> None:
    monkeypatch.setenv("IPPO_API_KEY", " ")
    with pytest.raises(ValueError, match="IPPO_API_KEY: is set but empty"):
        serve(Path("q"), lambda: scorer, host="127.0.0.1", port=0, say=print)


# ---- the process ----


class Served:
    """An `ippo serve-q` process on a free port."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-P", "-m", "iterative_ppo", "serve-q", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("serving "):
                self.port = int(line.rsplit(":", 1)[1])
                break
        else:
            raise AssertionError(self.process.communicate())

    def post(
        self, path: str, body: object, *, connection: http.client.HTTPConnection | None = None, **headers: str
    ) -> tuple[int, Any]:
        connection = connection or self.connect()
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def get(self, path: str) -> Any:
        connection = self.connect()
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def stop(self) -> str:
        """Its last line, after SIGTERM and a clean end."""
        self.process.send_signal(signal.SIGTERM)
        stdout, stderr = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, stderr
        assert stderr.splitlines() == ["loading libraries ..."]
        return stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_q_function(folder / "iteration-001/fit/q_function", seed=1)
    save_q_function(folder / "iteration-002/fit/q_function", seed=0)
    (folder / "config.toml").write_text(to_toml(CONFIG))
    return folder


@pytest.mark.slow
def test_a_process_answers_everything_it_took_when_it_is_stopped(run_folder: Path) -> None:
    """48 clients with a request each, again and again; one more whose 3,000 items wait when SIGTERM comes.

    A request on a connection that is being closed may be refused, before any answer, and is then not one that was taken:
    the process counts as many items as the clients were given.
    """
    scorer = QScorer.load(run_folder / "iteration-002/fit/q_function", CONFIG)
    items = random_items(scorer, 200, seed=5)
    rewards, _ = direct(scorer, [(item.prompt, item.response) for item in items])
    server = Served(run_folder)
    assert server.get("/health")["q_function"].endswith("iteration-002/fit/q_function")
    num_answered = [0] * 48

    def client(number: int) -> None:
        connection = server.connect()
        place = number
        while True:
            place = (place + 7) % len(items)
            try:
                status, answer = server.post("/v1/q", {"items": [as_json(items[place])]}, connection=connection)
            except (ConnectionError, http.client.RemoteDisconnected):
                return
            assert status == 200
            assert answer["rewards"] == pytest.approx([rewards[place]], abs=TOLERANCE)
            num_answered[number] += 1

    with ThreadPoolExecutor(64) as pool:
        clients = [pool.submit(client, number) for number in range(48)]
        while sum(num_answered) < 500:
            time.sleep(0.01)
        many = pool.submit(server.post, "/v1/q", {"items": [as_json(item) for item in items * 15]})
        while server.get("/health")["queued_items"] < 2000:
            time.sleep(0.005)
        last_line = server.stop()
        status, answer = many.result()
        for done in clients:
            done.result()
    assert status == 200
    np.testing.assert_allclose(answer["rewards"], rewards * 15, atol=TOLERANCE)
    assert last_line == f"stopped: {sum(num_answered) + 3000:,} items answered"
    with pytest.raises(ConnectionRefusedError):
        server.connect().connect()


@pytest.mark.slow
def test_a_process_keeps_its_bounds_and_its_key(run_folder: Path) -> None:
    server = Served(run_folder / "iteration-001", "--set", "q_function.pessimism=0.25", IPPO_API_KEY=KEY)
    bearer = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
    assert len(server.lines) == 1, "no warning"
    assert server.get("/health")["pessimism"] == 0.25
    assert server.post("/v1/q", {"items": [GOOD]})[0] == 401
    assert server.post("/v1/q", {"items": [GOOD]}, Authorization="Bearer x")[0] == 401
    assert server.post("/v1/q", {"items": [GOOD]}, **bearer)[0] == 200
    statuses: list[int] = []

    def flood(_: int) -> None:
        status, answer = server.post("/v1/q", {"items": [GOOD] * 4000}, **bearer)
        statuses.append(status)
        assert len(answer.get("rewards", [])) == (4000 if status == 200 else 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(flood, range(8)))
    assert set(statuses) == {200, 429}, statuses
    status, answer = server.post("/v1/q", {"items": [{"prompt": "x" * MAX_BODY_BYTES, "response": ""}]}, **bearer)
    assert status == 413, answer
    assert server.post("/v1/q", {"items": [GOOD]}, **bearer)[0] == 200
    server.stop()


def test_what_cannot_be_served_ends_with_one_line(run_folder: Path, tmp_path: Path) -> None:
    finished = run("serve-q", tmp_path, folder=tmp_path)
    assert finished.code == 2
    [line] = finished.complaints
    assert line.startswith(f"ippo: {tmp_path}: holds no Q-function")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finished = run("serve-q", run_folder, "--port", taken.getsockname()[1], folder=tmp_path)
    assert finished.code == 2
    [line] = finished.complaints
    assert re.fullmatch(r"ippo: 127\.0\.0\.1:\d+: cannot be bound \(--host, --port\): Address already in use", line)


@pytest.mark.slow
def test_beyond_loopback_without_a_key_it_warns(run_folder: Path) -> None:
    server = Served(run_folder, "--host", "0.0.0.0")
    assert server.lines[0].startswith("warning: 0.0.0.0 can be reached from other machines")
    server.stop()
