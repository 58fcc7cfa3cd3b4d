"""Q: one pass for all decision points, an ordinary reward-model checkpoint, a fit that works and a report that says
when it did not."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from iterative_ppo.batching import pad_right
from iterative_ppo.config import QFunctionConfig
from iterative_ppo.conversations import Conversation, Message, chat_messages, split_by_group
from iterative_ppo.intervals import clustered_interval, mean_interval
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.policy import Policy
from iterative_ppo.q_fit import Predictions, fit_q_function, predict, predict_after_share
from iterative_ppo.q_function import Link, QFunction, QFunctionCard, TokenValue, load_card
from iterative_ppo.q_report import (
    assess,
    calibration_bins,
    discrimination,
    expected_calibration_error,
)
from iterative_ppo.rendering import TokenIds
from iterative_ppo.shared_prefix import tree_batches
from iterative_ppo.supervised import FitHistory
from iterative_ppo.turns_to_tokens import all_prompts, labelled_sequences, td_lambda_targets, tokenize
from iterative_ppo.word_tasks import WordTasks

TOLERANCE = 1e-5
TOKENS = 1024
MODELS = {"llama": tiny.llama, "grouped_query_llama": tiny.grouped_query_llama, "gpt2": tiny.gpt2}
LINKS: tuple[Link, ...] = ("identity", "logistic")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random policy of each kind, on disk: what a Q-function starts from."""
    made = {}
    for name, model in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        tiny.letter_policy(model).save(made[name])
    return made


def started(folder: Path, *, link: Link, num_heads: int, pad_id: int, seed: int) -> QFunction:
    policy = Policy.load(folder, tiny.policy_config())
    return QFunction.from_policy(policy.model, link=link, num_heads=num_heads, pad_id=pad_id, lora_rank=4, seed=seed)


def new_q_function(folder: Path, *, link: Link = "logistic", num_heads: int = 1, seed: int = 0) -> QFunction:
    q_function = started(folder, link=link, num_heads=num_heads, pad_id=tiny.PAD, seed=seed)
    with torch.no_grad():
        q_function.heads.mul_(10)  # as after a fit: values that differ from each other
    return q_function


Chance = Callable[[TokenIds, TokenIds], float]
"""Probability of the outcome by what the customer said (two letters) and what was answered (two letters)."""


def by_response(said: TokenIds, response: TokenIds) -> float:
    """Mostly the response: an `a` or a `b` in it sells. A little what the customer said."""
    return 0.1 + 0.7 * (tiny.A in response or tiny.B in response) + 0.1 * (said[0] < tiny.D)


def by_state_alone(said: TokenIds, _: TokenIds) -> float:
    """Some customers buy, others do not, whatever they are told."""
    return 0.1 + 0.8 * (said[0] < tiny.D)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """Conversations of two turns: u s s . a r r . u s s . a r r .  with an outcome drawn at each turn."""

    sequences: list[LabelledSequence]
    chance: np.ndarray
    """The truth at each decision point, in the order of `predict`."""


def make_logs(num_conversations: int, chance: Chance, *, seed: int, response_letters: int = 2) -> Logs:
    generator = np.random.default_rng(seed)
    sequences, truth = [], []
    for i in range(num_conversations):
        token_ids: TokenIds = ()
        spans, returns = [], []
        for _ in range(2):
            said, response = tiny.random_rows(generator, [2, response_letters], low=tiny.A, high=tiny.G + 1)
            token_ids += (tiny.USER, *said, tiny.END, tiny.ASSISTANT)
            start = len(token_ids)
            token_ids += (*response, tiny.END)
            spans.append((start, len(token_ids)))
            truth.append(chance(said, response))
            returns.append(float(generator.random() < truth[-1]))
        sequences.append(
            LabelledSequence(
                token_ids=token_ids,
                spans=tuple(spans),
                turns=(0, 1),
                returns=tuple(returns),
                conversation=i,
                group=f"c-{i:03d}",
                messages_seen=(1, 3),
                num_messages=4,
            )
        )
    return Logs(sequences=sequences, chance=np.array(truth))


def fit(
    q_function: QFunction,
    logs: Logs,
    *,
    num_train: int,
    seed: int = 0,
    is_refit: bool = False,
    retarget: Callable[[Predictions], list[tuple[float, ...]]] | None = None,
    **settings: object,
) -> FitHistory:
    """Fits on the first conversations and stops by the others."""
    return fit_q_function(
        q_function,
        logs.sequences,
        held_out=[row >= num_train for row in range(len(logs.sequences))],
        config=QFunctionConfig(**({"max_passes": 12, "learning_rate": 3e-3, "link": q_function.link} | settings)),
        is_refit=is_refit,
        tokens_per_batch=TOKENS,
        generator=np.random.default_rng(seed),
        retarget=retarget,
    )


def turns_of(sequence: LabelledSequence) -> tuple[list[TokenIds], list[TokenIds]]:
    """Prompt and response of each decision point as rows of their own."""
    return (
        [sequence.token_ids[:start] for start, _ in sequence.spans],
        [sequence.token_ids[start:end] for start, end in sequence.spans],
    )


