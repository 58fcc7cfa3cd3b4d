"""Q as a read-out of frozen weights: what is read, how the heads are fitted, and that one pass is enough for everything."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from logs import assistant, record, user, write_lines
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from test_adapters import base as base  # a model that is trained through adapters
from test_adapters import improved, load, small_models_have_adapters
from test_q_function import CARD, Logs, all_turns_of, by_response, by_state_alone, make_logs
from test_shared_prefix import conversation_rows, unzip
from tiny import ASSISTANT, END, USER, A, B, C

from iterative_ppo import config as config_module
from iterative_ppo import conversation_features, q_from_logs
from iterative_ppo import policy as policy_module
from iterative_ppo.batching import pad_right
from iterative_ppo.commands import exchange, loop, single_stages
from iterative_ppo.config import Config, ConfigError, QFunctionConfig
from iterative_ppo.conversation_features import ResponseMarks
from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.cross_validation import cross_validate
from iterative_ppo.export import export_step
from iterative_ppo.frozen_features import FeatureCache
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.loading import load_q_and_renderer
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import Predictions, bootstrap_weights, predict, predict_after_share
from iterative_ppo.q_from_logs import fit_q_from_logs
from iterative_ppo.q_function import Link, QFunction, TokenIds, TokenValue, load_card
from iterative_ppo.q_scoring import QScorer
from iterative_ppo.read_out import ReadOutHistory, fit_read_out, read_positions, refit_read_out
from iterative_ppo.shared_prefix import run_trees, tree_batches

__all__ = ["small_models_have_adapters"]

TOKENS = 1024
TOLERANCE = 1e-5
QUIET: dict[str, Any] = {"console": Console(quiet=True), "progress": lambda *_: None}


def unfitted(policy: Policy, *, depth: float = 1.0, link: Link = "logistic", num_heads: int = 1) -> QFunction:
    return QFunction.on_base(policy.model, depth=depth, link=link, num_heads=num_heads, marks=tiny.MARKS)


def on_base(folder: Path, *, depth: float = 1.0, link: Link = "logistic", num_heads: int = 1) -> QFunction:
    """With random heads and words of random worth, as after a fit."""
    q_function = unfitted(load(folder), depth=depth, link=link, num_heads=num_heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        q_function.heads.normal_(std=0.3, generator=generator)
        words = torch.tensor([tiny.A, tiny.C, tiny.F])
        q_function.set_words(words, 30 * torch.randn(len(words), num_heads, generator=generator))
    return q_function


def fit(
    q_function: QFunction,
    logs: Logs,
    *,
    num_train: int,
    features: FeatureCache | None = None,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None = None,
    **settings: object,
) -> ReadOutHistory:
    return fit_read_out(
        q_function,
        logs.sequences,
        held_out=[row >= num_train for row in range(len(logs.sequences))],
        config=QFunctionConfig(**({"link": q_function.link} | settings)),
        features=features or FeatureCache(),
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(0),
        retarget=retarget,
    )


# --- what is read -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_features_are_the_state_and_means_of_what_it_sees_times_their_reliability(base: Path):
    """ρ = √(n / (n + 400)) of the n tokens seen, ρ' likewise of those that are not of a response, then ρ, ρ' and 1.

    <user> a b <end> <assistant> c <end> <user> d      a row, and another that is padded
      x    x x   x        x      .   .     x    x      others'
    """
    q_function = on_base(base)
    talk = (tiny.USER, tiny.A, tiny.B, tiny.END, tiny.ASSISTANT, tiny.C, tiny.END, tiny.USER, tiny.D)
    is_others = (True, True, True, True, True, False, False, True, True)
    rows = [talk, talk[:3]]
    token_BT, _ = pad_right(rows)
    hidden_BTD, feature_BTF = q_function.hidden(token_BT), q_function.features(token_BT)
    for b, row in enumerate(rows):
        for t in range(len(row)):
            own = [s for s in range(t + 1) if is_others[s]]
            mean_D = sum(hidden_BTD[b, s] for s in range(t + 1)) / (t + 1)
            weights = [2 ** ((s - t) / 64) for s in range(t + 1)]
            recent_D = sum(w * hidden_BTD[b, s] for s, w in enumerate(weights)) / sum(weights)
            others_D = sum(hidden_BTD[b, s] for s in own) / len(own)
            rho, rho_others = (torch.tensor([(n / (n + 400)) ** 0.5]) for n in (t + 1, len(own)))
            parts = [
                hidden_BTD[b, t],
                rho * mean_D,
                rho * recent_D,
                rho_others * others_D,
                rho,
                rho_others,
                torch.ones(1),
            ]
            np.testing.assert_allclose(feature_BTF[b, t], torch.cat(parts), rtol=0, atol=TOLERANCE)
            alone_F = q_function.features(torch.tensor([row[: t + 1]]))[0, -1]
            np.testing.assert_allclose(feature_BTF[b, t], alone_F, rtol=0, atol=TOLERANCE)
    width = hidden_BTD.shape[2]
    over_padding_D = hidden_BTD[1].mean(0)
    assert (feature_BTF[1, 2, width : 2 * width] / (3 / 403) ** 0.5 - over_padding_D).abs().max() > 0.01


@torch.no_grad()
def test_words_are_worth_their_share_of_what_others_said_times_its_reliability(base: Path):
    """
    <user> a b a <end> <assistant> a <end>     two of five tokens of others are an "a"; that of the response is not counted
    """
    q_function = unfitted(load(base), num_heads=2)
    row = (tiny.USER, tiny.A, tiny.B, tiny.A, tiny.END, tiny.ASSISTANT, tiny.A, tiny.END)
    assert q_function(torch.tensor([row])).abs().max() == 0, "nothing is known yet"
    q_function.set_words(torch.tensor([tiny.A, tiny.C]), torch.tensor([[3.0, -1.0], [7.0, 7.0]]))
    scalar_TM = q_function(torch.tensor([row]))[0]
    np.testing.assert_allclose(scalar_TM[2], torch.tensor([3.0, -1.0]) * (1 / 3) * (3 / 403) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(scalar_TM[-1], torch.tensor([3.0, -1.0]) * (2 / 6) * (6 / 406) ** 0.5, rtol=1e-5)
    shares_PW = conversation_features.word_shares(row, [2, 7], (tiny.C, tiny.A), tiny.MARKS)
    np.testing.assert_allclose(shares_PW, [[0, 1 / 3], [0, 2 / 6]], rtol=1e-6)


@torch.no_grad()
def test_half_a_trunk_is_its_first_layers_and_its_last_norm(base: Path):
    policy = load(base)
    token_BT = torch.tensor([[tiny.USER, tiny.C, tiny.D, tiny.E, tiny.A, tiny.END]])
    states = policy.model.base_model(token_BT, output_hidden_states=True).hidden_states
    q_function = unfitted(policy, depth=0.5, link="logistic", num_heads=1)
    assert (q_function.num_layers, policy.model.config.num_hidden_layers, len(states)) == (1, 2, 3)
    last_norm = policy.model.base_model.get_submodule("norm" if policy.model.config.model_type == "llama" else "ln_f")
    first_BTD = last_norm(states[1])
    np.testing.assert_allclose(q_function.hidden(token_BT), first_BTD, rtol=0, atol=TOLERANCE)
    assert (states[2] - first_BTD).abs().max() > 0.01, "the second layer does something"
    again = policy.model.base_model(token_BT).last_hidden_state
    np.testing.assert_array_equal(again, states[2], "the policy keeps all of its layers")
    shallow = unfitted(policy, depth=0.0, link="logistic", num_heads=1)
    assert shallow.num_layers == 1


def test_features_of_another_depth_are_not_mixed_in(base: Path):
    features, rows = FeatureCache(), [(tiny.USER, tiny.A, tiny.END)]
    features.of(on_base(base, depth=0.5), rows, [[2]], tokens_per_batch=TOKENS)
    with pytest.raises(AssertionError, match=r"1 layers of .*, and not of 2 layers"):
        features.of(on_base(base, depth=1.0), rows, [[2]], tokens_per_batch=TOKENS)


def test_means_over_a_long_row_are_exact():
    hidden_BTD = 100 + torch.randn(1, 20_000, 2, generator=torch.Generator().manual_seed(0))
    others_BT = torch.arange(20_000)[None] % 3 > 0
    feature_F = conversation_features.features(hidden_BTD, others_BT)[0, -1]
    num_others = int(others_BT.sum())
    means_F = feature_F[2:8] / torch.tensor([20_000 / 20_400] * 4 + [num_others / (num_others + 400)] * 2).sqrt()
    np.testing.assert_allclose(means_F[:2], hidden_BTD[0].double().mean(0), rtol=3e-7)
    weight_T1 = 2.0 ** (torch.arange(-19_999, 1, dtype=torch.float64) / 64)[:, None]
    recent_D = (weight_T1 * hidden_BTD[0]).sum(0) / weight_T1.sum()
    np.testing.assert_allclose(means_F[2:4], recent_D, rtol=1e-6)
    np.testing.assert_allclose(means_F[4:], hidden_BTD[0, others_BT[0]].double().mean(0), rtol=3e-7)
    assert (means_F[2:4] - means_F[:2]).abs().min() > 1e-3
    assert (means_F[4:] - means_F[:2]).abs().max() > 1e-3


def test_a_token_sixty_four_tokens_ago_counts_half_as_much():
    hidden_BTD = torch.zeros(1, 600, 2)
    hidden_BTD[0, 500 - 64, 0] = hidden_BTD[0, 500, 1] = 1.0
    recent_D = conversation_features.features(hidden_BTD, torch.ones(1, 600, dtype=torch.bool))[0, 500, 4:6]
    assert float(recent_D[0] / recent_D[1]) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((USER, A, END, ASSISTANT, B, C, END, USER, A), "xxxx...xx"),
        ((A, END, USER, B, END, ASSISTANT), "xxxxxx"),  # cut in front: whose the first word is cannot be known
        ((USER, A, END, ASSISTANT, END, USER, B), "xxxx.xx"),  # the empty response
        ((ASSISTANT, A, B), "x.."),  # cut at the cap
        ((USER, A, END, ASSISTANT, B, END, A), "xxxx..x"),
        ((A,), "x"),
    ],
)
def test_whose_a_token_is_stands_between_the_marks(row: TokenIds, expected: str):
    assert "".join("x" if own else "." for own in tiny.MARKS.others(torch.tensor([row]))[0]) == expected
    longer = ResponseMarks(opening=(END, ASSISTANT), end_id=END)
    if ASSISTANT in row[1:]:
        assert torch.equal(longer.others(torch.tensor([row])), tiny.MARKS.others(torch.tensor([row])))
    assert ResponseMarks(opening=(), end_id=END).others(torch.tensor([row])).all(), (
        "no marks: nobody's words are told apart"
    )


@torch.no_grad()
def test_trees_are_read_as_rows(base: Path):
    """Three turns and three responses to each, in trees: a branch's means are over its own prompt and itself. Over all
    columns before it, those of the other branches included, it would be another."""
    q_function = on_base(base, num_heads=2)
    prompts, responses = unzip(conversation_rows(0, num_samples=3))
    together = q_function.ensemble_scalars(prompts, responses, tokens_per_batch=TOKENS)
    alone = torch.stack(
        [
            q_function(torch.tensor([prompt + response]))[0, -1]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)
    [(rows, batch)] = tree_batches(prompts, responses, tokens_per_batch=10_000)
    assert batch.attention_BTT is not None
    own = q_function.scalars_of_trees(batch, batch.at_ends())
    np.testing.assert_allclose(batch.end(own), alone[rows], rtol=0, atol=TOLERANCE)
    hidden_BTD = run_trees(
        functools.partial(q_function._last_hidden, None), batch, device=q_function.device, dtype=torch.float32
    )
    others_BT = tiny.MARKS.others(batch.token_BT)
    words_BTM = conversation_features.word_scalars(q_function.word_values[batch.token_BT], others_BT)
    wrong = conversation_features.features(hidden_BTD, others_BT) @ q_function.heads.T + words_BTM
    assert (batch.end(wrong) - alone[rows]).abs().max() > 0.01


def test_the_token_value_ends_in_q(base: Path):
    q_function = on_base(base, num_heads=3)
    prompts, responses = all_turns_of(make_logs(3, by_response, seed=2).sequences)
    q_value = q_function.values(prompts, responses, tokens_per_batch=TOKENS)
    read = q_function.read(prompts, [[len(prompt) - 1] for prompt in prompts], tokens_per_batch=TOKENS)
    state_value = q_function.to_value(torch.tensor(read)[:, 0])
    with torch.no_grad():
        [(rows, batch)] = tree_batches(prompts, responses, tokens_per_batch=TOKENS)
        value_BT = TokenValue(q_function)(batch)
    np.testing.assert_allclose(batch.end(value_BT), q_value[rows], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(batch.before(value_BT)[:, 0], state_value[rows], rtol=0, atol=TOLERANCE)


def sequence_of(spans: Sequence[tuple[int, int]], num_tokens: int) -> LabelledSequence:
    return LabelledSequence(
        token_ids=tuple(range(num_tokens)),
        spans=tuple(spans),
        turns=tuple(range(len(spans))),
        returns=tuple(float(i) for i in range(len(spans))),
        conversation=0,
        group="c",
        messages_seen=tuple(range(len(spans))),
        num_messages=len(spans),
    )


def test_a_state_the_middle_of_a_response_and_its_end_are_read():
    """
    a response of ten tokens, one of one, and the conversation's end    . . [2 ... 11] . [13] . |
    """
    sequence = sequence_of([(2, 12), (13, 14), (15, 15)], 15)
    assert read_positions(sequence) == [1, 6, 11, 12, 13, 14]
    short = sequence_of([(1, 3), (5, 9)], 9)
    assert read_positions(short) == [0, 1, 2, 4, 6, 8]


# --- the heads ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The regression's rows, made anew from the definition: hidden states, means and shares of words, standardised, then times
    the reliability of those that have one, in units of its root mean square."""

    places: list[list[int]]
    standardised_NF: np.ndarray
    group_N: list[str]
    return_N: np.ndarray
    is_end_N: np.ndarray


