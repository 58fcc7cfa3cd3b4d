"""Rows that share a prefix in one pass: exactly what each row gives alone."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from iterative_ppo import policy as policy_module
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.shared_prefix import families, takes_trees, tree_batches

MODELS = [tiny.llama, tiny.grouped_query_llama, tiny.gpt2]
TOLERANCE = 1e-5


def conversation_rows(
    seed: int, *, num_conversations: int = 3, num_samples: int = 2
) -> list[tuple[TokenIds, TokenIds]]:
    """Prompts that grow turn by turn, `num_samples` responses to each, in a random order."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_conversations):
        prompt: TokenIds = ()
        for said in tiny.random_rows(generator, [2, 1, 4], low=tiny.A, high=tiny.G + 1):
            prompt += (tiny.USER, *said, tiny.END, tiny.ASSISTANT)
            lengths = generator.integers(1, 5, num_samples).tolist()
            responses = [(*r, tiny.END) for r in tiny.random_rows(generator, lengths, low=tiny.A, high=tiny.G + 1)]
            rows += [(prompt, response) for response in responses]
            prompt += responses[0]
    return [rows[i] for i in generator.permutation(len(rows))]


def unzip(rows: list[tuple[TokenIds, TokenIds]]) -> tuple[list[TokenIds], list[TokenIds]]:
    return [prompt for prompt, _ in rows], [response for _, response in rows]


# --- what a tree is -----------------------------------------------------------------------------------------


def test_a_family_is_a_chain_of_prefixes():
    a, ab, abc, ad, e = (1,), (1, 2), (1, 2, 3), (1, 4), (5,)
    prompts = [abc, e, ad, a, ab, abc]
    assert families(prompts) == [[3, 4, 0, 5], [2], [1]], "each row once, from the shortest prompt to the longest"


def test_a_family_holds_so_many_copies_of_a_prompt():
    a, ab, ac = (1,), (1, 2), (1, 3)
    prompts = [ab, a, a, ab, a, ac]
    assert families(prompts) == [[1, 2, 4, 0, 3], [5]]
    assert families(prompts, max_copies=1) == [[1], [2], [4, 0], [3], [5]]
    assert families(prompts, max_copies=2) == [[1, 2], [4, 0, 3], [5]]


def test_a_tree_drawn_as_rows():
    """
    prompts    5 6 | 5 6 7 8       tokens     5 6 7 8 | 9 2 | 3 2
    responses  9 2 | 3 2           positions  0 1 2 3 | 2 3 | 4 5
    """
    [(rows, batch)] = tree_batches([(5, 6, 7, 8), (5, 6)], [(3, 2), (9, 2)], tokens_per_batch=100)
    assert rows == [1, 0]
    assert batch.token_BT.tolist() == [[5, 6, 7, 8, 9, 2, 3, 2]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5]]
    sees = """
    1.......
    11......
    111.....
    1111....
    11..1...
    11..11..
    1111..1.
    1111..11
    """
    assert ["".join(".1"[x] for x in row) for row in batch.attention_BTT[0].int().tolist()] == sees.split()
    assert batch.before_RL.tolist() == [[1, 4], [3, 6]], "a response's first token is predicted at its own prompt's end"
    assert batch.end_R.tolist() == [5, 7]
    assert batch.response_RL.tolist() == [[9, 2], [3, 2]]


def test_the_last_tokens_of_responses_can_be_left_out():
    """The same tree without them; each response token is still predicted at the one before."""
    [(_, batch)] = tree_batches([(5, 6, 7, 8), (5, 6)], [(3, 2), (9, 2)], tokens_per_batch=100, ends=False)
    assert batch.token_BT.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 2, 4]]
    assert batch.before_RL.tolist() == [[1, 4], [3, 5]]
    assert batch.response_RL.tolist() == [[9, 2], [3, 2]]
    with pytest.raises(AssertionError, match="left out"):
        batch.end(batch.token_BT)


def test_rows_without_a_shared_prefix_need_no_mask_of_their_own():
    [(_, batch)] = tree_batches([(5, 6), (7,)], [(9, 2), (3,)], tokens_per_batch=100)
    assert batch.attention_BTT is None
    shared = tree_batches([(5, 6), (5, 6)], [(9, 2), (3,)], tokens_per_batch=100, share=False)
    assert [batch.token_BT.shape for _, batch in shared] == [(2, 4)]


def test_an_empty_response_is_read_at_the_prompts_end():
    [(_, batch)] = tree_batches([(5, 6), (5,)], [(), ()], tokens_per_batch=100)
    assert batch.end(batch.token_BT).tolist() == [5, 6]
    assert batch.mask_RL.sum() == 0


def test_gradients_at_a_shared_prompt_are_added_up_in_the_same_order_each_time():
    """120 responses to one prompt: their gradients meet at the prompt's last token. Threads that add to one place as they
    come give other last digits each time."""
    generator = torch.Generator().manual_seed(0)
    [(_, batch)] = tree_batches([(1, 2)] * 120, [(3, 4)] * 120, tokens_per_batch=1000)
    x_BTD = torch.randn(*batch.token_BT.shape, 256, generator=generator, requires_grad=True)
    weight_RLD = torch.randn(*batch.before_RL.shape, 256, generator=generator)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad((batch.before(x_BTD) * weight_RLD).sum(), x_BTD)[0] for _ in range(50)]
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


token = st.integers(0, 2)
row = st.tuples(st.lists(token, min_size=1, max_size=6), st.lists(token, max_size=4))