def all_turns_of(sequences: Sequence[LabelledSequence]) -> tuple[list[TokenIds], list[TokenIds]]:
    """The same for all of them together."""
    turns = [turn for s in sequences for turn in zip(*turns_of(s), strict=True)]
    return [prompt for prompt, _ in turns], [response for _, response in turns]


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_one_pass_over_a_conversation_is_one_row_a_turn(
    folders: dict[str, Path], model: str, link: Link, num_heads: int
):
    """All decision points in one pass, beside longer and shorter conversations, against each turn alone:

    u s s . a r r . u s s . a r r .         Q_0 at the 8th token, Q_1 at the last
    u s s . a r r .                         Q_0
    u s s . a r r . u s s . a r r .         Q_1

    and the value of the state is read at the `a` before the response.
    """
    q_function = new_q_function(folders[model], link=link, num_heads=num_heads)
    sequences = make_logs(7, by_response, seed=1).sequences
    long = sequences[0]
    sequences.append(
        dataclasses.replace(long, token_ids=(tiny.USER,) * 30 + long.token_ids, spans=((35, 38), (43, 46)))
    )
    together = predict(q_function, sequences, tokens_per_batch=64)
    rows = [(prompt, response) for s in sequences for prompt, response in zip(*turns_of(s), strict=True)]
    alone = [q_function.values([prompt], [response], tokens_per_batch=64).item() for prompt, response in rows]
    np.testing.assert_allclose(together.q_value, alone, rtol=0, atol=TOLERANCE)
    states = [q_function.values([prompt[:-1]], [prompt[-1:]], tokens_per_batch=64).item() for prompt, _ in rows]
    np.testing.assert_allclose(together.state_value, states, rtol=0, atol=TOLERANCE)
    batched = q_function.values([p for p, _ in rows], [r for _, r in rows], tokens_per_batch=100_000)
    np.testing.assert_allclose(batched, alone, rtol=0, atol=TOLERANCE)
    assert np.std(alone) > 0.01, "values that are all the same would agree whatever is read"


def test_the_token_value_ends_in_q(folders: dict[str, Path]):
    """PPO's token value starts as Q's own reading at every token; at the end of the response it is Q."""
    q_function = new_q_function(folders["llama"], num_heads=3)
    sequence = make_logs(1, by_response, seed=2).sequences[0]
    prompts, responses = turns_of(sequence)
    [(rows, batch)] = tree_batches(prompts, responses, tokens_per_batch=TOKENS)
    value_BT = TokenValue(q_function)(batch)
    read = predict(q_function, [sequence], tokens_per_batch=TOKENS)
    for place, row in enumerate(rows):
        assert batch.end(value_BT)[place].item() == pytest.approx(read.q_value[row], abs=TOLERANCE)
        assert batch.before(value_BT)[place, 0].item() == pytest.approx(read.state_value[row], abs=TOLERANCE)


def test_pessimism_is_the_mean_minus_deviations_of_the_members_values(folders: dict[str, Path]):
    """Of the values, after the link: of the scalars before it, a certain member would count for more."""
    q_function = new_q_function(folders["llama"], num_heads=3)
    prompts, responses = turns_of(make_logs(1, by_response, seed=3).sequences[0])
    scalar_BM = q_function.ensemble_scalars(prompts, responses, tokens_per_batch=TOKENS)
    value_BM = 1 / (1 + np.exp(-scalar_BM.numpy()))
    expected = value_BM.mean(1) - 2 * value_BM.std(1, ddof=1)
    actual = q_function.pessimistic_values(prompts, responses, pessimism=2.0, tokens_per_batch=TOKENS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_the_outcome_expected_after_a_share_of_the_conversation(folders: dict[str, Path]):
    """Four messages, the policy's are the 2nd and the 4th. After half of them, two: Q of the first response; after
    three quarters: the state that the second one answers; after all: Q of the second."""
    q_function = new_q_function(folders["llama"])
    sequences = make_logs(3, by_response, seed=4).sequences
    read = predict(q_function, sequences, tokens_per_batch=TOKENS)
    for share, expected in ((0.25, read.state_value[0::2]), (0.5, read.q_value[0::2])):
        assert list(
            predict_after_share(q_function, sequences, share, tokens_per_batch=TOKENS).values()
        ) == pytest.approx(expected.tolist(), abs=TOLERANCE)
    for share, expected in ((0.75, read.state_value[1::2]), (1.0, read.q_value[1::2])):
        assert list(
            predict_after_share(q_function, sequences, share, tokens_per_batch=TOKENS).values()
        ) == pytest.approx(expected.tolist(), abs=TOLERANCE)


# --- checkpoint ---------------------------------------------------------------------------------------------

CARD = QFunctionCard(link="identity", gamma=0.9, target="monte_carlo", policy="iteration-001", metrics={"auc": 0.7})


def outside_scores(folder: Path, rows: list[TokenIds]) -> list[float]:
    """What another stack reads: the label of transformers' own class, on a batch padded with the tokenizer's own
    padding token behind."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits_B1 = model(**batch).logits
    assert logits_B1.shape == (len(rows), 1)
    return logits_B1[:, 0].tolist()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_checkpoint_is_a_reward_model_with_the_same_values(
    tmp_path: Path, folders: dict[str, Path], model: str, link: Link, num_heads: int
):
    """Its one label is the scalar before the link, of the ensemble's mean head."""
    q_function = new_q_function(folders[model], link=link, num_heads=num_heads)
    tokenizer = AutoTokenizer.from_pretrained(folders[model])
    q_function.save(tmp_path, dataclasses.replace(CARD, link=link), tokenizer)
    sequences = make_logs(4, by_response, seed=5).sequences
    prompts, responses = all_turns_of(sequences)
    expected = q_function.values(prompts, responses, tokens_per_batch=TOKENS)

    label = torch.tensor(outside_scores(tmp_path, [p + r for p, r in zip(prompts, responses, strict=True)]))
    value = label.sigmoid() if link == "logistic" else label
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE)

    loaded = QFunction.load(tmp_path)
    np.testing.assert_allclose(
        loaded.values(prompts, responses, tokens_per_batch=TOKENS), expected, rtol=0, atol=TOLERANCE
    )
    np.testing.assert_allclose(
        loaded.pessimistic_values(prompts, responses, pessimism=1.0, tokens_per_batch=TOKENS),
        q_function.pessimistic_values(prompts, responses, pessimism=1.0, tokens_per_batch=TOKENS),
        rtol=0,
        atol=TOLERANCE,
    )