@torch.no_grad()
def design(q_function: QFunction, sequences: Sequence[LabelledSequence]) -> Design:
    said_in: dict[int, set[str]] = {}
    for sequence in sequences:
        for token, is_others in zip(sequence.token_ids, others_of(sequence), strict=True):
            if is_others:
                said_in.setdefault(token, set()).add(sequence.group)
    words = [token for token, groups in said_in.items() if 5 <= len(groups) <= 0.9 * len(sequences)]
    assert set(words) == set(range(tiny.A, tiny.G + 1)), "none of the template's"
    states, means, others, word_shares, rho, rho_others = [], [], [], [], [], []
    places, groups, returns, ends = [], [], [], []
    for sequence in sequences:
        hidden_TD = q_function.hidden(torch.tensor([sequence.token_ids]))[0].double().numpy()
        is_others_T = others_of(sequence)
        places.append([])
        for (start, end), value in zip(sequence.spans, sequence.returns, strict=True):
            for t in (start - 1, round((start - 1 + end - 1) / 2), end - 1):
                own_T = np.flatnonzero(is_others_T[: t + 1])
                age_T = np.arange(t, -1, -1)
                states.append(hidden_TD[t])
                recent_D = np.average(hidden_TD[: t + 1], axis=0, weights=0.5 ** (age_T / 64))
                means.append(np.concatenate([hidden_TD[: t + 1].mean(0), recent_D]))
                others.append(hidden_TD[own_T].mean(0))
                said = [sequence.token_ids[s] for s in own_T]
                word_shares.append([said.count(word) / len(said) for word in words])
                rho.append(np.sqrt((t + 1) / (t + 401)))
                rho_others.append(np.sqrt(len(own_T) / (len(own_T) + 400)))
                places[-1].append(t)
                groups.append(sequence.group)
                returns.append(value)
                ends.append(t == end - 1)

    def standardised(x: list[Any], unit_of: Callable[[np.ndarray], np.ndarray], rho: np.ndarray) -> np.ndarray:
        x_NF = np.array(x)
        return np.asarray((x_NF - x_NF.mean(0)) / unit_of(x_NF.std(0)) * (rho / np.sqrt((rho**2).mean()))[:, None])

    width = len(states[0])
    rho_N, rho_others_N = np.array(rho), np.array(rho_others)
    return Design(
        places=places,
        standardised_NF=np.concatenate(
            [
                standardised(states, lambda deviation_F: deviation_F, np.ones(len(states))),
                standardised(means, lambda deviation_F: deviation_F, rho_N),
                standardised(others, lambda deviation_F: deviation_F, rho_others_N),
                standardised(word_shares, lambda s_W: np.sqrt(s_W * s_W.mean() * len(s_W) / width), rho_others_N),
            ],
            axis=1,
        ),
        group_N=groups,
        return_N=np.array(returns),
        is_end_N=np.array(ends),
    )


