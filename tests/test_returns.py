"""The turn clock: hand-worked targets, identities, and the wrong formulas failing."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterative_ppo.returns import monte_carlo, pad, retrace, sarsa, td_lambda

UNIT = st.floats(0.0, 1.0)
Batch = dict[str, np.ndarray]
on_a_busy_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def example_conversation() -> Batch:
    """Three turns: turn rewards 1, 0, 2 and Q-values 3, 5, 7 of the responses that were sent."""
    return {
        "turn_reward_NH": np.array([[1.0, 0.0, 2.0]]),
        "q_value_NH": np.array([[3.0, 5.0, 7.0]]),
        "mask_NH": np.ones((1, 3), dtype=bool),
    }


# --- Monte Carlo --------------------------------------------------------------------------------------------


def test_monte_carlo_by_hand():
    """gamma = 1/2, rewards r_1 r_2 r_3 = 1 0 2:

    G_2 = r_3                       = 2
    G_1 = r_2 + 1/2 r_3             = 0 + 1         = 1
    G_0 = r_1 + 1/2 r_2 + 1/4 r_3   = 1 + 0 + 1/2   = 1.5

    and a second conversation of two turns, rewards 0 1: G_1 = 1, G_0 = 1/2, nothing in its padding.
    """
    reward_NH, mask_NH = pad([[1.0, 0.0, 2.0], [0.0, 1.0]])
    expected = [[1.5, 1.0, 2.0], [0.5, 1.0, 0.0]]
    np.testing.assert_array_equal(monte_carlo(reward_NH, mask_NH, gamma=0.5), expected)


def test_the_response_that_reaches_the_outcome_gets_all_of_it():
    """Outcome 1 on reaching s_3 (after a_2), gamma = 1/2: G = gamma^{3-i-1} = 1/4, 1/2, 1.

    Two off-by-one slips: gamma^{k-i} discounts the response that sold (1/8, 1/4, 1/2), and paying r_i to a_i
    (the reward of the state that a_i *answers*) moves the outcome a turn early, to the wrong response
    (1/2, 1, 0).
    """
    outcome_NH, mask_NH = np.array([[0.0, 0.0, 1.0]]), np.ones((1, 3), dtype=bool)
    returns_NH = monte_carlo(outcome_NH, mask_NH, gamma=0.5)
    np.testing.assert_array_equal(returns_NH, [[0.25, 0.5, 1.0]])

    one_discount_too_many = [[sum(0.5 ** (k - i) * (k == 3) for k in range(i + 1, 4)) for i in range(3)]]
    np.testing.assert_array_equal(one_discount_too_many, [[0.125, 0.25, 0.5]])
    assert not np.allclose(returns_NH, one_discount_too_many)
    paid_to_the_state_it_answers = monte_carlo(np.array([[0.0, 1.0, 0.0]]), mask_NH, gamma=0.5)
    assert not np.allclose(returns_NH, paid_to_the_state_it_answers)


def test_monte_carlo_of_a_truncated_conversation_by_hand():
    """gamma = 1/2, rewards 0 0, then our turn cap where V(s_2) = 4: G_1 = 2, G_0 = 1. Terminated: 0, 0."""
    reward_NH, mask_NH = pad([[0.0, 0.0], [0.0, 0.0]])
    returns_NH = monte_carlo(reward_NH, mask_NH, gamma=0.5, bootstrap_N=[4.0, 0.0])
    np.testing.assert_array_equal(returns_NH, [[1.0, 2.0], [0.0, 0.0]])


# --- SARSA and TD(lambda) -----------------------------------------------------------------------------------


def test_sarsa_by_hand():
    """gamma = 1/2, rewards 1 0 2, Q 3 5 7, terminated:

    target_0 = 1 + 1/2 * 5 = 3.5      target_1 = 0 + 1/2 * 7 = 3.5      target_2 = 2 (nothing follows)
    """
    np.testing.assert_array_equal(sarsa(**example_conversation(), gamma=0.5), [[3.5, 3.5, 2.0]])


def test_a_truncated_end_is_not_a_terminated_one():
    """The same talk cut by our cap where V(s_3) = 6: target_2 = 2 + 1/2 * 6 = 5; the others do not see it.

    Treating the cut as an end would teach Q that the customer was lost there: 2.
    """
    truncated = sarsa(**example_conversation(), gamma=0.5, bootstrap_N=[6.0])
    np.testing.assert_array_equal(truncated, [[3.5, 3.5, 5.0]])
    assert not np.allclose(truncated, sarsa(**example_conversation(), gamma=0.5))


def test_the_bootstrap_stands_at_each_conversations_own_last_turn():
    """Lengths 3 and 1, bootstraps 0 and 8, gamma = 1/2: the second row's one turn gets 1 + 1/2 * 8 = 5."""
    reward_NH, mask_NH = pad([[1.0, 0.0, 2.0], [1.0]])
    q_NH, _ = pad([[3.0, 5.0, 7.0], [9.0]])
    targets_NH = sarsa(reward_NH, q_NH, mask_NH, gamma=0.5, bootstrap_N=[0.0, 8.0])
    np.testing.assert_array_equal(targets_NH, [[3.5, 3.5, 2.0], [5.0, 0.0, 0.0]])