def padded_by_its_end_token() -> PreTrainedTokenizerBase:
    """As SmolLM2-Instruct is: one token ends a message and pads a batch."""
    tokenizer = tiny.letter_tokenizer()
    tokenizer.pad_token = "<end>"
    return tokenizer


def without_a_padding_token() -> PreTrainedTokenizerBase:
    """As GPT-2 and Llama 3 are."""
    tokenizer = tiny.letter_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize("make_tokenizer", [padded_by_its_end_token, without_a_padding_token])
def test_the_end_token_is_read_and_not_taken_for_padding(
    tmp_path: Path, make_tokenizer: Callable[[], PreTrainedTokenizerBase]
):
    """transformers reads the label at the last token that is not padding:

    u s . a r r .          the `.` ends the response, and Q stands there
    u s . a r r            what is left of it where `.` is the padding token too
    """
    policy = Policy(tiny.llama(12), make_tokenizer(), tiny.policy_config())
    policy.save(tmp_path / "policy")
    q_function = started(tmp_path / "policy", link="identity", num_heads=1, pad_id=policy.pad_id, seed=0)
    q_function.save(tmp_path / "q", CARD, policy.tokenizer)
    prompts = [(tiny.USER, tiny.C, tiny.END, tiny.ASSISTANT), (tiny.USER, tiny.D, tiny.E, tiny.END, tiny.ASSISTANT)]
    responses = [(tiny.A, tiny.B, tiny.END), (tiny.END,)]
    expected = q_function.values(prompts, responses, tokens_per_batch=TOKENS)
    scores = outside_scores(tmp_path / "q", [p + r for p, r in zip(prompts, responses, strict=True)])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_the_card_comes_back_and_what_is_no_card_is_refused(tmp_path: Path, folders: dict[str, Path]):
    new_q_function(folders["llama"], link="identity").save(
        tmp_path, CARD, AutoTokenizer.from_pretrained(folders["llama"])
    )
    assert load_card(tmp_path) == CARD
    path = tmp_path / "q_function.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    for broken in ("{", "[]", "{}", json.dumps(written | {"schema": 99}), json.dumps(written | {"link": "probit"})):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"q_function\.json") as caught:
            QFunction.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="no Q-function checkpoint"):
        QFunction.load(tmp_path)