def others_of(sequence: LabelledSequence) -> np.ndarray:
    """Which tokens are not of a response, from where the responses are known to be."""
    is_others_T = np.ones(len(sequence.token_ids), dtype=bool)
    for start, end in sequence.spans:
        is_others_T[start:end] = False
    return is_others_T


def scalars_at(q_function: QFunction, d: Design, sequences: Sequence[LabelledSequence]) -> np.ndarray:
    """[N, M] of a Q-function at a design's rows."""
    rows = [sequence.token_ids for sequence in sequences]
    return torch.cat(q_function.read_members(rows, d.places, tokens_per_batch=TOKENS)).double().numpy()


def test_the_penalty_is_the_one_of_the_lowest_loss_on_conversations_left_out(base: Path):
    """Five folds of the training conversations; each ridge regression sees the other four, and is judged at responses' ends."""
    logs = make_logs(150, by_response, seed=1)
    history = fit(on_base(base, link="identity"), logs, num_train=120, loss="squared_error")
    d = design(on_base(base, link="identity"), logs.sequences[:120])
    unit = np.std([x for s in logs.sequences for x in s.returns])
    generator = np.random.default_rng(0)
    bootstrap_weights(logs.sequences, num_heads=1, generator=generator)
    groups = sorted({s.group for s in logs.sequences[:120]})
    fold_of = dict(zip(groups, generator.permutation(120) % 5, strict=True))
    fold_N = np.array([fold_of[group] for group in d.group_N])
    design_NG = np.c_[d.standardised_NF, np.ones(len(d.return_N))]
    tried = history.penalty_losses
    assert list(tried)[:3] == ["inf", "100", "31.6228"]
    for penalty, loss in tried.items():
        errors: list[np.ndarray] = []
        for fold in range(5):
            train, test = fold_N != fold, (fold_N == fold) & d.is_end_N
            ridge = 1e12 if penalty == "inf" else float(penalty) / 2
            gram_GG = design_NG[train].T @ design_NG[train] / train.sum()
            gram_GG += ridge * np.diag([1.0] * d.standardised_NF.shape[1] + [0.0])
            solution_G = np.linalg.solve(gram_GG, design_NG[train].T @ d.return_N[train] / unit / train.sum())
            errors.append(np.square(design_NG[test] @ solution_G - d.return_N[test] / unit))
        assert loss == pytest.approx(np.concatenate(errors).mean(), rel=1e-3)
    assert history.penalty == pytest.approx(float(min(tried, key=tried.__getitem__)), rel=1e-5)
    assert 100 > history.penalty > 1e-4, "neither end of the grid"
    assert history.best_pass == 1


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_penalties_are_told_apart_by_the_loss_and_link_of_the_fit(base: Path, loss: str):
    """One Newton step in place of a minimum sees what is to be learnt, and in the strongest penalty the constant."""
    logs = make_logs(300, by_state_alone, seed=0)
    history = fit(on_base(base), logs, num_train=299, loss=loss)
    tried = {float(penalty): found for penalty, found in history.penalty_losses.items()}
    assert min(tried.values()) < 0.98 * tried[np.inf]
    assert tried[100.0] == pytest.approx(tried[np.inf], rel=0.02)


