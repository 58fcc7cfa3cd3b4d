"""The policy as a distribution: scoring whatever the padding, cloning, saving, and what cannot be loaded."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, QFunctionCard
from iterative_ppo.rendering import TokenIds, TurnSequence, pack_turns
from iterative_ppo.supervised import accumulate_gradient

MODELS = [tiny.llama, tiny.grouped_query_llama, tiny.gpt2]
TOLERANCE = 1e-5


def turns(seed: int, num_rows: int = 6) -> tuple[list[TokenIds], list[TokenIds]]:
    """Prompts of 1 to 20 letters and responses of 1 to 8, of very different lengths."""
    generator = np.random.default_rng(seed)
    prompts = tiny.random_rows(generator, generator.integers(1, 21, num_rows).tolist(), low=1, high=12)
    responses = tiny.random_rows(generator, generator.integers(1, 9, num_rows).tolist(), low=5, high=12)
    return prompts, responses


def naive_logprobs(policy: Policy, prompt: TokenIds, response: TokenIds) -> list[float]:
    """One row, nothing padded, a softmax over everything: token t of the response is read at the token before it."""
    with torch.no_grad():
        logits_TV = policy.model(input_ids=torch.tensor([prompt + response])).logits[0] / policy.temperature
    logprob_TV = logits_TV.log_softmax(-1)
    return [float(logprob_TV[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]


def assert_rows_close(actual: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    assert list(map(len, actual)) == list(map(len, expected))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


# --- scoring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logits_are_those_of_every_row_alone(model: Callable[..., PreTrainedModel], temperature: float):
    """Batches of different lengths, padded on the right:

    p p p p r r
    p r r r . .
    p p r . . .
    """
    policy = tiny.letter_policy(model, temperature=temperature)
    prompts, responses = turns(1)
    batches = list(policy.response_logits(prompts, responses, tokens_per_batch=4096))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(prompts)))
    assert not all(batch.mask_BT.all() for batch in batches), "nothing was padded"
    for batch in batches:
        logprob_BT = batch.logprobs().detach()
        responses_in_order = [responses[row] for row in batch.rows]
        assert batch.mask_BT.sum(1).tolist() == list(map(len, responses_in_order))
        expected = [naive_logprobs(policy, prompts[row], responses[row]) for row in batch.rows]
        assert_rows_close([logprob_BT[b, : len(r)].tolist() for b, r in enumerate(responses_in_order)], expected)
    if temperature != 1.0:
        policy.temperature = 1.0
        row = batches[-1].rows[0]
        assert abs(naive_logprobs(policy, prompts[row], responses[row])[0] - expected[0][0]) > 1e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens_per_batch", [64, 200, 100_000])
def test_logprobs_do_not_depend_on_batches_or_their_order(model: Callable[..., PreTrainedModel], tokens_per_batch: int):
    policy = tiny.letter_policy(model)
    prompts, responses = turns(2, num_rows=12)
    expected = [naive_logprobs(policy, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert_rows_close(policy.logprobs(prompts, responses, tokens_per_batch=tokens_per_batch), expected)
    order = np.random.default_rng(3).permutation(12).tolist()
    shuffled = policy.logprobs(
        [prompts[row] for row in order], [responses[row] for row in order], tokens_per_batch=tokens_per_batch
    )
    assert_rows_close(shuffled, [expected[row] for row in order])


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_does_not_depend_on_the_padding(model: Callable[..., PreTrainedModel]):
    """The summed log-probability of a short row, alone and beside a row that is twice as long."""
    policy = tiny.letter_policy(model)
    generator = np.random.default_rng(4)
    prompts = tiny.random_rows(generator, [4, 7], low=5, high=12)
    responses = tiny.random_rows(generator, [2, 5], low=5, high=12)

    def gradient(num_rows: int) -> dict[str, torch.Tensor]:
        policy.model.zero_grad()
        [batch] = policy.response_logits(prompts[:num_rows], responses[:num_rows], tokens_per_batch=4096)
        batch.logprobs()[batch.rows.index(0)].sum().backward()
        return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}

    assert tiny.largest_difference(gradient(1), gradient(2)) < TOLERANCE


# --- cloning ------------------------------------------------------------------------------------------------


def talks(num_talks: int, seed: int, renderer_policy: Policy) -> list[TurnSequence]:
    """Conversations of two turns in which the seller always repeats the customer's last letter, twice."""
    generator = np.random.default_rng(seed)
    renderer, sequences = renderer_policy.renderer, []
    for _ in range(num_talks):
        chat: list[dict[str, str]] = []
        prompts, responses = [], []
        for _ in range(2):
            said = "".join(generator.choice(list(tiny.LETTERS), int(generator.integers(1, 5))))
            chat.append({"role": "user", "content": said})
            prompts.append(renderer.prompt(chat).token_ids)
            responses.append(renderer.response(2 * said[-1]))
            chat.append({"role": "assistant", "content": 2 * said[-1]})
        sequences += pack_turns(prompts, responses)
    return sequences