@pytest.mark.parametrize("broken", ["heads.safetensors", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_checkpoint_with_broken_weights_is_refused_in_one_line(
    tmp_path: Path, folders: dict[str, Path], broken: str, how: str
):
    new_q_function(folders["llama"], link="identity").save(
        tmp_path, CARD, AutoTokenizer.from_pretrained(folders["llama"])
    )
    file = tmp_path / broken
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        QFunction.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- fit and report -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    q_function: QFunction
    history: FitHistory
    held_out: Logs
    predictions: Predictions
    constant: float


def fitted(folder: Path, chance: Chance, *, seed: int = 0, **settings: object) -> Fitted:
    """300 conversations to learn from, 150 to stop by and to be judged on."""
    logs = make_logs(450, chance, seed=seed)
    q_function = started(
        folder,
        link=settings.get("link", "logistic"),
        num_heads=settings.get("num_heads", 1),
        pad_id=tiny.PAD,
        seed=seed,
    )
    history = fit(q_function, logs, num_train=300, seed=seed, **settings)
    held_out = Logs(sequences=logs.sequences[300:], chance=logs.chance[600:])
    return Fitted(
        q_function=q_function,
        history=history,
        held_out=held_out,
        predictions=predict(q_function, held_out.sequences, tokens_per_batch=TOKENS),
        constant=float(np.mean([s.returns for s in logs.sequences[:300]])),
    )


@pytest.mark.parametrize(
    ("loss", "link"),
    [
        ("binary_cross_entropy", "logistic"),
        ("squared_error", "logistic"),
        ("squared_error", "identity"),
        ("hl_gauss", "logistic"),
        ("hl_gauss", "identity"),
    ],
)
def test_every_loss_learns_which_response_sells(folders: dict[str, Path], loss: str, link: Link):
    """Close to the true chances (whose variance is 0.12), for the checkpoint's scalar: HL-Gauss is read out into one.
    An ensemble of five, the learning rate and the number of passes are as they come; none of the losses may need
    more than the others."""
    settings = {"num_heads": 5, "max_passes": 8, "learning_rate": 1e-3}
    done = fitted(folders["llama"], by_response, loss=loss, link=link, **settings)
    error = np.square(done.predictions.q_value - done.held_out.chance).mean()
    assert error < 0.07
    assert done.held_out.chance.var() > 0.1
    report = assess(done.predictions, constant=done.constant, loss="squared_error")
    assert report.warnings == ()
    assert report.loss < min(report.constant_loss, report.state_only_loss) - 0.03
    assert report.state_only_gain.low > 0
    assert report.measure == "auc"
    assert report.discrimination > 0.75
    assert [turn.turn for turn in report.by_turn] == [0, 1]
    assert (report.num_points, report.num_conversations) == (300, 150)


def test_the_report_says_when_q_knows_no_more_than_the_state(folders: dict[str, Path]):
    """Outcomes that do not depend on the response. Q is a good predictor (AUC), and must not pass for one that can
    rank responses. The state's value is a fair opponent only if it is fitted as well as Q is: over seeds and
    lengths of the response, an advantage of Q is found no more often than the interval's 2.5 % allow."""
    found = 0
    for seed in range(7):
        logs = make_logs(390, by_state_alone, seed=seed, response_letters=10)
        q_function = started(folders["llama"], link="logistic", num_heads=1, pad_id=tiny.PAD, seed=seed)
        fit(q_function, logs, num_train=240, seed=seed, num_heads=1, max_passes=4, learning_rate=5e-3)
        predictions = predict(q_function, logs.sequences[240:], tokens_per_batch=TOKENS)
        report = assess(predictions, constant=0.5, loss="cross_entropy")
        assert report.discrimination > 0.7
        assert report.loss < report.constant_loss
        warned = any("does not beat the state-only predictor" in warning for warning in report.warnings)
        assert warned == (report.state_only_gain.low <= 0)
        found += not warned
    assert found <= 1


def test_the_report_says_when_nothing_was_learnt():
    """Predictions that are worse than the mean return: 0.1 where half of the conversations sell."""
    target = np.tile([0.0, 1.0], 20)
    predictions = Predictions(
        q_value=np.full(40, 0.1),
        state_value=np.full(40, 0.5),
        target=target,
        group=np.array([f"c-{i}" for i in range(40)]),
        turn=np.zeros(40, dtype=int),
    )
    report = assess(predictions, constant=0.5, loss="squared_error")
    assert report.loss == pytest.approx((0.1**2 + 0.9**2) / 2)
    assert report.constant_loss == pytest.approx(0.25)
    assert [warning.split(" predictor")[0] for warning in report.warnings] == [
        "Q does not beat the constant",
        "Q does not beat the state-only",
    ]
    assert report.discrimination is None, "equal predictions rank nothing"


def test_the_best_pass_is_kept_and_the_fit_stops_soon_after(folders: dict[str, Path]):
    """Sixty conversations and a high learning rate: it overfits, the held-out loss turns up, and the weights are
    those from before it did."""
    logs = make_logs(160, by_response, seed=6)
    q_function = started(folders["llama"], link="logistic", num_heads=1, pad_id=tiny.PAD, seed=0)
    history = fit(
        q_function,
        logs,
        num_train=60,
        max_passes=40,
        patience_passes=3,
        learning_rate=1e-2,
        loss="binary_cross_entropy",
        next_message_weight=0.0,  # outcomes alone, of which there are too few
    )
    losses = history.held_out_losses
    assert 0 < history.best_pass == int(np.argmin(losses))
    assert len(history.train_losses) == len(losses) - 1 == history.best_pass + 3 < 40
    assert history.train_losses[-1] < history.train_losses[0]
    held_out = predict(q_function, logs.sequences[60:], tokens_per_batch=TOKENS)
    report = assess(held_out, constant=0.5, loss="cross_entropy")
    assert report.loss == pytest.approx(losses[history.best_pass], abs=1e-4)
    assert not q_function.training


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "hl_gauss"])
@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, folders: dict[str, Path], model: str, loss: str):
    """Whatever torch's own generator has been used for before: GPT-2 has dropout, HL-Gauss a layer of its own."""
    logs = make_logs(60, by_response, seed=7)

    def written(seed: int, global_seed: int) -> list[bytes]:
        torch.manual_seed(global_seed)
        q_function = started(folders[model], link="logistic", num_heads=3, pad_id=tiny.PAD, seed=0)
        fit(q_function, logs, num_train=60, seed=seed, num_heads=3, max_passes=1, loss=loss)  # none held out
        q_function.save(tmp_path, CARD, AutoTokenizer.from_pretrained(folders[model]))
        return [(tmp_path / name).read_bytes() for name in ("model.safetensors", "heads.safetensors")]

    first = written(0, global_seed=0)
    assert written(0, global_seed=1) == first
    assert written(1, global_seed=0) != first


def test_the_members_of_an_ensemble_disagree_where_they_know_little(folders: dict[str, Path]):
    """Each sees its own bootstrap of the conversations. Trained on one and the same, they would end up alike."""
    done = fitted(folders["llama"], by_response, num_heads=5, next_message_weight=0.0)
    prompts, responses = all_turns_of(done.held_out.sequences)
    value_BM = done.q_function.to_value(done.q_function.ensemble_scalars(prompts, responses, tokens_per_batch=TOKENS))
    assert value_BM.std(1).mean() > 0.01
    unseen = [(tiny.SYSTEM,) * 5] * 50
    far_BM = done.q_function.to_value(
        done.q_function.ensemble_scalars(unseen, [(tiny.SYSTEM, tiny.PAD, tiny.END)] * 50, tokens_per_batch=TOKENS)
    )
    assert far_BM.std(1).mean() > value_BM.std(1).mean()


@pytest.mark.parametrize("returns", [(-1.0, 0.0), (0.0, 1.5)])
def test_returns_outside_the_unit_interval_need_the_identity_link(
    folders: dict[str, Path], returns: tuple[float, float]
):
    sequence = dataclasses.replace(make_logs(1, by_response, seed=8).sequences[0], returns=returns)
    logs = Logs(sequences=[sequence, dataclasses.replace(sequence, group="c-other")], chance=np.zeros(4))
    logistic = started(folders["llama"], link="logistic", num_heads=1, pad_id=tiny.PAD, seed=0)
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*identity.*squared_error"):
        fit(logistic, logs, num_train=1)
    identity = started(folders["llama"], link="identity", num_heads=1, pad_id=tiny.PAD, seed=0)
    fit(identity, logs, num_train=1, loss="squared_error", max_passes=1)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_handful_of_conversations_is_no_crash(folders: dict[str, Path], num_heads: int):
    """One to learn from, which the bootstrap of two members draws not at all in one of seven fits, and two to judge."""
    logs = make_logs(3, by_response, seed=9)
    for seed in range(20):
        q_function = started(folders["llama"], link="logistic", num_heads=num_heads, pad_id=tiny.PAD, seed=0)
        history = fit(q_function, logs, num_train=1, seed=seed, num_heads=num_heads, max_passes=1)
        assert np.isfinite(history.held_out_losses).all()
    report = assess(
        predict(q_function, logs.sequences[2:], tokens_per_batch=TOKENS), constant=0.5, loss="cross_entropy"
    )
    assert report.warnings, "one conversation shows nothing"


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=40).filter(lambda owners: len(set(owners)) > 1),
    st.floats(0.05, 0.9),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_a_conversation_is_on_one_side_of_the_split(owners: list[int], share: float, seed: int):
    """Rows of one conversation share their outcome; on both sides of a split they would give it away."""
    held_out = split_by_group([f"c-{owner}" for owner in owners], held_out_share=share, seed=seed)
    sides: dict[int, set[bool]] = {}
    for owner, side in zip(owners, held_out.tolist(), strict=True):
        sides.setdefault(owner, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())