def test_squared_errors_heads_are_ridge_regressions_on_bootstraps_around_that_on_all(base: Path):
    """(Xᵀ W X / ΣW + λ/2) w = Xᵀ W (y − b) / ΣW, W how often a bootstrap drew the conversation, with the constant's normal equation beside it, y in standard deviations: on
    the training conversations, and after the refit on all."""
    logs = make_logs(150, by_state_alone, seed=1)
    logs = Logs(
        sequences=[dataclasses.replace(s, returns=tuple(10 + 3 * x for x in s.returns)) for s in logs.sequences],
        chance=logs.chance,
    )
    q_function = unfitted(load(base), link="identity", num_heads=3)
    history = fit(q_function, logs, num_train=120, loss="squared_error")
    assert history.best_pass == 1, "the heads are the constant"
    unit = np.std([x for s in logs.sequences for x in s.returns])
    weight_of = bootstrap_weights(logs.sequences, num_heads=3, generator=np.random.default_rng(0))

    def check(sequences: Sequence[LabelledSequence]) -> None:
        d = design(q_function, sequences)
        bootstrap_NM = np.stack([weight_of[group].double().numpy() for group in d.group_N])
        assert set(np.unique(bootstrap_NM)) >= {0, 1, 2}
        design_NG = np.c_[d.standardised_NF, np.ones(len(d.return_N))]
        scalar_NM = scalars_at(q_function, d, sequences)

        def ridge(drawn_N: np.ndarray) -> np.ndarray:
            weight_N = drawn_N / drawn_N.sum()
            ridge_GG = history.penalty / 2 * np.diag([1.0] * d.standardised_NF.shape[1] + [0.0])
            moments_G = design_NG.T @ (weight_N * d.return_N / unit)
            return np.asarray(
                unit * design_NG @ np.linalg.solve(design_NG.T * weight_N @ design_NG + ridge_GG, moments_G)
            )

        whole_N = ridge(np.ones(len(d.return_N)))
        bootstrap_NM = np.stack([ridge(drawn_N) for drawn_N in bootstrap_NM.T], axis=1)
        expected_NM = whole_N[:, None] + bootstrap_NM - bootstrap_NM.mean(1, keepdims=True)
        np.testing.assert_allclose(scalar_NM, expected_NM, rtol=0, atol=2e-3 * unit)
        assert np.abs(scalar_NM.mean(1) - bootstrap_NM.mean(1)).max() > 0.02 * unit, "Q is not the bootstraps' mean"
        assert np.abs(scalar_NM[:, 0] - scalar_NM[:, 1]).max() > 0.1 * unit, "members differ"

    check(logs.sequences[:120])
    refit_read_out(
        q_function,
        logs.sequences,
        [sequence.returns for sequence in logs.sequences],
        penalty=history.penalty,
        config=QFunctionConfig(link="identity", loss="squared_error"),
        features=FeatureCache(),
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(0),
    )
    check(logs.sequences)


