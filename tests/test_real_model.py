"""SmolLM2-135M-Instruct: a pretrained model with its own tokenizer and chat template, through the same code."""

import importlib.util
import sys
import timeit
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from iterative_ppo import adapters
from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.conversations import Conversation, Message
from iterative_ppo.improvement import native
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, QFunctionCard, TokenValue
from iterative_ppo.turns_to_tokens import response_sequences, tokenize

CONFIG = PolicyConfig(context_tokens=512, max_response_tokens=8)
CARD = QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="logs", metrics={})
TOKENS = 1024


def _example() -> ModuleType:
    file = Path(__file__).parent.parent / "examples" / "persuasion" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["smollm2"] = module
    spec.loader.exec_module(module)
    return module


smollm2 = _example()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not smollm2.is_installed() and not smollm2.cache_folder().exists(),
        reason="SmolLM2 is not there: make smollm2",
    ),
]


@cache
def bfloat16_takes_hours() -> bool:
    """Whether this processor has no instructions for it: its products then take a hundred times as long."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: x @ x, number=1, repeat=5))

    return seconds(torch.bfloat16) > 10 * seconds(torch.float32)


@cache
def policy(dtype: torch.dtype = torch.float32) -> Policy:
    return Policy.load(smollm2.model_folder(), CONFIG, dtype=dtype)


def prompts(num_prompts: int) -> list[tuple[int, ...]]:
    words = ["a joke", "about the sea", "why people donate to charity", "which shoes are good for trails"]
    return [
        policy().renderer.prompt([{"role": "user", "content": f"Tell me {words[i % 4]}."}]).token_ids
        for i in range(num_prompts)
    ]


def test_it_speaks_english():
    """The most likely word, five times."""
    renderer = policy().renderer
    [prompt] = [renderer.prompt([{"role": "user", "content": "What is the capital of France?"}]).token_ids]
    answer = ""
    for _ in range(8):
        with torch.no_grad():
            prompt = (*prompt, int(policy().model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()))
        answer = policy().tokenizer.decode(prompt)
    assert "Paris" in answer.rpartition("assistant")[2]


def test_a_conversation_is_one_sequence_and_its_prompts_are_what_the_template_writes():
    messages = [
        Message(role="system", content="You sell shoes."),
        Message(role="user", content="hi"),
        Message(role="assistant", content="Which budget do you have?"),
        Message(role="user", content="around 80"),
        Message(role="assistant", content="Then take these."),
        Message(role="user", content="thanks"),
    ]
    conversation = Conversation(id="c", messages=tuple(messages), outcome=1.0, end="terminated")
    turns = tokenize(conversation, policy().renderer)
    assert len(response_sequences(turns)) == 1
    chats = [{"role": message.role, "content": message.content} for message in messages]
    for prompt, num_messages in zip(turns.prompts, (2, 4), strict=True):
        text = policy().tokenizer.apply_chat_template(chats[:num_messages], tokenize=False, add_generation_prompt=True)
        assert policy().tokenizer.decode(prompt) == text


def test_what_is_sampled_is_scored_alike():
    asked = prompts(6)
    sampled = policy().sample(asked, np.random.default_rng(0).random((6, 8)))
    scored = policy().logprobs(asked, sampled.token_ids, tokens_per_batch=TOKENS)
    for by_sampler, by_scorer in zip(sampled.token_logprobs, scored, strict=True):
        np.testing.assert_allclose(by_sampler, by_scorer, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_one_backbone_raises_the_reward(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Policy, anchor, token value and Q on one set of frozen weights. The reward is the share of tokens with even ids: the
    probability of such a token must rise, wherever the anchor's responses lead."""
    if dtype == torch.bfloat16 and bfloat16_takes_hours():
        pytest.skip("no bfloat16 instructions here; test_adapters makes such a step with small models")
    monkeypatch.setattr(native, "num_responses_for_kl", lambda _: 32)
    current = policy(dtype)
    q_function = QFunction.from_policy(
        current.model, link="logistic", num_heads=2, pad_id=current.pad_id, lora_rank=8, seed=0
    )
    improvement = native.improve(
        current,
        prompts(8),
        lambda _, responses: torch.tensor([float(np.mean([token % 2 == 0 for token in r])) for r in responses]),
        ImprovementConfig(
            num_updates=3, prompts_per_update=8, num_samples=4, num_minibatches=1, learning_rate=5e-4, kl_target=20.0
        ),
        token_value=TokenValue(q_function),
        generator=np.random.default_rng(0),
        tokens_per_batch=TOKENS,
    )
    assert improvement.updates[0].kl == pytest.approx(0, abs=1e-4)
    responses = current.respond(prompts(8), np.random.default_rng(1).random((8, 8)))

    def even_probability(policy: Policy) -> float:
        with torch.no_grad():
            batches = policy.response_logits(prompts(8), responses, tokens_per_batch=TOKENS)
            return float(torch.cat([b.logits_NV.softmax(-1)[:, ::2].sum(-1) for b in batches]).mean())

    assert even_probability(improvement.candidate) > even_probability(current) + 0.005

    frozen = {p.data_ptr() for p in current.model.parameters()}
    for model in (improvement.candidate.model, q_function.model.base_model):
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} <= frozen
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.05 * current.num_parameters

    improvement.candidate.save(tmp_path / "candidate")
    assert adapters.base_of(tmp_path / "candidate") == str(smollm2.model_folder())
    q_function.save(tmp_path / "q", CARD, current.tokenizer)
    if dtype == torch.float32:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q", num_labels=1).eval()
        model.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "q").pad_token_id
        asked, responses = prompts(2), [(*prompts(1)[0][-3:], current.renderer.end_id)] * 2
        with torch.no_grad():
            label = [
                float(model(input_ids=torch.tensor([p + r])).logits) for p, r in zip(asked, responses, strict=True)
            ]
        expected = q_function.values(asked, responses, tokens_per_batch=TOKENS)
        np.testing.assert_allclose(torch.tensor(label).sigmoid(), expected, atol=1e-4)