# --- labels -------------------------------------------------------------------------------------------------


def test_a_conversation_becomes_its_returns_and_its_last_word():
    """Turn rewards 0 and 1 (the outcome), turn discount ½; the customer has the last word, after the outcome:

    u a u a u       returns of the two responses: ½ and 1; the state at the end carries what was paid on reaching it
    """
    conversation = Conversation(
        id="c-1",
        messages=tuple(
            Message(role=role, content=content)
            for role, content in [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d"), ("user", "e")]
        ),
        outcome=1.0,
        end="terminated",
    )
    renderer = tiny.letter_policy().renderer
    turns = tokenize(conversation, renderer)
    [sequence] = labelled_sequences(conversation, turns, gamma=0.5, index=7, group="g")
    assert sequence.returns == (0.5, 1.0, 1.0)
    assert (sequence.turns, sequence.messages_seen, sequence.num_messages) == ((0, 1, 2), (1, 3, 5), 5)
    said = [sequence.token_ids[start:end] for start, end in sequence.spans]
    assert said == [(tiny.B, tiny.B, tiny.END), (tiny.D, tiny.END), ()]
    assert sequence.token_ids == renderer.prompt(chat_messages(conversation.messages)).token_ids
    assert (sequence.conversation, sequence.group) == (7, "g")

    censored = dataclasses.replace(conversation, outcome=None, end="censored")
    assert labelled_sequences(censored, turns, gamma=0.5, index=0, group="g") == []
    assert all_prompts([turns, turns]) == [*turns.prompts, *turns.prompts], (
        "a censored conversation still gives prompts"
    )


@pytest.mark.parametrize(("lambda_", "first"), [(1.0, 0.5), (0.0, 0.35), (0.5, 0.425)])
def test_td_lambda_targets_by_hand(lambda_: float, first: float):
    """Turn rewards 0 and 1, discount ½, Q of the responses .4 and .7. The last target is the outcome, 1. The first:

    λ = 1: ½ · 1 = .5        λ = 0: ½ · .7 = .35        λ = ½: ½ · (½ · .7 + ½ · 1) = .425

    whether the conversation is one sequence or two, and whatever stands beside it.
    """
    one = make_logs(1, by_response, seed=10).sequences[0]
    whole = dataclasses.replace(one, returns=(0.5, 1.0), conversation=4)
    halves = [
        dataclasses.replace(
            whole, spans=(span,), turns=(turn,), returns=(target,), messages_seen=(seen,), conversation=9
        )
        for span, turn, target, seen in zip(whole.spans, whole.turns, whole.returns, whole.messages_seen, strict=True)
    ]
    ended = dataclasses.replace(
        whole, spans=(*whole.spans, (16, 16)), turns=(0, 1, 2), returns=(0.5, 1.0, 1.0), conversation=2
    )
    predictions = Predictions(
        q_value=np.array([0.4, 0.7] * 3),
        state_value=np.zeros(6),
        target=np.array([0.5, 1.0] * 3),
        group=np.array(["c"] * 6),
        turn=np.array([0, 1] * 3),
    )
    targets = td_lambda_targets([whole, *halves, ended], predictions, gamma=0.5, lambda_=lambda_)
    assert targets == [
        pytest.approx((first, 1.0)),
        pytest.approx((first,)),
        pytest.approx((1.0,)),
        pytest.approx((first, 1.0, 1.0)),
    ]


@pytest.mark.parametrize(
    ("loss", "link"), [("binary_cross_entropy", "logistic"), ("squared_error", "identity"), ("hl_gauss", "identity")]
)
def test_new_targets_are_made_from_what_q_has_learnt_so_far(folders: dict[str, Path], loss: str, link: Link):
    """Bootstrapping from a Q that is not being fitted would pull every target towards noise: Q must order the
    responses as the outcomes do, and lie where they lie."""
    logs = make_logs(300, by_response, seed=11)
    seen: list[tuple[float, float]] = []

    def retarget(predictions: Predictions) -> list[tuple[float, ...]]:
        assert predictions.target.tolist() == [target for s in logs.sequences for target in s.returns]
        correlation = float(np.corrcoef(predictions.q_value, predictions.target)[0, 1])
        seen.append((correlation, float(predictions.q_value.mean() - predictions.target.mean())))
        return [s.returns for s in logs.sequences]

    q_function = started(folders["llama"], link=link, num_heads=1, pad_id=tiny.PAD, seed=0)
    fit(q_function, logs, num_train=300, retarget=retarget, loss=loss, num_heads=1, max_passes=8)
    assert len(seen) == 7, "before every pass but the first"
    correlation, bias = seen[-1]
    assert correlation > 0.5
    assert abs(bias) < 0.15
    before = predict(q_function, logs.sequences, tokens_per_batch=TOKENS)
    known = (
        float(np.corrcoef(before.q_value, before.target)[0, 1]),
        float(before.q_value.mean() - before.target.mean()),
    )
    history = fit(
        q_function, logs, num_train=300, is_refit=True, retarget=retarget, loss=loss, num_heads=1, refit_passes=2
    )
    assert len(history.train_losses) == 2
    assert len(seen) == 9, "a Q that has been fitted before is asked before the first pass too"
    correlation, bias = seen[7]
    assert correlation > 0.5
    assert abs(bias) < 0.15
    if loss != "squared_error":  # whose heads a fit sets anew from the returns
        assert seen[7] == pytest.approx(known), "and asked for what it knew before the refit"


@pytest.mark.parametrize(
    ("loss", "link"), [("binary_cross_entropy", "logistic"), ("hl_gauss", "logistic"), ("hl_gauss", "identity")]
)
def test_new_targets_beyond_the_returns_do_no_harm(folders: dict[str, Path], loss: str, link: Link):
    """A reward on the way and an optimistic Q behind it: ½ + .9 = 1.4, though no return is above 1. A cross-entropy
    with such a label has no lowest point, and a histogram no place for it."""
    logs = make_logs(40, by_response, seed=12)
    q_function = started(folders["llama"], link=link, num_heads=1, pad_id=tiny.PAD, seed=0)
    history = fit(
        q_function,
        logs,
        num_train=40,
        retarget=lambda _: [(1.4, 3.0)] * 40,
        loss=loss,
        num_heads=1,
        max_passes=6,
    )
    assert min(history.train_losses) >= 0
    assert np.isfinite(predict(q_function, logs.sequences, tokens_per_batch=TOKENS).q_value).all()


# --- figures of the report ----------------------------------------------------------------------------------


def test_discrimination_by_hand():
    """Two sold (.35 and .8), two not (.1 and .4): of four pairs three are in order, AUC ¾. A tie counts half.
    Graded returns are compared by rank, whatever their size."""
    assert discrimination([0.1, 0.4, 0.35, 0.8], np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert discrimination([0.1, 0.4, 0.4, 0.8], np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(3.5 / 4)
    assert discrimination([0.1, 0.2, 0.3, 0.4], np.array([1.0, 2.0, 4.0, 800.0])) == pytest.approx(1.0)
    assert discrimination([4.0, 3.0, 2.0], np.array([0.1, 0.2, 0.3])) == pytest.approx(-1.0)
    assert discrimination([0.1, 0.2], np.array([1.0, 1.0])) is None


def test_one_report_has_one_measure():
    """Graded returns, but at turn 1 only two of them occur: still Spearman, as the report says, and not an AUC,
    whose 0.5 means what Spearman's 0 means. At turn 1, predictions .1 .2 .3 .4 for returns 0 1 0 1: the ranks are
    1 2 3 4 and 1.5 3.5 1.5 3.5, of which Spearman is 2/sqrt(5 * 4) = .4472; the AUC would be .75."""
    predictions = Predictions(
        q_value=np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.4]),
        state_value=np.full(7, 0.5),
        target=np.array([0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0]),
        group=np.array(list("abcabcd")),
        turn=np.array([0, 0, 0, 1, 1, 1, 1]),
    )
    report = assess(predictions, constant=0.5, loss="squared_error")
    assert report.measure == "spearman"
    assert report.by_turn[0].discrimination == pytest.approx(1.0)
    assert report.by_turn[1].discrimination == pytest.approx(2 / np.sqrt(20))


def test_calibration_by_hand():
    """Twenty points, two a bin: predicted .05 .15 ... .95. In the first five bins nobody buys, in the others all do:

    |.05 − 0| + |.15 − 0| + ... + |.45 − 0| = 1.25, and as much above: 2.5 over ten bins = .25.
    Exactly as predicted: 0. Ten points more than bins is no matter.
    """
    predicted = np.repeat(np.arange(10) / 10 + 0.05, 2)
    sold = (predicted > 0.5).astype(float)
    bins = calibration_bins(predicted, sold)
    assert [b.num_points for b in bins] == [2] * 10
    assert [b.predicted for b in bins] == pytest.approx((np.arange(10) / 10 + 0.05).tolist())
    assert [b.observed for b in bins] == [0.0] * 5 + [1.0] * 5
    assert expected_calibration_error(bins) == pytest.approx(0.25)
    assert expected_calibration_error(calibration_bins(predicted, predicted)) == pytest.approx(0.0)
    assert sum(b.num_points for b in calibration_bins(np.arange(7) / 7, np.ones(7))) == 7


def test_equal_predictions_are_one_group_of_the_calibration():
    """A predictor that says ½ everywhere and is right on average is calibrated, in whatever order the conversations
    lie. Split up by that order it would seem to be off by ½."""
    sold = np.repeat([0.0, 1.0], 20)
    assert expected_calibration_error(calibration_bins(np.full(40, 0.5), sold)) == pytest.approx(0.0)
    two_levels = np.repeat([0.25, 0.75], 20)
    as_predicted = np.concatenate([np.repeat([0.0, 1.0], [15, 5]), np.repeat([0.0, 1.0], [5, 15])])
    assert expected_calibration_error(calibration_bins(two_levels, as_predicted)) == pytest.approx(0.0)


def test_wilson_and_student_by_hand():
    """5 of 10: Wilson's interval is (.2366, .7634); 0 of 10: (0, .2775), where the normal one has no width at all.

    1 2 3: mean 2, standard error 1/sqrt(3), t_{.975}(2) = 4.3027, so 2 ∓ 2.4841.
    """
    five = mean_interval([1.0] * 5 + [0.0] * 5)
    assert (five.mean, five.low, five.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    none = mean_interval([0.0] * 10)
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-4)
    graded = mean_interval([1.0, 2.0, 3.0])
    assert (graded.low, graded.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    narrower = mean_interval([1.0, 2.0, 3.0], confidence=0.9)
    assert graded.low < narrower.low < narrower.high < graded.high


def test_the_clustered_interval_by_hand():
    """Rows 1 1 | 3 | 2, mean 7/4. Sums of deviations −1.5, 1.25, .25: squares 2.25 + 1.5625 + .0625 = 3.875.
    se² = 3/2 · 3.875 / 4² = .36328, and with t_{.975}(2) = 4.3027 the margin is 2.5933."""
    interval = clustered_interval([1.0, 1.0, 3.0, 2.0], ["a", "a", "b", "c"])
    margin = stats.t.ppf(0.975, 2) * np.sqrt(1.5 * 3.875 / 16)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.75, 1.75 - margin, 1.75 + margin))
    assert margin == pytest.approx(2.5933, abs=1e-4)
    alone = clustered_interval([1.0, 0.0], ["a", "a"])
    assert (alone.low, alone.high) == (-np.inf, np.inf)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(2, 6))