def test_td_lambda_by_hand():
    """gamma = lambda = 1/2, rewards 1 0 2, Q 3 5 7, V(s_3) = 6, backwards:

    target_2 = 2 + 1/2 * 6                       = 5      (both terms of the bracket are the bootstrap)
    target_1 = 0 + 1/2 * (1/2 * 7 + 1/2 * 5)     = 3
    target_0 = 1 + 1/2 * (1/2 * 5 + 1/2 * 3)     = 3
    """
    targets_NH = td_lambda(**example_conversation(), gamma=0.5, lambda_=0.5, bootstrap_N=[6.0])
    np.testing.assert_array_equal(targets_NH, [[3.0, 3.0, 5.0]])


# --- Retrace ------------------------------------------------------------------------------------------------


def test_retrace_by_hand():
    """gamma = 1/2, lambda = 1, rewards 1 0 2, Q 3 5 7, V 4 6 8, V(s_3) = 0.

    Probabilities of the sent responses: behavior 0.5 0.8 0.2, current policy 0.1 0.4 0.6, so
    c_1 = 0.4/0.8 = 1/2 and c_2 = min(1, 0.6/0.2) = 1 (c_0 plays no part: a_0 is what is being judged).

    delta_2 = 2 + 0       - 7 = -5        target_2 = 7 - 5                           = 2
    delta_1 = 0 + 1/2 * 8 - 5 = -1        target_1 = 5 - 1 + 1/2 * 1 * (-5)          = 1.5
    delta_0 = 1 + 1/2 * 6 - 3 =  1        target_0 = 3 + 1 + 1/2 * 1/2 * (-1 - 2.5)  = 3.125

    Three slips: the ratio upside down (c_1 = 1, c_2 = 1/3), the ratio not cut at 1 (c_2 = 3), and the trace
    of a_i itself in target_i (c_0 = 1/5 instead of c_1) each give other numbers.
    """
    state_value_NH = np.array([[4.0, 6.0, 8.0]])
    behavior_NH, policy_NH = np.log([[0.5, 0.8, 0.2]]), np.log([[0.1, 0.4, 0.6]])

    def target(behavior_logprob_NH: np.ndarray, policy_logprob_NH: np.ndarray) -> np.ndarray:
        return retrace(
            **example_conversation(),
            state_value_NH=state_value_NH,
            behavior_logprob_NH=behavior_logprob_NH,
            policy_logprob_NH=policy_logprob_NH,
            gamma=0.5,
            lambda_=1.0,
        )

    np.testing.assert_allclose(target(behavior_NH, policy_NH), [[3.125, 1.5, 2.0]], atol=1e-14)

    def by_definition(trace_H: list[float], first: int = 1) -> float:
        """target_0 with the product of traces from `first` on (2 turns of correction)."""
        delta = [1.0, -1.0, -5.0]
        return 3.0 + sum(0.5**k * math.prod(trace_H[first : first + k]) * delta[k] for k in range(3))

    assert by_definition([0.2, 0.5, 1.0]) == pytest.approx(3.125)
    wrong = [
        by_definition([1.0, 1.0, 1 / 3]),
        by_definition([0.2, 0.5, 3.0]),
        by_definition([0.2, 0.5, 1.0], 0),
    ]
    assert all(abs(value - 3.125) > 0.01 for value in wrong)
    assert target(policy_NH, behavior_NH)[0, 0] == pytest.approx(wrong[0])