def test_cross_entropys_heads_are_those_of_logistic_regression(base: Path):
    """scikit-learn minimises |w|²/2 + C Σ loss: ours with C = 1 / (penalty · N)."""
    logs = make_logs(300, by_state_alone, seed=0)
    q_function = unfitted(load(base), link="logistic", num_heads=1)
    history = fit(q_function, logs, num_train=200)
    assert history.best_pass == 1
    d = design(q_function, logs.sequences[:200])
    other = LogisticRegression(C=1 / (history.penalty * len(d.return_N)), tol=1e-8, max_iter=10_000)
    other.fit(d.standardised_NF, d.return_N)
    scalar_N = scalars_at(q_function, d, logs.sequences[:200])[:, 0]
    np.testing.assert_allclose(scalar_N, other.decision_function(d.standardised_NF), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("loss", "link"),
    [
        ("binary_cross_entropy", "logistic"),
        ("squared_error", "logistic"),
        ("squared_error", "identity"),
        ("hl_gauss", "identity"),
    ],
)
def test_every_loss_learns_from_frozen_weights_which_stay_as_they_are(base: Path, loss: str, link: Link):
    policy = improved(load(base))
    before = tiny.weights(policy.model)
    logs = make_logs(300, by_state_alone, seed=0)
    q_function = unfitted(policy, link=link, num_heads=5)
    assert [name for name, p in q_function.named_parameters() if p.requires_grad] == ["heads"]
    trunk = tiny.weights(q_function.model)
    history = fit(q_function, logs, num_train=200, loss=loss)
    assert tiny.largest_difference(tiny.weights(policy.model), before) == 0
    assert tiny.largest_difference(tiny.weights(q_function.model), trunk) == 0
    assert history.best_pass == 1
    assert history.held_out_losses[1] < history.held_out_losses[0]
    predictions = predict(q_function, logs.sequences[200:], tokens_per_batch=TOKENS)
    error = np.square(predictions.q_value - logs.chance[400:]).mean()
    assert error < 0.93 * logs.chance[400:].var()