def test_cloning_lowers_the_held_out_loss_and_learns_what_the_logs_do():
    policy = tiny.letter_policy(clone_passes=12, clone_learning_rate=1e-2)
    sequences = talks(160, 5, policy)
    held_out = [row >= 120 for row in range(160)]
    before = mean_negative_log_likelihood(policy, sequences[120:])
    history = policy.clone(sequences, held_out=held_out, tokens_per_batch=512, generator=np.random.default_rng(0))
    after = mean_negative_log_likelihood(policy, sequences[120:])
    assert history.held_out_losses[0] == pytest.approx(before, abs=1e-4)
    assert history.held_out_losses[history.best_pass] == pytest.approx(after, abs=1e-4)
    assert after < 0.2 * before
    prompt = policy.renderer.prompt([{"role": "user", "content": "abf"}]).token_ids
    [sampled] = policy.conversation_cache().sample([prompt], np.full((1, 8), 0.5)).token_ids
    assert policy.renderer.response_text(sampled) == "ff"


def mean_negative_log_likelihood(policy: Policy, sequences: Sequence[TurnSequence]) -> float:
    """By the other road: prompt and response of every turn as a row of their own, through `logprobs`."""
    prompts = [s.token_ids[:start] for s in sequences for start, _ in s.spans]
    responses = [s.token_ids[start:end] for s in sequences for start, end in s.spans]
    logprobs = policy.logprobs(prompts, responses, tokens_per_batch=4096)
    return -sum(map(sum, logprobs)) / sum(map(len, logprobs))


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_of_cloning_is_the_likelihood_of_the_policy(model: Callable[..., PreTrainedModel]):
    """At temperature 0.7 as well: what is fitted is the distribution that is sampled."""
    policy = tiny.letter_policy(model, temperature=0.7)
    sequences = talks(10, 6, policy)
    loss, weight = policy._negative_log_likelihood(sequences)(list(range(10)))
    assert float(loss.detach() / weight) == pytest.approx(
        mean_negative_log_likelihood(policy, sequences), abs=TOLERANCE
    )
    assert float(weight) == sum(end - start for s in sequences for start, end in s.spans)


def test_the_loss_of_cloning_is_the_likelihood_where_a_family_scales_its_logits():
    """Granite divides its logits by a constant (Cohere and others multiply them): the model's own logits count."""
    config = GraniteConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        logits_scaling=4.0,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tiny.END,
        pad_token_id=tiny.PAD,
    )
    torch.manual_seed(0)
    policy = Policy(GraniteForCausalLM(config), tiny.letter_tokenizer(), tiny.policy_config())
    sequences = talks(10, 6, policy)
    loss, weight = policy._negative_log_likelihood(sequences)(list(range(10)))
    assert float(loss.detach() / weight) == pytest.approx(
        mean_negative_log_likelihood(policy, sequences), abs=TOLERANCE
    )


