"""The turn clock: what the logs say Q(state, response) should be.

A conversation is s_0, a_0, r_1, s_1, a_1, r_2, ..., and r_{i+1} is paid on *reaching* s_{i+1}. Column i of
every array belongs to response a_i, so `turn_reward_NH[:, i]` is r_{i+1}: what followed a_i.

| target | evaluates | unbiased when |
|---|---|---|
| `monte_carlo` | the policy that wrote the logs | always (on-policy data, uncensored ends) |
| `sarsa`, `td_lambda` | the policy that wrote the logs | `q_value_NH` is that policy's Q, or λ = 1 |
| `retrace` | the current policy, from another policy's logs | `q_value_NH` is the current policy's Q |

Shapes: `N` conversations, `H` turns. Arrays are padded on the right; `mask_NH` is True at the real turns, a
prefix of each row. What stands in the padding never matters, not even a NaN; targets there are 0.

Ends: `bootstrap_N` is the value of the state after a conversation's last turn. It is 0 where the conversation
was *terminated* (the outcome came, or a side went silent) and an estimate of V there where it was *truncated*
by our turn cap. A *censored* conversation has no target at all: leave it out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def monte_carlo(
    turn_reward_NH: npt.ArrayLike,
    mask_NH: BoolArray,
    *,
    gamma: float,
    bootstrap_N: npt.ArrayLike | None = None,
) -> FloatArray:
    """The discounted sum of what was paid after each response.

        G_i = Σ_{k>i} γ^{k-i-1} r_k + γ^{L-i} * bootstrap

    for a conversation of L turns. An outcome of 1 reached by the last response gives G_i = γ^{L-1-i}: the
    last response gets all of it.

    Unbiased for Q of the policy that wrote the logs, whatever that policy was; says nothing about another.

    Args:
        turn_reward_NH: r_{i+1} in column i.
        mask_NH: True at real turns.
        gamma: turn discount, in [0, 1].
        bootstrap_N: value of the state after the last turn; None for 0 everywhere (all terminated).

    Returns:
        Returns, shape NH, 0 in the padding.

    Raises:
        ValueError: gamma outside [0, 1], shapes that differ, or a mask that is not a prefix of each row.

    Reference: Jiang et al. 2025, arXiv 2511.21638, Observation 2; Sutton & Barto 2018, eq. 3.8.
    """
    _check_fraction("gamma", gamma)
    mask_NH = _checked_mask(mask_NH)
    reward_NH = _checked("turn_reward_NH", turn_reward_NH, mask_NH)
    end_value_NH = _after_turn(np.zeros_like(reward_NH), mask_NH, _checked_bootstrap(bootstrap_N, mask_NH))
    return _accumulate_backward(reward_NH + gamma * end_value_NH, np.full_like(reward_NH, gamma))


def sarsa(
    turn_reward_NH: npt.ArrayLike,
    q_value_NH: npt.ArrayLike,
    mask_NH: BoolArray,
    *,
    gamma: float,
    bootstrap_N: npt.ArrayLike | None = None,
) -> FloatArray:
    """One real turn, then the value of the response that really came next.

        target_i = r_{i+1} + γ Q(s_{i+1}, a_{i+1})

    After the last turn Q is replaced by the bootstrap.

    Less variance than Monte Carlo, and biased as far as `q_value_NH` is wrong at the next turn.

    Args:
        turn_reward_NH: r_{i+1} in column i.
        q_value_NH: Q(s_i, a_i) of the logged responses.
        mask_NH: True at real turns.
        gamma: turn discount, in [0, 1].
        bootstrap_N: value of the state after the last turn; None for 0 everywhere (all terminated).

    Returns:
        Targets, shape NH, 0 in the padding.

    Raises:
        ValueError: as `monte_carlo`.

    Reference: Sutton & Barto 2018, eq. 6.7.
    """
    _check_fraction("gamma", gamma)
    mask_NH = _checked_mask(mask_NH)
    reward_NH = _checked("turn_reward_NH", turn_reward_NH, mask_NH)
    q_NH = _checked("q_value_NH", q_value_NH, mask_NH)
    return reward_NH + gamma * _after_turn(q_NH, mask_NH, _checked_bootstrap(bootstrap_N, mask_NH))


def td_lambda(
    turn_reward_NH: npt.ArrayLike,
    q_value_NH: npt.ArrayLike,
    mask_NH: BoolArray,
    *,
    gamma: float,
    lambda_: float,
    bootstrap_N: npt.ArrayLike | None = None,
) -> FloatArray:
    """The geometric mean between `sarsa` (λ = 0) and `monte_carlo` (λ = 1).

        target_i = r_{i+1} + γ [(1 − λ) Q(s_{i+1}, a_{i+1}) + λ target_{i+1}]

    After the last turn both terms in the bracket are the bootstrap.

    At λ = 1 `q_value_NH` has no effect and the target is unbiased; below, variance is bought with the bias
    of `q_value_NH`. Corrects for no difference between the policy that wrote the logs and another.

    Args:
        turn_reward_NH: r_{i+1} in column i.
        q_value_NH: Q(s_i, a_i) of the logged responses.
        mask_NH: True at real turns.
        gamma: turn discount, in [0, 1].
        lambda_: weight on what really followed, in [0, 1].
        bootstrap_N: value of the state after the last turn; None for 0 everywhere (all terminated).

    Returns:
        Targets, shape NH, 0 in the padding.

    Raises:
        ValueError: as `monte_carlo`, and lambda_ outside [0, 1].

    Reference: Sutton & Barto 2018, eq. 12.19 (the lambda-return for action values, recursively).
    """
    _check_fraction("gamma", gamma)
    _check_fraction("lambda_", lambda_)
    mask_NH = _checked_mask(mask_NH)
    reward_NH = _checked("turn_reward_NH", turn_reward_NH, mask_NH)
    q_NH = _checked("q_value_NH", q_value_NH, mask_NH)
    q_weight_NH = np.where(_is_last_turn(mask_NH), 1.0, 1.0 - lambda_)
    next_q_NH = _after_turn(q_NH, mask_NH, _checked_bootstrap(bootstrap_N, mask_NH))
    one_step_NH = reward_NH + gamma * q_weight_NH * next_q_NH
    return _accumulate_backward(one_step_NH, np.full_like(reward_NH, gamma * lambda_))


def retrace(
    turn_reward_NH: npt.ArrayLike,
    q_value_NH: npt.ArrayLike,
    state_value_NH: npt.ArrayLike,
    mask_NH: BoolArray,
    *,
    behavior_logprob_NH: npt.ArrayLike,
    policy_logprob_NH: npt.ArrayLike,
    gamma: float,
    lambda_: float,
    bootstrap_N: npt.ArrayLike | None = None,
) -> FloatArray:
    """What the *current* policy's Q should be, from conversations that another policy held.

        target_i = Q(s_i, a_i) + Σ_{k>=i} γ^{k-i} (c_{i+1} ... c_k) δ_k
        δ_k = r_{k+1} + γ V(s_{k+1}) − Q(s_k, a_k),   V(s) = E_{a~policy} Q(s, a)
        c_k = λ min(1, policy(a_k | s_k) / behavior(a_k | s_k))

    or, backwards, target_i = r_{i+1} + γ [V(s_{i+1}) + c_{i+1} (target_{i+1} − Q(s_{i+1}, a_{i+1}))].

    For every behavior policy and every λ, Q of the current policy is the fixed point in expectation. With
    a wrong Q the expected target is off by what the cut traces leave uncorrected; fit again and repeat. A
    response's ratio is a product over its tokens, so on long responses the trace is soon cut and the target
    comes close to r + γ V.

    **On-policy** (ratio 1), target_i − G_i = Σ_{k>i} γ^{k-i} [V(s_k) − Q(s_k, a_k)] at λ = 1:
    - with V the true expectation of Q this has mean zero: Monte Carlo in expectation, not row by row, and the
      term is a control variate (it takes out the luck of which response was drawn later on);
    - with `state_value_NH = q_value_NH` (the one-sample estimate of V, right on-policy only) it is zero:
      the target is `td_lambda` at every λ, row by row, hence `monte_carlo` at λ = 1.
    Off-policy the one-sample form is wrong at every λ: its fixed point is the behavior policy's Q.

    Args:
        turn_reward_NH: r_{i+1} in column i.
        q_value_NH: Q(s_i, a_i) of the logged responses.
        state_value_NH: V(s_i), the mean of Q over responses of the *current* policy.
        mask_NH: True at real turns.
        behavior_logprob_NH: log-probability of the logged response when it was drawn, summed over tokens.
        policy_logprob_NH: the same under the current policy; -inf (impossible by now) cuts the trace.
        gamma: turn discount, in [0, 1].
        lambda_: weight on the corrections from later turns, in [0, 1].
        bootstrap_N: value of the state after the last turn; None for 0 everywhere (all terminated).

    Returns:
        Targets, shape NH, 0 in the padding.

    Raises:
        ValueError: as `td_lambda`.

    Reference: Munos, Stepleton, Harutyunyan, Bellemare 2016, "Safe and efficient off-policy reinforcement
    learning", arXiv 1606.02647.
    """
    _check_fraction("gamma", gamma)
    _check_fraction("lambda_", lambda_)
    mask_NH = _checked_mask(mask_NH)
    reward_NH = _checked("turn_reward_NH", turn_reward_NH, mask_NH)
    q_NH = _checked("q_value_NH", q_value_NH, mask_NH)
    state_value_NH = _checked("state_value_NH", state_value_NH, mask_NH)
    behavior_NH = _checked("behavior_logprob_NH", behavior_logprob_NH, mask_NH)
    policy_NH = _checked("policy_logprob_NH", policy_logprob_NH, mask_NH)
    bootstrap_N = _checked_bootstrap(bootstrap_N, mask_NH)

    # The minimum comes before the exponential: a response that became e^800 times likelier has a ratio of 1.
    trace_NH = lambda_ * np.exp(np.minimum(0.0, policy_NH - behavior_NH))
    next_trace_NH = _after_turn(trace_NH, mask_NH, np.zeros_like(bootstrap_N))
    td_error_NH = reward_NH + gamma * _after_turn(state_value_NH, mask_NH, bootstrap_N) - q_NH
    return q_NH + _accumulate_backward(td_error_NH, gamma * next_trace_NH)


def pad(rows: Sequence[Sequence[float]]) -> tuple[FloatArray, BoolArray]:
    """Ragged rows as one array and its mask: `pad([[1, 2], [3]])` is `[[1, 2], [3, 0]], [[T, T], [T, F]]`.

    Args:
        rows: one sequence of numbers a conversation; lengths may differ and may be 0.

    Returns:
        The values, shape NH with H the longest row, 0 in the padding; and the mask, True at real values.
    """
    length_N = np.array([len(row) for row in rows], dtype=np.int64)
    mask_NH = np.arange(length_N.max(initial=0)) < length_N[:, None]
    array_NH = np.zeros(mask_NH.shape)
    for row_H, row in zip(array_NH, rows, strict=True):
        row_H[: len(row)] = row
    return array_NH, mask_NH


def _accumulate_backward(term_NH: FloatArray, decay_NH: FloatArray) -> FloatArray:
    """x_i = term_i + decay_i * x_{i+1}, from the last turn to the first, with x = 0 after the end."""
    total_NH = np.zeros_like(term_NH)
    total_N = np.zeros(term_NH.shape[0])
    for turn in reversed(range(term_NH.shape[1])):
        total_N = term_NH[:, turn] + decay_NH[:, turn] * total_N
        total_NH[:, turn] = total_N
    return total_NH


def _after_turn(value_NH: FloatArray, mask_NH: BoolArray, bootstrap_N: FloatArray) -> FloatArray:
    """The value one turn later: column i+1, the bootstrap at the last real turn, 0 in the padding."""
    next_NH = np.zeros_like(value_NH)
    next_NH[:, :-1] = value_NH[:, 1:]
    return np.where(_is_last_turn(mask_NH), bootstrap_N[:, None], next_NH)


def _is_last_turn(mask_NH: BoolArray) -> BoolArray:
    next_is_real_NH = np.zeros_like(mask_NH)
    next_is_real_NH[:, :-1] = mask_NH[:, 1:]
    return mask_NH & ~next_is_real_NH


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _checked_mask(mask_NH: BoolArray) -> BoolArray:
    mask_NH = np.asarray(mask_NH)
    if mask_NH.dtype != np.bool_ or mask_NH.ndim != 2:
        raise ValueError(f"mask_NH must be boolean [N, H], got {mask_NH.dtype} of shape {mask_NH.shape}")
    if np.any(mask_NH[:, 1:] & ~mask_NH[:, :-1]):
        raise ValueError("mask_NH must be True on a prefix of each row: a real turn follows a padded one")
    return mask_NH


def _checked(name: str, array_NH: npt.ArrayLike, mask_NH: BoolArray) -> FloatArray:
    """The array as float64 with the padding set to 0."""
    array = np.asarray(array_NH, dtype=np.float64)
    if array.shape != mask_NH.shape:
        raise ValueError(f"{name} has shape {array.shape}, mask_NH has {mask_NH.shape}")
    return np.where(mask_NH, array, 0.0)


def _checked_bootstrap(bootstrap_N: npt.ArrayLike | None, mask_NH: BoolArray) -> FloatArray:
    num_conversations = mask_NH.shape[0]
    if bootstrap_N is None:
        return np.zeros(num_conversations)
    bootstrap = np.asarray(bootstrap_N, dtype=np.float64)
    if bootstrap.shape != (num_conversations,):
        raise ValueError(f"bootstrap_N has shape {bootstrap.shape}, expected ({num_conversations},)")
    return bootstrap
