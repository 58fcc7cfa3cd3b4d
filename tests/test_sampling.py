"""Sampling with a cache that lives as long as the conversation: the same numbers as from scratch, for less work."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from iterative_ppo import sampling_chunks
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.sampling import ConversationCache, SampledResponses, cache_bytes_per_token

MODELS = [tiny.llama, tiny.grouped_query_llama, tiny.gpt2]
TOLERANCE = 1e-5
NUM_TOKENS = 5 + len(tiny.LETTERS)


def uniforms(generator: np.random.Generator, num_rows: int, policy: Policy) -> np.ndarray:
    return generator.random((num_rows, policy.config.max_response_tokens))


def words(generator: np.random.Generator, *lengths: int) -> list[TokenIds]:
    """What a customer says, and the mark behind which the policy answers."""
    return [(tiny.USER, *row, tiny.END, tiny.ASSISTANT) for row in tiny.random_rows(generator, lengths, low=5, high=12)]


def assert_as_from_scratch(policy: Policy, prompts: Sequence[TokenIds], sampled: SampledResponses) -> None:
    """The sampler's log-probabilities are those of scoring prompt and response without a cache."""
    scored = policy.logprobs(prompts, sampled.token_ids, tokens_per_batch=64)
    for own, from_scratch in zip(sampled.token_logprobs, scored, strict=True):
        np.testing.assert_allclose(own, from_scratch, rtol=0, atol=TOLERANCE)


def fresh(policy: Policy, prompts: Sequence[TokenIds], uniforms_BT: np.ndarray) -> SampledResponses:
    return policy.conversation_cache().sample(prompts, uniforms_BT)


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_cache_kept_over_turns_gives_what_scoring_from_scratch_gives(model: Callable[..., PreTrainedModel]):
    """Ragged rows, and rows that leave as their conversations end (p prompt, r response, x not there):

    turn 0    pppr     ppppprrrr   pprr      ppppppprr
    turn 1    pprrr    x           ppppr     pprrrrr
    turn 2    ppppr    x           x         pr           ...
    """
    policy = tiny.letter_policy(model)
    generator = np.random.default_rng(1)
    cache = policy.conversation_cache()
    prompts = words(generator, 2, 9, 1, 14, 5, 3)
    for _ in range(5):
        uniforms_BT = uniforms(generator, len(prompts), policy)
        sampled = cache.sample(prompts, uniforms_BT)
        assert_as_from_scratch(policy, prompts, sampled)
        assert sampled.token_ids == fresh(policy, prompts, uniforms_BT).token_ids
        stay = [row for row in range(len(prompts)) if row != 1] if len(prompts) > 2 else [0, 1]
        if len(stay) < len(prompts):
            cache.keep(stay)
        said = words(generator, *generator.integers(1, 12, len(stay)).tolist())
        prompts = [prompts[row] + sampled.token_ids[row] + new for row, new in zip(stay, said, strict=True)]
    assert len(prompts) == 2


@pytest.mark.parametrize("model", MODELS)
def test_a_rewritten_past_is_forgotten_and_read_anew(model: Callable[..., PreTrainedModel]):
    """A template that drops thoughts, or a context that overflows: row 0 changes a token in the middle, row 1 loses
    its front, row 2 is cut short, row 3 is another conversation altogether, row 4 only grows."""
    policy = tiny.letter_policy(model)
    generator = np.random.default_rng(2)
    cache = policy.conversation_cache()
    prompts = words(generator, 12, 12, 12, 12, 12)
    for _ in range(3):
        uniforms_BT = uniforms(generator, 5, policy)
        sampled = cache.sample(prompts, uniforms_BT)
        assert_as_from_scratch(policy, prompts, sampled)
        assert sampled.token_ids == fresh(policy, prompts, uniforms_BT).token_ids
        grown = [
            p + r + new for p, r, new in zip(prompts, sampled.token_ids, words(generator, 4, 4, 4, 4, 4), strict=True)
        ]
        changed = grown[0][5] % 7 + 5  # another letter
        prompts = [
            (*grown[0][:5], changed, *grown[0][6:]),
            grown[1][6:],
            prompts[2][:-3],
            words(generator, 8)[0],
            grown[4],
        ]