def test_retrace_with_extreme_log_probabilities():
    """Responses of many tokens: log-ratios of +2000, -2000 and -inf are traces of 1, 0 and 0, no overflow.

    gamma = 1, Q 3 5 7, V = Q: target_2 = 2. Trace 1 at a_2: target_1 = 0 + 7 + (2 - 7) = 2. Trace 0 at a_1:
    target_0 = 1 + 5 = 6.
    """
    conversation = example_conversation()
    for policy_logprob in (-2500.0, -np.inf):
        with np.errstate(over="raise", invalid="raise"):
            targets_NH = retrace(
                **conversation,
                state_value_NH=conversation["q_value_NH"],
                behavior_logprob_NH=np.array([[-1.0, -500.0, -2500.0]]),
                policy_logprob_NH=np.array([[-1.0, policy_logprob, -500.0]]),
                gamma=1.0,
                lambda_=1.0,
            )
        np.testing.assert_array_equal(targets_NH, [[6.0, 2.0, 2.0]])


# A chain of two turns. From s_0 a response L leads on to s_1 with probability 0.9 and R with 0.4 (else the
# customer leaves); from s_1 L sells with probability 0.2 and R with 0.7.
CONTINUES = {"L": 0.9, "R": 0.4}
SELLS = {"L": 0.2, "R": 0.7}
CHAIN_GAMMA = 0.5
BEHAVIOR = {"L": 0.8, "R": 0.2}
POLICY = {"L": 0.3, "R": 0.7}


def chain_q_values(policy: dict[str, float]) -> list[dict[str, float]]:
    """Q(s_1, a) = P(sells | a); Q(s_0, a) = gamma * P(continues | a) * E_policy Q(s_1, .)."""
    value_1 = sum(policy[a] * SELLS[a] for a in "LR")
    return [{a: CHAIN_GAMMA * CONTINUES[a] * value_1 for a in "LR"}, SELLS]


def chain_expected_target(
    q_value: list[dict[str, float]], state_value: Callable[[int, str], float], lambda_: float
) -> list[dict[str, float]]:
    """E[target | s_i, a_i] under the behavior policy, by listing every conversation that can happen."""
    talks: list[tuple[float, str, list[float]]] = []
    for first in "LR":
        talks.append((1 - CONTINUES[first], first, [0.0]))
        for second, sold in itertools.product("LR", (0.0, 1.0)):
            ends_so = SELLS[second] if sold else 1 - SELLS[second]
            talks.append((CONTINUES[first] * BEHAVIOR[second] * ends_so, first + second, [0.0, sold]))

    def rows(value: Callable[[int, str], float]) -> np.ndarray:
        return pad([[value(turn, a) for turn, a in enumerate(actions)] for _, actions, _ in talks])[0]

    reward_NH, mask_NH = pad([reward for _, _, reward in talks])
    target_NH = retrace(
        reward_NH,
        rows(lambda turn, a: q_value[turn][a]),
        rows(state_value),
        mask_NH,
        behavior_logprob_NH=rows(lambda _, a: math.log(BEHAVIOR[a])),
        policy_logprob_NH=rows(lambda _, a: math.log(POLICY[a])),
        gamma=CHAIN_GAMMA,
        lambda_=lambda_,
    )
    probability_N = np.array([p for p, _, _ in talks])
    expected = []
    for turn in (0, 1):
        weight = {a: probability_N * [(talk + "  ")[turn] == a for _, talk, _ in talks] for a in "LR"}
        expected.append({a: float(weight[a] @ target_NH[:, turn] / weight[a].sum()) for a in "LR"})
    return expected