@settings(deadline=None)
def test_writing_every_row_down_several_times_is_no_evidence(values: list[float], copies: int):
    """Clustered, the interval stays what it is; taken for independent rows, it would shrink."""
    groups = np.arange(len(values))
    once = clustered_interval(values, groups)
    again = clustered_interval(np.repeat(values, copies), np.repeat(groups, copies))
    assert (again.low, again.high) == pytest.approx((once.low, once.high), abs=1e-9)
    if np.std(values) > 1e-3:
        naive = clustered_interval(np.repeat(values, copies), np.arange(copies * len(values)))
        assert naive.high - naive.low < again.high - again.low


# --- what the customer answers ------------------------------------------------------------------------------


def answered_logs(num_conversations: int, *, seed: int) -> list[LabelledSequence]:
    """One turn. Who hears an `a` or a `b` answers with an `f`, everybody else with a `g`; the outcome is a coin."""
    generator = np.random.default_rng(seed)
    sequences = []
    for sequence in make_logs(num_conversations, by_response, seed=seed).sequences:
        start, end = sequence.spans[0]
        pleased = {tiny.A, tiny.B} & set(sequence.token_ids[start:end])
        sequences.append(
            dataclasses.replace(
                sequence,
                token_ids=sequence.token_ids[:end],
                spans=((start, end),),
                turns=(0,),
                returns=(float(generator.random() < 0.5),),
                messages_seen=(1,),
                next_messages=((tiny.F if pleased else tiny.G,),),
            )
        )
    return sequences