@pytest.mark.parametrize("model", MODELS)
def test_compaction_changes_nothing(model: Callable[..., PreTrainedModel]):
    """Row 1 is another one every time and row 0 grows by a letter, so forgotten slots and padding pile up until what
    is left is gathered together:

    ppp...r.....p.....p.....p..    ->    pppppp...
    ###pppppp###pppppp###pppppp    ->    pppppp...
    """
    policy = tiny.letter_policy(model)
    generator = np.random.default_rng(3)
    cache = policy.conversation_cache()
    growing: TokenIds = (tiny.ASSISTANT,)
    widths = []
    for _ in range(12):
        growing = (*growing, tiny.A)
        prompts = [growing, words(generator, 20)[0]]
        uniforms_BT = uniforms(generator, 2, policy)
        sampled = cache.sample(prompts, uniforms_BT)
        assert_as_from_scratch(policy, prompts, sampled)
        assert sampled.token_ids == fresh(policy, prompts, uniforms_BT).token_ids
        widths.append(cache._mask_BS.shape[1])
    assert any(after < before for before, after in itertools.pairwise(widths)), "it was never compacted"


def test_rows_may_be_kept_in_any_order_and_several_times():
    """Branching: from one state, several continuations."""
    policy = tiny.letter_policy()
    generator = np.random.default_rng(4)
    cache = policy.conversation_cache()
    prompts = words(generator, 4, 7, 2)
    sampled = cache.sample(prompts, uniforms(generator, 3, policy))
    cache.keep([2, 0, 2])
    before = cache.num_encoded_tokens
    prompts = [
        prompts[row] + sampled.token_ids[row] + new
        for row, new in zip([2, 0, 2], words(generator, 3, 3, 5), strict=True)
    ]
    uniforms_BT = uniforms(generator, 3, policy)
    again = cache.sample(prompts, uniforms_BT)
    assert_as_from_scratch(policy, prompts, again)
    assert again.token_ids == fresh(policy, prompts, uniforms_BT).token_ids
    new_tokens = sum(map(len, words(generator, 3, 3, 5))) + sum(map(len, again.token_ids))
    assert cache.num_encoded_tokens - before == new_tokens, "the kept rows were not read again"