@given(
    rows=st.lists(row, min_size=1, max_size=12),
    tokens_per_batch=st.integers(1, 60),
    share=st.booleans(),
    ends=st.booleans(),
)
def test_every_row_is_read_once_and_sees_its_own_prefix_alone(
    rows: list[tuple[list[int], list[int]]], tokens_per_batch: int, share: bool, ends: bool
):
    """Following the mask from each token that is read gives the row's own tokens up to there, in order of their positions."""
    prompts, responses = [tuple(p) for p, _ in rows], [tuple(r) for _, r in rows]
    seen: list[int] = []
    for places, batch in tree_batches(prompts, responses, tokens_per_batch=tokens_per_batch, share=share, ends=ends):
        seen += places
        assert (batch.end_R is not None) == ends
        width = batch.token_BT.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        attention = causal.expand(len(batch.token_BT), -1, -1) if batch.attention_BTT is None else batch.attention_BTT
        for r, place in enumerate(places):
            own, tree = prompts[place] + responses[place], int(batch.tree_R[r])
            read = batch.before_RL[r, : len(responses[place])].tolist()
            if batch.end_R is not None:
                read.append(int(batch.end_R[r]))
            for num_seen, column in enumerate(read, start=len(prompts[place])):
                visible = attention[tree, column].nonzero().squeeze(1)
                by_position = visible[batch.position_BT[tree, visible].argsort()]
                assert tuple(batch.token_BT[tree, by_position].tolist()) == own[:num_seen]
                assert batch.position_BT[tree, by_position].tolist() == list(range(num_seen))
            assert batch.mask_RL[r].sum() == len(responses[place])
    assert sorted(seen) == list(range(len(rows)))


# --- what models make of it ---------------------------------------------------------------------------------


def logprobs_and_gradient(
    policy: Policy, rows: list[tuple[TokenIds, TokenIds]], tokens_per_batch: int
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """log π of every response token, and the gradient of a weighted sum of them."""
    prompts, responses = unzip(rows)
    policy.model.zero_grad()
    logprobs: list[list[float]] = [[] for _ in rows]
    for batch in policy.response_logits(prompts, responses, tokens_per_batch=tokens_per_batch):
        logprob_BT = batch.logprobs()
        weight_B = torch.tensor([1.0 + place for place in batch.rows])
        (logprob_BT.sum(1) * weight_B).sum().backward()
        for place, values in zip(batch.rows, logprob_BT.tolist(), strict=True):
            logprobs[place] = values[: len(responses[place])]
    return logprobs, {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tree_gives_what_its_rows_give_alone(
    model: Callable[..., PreTrainedModel], attention: str, monkeypatch: pytest.MonkeyPatch
):
    policy = tiny.letter_policy(model)
    policy.model.set_attn_implementation(attention)
    rows = conversation_rows(1)
    assert takes_trees(policy.model)
    shared, shared_gradient = logprobs_and_gradient(policy, rows, 4096)
    cut, cut_gradient = logprobs_and_gradient(policy, rows, 40)
    monkeypatch.setattr(policy_module, "takes_trees", lambda _: False)
    alone, gradient = logprobs_and_gradient(policy, rows, 4096)
    for logprobs in (shared, cut):
        for a, b in zip(logprobs, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    scale = max(float(g.abs().max()) for g in gradient.values())
    assert tiny.largest_difference(shared_gradient, gradient) < TOLERANCE * scale
    assert tiny.largest_difference(cut_gradient, gradient) < TOLERANCE * scale


def test_a_tree_read_without_its_mask_is_wrong():
    """The wrong version: branches that see each other."""
    policy = tiny.letter_policy()
    prompts, responses = unzip(conversation_rows(2, num_conversations=1))
    [(_, batch)] = tree_batches(prompts, responses, tokens_per_batch=4096)
    plain = policy.model(input_ids=batch.token_BT, position_ids=batch.position_BT).logits
    [right] = policy.response_logits(prompts, responses, tokens_per_batch=4096)
    assert float((batch.before(plain)[batch.mask_RL] - right.logits_NV).abs().max()) > 0.1


def sliding_window_model(vocab_size: int, *, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(
        MistralConfig(vocab_size=vocab_size, **sizes, num_key_value_heads=2, sliding_window=4, initializer_range=0.2)
    )


def test_a_model_with_a_sliding_window_reads_its_rows_apart():
    """Its window is measured in places of the sequence, among which another branch would lie."""
    policy = tiny.letter_policy(sliding_window_model)
    assert not takes_trees(policy.model)
    prompts, responses = unzip(conversation_rows(3))
    logprobs = policy.logprobs(prompts, responses, tokens_per_batch=200)
    for prompt, response, actual in zip(prompts, responses, logprobs, strict=True):
        [expected] = policy.logprobs([prompt], [response], tokens_per_batch=200)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_sampling_encodes_a_shared_prompt_once_and_draws_the_same(model: Callable[..., PreTrainedModel]):
    policy = tiny.letter_policy(model)
    prompts, _ = unzip(conversation_rows(4))
    uniforms_BT = np.random.default_rng(0).random((len(prompts), policy.config.max_response_tokens))
    together = policy.sample(prompts, uniforms_BT)
    alone = [policy.sample([p], uniforms_BT[i : i + 1]) for i, p in enumerate(prompts)]
    assert list(together.token_ids) == list(itertools.chain.from_iterable(s.token_ids for s in alone))
    for a, b in zip(together.token_logprobs, (x for s in alone for x in s.token_logprobs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