def mean_over_policy(q_value: list[dict[str, float]]) -> Callable[[int, str], float]:
    return lambda turn, _: sum(POLICY[a] * q_value[turn][a] for a in "LR")


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_retrace_has_the_current_policys_q_as_its_fixed_point(lambda_: float):
    """With Q = Q^policy and V = E_policy Q, E_behavior[target | s, a] = Q^policy(s, a), for every lambda.

    By hand: V(s_1) = 0.3 * 0.2 + 0.7 * 0.7 = 0.55, Q^policy(s_0, L) = 1/2 * 0.9 * 0.55 = 0.2475; under the
    behavior policy V(s_1) = 0.8 * 0.2 + 0.2 * 0.7 = 0.30, Q^behavior(s_0, L) = 0.135.
    """
    exact = chain_q_values(POLICY)
    assert exact[0]["L"] == pytest.approx(0.2475)
    assert chain_q_values(BEHAVIOR)[0]["L"] == pytest.approx(0.135)
    expected = chain_expected_target(exact, mean_over_policy(exact), lambda_)
    for turn in (0, 1):
        assert expected[turn] == pytest.approx(exact[turn], abs=1e-14)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_repeated_retrace_reaches_the_current_policys_q_from_a_wrong_start(lambda_: float):
    """On a chain of two turns two rounds are enough: the last turn is right after one, the first after 2."""
    q_value = [{"L": 5.0, "R": -3.0}, {"L": 2.0, "R": 4.0}]
    for _ in range(2):
        q_value = chain_expected_target(q_value, mean_over_policy(q_value), lambda_)
    exact = chain_q_values(POLICY)
    for turn in (0, 1):
        assert q_value[turn] == pytest.approx(exact[turn], abs=1e-14)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_the_one_sample_state_value_is_wrong_off_policy(lambda_: float):
    """With V(s) := Q(s, a) of the logged a, the fixed point is Q of the *behavior* policy instead."""
    behavior = chain_q_values(BEHAVIOR)
    expected = chain_expected_target(behavior, lambda turn, a: behavior[turn][a], lambda_)
    assert expected[0] == pytest.approx(behavior[0], abs=1e-14)
    exact = chain_q_values(POLICY)
    expected = chain_expected_target(exact, lambda turn, a: exact[turn][a], lambda_)
    assert abs(expected[0]["L"] - exact[0]["L"]) > 0.05


def test_retrace_on_policy_differs_from_monte_carlo_by_a_control_variate():
    """On-policy, lambda 1: target_i - G_i = sum_{k>i} gamma^{k-i} [V(s_k) - Q(s_k, a_k)].

    gamma = 1/2, Q 3 5 7, V 4 6 8 (so V - Q = 1 everywhere): differences 1/2 + 1/4, 1/2, 0.
    """
    conversation = example_conversation()
    logprob_NH = np.log([[0.5, 0.8, 0.2]])
    targets_NH = retrace(
        **conversation,
        state_value_NH=conversation["q_value_NH"] + 1.0,
        behavior_logprob_NH=logprob_NH,
        policy_logprob_NH=logprob_NH,
        gamma=0.5,
        lambda_=1.0,
    )
    returns_NH = monte_carlo(conversation["turn_reward_NH"], conversation["mask_NH"], gamma=0.5)
    np.testing.assert_allclose(targets_NH - returns_NH, [[0.75, 0.5, 0.0]], atol=1e-14)


# --- For all inputs -----------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """A ragged batch of up to 5 conversations of 0 to 6 turns, with everything that any target needs."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    number = st.floats(-100.0, 100.0)

    def array(numbers: st.SearchStrategy[float]) -> np.ndarray:
        return pad([draw(st.lists(numbers, min_size=length, max_size=length)) for length in lengths])[0]

    return {
        "turn_reward_NH": array(number),
        "q_value_NH": array(number),
        "state_value_NH": array(number),
        "behavior_logprob_NH": array(st.floats(-5.0, 0.0)),
        "policy_logprob_NH": array(st.floats(-5.0, 0.0)),
        "mask_NH": pad([[1.0] * length for length in lengths])[1],
        "bootstrap_N": np.array(draw(st.lists(number, min_size=len(lengths), max_size=len(lengths)))),
    }


def all_targets(batch: Batch, gamma: float, lambda_: float) -> dict[str, np.ndarray]:
    reward_NH, q_NH, mask_NH = batch["turn_reward_NH"], batch["q_value_NH"], batch["mask_NH"]
    end = {"bootstrap_N": batch["bootstrap_N"]}
    return {
        "monte_carlo": monte_carlo(reward_NH, mask_NH, gamma=gamma, **end),
        "sarsa": sarsa(reward_NH, q_NH, mask_NH, gamma=gamma, **end),
        "td_lambda": td_lambda(reward_NH, q_NH, mask_NH, gamma=gamma, lambda_=lambda_, **end),
        "retrace": retrace(**batch, gamma=gamma, lambda_=lambda_),
    }