@pytest.mark.parametrize("tokens_per_batch", [64, 150, 400])
def test_micro_batches_change_nothing_in_the_gradient(tokens_per_batch: int):
    """Sums are accumulated and divided once by all tokens. A mean of the micro-batches' means is another number."""
    policy = tiny.letter_policy()
    sequences = talks(20, 7, policy)
    parameters = list(policy.model.parameters())

    def gradient(size: int) -> list[torch.Tensor]:
        policy.model.zero_grad()
        lengths = [len(s.token_ids) for s in sequences]
        accumulate_gradient(
            policy._negative_log_likelihood(sequences), range(20), lengths, parameters, tokens_per_batch=size
        )
        return [p.grad.clone() for p in parameters if p.grad is not None]

    whole, split = gradient(100_000), gradient(tokens_per_batch)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, split, strict=True)) < 1e-6
    assert max(float(g.abs().max()) for g in whole) > 1e-2


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_policy_is_an_ordinary_transformers_folder(tmp_path: Path, model: Callable[..., PreTrainedModel]):
    policy = tiny.letter_policy(model, temperature=0.7)
    policy.save(tmp_path)
    prompts, responses = turns(8)
    expected = policy.logprobs(prompts, responses, tokens_per_batch=512)

    loaded = Policy.load(tmp_path, policy.config)
    assert_rows_close(loaded.logprobs(prompts, responses, tokens_per_batch=512), expected)
    assert loaded.renderer.end_id == policy.renderer.end_id
    assert loaded.pad_id == policy.pad_id

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    ) == loaded.renderer.prompt_text(chat)
    with torch.no_grad():
        logits_TV = plain(input_ids=torch.tensor([prompts[0] + responses[0]])).logits[0] / 0.7
    assert float(logits_TV.log_softmax(-1)[len(prompts[0]) - 1, responses[0][0]]) == pytest.approx(
        expected[0][0], abs=TOLERANCE
    )


def test_its_generation_settings_sample_from_exactly_this_policy(tmp_path: Path):
    """Temperature and end token as here, and neither top-k (50 where nothing is said) nor top-p nor a penalty."""
    policy = tiny.letter_policy(temperature=0.7, max_response_tokens=6)
    policy.save(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert written["temperature"] == 0.7
    assert written["eos_token_id"] == tiny.END
    assert written["pad_token_id"] == tiny.PAD
    assert written["do_sample"] is True
    assert written["max_new_tokens"] == 6
    assert written["top_k"] == 0, "where nothing is written, `generate` takes the 50 most probable tokens"
    settings_read = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert settings_read.top_k in (0, None)
    assert settings_read.top_p in (1.0, None)
    assert settings_read.repetition_penalty in (1.0, None)


def test_generate_draws_what_the_sampler_draws(tmp_path: Path):
    """Both distributions over the first token, by 4,000 draws of transformers' own `generate`."""
    policy = tiny.letter_policy(temperature=0.7, max_response_tokens=1)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = (tiny.USER, tiny.A, tiny.END, tiny.ASSISTANT)
    torch.manual_seed(0)
    drawn = plain.generate(torch.tensor([prompt] * 4000), attention_mask=torch.ones(4000, 4, dtype=torch.long))[:, 4]
    share_V = torch.bincount(drawn, minlength=12).numpy() / 4000
    logprobs = policy.logprobs([prompt] * 12, [(token,) for token in range(12)], tokens_per_batch=512)
    probability_V = np.exp(logprobs)[:, 0]
    assert np.abs(share_V - probability_V).max() < 4 * np.sqrt(0.25 / 4000)


def test_the_tiny_policy_is_decided_by_its_seed(tmp_path: Path):
    config = tiny.policy_config(hidden_size=32, num_layers=1, vocabulary_size=300)
    first, same, other = (Policy.tiny(tiny.TEXTS, config, seed=seed) for seed in (0, 0, 1))
    assert tiny.largest_difference(first.model.state_dict(), same.model.state_dict()) == 0
    assert tiny.largest_difference(first.model.state_dict(), other.model.state_dict()) > 0
    assert first.tokenizer.get_vocab() == same.tokenizer.get_vocab()
    first.save(tmp_path)
    assert Policy.load(tmp_path, config).num_parameters == first.num_parameters
    with pytest.raises(ValueError, match="hidden_size"):
        Policy.tiny(tiny.TEXTS, tiny.policy_config(hidden_size=33), seed=0)


def test_the_tiny_tokenizer_gives_back_any_text():
    """Bytes it has never seen included; the only texts that do not come back are its own special tokens."""
    config = tiny.policy_config(hidden_size=32, num_layers=1, vocabulary_size=300)
    renderer = Policy.tiny(tiny.TEXTS, config, seed=0).renderer

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    @settings(deadline=None)
    def check(text: str) -> None:
        if "<|" not in text:
            assert renderer.response_text(renderer.response(text)) == text

    check()
    for text in (" ,a .  b's \n\n c ", "naïve 😀 \x00\x7f\u200b 日本語", "", " "):
        assert renderer.response_text(renderer.response(text)) == text


def test_a_tokenizer_with_one_special_token_loses_no_text(tmp_path: Path):
    """GPT-2's way: one token ends everything, and there is none for padding. Whatever is made of that, no token that
    people write may become a special one, which is left out of what the customer sees."""
    template = tiny.TEMPLATE.replace("<{{ message['role'] }}>", "{{ message['role'] }}: ").replace(
        "<assistant>", "me: "
    )
    tokenizer = tiny.byte_tokenizer(template, ["<end>"], eos="<end>", pad=None)
    everything = "".join(map(chr, range(32, 127))) + " é!! ##"
    expected = tokenizer(everything, add_special_tokens=False)["input_ids"]
    policy = Policy(tiny.gpt2(len(tokenizer)), tokenizer, tiny.policy_config())
    policy.save(tmp_path)
    for renderer in (policy.renderer, Policy.load(tmp_path, policy.config).renderer):
        assert renderer.response(everything) == (*expected, renderer.end_id)
        assert renderer.response_text(renderer.response(everything)) == everything


# --- what cannot be loaded ----------------------------------------------------------------------------------


def break_missing(folder: Path) -> Path:
    return folder / "missing"


def break_empty(folder: Path) -> Path:
    for file in folder.iterdir():
        file.unlink()
    return folder


def break_no_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def break_cut_weights(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def break_config(folder: Path) -> Path:
    (folder / "config.json").write_text("{", encoding="utf-8")
    return folder


def break_shapes(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}), encoding="utf-8")
    return folder