def test_a_sliding_window_is_measured_in_tokens_and_not_in_cache_slots():
    """Mistral and Gemma look back a fixed number of tokens. Beside a long row a short one has gaps in the cache:

    slots    p p p . . . . . . r r     a window of four tokens must reach over the gap
    """
    config = MistralConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tiny.END,
        pad_token_id=tiny.PAD,
    )

    def mistral(_: int, *, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return MistralForCausalLM(config)

    policy = tiny.letter_policy(mistral)
    generator = np.random.default_rng(5)
    prompts = words(generator, 3, 14)
    sampled = fresh(policy, prompts, uniforms(generator, 2, policy))
    assert_as_from_scratch(policy, prompts, sampled)


# --- its cost -----------------------------------------------------------------------------------------------


def tokens_of_a_conversation(policy: Policy, num_turns: int, *, keep_cache: bool) -> tuple[int, int]:
    """Tokens that the model ran over in a conversation, and the tokens that the conversation has."""
    generator = np.random.default_rng(6)
    cache, num_encoded = policy.conversation_cache(), 0
    past: TokenIds = ()
    for _ in range(num_turns):
        prompt = past + words(generator, 6)[0]
        [response] = cache.sample([prompt], uniforms(generator, 1, policy)).token_ids
        past = prompt + response
        if not keep_cache:
            num_encoded += cache.num_encoded_tokens
            cache = policy.conversation_cache()
    return num_encoded + cache.num_encoded_tokens, len(past)


def test_encoded_tokens_grow_linearly_with_the_turns():
    """With the cache every token is encoded once (the very last, which nothing follows, not at all). Encoding each
    prompt from its beginning instead costs Σ_turns (length so far): four times as much for twice the turns."""
    policy = tiny.letter_policy()
    for num_turns in (1, 5, 10, 20):
        num_encoded, num_tokens = tokens_of_a_conversation(policy, num_turns, keep_cache=True)
        assert num_encoded == num_tokens - 1
    cached = [tokens_of_a_conversation(policy, n, keep_cache=True)[0] for n in (10, 20)]
    encoded_anew = [tokens_of_a_conversation(policy, n, keep_cache=False)[0] for n in (10, 20)]
    assert cached[1] / cached[0] == pytest.approx(2, abs=0.3)
    assert encoded_anew[1] / encoded_anew[0] == pytest.approx(4, abs=0.6)
    assert encoded_anew[1] > 8 * cached[1]


# --- the distribution ---------------------------------------------------------------------------------------


def test_the_same_uniform_numbers_give_the_same_tokens_in_any_batch():
    """Alone, together, in another order, beside other rows."""
    policy = tiny.letter_policy()
    generator = np.random.default_rng(7)
    prompts = words(generator, 3, 17, 1, 8, 30, 2)
    uniforms_BT = uniforms(generator, 6, policy)
    together = fresh(policy, prompts, uniforms_BT)
    assert fresh(policy, prompts, uniforms_BT) == together
    order = [4, 2, 0, 5]
    shuffled = fresh(policy, [prompts[row] for row in order], uniforms_BT[order])
    assert shuffled.token_ids == tuple(together.token_ids[row] for row in order)
    for row in range(6):
        [alone] = fresh(policy, prompts[row : row + 1], uniforms_BT[row : row + 1]).token_ids
        assert alone == together.token_ids[row]
    others = fresh(policy, prompts, uniforms(generator, 6, policy))
    assert others.token_ids != together.token_ids


@pytest.mark.parametrize("model", MODELS)
def test_rows_that_go_on_alone_say_what_they_would_have_said(
    model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
):
    """Of 24 rows most end early; what the others say, in this turn and the next, is what each says by itself."""
    num_parts: list[int] = []
    part = ConversationCache._part

    def counted(self: ConversationCache, rows: Sequence[int]) -> ConversationCache:
        num_parts.append(len(rows))
        return part(self, rows)

    monkeypatch.setattr(ConversationCache, "_part", counted)
    policy = tiny.letter_policy(model, max_response_tokens=24)
    generator = np.random.default_rng(8)
    first, second = words(generator, *[4] * 24), words(generator, *[3] * 24)
    uniforms_BT = [uniforms(generator, 24, policy) for _ in range(2)]
    cache = policy.conversation_cache()
    one = cache.sample(first, uniforms_BT[0])
    assert num_parts, "no batch was shrunk"
    prompts = [p + r + q for p, r, q in zip(first, one.token_ids, second, strict=True)]
    two = cache.sample(prompts, uniforms_BT[1])
    for row in range(24):
        alone = policy.conversation_cache()
        for sampled, prompt, numbers in ((one, first[row], uniforms_BT[0]), (two, prompts[row], uniforms_BT[1])):
            expected = alone.sample([prompt], numbers[row : row + 1])
            assert sampled.token_ids[row] == expected.token_ids[0]
            assert sampled.token_logprobs[row] == pytest.approx(expected.token_logprobs[0], abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_frequencies_are_the_probabilities_of_the_tempered_softmax(temperature: float):
    """4,000 responses of one token to one prompt; the counts must pass a chi-square test against
    softmax(logits / temperature), and fail it against the softmax of another temperature."""
    policy = tiny.letter_policy(max_response_tokens=1, temperature=temperature)
    generator = np.random.default_rng(8)
    prompt = words(generator, 4)[0]
    sampled = fresh(policy, [prompt] * 4000, uniforms(generator, 4000, policy))
    counts = np.bincount([token for [token] in sampled.token_ids], minlength=NUM_TOKENS)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()

    def p_value(tempered: torch.Tensor) -> float:
        return float(stats.chisquare(counts, 4000 * tempered.softmax(0).numpy()).pvalue)

    assert p_value(logits / temperature) > 1e-3
    assert p_value(logits / (1.3 * temperature)) < 1e-6
    for [token], [logprob] in zip(sampled.token_ids[:20], sampled.token_logprobs[:20], strict=True):
        assert logprob == pytest.approx(float((logits / temperature).log_softmax(0)[token]), abs=TOLERANCE)


def test_whole_responses_come_with_their_probability():
    """Responses of up to two tokens: π(y) = Π_t π(y_t | y_<t), so 5,000 draws show each as often as its
    log-probability says."""
    policy = tiny.letter_policy(max_response_tokens=2, num_letters=3)
    generator = np.random.default_rng(9)
    prompt = (tiny.USER, tiny.A, tiny.B, tiny.END, tiny.ASSISTANT)
    sampled = fresh(policy, [prompt] * 5000, uniforms(generator, 5000, policy))
    probability = {
        response: math.exp(sum(logprobs))
        for response, logprobs in zip(sampled.token_ids, sampled.token_logprobs, strict=True)
    }
    for response in sorted(probability, key=probability.__getitem__)[-10:]:
        share = sampled.token_ids.count(response) / 5000
        deviation = math.sqrt(probability[response] * (1 - probability[response]) / 5000)
        assert abs(share - probability[response]) < 4 * deviation
    assert sum(probability.values()) <= 1 + 1e-5, "the drawn responses have no more probability than all have"


@pytest.mark.parametrize("extreme", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_are_possible_tokens(extreme: float):
    """The first and the last token of which the probability is not nothing, where the very first and the very last of
    the vocabulary have none."""
    policy = tiny.letter_policy(max_response_tokens=4)
    head = torch.nn.Linear(32, NUM_TOKENS)
    with torch.no_grad():
        head.weight.copy_(policy.model.lm_head.weight)
        head.bias.zero_()
        head.bias[[0, NUM_TOKENS - 1]] = -1e6
    policy.model.lm_head = head
    prompts = words(np.random.default_rng(10), 3, 8)
    sampled = fresh(policy, prompts, np.full((2, 4), extreme))
    assert {row[0] for row in sampled.token_ids} == {1 if extreme == 0.0 else NUM_TOKENS - 2}


# --- its end ------------------------------------------------------------------------------------------------


def test_a_response_ends_with_its_first_end_token_or_is_cut_at_the_cap():
    """y y .        ended: the end token is the last
    y y y          cut after three: no end token"""
    policy = tiny.letter_policy(max_response_tokens=3)
    generator = np.random.default_rng(11)
    sampled = fresh(policy, words(generator, *[4] * 60), uniforms(generator, 60, policy))
    lengths = {len(row) for row in sampled.token_ids}
    assert max(lengths) == 3
    assert min(lengths) < 3
    for row, logprobs in zip(sampled.token_ids, sampled.token_logprobs, strict=True):
        assert len(row) == len(logprobs)
        assert tiny.END not in row[:-1]
        assert row[-1] == tiny.END or len(row) == 3
    assert any(row[-1] != tiny.END for row in sampled.token_ids)


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_may_fill_the_context(model: Callable[..., PreTrainedModel]):
    """The longest prompt that the renderer lets through, and a response up to the cap: with absolute positions there
    is no place for a token more. A short row beside it has nothing left to say but is still in the batch."""
    tokenizer = tiny.letter_tokenizer()
    policy = Policy(
        model(len(tokenizer), context_tokens=32),
        tokenizer,
        tiny.policy_config(context_tokens=32, max_response_tokens=8),
    )
    generator = np.random.default_rng(12)
    chats = [[{"role": "user", "content": "abc" * 40}], [{"role": "user", "content": "a"}]]
    prompts = [policy.renderer.prompt(chat).token_ids for chat in chats]
    assert len(prompts[0]) == policy.renderer.prompt_budget
    cache = policy.conversation_cache()
    for _ in range(2):
        sampled = cache.sample(prompts, uniforms(generator, 2, policy))
        assert_as_from_scratch(policy, prompts, sampled)
        prompts = [prompts[0][:3] + prompts[0][4:] + (tiny.A,), prompts[1]]


def test_another_number_of_rows_is_another_batch():
    """A cache that is handed other conversations than it knows starts anew instead of mixing them up."""
    policy = tiny.letter_policy()
    generator = np.random.default_rng(13)
    cache: ConversationCache = policy.conversation_cache()
    cache.sample(words(generator, 3, 4), uniforms(generator, 2, policy))
    prompts = words(generator, 5, 2, 8)
    assert_as_from_scratch(policy, prompts, cache.sample(prompts, uniforms(generator, 3, policy)))


@pytest.mark.parametrize("model", MODELS)
def test_responses_that_are_sampled_together_fit_into_memory(
    model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
):
    """Keys and values of 40 tokens, 8 a row for the response: 3 rows with prompts of 5, 2 of 9 (or one of 5 and one of
    9), 1 of 20, and 1 of 40 although it is too long."""
    policy = tiny.letter_policy(model)
    generator = np.random.default_rng(0)
    lengths = [5, 12, 5, 40, 5, 9, 5, 20]
    prompts = tiny.random_rows(generator, lengths, low=5, high=12)
    prompts += [prompts[-1]] * 2  # three responses to the one of 20
    uniforms_BT = generator.random((len(prompts), policy.config.max_response_tokens))
    expected = policy.sample(prompts, uniforms_BT)
    sampled_together: list[int] = []
    sample = ConversationCache.sample

    def spy(cache: ConversationCache, chunk: Sequence[TokenIds], uniforms: np.ndarray) -> SampledResponses:
        sampled_together.append(len(chunk))
        sampled = sample(cache, chunk, uniforms)
        [layer, *_] = cache._cache.layers
        bytes_of_slot = layer.keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes
        assert bytes_of_slot * len(cache._cache.layers) == len(chunk) * cache_bytes_per_token(policy.model)
        return sampled

    monkeypatch.setattr(ConversationCache, "sample", spy)
    monkeypatch.setattr(sampling_chunks, "_CACHE_BYTES", 40 * cache_bytes_per_token(policy.model))
    assert policy.sample(prompts, uniforms_BT).token_ids == expected.token_ids
    assert sampled_together == [3, 2, 1, 1, 1, 1, 1]