@on_a_busy_machine
@given(batches(), UNIT, UNIT)
def test_targets_follow_their_definitions(batch: Batch, gamma: float, lambda_: float):
    """The backward recursions equal the sums they stand for, written out turn by turn:

    Monte Carlo  sum_{k>i} gamma^{k-i-1} r_k
    TD(lambda)   the (1 - lambda) lambda^{n-1} mixture of n-step targets, the rest of the weight on the return
    Retrace      Q + sum_{k>=i} gamma^{k-i} (prod_{j=i+1..k} c_j) delta_k
    """
    targets = all_targets(batch, gamma, lambda_)
    for row, length in enumerate(batch["mask_NH"].sum(axis=1)):
        r, q = batch["turn_reward_NH"][row, :length], batch["q_value_NH"][row, :length]
        end = batch["bootstrap_N"][row]
        next_v = np.append(batch["state_value_NH"][row, 1:length], end)
        ratio = np.exp(batch["policy_logprob_NH"][row] - batch["behavior_logprob_NH"][row])
        trace = lambda_ * np.minimum(1.0, ratio)
        for i in range(length):
            n_step = [
                sum(gamma ** (k - i) * r[k] for k in range(i, i + n)) + gamma**n * np.append(q, end)[i + n]
                for n in range(1, length - i + 1)
            ]
            weight = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, length - i)]
            weight.append(lambda_ ** (length - i - 1))
            delta = r + gamma * next_v - q
            decay = [gamma ** (k - i) * math.prod(trace[i + 1 : k + 1]) for k in range(i, length)]
            assert targets["monte_carlo"][row, i] == pytest.approx(n_step[-1], abs=1e-9)
            assert targets["sarsa"][row, i] == pytest.approx(n_step[0], abs=1e-9)
            assert targets["td_lambda"][row, i] == pytest.approx(np.dot(weight, n_step), abs=1e-9)
            assert targets["retrace"][row, i] == pytest.approx(q[i] + np.dot(decay, delta[i:]), abs=1e-9)


@on_a_busy_machine
@given(batches(), UNIT)
def test_lambda_one_is_monte_carlo_and_lambda_zero_is_sarsa(batch: Batch, gamma: float):
    one, zero = all_targets(batch, gamma, 1.0), all_targets(batch, gamma, 0.0)
    np.testing.assert_allclose(one["td_lambda"], one["monte_carlo"], atol=1e-9)
    np.testing.assert_allclose(zero["td_lambda"], zero["sarsa"], atol=1e-9)


@on_a_busy_machine
@given(batches(), UNIT, UNIT)
def test_one_sample_retrace_on_policy_is_td_lambda(batch: Batch, gamma: float, lambda_: float):
    """Ratio 1 and V(s) := Q(s, a): the corrections telescope to TD(lambda), so to Monte Carlo at lambda 1."""
    on_policy = batch | {
        "policy_logprob_NH": batch["behavior_logprob_NH"],
        "state_value_NH": batch["q_value_NH"],
    }
    targets = all_targets(on_policy, gamma, lambda_)
    np.testing.assert_allclose(targets["retrace"], targets["td_lambda"], atol=1e-9)
    targets = all_targets(on_policy, gamma, 1.0)
    np.testing.assert_allclose(targets["retrace"], targets["monte_carlo"], atol=1e-9)


@on_a_busy_machine
@given(batches(), UNIT, UNIT)
def test_a_q_that_agrees_with_the_log_is_its_own_target(batch: Batch, gamma: float, lambda_: float):
    """If Q(s_i, a_i) = r_{i+1} + gamma Q(s_{i+1}, a_{i+1}) along the log, every lambda gives back Q."""
    q_NH = all_targets(batch, gamma, 1.0)["monte_carlo"]
    agreed = batch | {"q_value_NH": q_NH, "state_value_NH": q_NH}
    for target_NH in all_targets(agreed, gamma, lambda_).values():
        np.testing.assert_allclose(target_NH, q_NH, atol=1e-9)


@on_a_busy_machine
@given(batches(), UNIT, UNIT, st.randoms(use_true_random=False))
def test_batch_order_does_not_matter(batch: Batch, gamma: float, lambda_: float, random):
    order = list(range(len(batch["mask_NH"])))
    random.shuffle(order)
    shuffled = all_targets({name: array[order] for name, array in batch.items()}, gamma, lambda_)
    for name, target_NH in all_targets(batch, gamma, lambda_).items():
        np.testing.assert_array_equal(shuffled[name], target_NH[order])