def break_unknown_architecture(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such"}), encoding="utf-8")
    return folder


def break_no_tokenizer(folder: Path) -> Path:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def break_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def break_no_template(folder: Path) -> Path:
    for file in folder.glob("chat_template*"):
        file.unlink()
    return folder


def break_template(folder: Path) -> Path:
    for file in folder.glob("chat_template*"):
        file.write_text("{% for message in messages %}", encoding="utf-8")
    return folder


def break_no_language_model(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}), encoding="utf-8")
    return folder


def break_a_weight(folder: Path) -> Path:
    """transformers fills in random numbers, and says so in a log that nobody reads."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def break_by_taking_a_q_function_for_a_policy(folder: Path) -> Path:
    """It has a tokenizer, a trunk and a chat template, and no vocabulary projection."""
    model = Policy.load(folder, tiny.policy_config()).model
    q_function = QFunction.from_policy(model, link="identity", num_heads=1, pad_id=tiny.PAD, lora_rank=4, seed=0)
    card = QFunctionCard(link="identity", gamma=1.0, target="monte_carlo", policy="", metrics={})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    break_empty(folder)
    q_function.save(folder, card, tokenizer)
    return folder


@pytest.mark.parametrize(
    "break_",
    [
        break_missing,
        break_empty,
        break_no_weights,
        break_cut_weights,
        break_config,
        break_shapes,
        break_unknown_architecture,
        break_no_tokenizer,
        break_tokenizer,
        break_no_template,
        break_template,
        break_no_language_model,
        break_a_weight,
        break_by_taking_a_q_function_for_a_policy,
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_it(tmp_path: Path, break_: Callable[[Path], Path]):
    policy = tiny.letter_policy()
    policy.save(tmp_path)
    source = break_(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Policy.load(source, policy.config)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert 20 < len(message) - len(str(source)) < 400, "a reason, and no page of it"


@pytest.mark.parametrize("source", ["no-such-folder", "no/such", "a/b/c", "", "with space"])
def test_a_name_that_is_no_model_is_refused_in_one_line(source: str):
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        Policy.load(source, tiny.policy_config())
    assert "\n" not in str(caught.value)