def test_the_next_message_is_learnt_from_the_end_of_the_response_and_shapes_the_trunk(folders: dict[str, Path]):
    """Outcomes are coins here, so all that the trunk can learn about a response comes from the answer to it. A linear
    reading of the hidden state then tells the two kinds of response apart; without the second task it does not."""

    def accuracy(weight: float) -> float:
        q_function = new_q_function(folders["llama"])
        sequences = answered_logs(300, seed=11)
        fit(
            q_function,
            Logs(sequences=sequences, chance=np.array([])),
            num_train=300,
            max_passes=6,
            next_message_weight=weight,
        )
        prompts, responses = all_turns_of(sequences)
        token_BT, mask_BT = pad_right([p + r for p, r in zip(prompts, responses, strict=True)])
        with torch.no_grad():
            hidden_BTD = q_function.hidden(token_BT)
        hidden_BD = hidden_BTD[torch.arange(300), mask_BT.sum(1) - 1].double().numpy()
        pleased = np.array([sequence.next_messages[0][0] == tiny.F for sequence in sequences], dtype=float)
        design = np.hstack([hidden_BD, np.ones((300, 1))])
        half = 150
        solution = np.linalg.solve(
            design[:half].T @ design[:half] + 1e-2 * np.eye(design.shape[1]), design[:half].T @ (pleased[:half] - 0.5)
        )
        return float(((design[half:] @ solution > 0) == pleased[half:].astype(bool)).mean())

    with_task, without = accuracy(1.0), accuracy(0.0)
    assert with_task > 0.95
    assert with_task > without + 0.05