@on_a_busy_machine
@given(batches(), UNIT, UNIT, st.sampled_from([np.nan, np.inf, -np.inf, 1e300]), st.integers(0, 3))
def test_padding_never_matters(batch: Batch, gamma: float, lambda_: float, junk: float, extra_turns: int):
    """Wider padding with anything in it, NaN too, leaves real turns bit-identical and gives 0 elsewhere."""

    def wider(array: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, extra_turns)), constant_values=fill)

    mask_NH = batch["mask_NH"]
    junked = {
        name: wider(np.where(mask_NH, array, junk), junk) if name.endswith("_NH") else array
        for name, array in batch.items()
    } | {"mask_NH": wider(mask_NH, False)}
    for (name, target_NH), (_, other_NH) in zip(
        all_targets(batch, gamma, lambda_).items(), all_targets(junked, gamma, lambda_).items(), strict=True
    ):
        np.testing.assert_array_equal(wider(target_NH, 0.0), other_NH, err_msg=name)


# --- The boundary -------------------------------------------------------------------------------------------


def test_pad_by_hand():
    array_NH, mask_NH = pad([[1.0, 2.0], [], [3.0]])
    np.testing.assert_array_equal(array_NH, [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_array_equal(mask_NH, [[True, True], [False, False], [True, False]])
    assert (array_NH.dtype, mask_NH.dtype) == (np.float64, np.bool_)


def test_no_conversations_and_no_turns_give_empty_targets():
    for rows, shape in (([], (0, 0)), ([[], []], (2, 0))):
        array_NH, mask_NH = pad(rows)
        assert array_NH.shape == mask_NH.shape == shape
        assert monte_carlo(array_NH, mask_NH, gamma=0.9).shape == shape


def test_inputs_are_left_as_they_were():
    conversation = example_conversation()
    td_lambda(**conversation, gamma=0.5, lambda_=0.5)
    for name, array in example_conversation().items():
        np.testing.assert_array_equal(conversation[name], array)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_discounts_outside_the_unit_interval_are_refused(bad: float):
    conversation = example_conversation()
    reward_NH, q_NH, mask_NH = conversation.values()
    logprobs = {"behavior_logprob_NH": q_NH, "policy_logprob_NH": q_NH}
    for call in (
        lambda: monte_carlo(reward_NH, mask_NH, gamma=bad),
        lambda: sarsa(reward_NH, q_NH, mask_NH, gamma=bad),
        lambda: td_lambda(reward_NH, q_NH, mask_NH, gamma=bad, lambda_=0.5),
        lambda: retrace(reward_NH, q_NH, q_NH, mask_NH, gamma=bad, lambda_=0.5, **logprobs),
    ):
        with pytest.raises(ValueError, match="gamma"):
            call()
    with pytest.raises(ValueError, match="lambda_"):
        td_lambda(reward_NH, q_NH, mask_NH, gamma=0.5, lambda_=bad)
    with pytest.raises(ValueError, match="lambda_"):
        retrace(reward_NH, q_NH, q_NH, mask_NH, gamma=0.5, lambda_=bad, **logprobs)


def test_shapes_that_differ_and_broken_masks_are_refused():
    reward_NH, q_NH, mask_NH = example_conversation().values()
    with pytest.raises(ValueError, match="turn_reward_NH has shape"):
        monte_carlo(reward_NH[:, :2], mask_NH, gamma=0.5)
    with pytest.raises(ValueError, match="q_value_NH has shape"):
        sarsa(reward_NH, q_NH[0], mask_NH, gamma=0.5)
    with pytest.raises(ValueError, match="bootstrap_N has shape"):
        sarsa(reward_NH, q_NH, mask_NH, gamma=0.5, bootstrap_N=[[1.0]])
    with pytest.raises(ValueError, match="boolean"):
        monte_carlo(reward_NH, np.ones((1, 3)), gamma=0.5)
    with pytest.raises(ValueError, match="boolean"):
        monte_carlo(reward_NH[0], mask_NH[0], gamma=0.5)
    with pytest.raises(ValueError, match="prefix"):
        monte_carlo(reward_NH, np.array([[True, False, True]]), gamma=0.5)