@pytest.mark.parametrize("num_heads", [1, 5])
def test_the_held_out_loss_is_that_of_the_ensembles_q_at_the_responses_ends(base: Path, num_heads: int):
    """As the report computes it; they begin with that of the training mean."""
    logs = make_logs(200, by_state_alone, seed=3)
    q_function = unfitted(load(base), link="logistic", num_heads=num_heads)
    history = fit(q_function, logs, num_train=140)
    assert history.best_pass == 1, "the heads are the constant"
    predictions = predict(q_function, logs.sequences[140:], tokens_per_batch=TOKENS)

    def cross_entropy(predicted: np.ndarray) -> float:
        target = predictions.target
        return float(-(target * np.log(predicted) + (1 - target) * np.log(1 - predicted)).mean())

    mean = float(np.mean([x for s in logs.sequences[:140] for x in s.returns]))
    start, chosen = history.held_out_losses
    assert chosen == pytest.approx(cross_entropy(predictions.q_value), abs=1e-4)
    assert start == pytest.approx(cross_entropy(np.full(120, mean)), abs=1e-4 if num_heads == 1 else 5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_to_be_learnt_q_is_the_constant_or_close_to_it(base: Path, seed: int):
    logs = make_logs(120, lambda *_: 0.5, seed=seed)
    q_function = unfitted(load(base), link="logistic", num_heads=1)
    history = fit(q_function, logs, num_train=80)
    predictions = predict(q_function, logs.sequences, tokens_per_batch=TOKENS)
    lowest = min(loss for penalty, loss in history.penalty_losses.items() if penalty != "inf")
    assert history.best_pass == int(lowest < history.penalty_losses["inf"])
    assert predictions.q_value.std() < (0.06 if history.best_pass else 1e-5)


def test_from_one_conversation_nothing_is_learnt_but_its_return(base: Path):
    logs = make_logs(4, by_response, seed=0)
    q_function = unfitted(load(base), link="identity", num_heads=1)
    history = fit(q_function, logs, num_train=1, loss="squared_error")
    assert history.best_pass == 0
    predictions = predict(q_function, logs.sequences, tokens_per_batch=TOKENS)
    np.testing.assert_allclose(predictions.q_value, np.mean(logs.sequences[0].returns), atol=1e-5)


def test_returns_beyond_the_link_are_refused(base: Path):
    logs = make_logs(8, by_response, seed=0)
    logs.sequences[0] = dataclasses.replace(logs.sequences[0], returns=(2.0, 0.0))
    with pytest.raises(ValueError, match="outside"):
        fit(unfitted(load(base), link="logistic", num_heads=1), logs, num_train=6)


def test_new_targets_are_fitted_to_the_same_features(base: Path):
    """TD(λ): asked before every pass but the first, from what Q says by then; the held-out loss stays that of the returns."""
    logs = make_logs(600, by_state_alone, seed=0)
    q_function = unfitted(load(base), link="logistic", num_heads=2)
    asked: list[np.ndarray] = []

    def nothing(predictions: Predictions) -> list[tuple[float, ...]]:
        asked.append(predictions.q_value)
        return [(0.25, 0.25)] * 500

    history = fit(q_function, logs, num_train=500, retarget=nothing, max_passes=4, patience_passes=9)
    assert len(asked) == 3
    assert asked[0].std() > 0.05, "from the fit to the returns"
    assert asked[1] == pytest.approx(0.25, abs=0.01), "and then from the fit to what was made of it"
    assert len(history.held_out_losses) == 5
    assert history.best_pass == 1
    kept = predict(q_function, logs.sequences[:500], tokens_per_batch=TOKENS).q_value
    np.testing.assert_allclose(kept, asked[0], rtol=0, atol=TOLERANCE, err_msg="the best pass is kept")
    asked.clear()
    fit(q_function, logs, num_train=500, retarget=nothing, max_passes=4, patience_passes=1)
    assert len(asked) == 1, "one pass that is no better is enough"


# --- one pass -----------------------------------------------------------------------------------------------


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each row that a trunk was asked for features of."""
    read: list[int] = []
    original = QFunction.read_features

    def counted(self: QFunction, rows: Sequence[Any], *arguments: Any, **keywords: Any) -> list[torch.Tensor]:
        read.extend(map(len, rows))
        return original(self, rows, *arguments, **keywords)

    monkeypatch.setattr(QFunction, "read_features", counted)
    return read


def test_a_row_is_read_once_and_again_only_elsewhere(base: Path, rows_read: list[int]):
    q_function, features = on_base(base), FeatureCache()
    rows = [(tiny.USER, tiny.A, tiny.B, tiny.END), (tiny.USER, tiny.C, tiny.END)]

    def ask(positions: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return features.of(q_function, rows, positions, tokens_per_batch=TOKENS)

    first = ask([[1, 3], [2]])
    assert rows_read == [4, 3]
    again = ask([[3, 1, 3], []])
    assert rows_read == [4, 3]
    assert torch.equal(again[0], first[0][[1, 0, 1]])
    assert again[1].shape == (0, first[0].shape[1])
    third = ask([[0, 1], [2]])
    assert rows_read == [4, 3, 4]
    assert torch.equal(ask([[1, 3], [2]])[0], torch.stack([third[0][1], first[0][1]]))
    expected = q_function.read_features(rows, [[0, 1], [2]], tokens_per_batch=TOKENS)
    np.testing.assert_allclose(third[0], expected[0], rtol=0, atol=TOLERANCE)


def test_predictions_from_the_cache_are_those_of_a_pass(base: Path):
    q_function, features = on_base(base, num_heads=2), FeatureCache()
    sequences = make_logs(20, by_response, seed=6).sequences
    known, read = (
        predict(q_function, sequences, tokens_per_batch=TOKENS, features=cache) for cache in (features, None)
    )
    np.testing.assert_allclose(known.q_value, read.q_value, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(known.state_value, read.state_value, rtol=0, atol=TOLERANCE)
    for share in (0.25, 0.5, 1.0):
        known_after, read_after = (
            predict_after_share(q_function, sequences, share, tokens_per_batch=TOKENS, features=cache)
            for cache in (features, None)
        )
        assert known_after == pytest.approx(read_after, abs=TOLERANCE)


@pytest.mark.parametrize("return_lambda", [1.0, 0.5])
def test_a_fit_from_logs_ends_with_all_conversations_and_reports_on_those_held_out_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, return_lambda: float
):
    refits: list[tuple[int, float]] = []

    def refit(_: QFunction, sequences: Sequence[Any], targets: Sequence[Any], *, penalty: float, **__: object) -> None:
        assert len(targets) == len(sequences)
        assert (targets == [s.returns for s in sequences]) == (return_lambda == 1)
        refits.append((len(sequences), penalty))

    said = ["aa" if i % 2 else "bb" for i in range(60)]
    turns = [[user("c"), assistant(text), user("d"), assistant(text)] for text in said]
    lines = [record(*turns[i], id=f"c{i}", outcome=float(i % 2)) for i in range(60)]
    conversations = list(read_conversations(write_lines(tmp_path / "log.jsonl", *lines)))
    settings = {"return_lambda": return_lambda, "held_out_share": 0.3}
    config = config_of(base, q_function=settings)
    arguments: dict[str, Any] = {"name": "p", "seed": 0, "progress": lambda *_: None}
    whole = fit_q_from_logs(config, load(base), conversations, **arguments)
    monkeypatch.setattr(q_from_logs, "refit_read_out", refit)
    without = fit_q_from_logs(config, load(base), conversations, **arguments)
    assert whole.card.metrics["best_pass"] > 0, "the mean return is not refitted, and nothing is shown"
    assert refits == [(60, whole.card.metrics["penalty"])]
    assert dataclasses.asdict(whole.report) == dataclasses.asdict(without.report)
    assert not torch.equal(whole.q_function.heads, without.q_function.heads)


def write_log(path: Path, num_conversations: int = 24) -> Path:
    """Every conversation has words of its own, and none is shorter than 33 tokens."""
    generator = np.random.default_rng(0)
    lines = []
    for i in range(num_conversations):
        said = ["".join(generator.choice(list(tiny.LETTERS), 12)) for _ in range(4)]
        messages = [user(said[0]), assistant(said[1]), user(said[2]), assistant(said[3])]
        lines.append(record(*messages, id=f"c{i}", outcome=float("a" in said[3])))
    return write_lines(path, *lines)


def config_of(base: Path, **tables: dict[str, Any]) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "policy": {"start": str(base), "lora_rank": 4, "context_tokens": 128, "max_response_tokens": 4},
        "q_function": {"num_heads": 2},
        "improvement": {"num_updates": 1, "prompts_per_update": 8, "learning_rate": 1e-2, "kl_target": 9.0},
    }
    return config_module.from_dict(
        {name: table | tables.get(name, {}) for name, table in settings.items()}
        | {name: table for name, table in tables.items() if name not in settings}
    )


def test_folds_from_one_pass_are_those_of_a_pass_each_to_the_last_bit(base: Path, tmp_path: Path, rows_read: list[int]):
    """With a row a batch: what shares a batch changes the last digits."""
    conversations = list(read_conversations(write_log(tmp_path / "log.jsonl")))
    config = config_of(base, compute={"tokens_per_batch": 64})
    policy = load(base)
    groups = [f"c{i}" for i in range(24)]
    shared = FeatureCache()
    arguments: dict[str, Any] = {"groups": groups, "seed": 0, "progress": lambda *_: None}
    together = cross_validate(config, policy, conversations, num_folds=3, features=shared, **arguments)
    assert len(rows_read) == 24, "every conversation once, for three fits and three test folds"
    assert min(rows_read) > 32
    alone = fit_q_from_logs(config, policy, conversations, name="p", **arguments)
    again = fit_q_from_logs(config, policy, conversations, name="p", features=shared, **arguments)
    assert len(rows_read) == 48, "the fit without the cache reads them again, the one with it nothing"
    assert torch.equal(alone.q_function.heads, again.q_function.heads)
    assert dataclasses.asdict(alone.report) == dataclasses.asdict(again.report)
    separate = cross_validate(config, policy, conversations, num_folds=3, features=FeatureCache(), **arguments)
    drop_clock = [dataclasses.replace(result, seconds=0.0) for result in (together, separate)]
    assert drop_clock[0] == drop_clock[1]


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "num_layers"), [(1.0, 2), (0.5, 1)])
def test_a_checkpoint_holds_the_heads_and_the_name_of_the_model(
    base: Path, tmp_path: Path, depth: float, num_layers: int
):
    """Loaded on the backbone of a policy whose adapter has moved on, and without: the base's values, not the adapter's."""
    policy = improved(load(base))
    q_function = on_base(base, depth=depth, num_heads=2)
    prompts, responses = all_turns_of(make_logs(4, by_response, seed=7).sequences)
    expected = q_function.ensemble_scalars(prompts, responses, tokens_per_batch=TOKENS)
    q_function.save(tmp_path / "q", dataclasses.replace(CARD, link="logistic"), policy.tokenizer)
    assert not [file.name for file in (tmp_path / "q").iterdir() if "model" in file.name or file.name == "config.json"]
    assert sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors")) < 3000
    card = load_card(tmp_path / "q")
    assert (card.read_out, card.base, card.num_layers) == ("mean", str(base.resolve()), num_layers)

    shared, alone = QFunction.load(tmp_path / "q", backbone=policy.model), QFunction.load(tmp_path / "q")
    by_config, renderer = load_q_and_renderer(tmp_path / "q", config_of(base))
    for loaded in (shared, alone, by_config):
        scalars = loaded.ensemble_scalars(prompts, responses, tokens_per_batch=TOKENS)
        np.testing.assert_allclose(scalars, expected, rtol=0, atol=TOLERANCE)
    assert renderer.context_tokens == 128
    scorer = QScorer.load(tmp_path / "q", config_of(base))
    [reading] = scorer.read([scorer.item(prompts[0], responses[0])])
    assert reading.q_value == pytest.approx(float(expected[0].mean().sigmoid()), abs=TOLERANCE)
    frozen = {p.data_ptr() for p in policy.model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in shared.model.base_model.parameters()} <= frozen
    assert not {p.data_ptr() for p in alone.model.parameters()} & frozen


def test_a_checkpoint_of_another_version_is_refused_by_its_schema(base: Path, tmp_path: Path):
    on_base(base).save(tmp_path, dataclasses.replace(CARD, link="logistic"), load(base).tokenizer)
    path = tmp_path / "q_function.json"
    fields = json.loads(path.read_text())
    del fields["marks"]
    path.write_text(json.dumps(fields | {"schema": 4}))
    with pytest.raises(ValueError, match=r"schema 4 .* not known to this version"):
        QFunction.load(tmp_path)


@pytest.mark.parametrize(
    "changed", [{"read_out": "median"}, {"base": None}, {"num_layers": None}, {"marks": None}, {"schema": 1}]
)
def test_a_card_that_does_not_say_what_is_read_from_what_is_refused(
    base: Path, tmp_path: Path, changed: dict[str, Any]
):
    on_base(base).save(tmp_path, dataclasses.replace(CARD, link="logistic"), load(base).tokenizer)
    path = tmp_path / "q_function.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match="not known to this version") as caught:
        QFunction.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- the commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_from_logs(base: Path, tmp_path: Path, dtype: str, rows_read: list[int]):
    """Fit, grader and folds from one pass over the logs; improvement and grading on the policy's frozen weights."""
    log = write_log(tmp_path / "log.jsonl")
    config = config_of(base, compute={"dtype": dtype})
    read: dict[str, Any] = {"group": None, "bad_lines": "error"}
    result = loop.run_step(config, log, tmp_path / "run", num_folds=2, resume=False, **read, **QUIET)
    assert len(rows_read) == 24
    assert np.isfinite(result["grade"]["q_gain"]["mean"])
    assert result["fit"]["penalty"] > 0
    assert len(result["fit"]["held_out_losses"]) == 2
    for name in ("fit", "grader"):
        assert load_card(tmp_path / "run" / name / "q_function").base == str(base.resolve())
    step = find_open_step(tmp_path / "run")
    for stack in ("verl", "openrlhf", "trl"):
        with pytest.raises(ValueError, match=r'reads a mean .* q_function\.trunk = "trained"; .*serve-q') as caught:
            export_step(step, stack, tmp_path / stack)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / stack).exists()
    with pytest.raises(ValueError, match="label of a plain model reads one token") as caught:
        exchange.run_merge(config, step.q_function, tmp_path / "merged", console=QUIET["console"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_fit_and_improve_by_themselves(base: Path, tmp_path: Path, rows_read: list[int]):
    log = write_log(tmp_path / "log.jsonl")
    config, shown = config_of(base), QUIET | {"bad_lines": "error"}
    fitted = single_stages.run_fit(config, log, str(base), tmp_path / "fit", num_folds=2, group=None, **shown)
    assert len(rows_read) == 24, "the folds and the fit after them"
    assert set(fitted["auc"]) == {"25", "50", "75", "100"}
    q_folder = str(tmp_path / "fit/q_function")
    improvement = single_stages.run_improve(config, log, str(base), q_folder, tmp_path / "candidate", **shown)
    assert np.isfinite(improvement["reward_last"])


def test_the_loop_fits_the_base_models_features_anew_each_time(base: Path, tmp_path: Path):
    config = config_of(
        base,
        environment={"entry_point": "test_rollout:Game", "max_turns": 3},
        q_function={"link": "identity", "loss": "squared_error", "return_lambda": 0.5, "max_passes": 2},
        iterations={"count": 2, "conversations": 16},
        evaluation={"conversations": 8},
    )
    loop.run_iterate(config, tmp_path / "run", resume=False, **QUIET)
    cards = [load_card(tmp_path / f"run/iteration-00{i}/fit/q_function") for i in (1, 2)]
    assert {card.base for card in cards} == {str(base.resolve())}
    assert [card.target for card in cards] == ["td_lambda 0.5"] * 2
    assert not (tmp_path / "run/iteration-000/start/q_function").exists()


def test_who_has_a_frozen_trunk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`auto`: whoever is trained through adapters, unless another stack makes the improvement step."""
    conversations = list(read_conversations(write_log(tmp_path / "log.jsonl", 8)))

    def read_out(config: Config) -> str:
        policy = policy_module.Policy.load(base, config.policy)
        arguments: dict[str, Any] = {"name": "p", "seed": 0, "progress": lambda *_: None}
        return fit_q_from_logs(config, policy, conversations, **arguments).q_function.read_out

    one_pass = {"max_passes": 1}
    assert read_out(config_of(base)) == "mean"
    assert read_out(config_of(base, q_function=one_pass | {"trunk": "trained"})) == "last"
    assert read_out(config_of(base, q_function=one_pass, policy={"lora_rank": 0})) == "last"
    external = {"improvement": {"backend": "external"}}
    assert read_out(config_of(base, q_function=one_pass, **external)) == "last"
    assert read_out(config_of(base, q_function={"trunk": "frozen"}, **external)) == "mean"
    with pytest.raises(ConfigError, match=r'q_function\.trunk: "frozen" needs weights that stay'):
        config_of(base, q_function={"trunk": "frozen"}, policy={"lora_rank": 0})
    monkeypatch.setattr(policy_module, "_SMALLEST_FOR_ADAPTERS", 10_000_000)
    assert read_out(config_of(base, q_function=one_pass)) == "last"
    with pytest.raises(ValueError, match=r'q_function\.trunk: "frozen" is for policies'):
        read_out(config_of(base, q_function={"trunk": "frozen"}))