def test_the_loss_of_the_words_by_hand(folders: dict[str, Path]):
    """Answers: Σ_w share(w) · −log softmax(E P h + b)_w, P the identity at the start, all words with the same share. Echoes: the
    cross-entropy of σ(u · h + c_w), both zero at the start, in shares by the words' rarity among the conversations."""
    q_function = new_q_function(folders["llama"])
    sequences = [
        dataclasses.replace(
            sequence, token_ids=token_ids, spans=spans, turns=turns, returns=returns, next_messages=answers
        )
        for sequence, token_ids, spans, turns, returns, answers in zip(
            make_logs(2, by_response, seed=12).sequences,
            ((tiny.A, tiny.C, tiny.END, tiny.A, tiny.D, tiny.C, tiny.END), (tiny.A, tiny.B, tiny.END)),
            (((1, 3), (5, 7)), ((1, 3),)),
            ((0, 1), (0,)),
            ((1.0, 1.0), (0.0,)),
            (((tiny.F, tiny.G), (tiny.F,)), ((),)),
            strict=True,
        )
    ]
    task = WordTasks(q_function, sequences)
    hidden_BTD = q_function.hidden(pad_right([s.token_ids for s in sequences])[0])
    embedding_VD = q_function.model.get_input_embeddings().weight
    count_V = 1 + np.bincount([tiny.F, tiny.G, tiny.F], minlength=len(embedding_VD))

    def answer_loss(column: int, *words: int) -> float:
        logits_V = embedding_VD @ hidden_BTD[0, column] + torch.tensor(np.log(count_V / count_V.sum()))
        return -float(logits_V.log_softmax(-1)[list(words)].mean().detach())

    answers = answer_loss(2, tiny.F, tiny.G) + answer_loss(6, tiny.F)
    # One more conversation counted with each: A and the end token are in 3 of 2, B, C and D in 2 of 2, so none is rare.
    assert float(task(hidden_BTD, sequences).detach()) == pytest.approx(answers, rel=1e-5)

    others = [dataclasses.replace(sequences[1], token_ids=(tiny.A, tiny.E, tiny.END))] * 2
    task = WordTasks(q_function, [*sequences, *others])
    with torch.no_grad():  # C, D and B are rare now; each response has one of them, and none was heard before
        task.echo_bias_V[[tiny.B, tiny.C, tiny.D]] = torch.tensor([0.5, 1.0, 2.0])
    odds_of_an_echo = [1.0, 1.0, 0.5]
    echoes = sum(np.log1p(np.exp(odds)) for odds in odds_of_an_echo)
    assert float(task(hidden_BTD, sequences).detach()) == pytest.approx(answers + echoes / 3, rel=1e-5)

    # What the response itself said before does not make an echo of a word; what others said does.
    heard = dataclasses.replace(sequences[0], token_ids=(tiny.A, tiny.C, tiny.END, tiny.D, tiny.D, tiny.D, tiny.C))
    with torch.no_grad():
        hidden_BTD = q_function.hidden(pad_right([heard.token_ids])[0])
    unanswered = [dataclasses.replace(heard, next_messages=())]
    echoes = np.log1p(np.exp(1.0)) + (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))) / 2
    assert float(task(hidden_BTD, unanswered).detach()) == pytest.approx(echoes / 3, rel=1e-5)


def test_whether_a_word_was_heard_is_learnt(folders: dict[str, Path]):
    """One turn: three words of six are heard, and one of the six is said. Outcomes and answers have nothing to do with it; a
    linear reading of the hidden state at the word tells whether it was heard after a fit with the task."""
    generator = np.random.default_rng(13)
    words = (tiny.A, tiny.B, tiny.C, tiny.D, tiny.E, tiny.F)
    [example] = make_logs(1, by_response, seed=13).sequences
    sequences, is_echo = [], []
    for index in range(600):
        heard, said = generator.choice(words, size=3, replace=False).tolist(), int(generator.choice(words))
        is_echo.append(said in heard)
        sequences.append(
            dataclasses.replace(
                example,
                token_ids=(*heard, said, tiny.END),
                spans=((3, 5),),
                turns=(0,),
                returns=(float(generator.random() < 0.5),),
                messages_seen=(1,),
                next_messages=((tiny.G,),),
                conversation=index,
                group=str(index),
            )
        )

    def accuracy(weight: float) -> float:
        q_function = new_q_function(folders["llama"])
        logs = Logs(sequences=sequences, chance=np.array([]))
        fit(q_function, logs, num_train=600, max_passes=6, next_message_weight=weight)
        with torch.no_grad():
            hidden_BD = q_function.hidden(torch.tensor([s.token_ids for s in sequences]))[:, 3].double().numpy()
        design, echo = np.hstack([hidden_BD, np.ones((600, 1))]), np.array(is_echo)
        gram = design[:300].T @ design[:300] + 1e-2 * np.eye(design.shape[1])
        solution = np.linalg.solve(gram, design[:300].T @ (echo[:300] - 0.5))
        return float(((design[300:] @ solution > 0) == echo[300:]).mean())

    with_task, without = accuracy(3.0), accuracy(0.0)
    assert with_task > 0.95
    assert with_task > without + 0.05


def test_the_answers_of_a_log_are_those_that_follow_the_responses():
    policy = tiny.word_policy()
    messages = (
        Message(role="user", content="hello"),
        Message(role="assistant", content="trail or road?", suggestion="which?", decision="edited"),
        Message(role="user", content="trail"),
        Message(role="assistant", content="80 euro"),
        Message(role="assistant", content="60 euro"),
    )
    conversation = Conversation(id="c", messages=messages, outcome=1.0, end="terminated")
    turns = tokenize(conversation, policy.renderer)
    answers = [policy.tokenizer.decode(answer) for answer in turns.next_messages]
    assert answers == ["trail", "", ""], "in the customer's own words; what was sent instead is the business's"
    [sequence] = labelled_sequences(conversation, turns, gamma=1.0, index=0, group="c")
    assert sequence.next_messages == turns.next_messages


# --- returns of any size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (100.0, 0.0), (0.01, 0.0), (1.0, -5.0)])
def test_the_fit_does_not_depend_on_the_scale_and_the_origin_of_the_reward(
    folders: dict[str, Path], scale: float, offset: float
):
    """Returns of −5 or of hundreds are found as well as those of 0 and 1, in the same few passes."""
    logs = make_logs(240, by_response, seed=13)
    sequences = [dataclasses.replace(s, returns=tuple(scale * r + offset for r in s.returns)) for s in logs.sequences]
    q_function = new_q_function(folders["llama"], link="identity")
    fit(
        q_function,
        Logs(sequences=sequences, chance=logs.chance),
        num_train=180,
        loss="squared_error",
        max_passes=6,
        patience_passes=6,
    )
    read = predict(q_function, sequences, tokens_per_batch=TOKENS)
    assert float(np.mean(read.q_value)) == pytest.approx(scale * np.mean(logs.chance) + offset, abs=0.1 * scale)
    assert np.corrcoef(read.q_value, logs.chance)[0, 1] > 0.8
