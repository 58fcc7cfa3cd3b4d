"""Why single-turn PPO with Q^π as its reward model improves a multi-turn policy: every step, exactly.

Source: Jiang, Bhandari, Yang, Munos, Lu, arXiv 2511.21638. A small conversation (see `tabular.py`) is solved
exactly, so each claim is an equation or an inequality between numbers that hold to 1e-10, and next to it
stands the tempting variant that does not hold. Read from the top:

1. within one response, tokens and turns agree: values, advantages, gradients, GAE;
2. a better response in every state is a better policy: Theorem 1 and the lemma under it;
3. what an imperfect Q and optimizer cost: the closed form, Theorem 2, its KL anchor and direction;
4. repeated, the steps reach the optimal policy, and Monte Carlo returns are the right labels for Q^π.

Notation: π the current policy, π' the next, Q = Q^π, V = V^π, d^π the discounted state distribution.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import tabular
import torch
from tabular import Conversation, Talk, TurnValues
from torch import Tensor

from iterative_ppo.losses import generalized_advantage_estimation, terminal_token_reward
from iterative_ppo.returns import monte_carlo, pad

EXACT = 1e-10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of a dozen rows: a second thread only makes the first one wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A random conversation and a random policy on it, evaluated."""

    generator: torch.Generator
    num_turns: int
    conversation: Conversation
    logits_SPV: Tensor
    token_prob_SPV: Tensor
    prob_SA: Tensor
    values: TurnValues


def instances(count: int, *, num_moods: int = 3) -> Iterator[Instance]:
    """Two, three and four turns in rotation; customer, rewards, turn discount and policy are drawn anew."""
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        num_turns = 2 + seed % 3
        conversation = tabular.random_conversation(generator, num_turns=num_turns, num_moods=num_moods)
        logits_SPV = tabular.random_logits(generator, conversation)
        token_prob_SPV = tabular.token_policy(logits_SPV)
        prob_SA = tabular.response_probabilities(token_prob_SPV)
        yield Instance(
            generator=generator,
            num_turns=num_turns,
            conversation=conversation,
            logits_SPV=logits_SPV,
            token_prob_SPV=token_prob_SPV,
            prob_SA=prob_SA,
            values=tabular.evaluate(conversation, prob_SA),
        )


def random_policy(instance: Instance, scale: float = 1.0) -> Tensor:
    logits_SPV = tabular.random_logits(instance.generator, instance.conversation, scale)
    return tabular.response_probabilities(tabular.token_policy(logits_SPV))


def random_uniform(instance: Instance, *shape: int) -> Tensor:
    return torch.rand(shape, generator=instance.generator, dtype=torch.float64)


def mean(prob_SA: Tensor, value_SA: Tensor) -> Tensor:
    """E_{a ~ prob}[value(s, a)] at every state."""
    return (prob_SA * value_SA).sum(-1)


def kl(p_SA: Tensor, q_SA: Tensor) -> Tensor:
    """KL(p‖q) = Σ_a p log(p/q) at every state."""
    return (p_SA * (p_SA.log() - q_SA.log())).sum(-1)


def closed_form(prob_SA: Tensor, q_SA: Tensor, beta: float) -> Tensor:
    """π' ∝ π exp(Q/β): what single-turn RLHF with reward Q and KL coefficient β converges to."""
    return (prob_SA.log() + q_SA / beta).softmax(-1)


def reverse_kl_objective(mu_SA: Tensor, prob_SA: Tensor, q_SA: Tensor, beta: float) -> Tensor:
    """L_s(μ) = E_μ Q − β KL(μ‖π), the objective of RLHF."""
    return mean(mu_SA, q_SA) - beta * kl(mu_SA, prob_SA)


def forward_kl_objective(mu_SA: Tensor, prob_SA: Tensor, q_SA: Tensor, beta: float) -> Tensor:
    """L_s(μ) = E_μ Q − β KL(π‖μ), the objective in the paper."""
    return mean(mu_SA, q_SA) - beta * kl(prob_SA, mu_SA)


def forward_kl_form(prob_SA: Tensor, q_SA: Tensor, beta: float) -> Tensor:
    """The maximiser of E_μ Q − β KL(π‖μ): μ(a) = β π(a) / (η(s) − Q(s,a)).

    η(s) > max_a Q makes μ sum to 1; the sum falls in η and lies on both sides of 1 at the two ends below.
    """
    best_S, best = q_SA.max(-1)
    low_S = best_S + beta * prob_SA.gather(-1, best[:, None]).squeeze(-1)
    high_S = best_S + beta
    for _ in range(100):
        eta_S = (low_S + high_S) / 2
        too_low_S = (beta * prob_SA / (eta_S[:, None] - q_SA)).sum(-1) > 1
        low_S, high_S = torch.where(too_low_S, eta_S, low_S), torch.where(too_low_S, high_S, eta_S)
    return beta * prob_SA / (((low_S + high_S) / 2)[:, None] - q_SA)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=EXACT)


def differ(actual: Tensor, other: Tensor) -> bool:
    return (actual - other).abs().max().item() > 1e-3


# === 1. Tokens and turns agree within one response ==========================================================


def test_any_policy_over_responses_is_a_token_policy():
    """π(a|s) = Π_t π(y_t | s, y_<t): multiplying out gives a distribution, and splitting it up again the same
    conditionals. So to optimise over token policies is to optimise over all policies."""
    for instance in instances(6):
        assert_exact(instance.prob_SA.sum(-1), torch.ones_like(instance.prob_SA[:, 0]))
        assert_exact(tabular.token_conditionals(instance.prob_SA), instance.token_prob_SPV)


def test_the_token_value_of_the_empty_prefix_is_the_turn_value():
    """With token reward 0 but Q(s,a) at the end token, and token discount 1, the value before the first token
    is V_token(s, ∅) = E_{a~π(.|s)}[Q(s,a)] = V(s), at every state.

    Q of another policy as the reward gives another value: Q must belong to the policy that is being improved.
    """
    for instance in instances(12):
        token_v_SP = tabular.token_values(instance.token_prob_SPV, instance.values.q_SA).v_SP
        assert_exact(token_v_SP[:, 0], instance.values.v_S)

        q_of_another_SA = tabular.evaluate(instance.conversation, random_policy(instance)).q_SA
        token_v_SP = tabular.token_values(instance.token_prob_SPV, q_of_another_SA).v_SP
        assert differ(token_v_SP[:, 0], instance.values.v_S)


def test_a_token_discount_breaks_the_equality_and_prefers_short_responses():
    """With a token discount g < 1, V_token(s, ∅) = E_a[g^{len(a)-1} Q(s,a)], which is not V(s), and the
    ranking of responses turns around in favour of the short one.

    One turn, g = 0.9. `<end>` sells with probability 0.80, `a b <end>` with 0.90, all others never; π answers
    with each of the two half of the time:
        V = (0.80 + 0.90)/2 = 0.85, but V_token = (0.80 + 0.9² * 0.90)/2 = (0.80 + 0.729)/2 = 0.7645;
        the best response is `a b <end>` (0.90 > 0.80), but with g it is `<end>` (0.80 > 0.729).
    """
    short, long = tabular.RESPONSES.index((0,)), tabular.RESPONSES.index((1, 2, 0))
    sells_A = torch.zeros(7, dtype=torch.float64)
    sells_A[short], sells_A[long] = 0.8, 0.9
    conversation = tabular.hand_made(
        gamma=0.9,
        start_S=[1.0],
        transition_SAX=[[[0.0, p, 1.0 - p] for p in sells_A.tolist()]],
        reward_X=[0.0, 1.0, 0.0],
    )
    token_prob_SPV = torch.zeros(1, 7, 3, dtype=torch.float64)
    token_prob_SPV[..., 0] = 1.0
    after_nothing, after_a = tabular.PREFIXES.index(()), tabular.PREFIXES.index((1,))
    token_prob_SPV[0, after_nothing] = torch.tensor([0.5, 0.5, 0.0])
    token_prob_SPV[0, after_a] = torch.tensor([0.0, 0.0, 1.0])
    values = tabular.evaluate(conversation, tabular.response_probabilities(token_prob_SPV))
    assert values.v_S.item() == pytest.approx(0.85, abs=EXACT)

    def value_and_best(token_discount: float) -> tuple[float, int]:
        token = tabular.token_values(token_prob_SPV, values.q_SA, token_discount=token_discount)
        best_SA = tabular.greedy_responses(values.q_SA, token_discount=token_discount)
        return token.v_SP[0, 0].item(), int(best_SA.argmax())

    assert value_and_best(1.0) == (pytest.approx(0.85, abs=EXACT), long)
    assert value_and_best(0.9) == (pytest.approx(0.7645, abs=EXACT), short)


def test_token_advantages_telescope_to_the_turn_advantage():
    """Σ_t A_token(s, y_<t, y_t) = Q(s,a) − V(s) for every state and every response, whatever its length.

    With a token discount of 0.9 the sum is something else.
    """
    for instance in instances(12):
        q_SA, turn_advantage_SA = instance.values.q_SA, instance.values.q_SA - instance.values.v_S[:, None]
        token = tabular.token_values(instance.token_prob_SPV, q_SA)
        advantage_SAT = tabular.along_responses(tabular.token_advantages(token))
        assert_exact(advantage_SAT.sum(-1), turn_advantage_SA)

        discounted = tabular.token_values(instance.token_prob_SPV, q_SA, token_discount=0.9)
        advantage_SAT = tabular.along_responses(tabular.token_advantages(discounted))
        assert differ(advantage_SAT.sum(-1), turn_advantage_SA)


def single_turn_gradient(
    instance: Instance, weight_S: Tensor, reward_SA: Tensor, *, token_discount: float = 1.0
) -> Tensor:
    """Σ_s w(s) E_{a~π}[Σ_t ∇ log π(y_t | s, y_<t) A_token(s, y_<t, y_t)], in the logits of every (s, prefix).

    For a softmax ∇_{logit v} log π(y) = 1[y = v] − π(v), and Σ_y π(y) A(y) = 0, so at logit v of prefix p
    this is w(s) * P(prefix p) * π(v | s, p) * A(s, p, v). No autograd, and no turn after this one.
    """
    token = tabular.token_values(instance.token_prob_SPV, reward_SA, token_discount=token_discount)
    reach_SP = tabular.prefix_probabilities(instance.token_prob_SPV)
    prefix_weight_SP = weight_S[:, None] * reach_SP
    return prefix_weight_SP[..., None] * instance.token_prob_SPV * tabular.token_advantages(token)


def multi_turn_gradient(instance: Instance) -> Tensor:
    """∇J by autograd through the exact solution of the whole conversation: no Q, no token advantage."""
    logits_SPV = instance.logits_SPV.clone().requires_grad_()
    prob_SA = tabular.response_probabilities(tabular.token_policy(logits_SPV))
    objective = tabular.evaluate(instance.conversation, prob_SA).objective
    return torch.autograd.grad(objective, logits_SPV)[0]


def test_the_single_turn_policy_gradient_is_the_multi_turn_one():
    """∇J(π) = 1/(1−γ) Σ_s d^π(s) E_{a~π}[Σ_t ∇ log π(y_t | s, y_<t) A_token(s, y_<t, y_t)]: token-level
    policy gradient on single turns, with Q^π as a frozen reward, is the exact gradient of the multi-turn
    objective.

    Not so with the immediate turn reward in place of Q^π (Q is what holds the future), nor with a token
    discount.
    """
    for instance in instances(12):
        conversation, q_SA = instance.conversation, instance.values.q_SA
        exact = multi_turn_gradient(instance)
        d_S = tabular.discounted_state_distribution(conversation, instance.prob_SA)
        weight_S = d_S / (1 - conversation.gamma)
        assert_exact(single_turn_gradient(instance, weight_S, q_SA), exact)

        immediate_SA = conversation.transition_SAX @ conversation.reward_X
        assert differ(single_turn_gradient(instance, weight_S, immediate_SA), exact)
        assert differ(single_turn_gradient(instance, weight_S, q_SA, token_discount=0.9), exact)


def test_the_gradient_of_the_single_turn_objective_is_the_multi_turn_one():
    """∇J(π) = 1/(1−γ) Σ_s d^π(s) ∇E_{a~π(.|s)}[Q(s,a)] with d^π and Q held fixed: the RLHF objective itself,
    differentiated as an RLHF library does, points where the conversation's outcome does."""
    for instance in instances(12):
        d_S = tabular.discounted_state_distribution(instance.conversation, instance.prob_SA)
        logits_SPV = instance.logits_SPV.clone().requires_grad_()
        prob_SA = tabular.response_probabilities(tabular.token_policy(logits_SPV))
        objective = d_S @ mean(prob_SA, instance.values.q_SA) / (1 - instance.conversation.gamma)
        assert_exact(torch.autograd.grad(objective, logits_SPV)[0], multi_turn_gradient(instance))


def test_weighting_all_logged_turns_alike_is_another_direction_yet_an_ascent_direction():
    """Logs hold state s as often as Σ_t P(s_t = s), not Σ_t γ^t P(s_t = s). With these weights the gradient
    is not even parallel to ∇J, but its inner product with ∇J is positive: state by state, both are positive
    multiples of the same vector, ∇E_{a~π}[Q(s,a)] in the logits of that state."""
    for instance in instances(12):
        exact = multi_turn_gradient(instance)
        visits_S = tabular.state_visits(instance.conversation, instance.prob_SA, discount=1.0)
        logged = single_turn_gradient(instance, visits_S, instance.values.q_SA)
        cosine = (logged * exact).sum() / (logged.norm() * exact.norm())
        assert 0.0 < cosine < 1.0 - 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One row for every (state, response): what a token-level optimizer sees of it. B = S * A."""

    token_reward_BT: Tensor
    token_value_BT: Tensor
    mask_BT: Tensor

    def advantages(self, lambda_: float) -> Tensor:
        return generalized_advantage_estimation(
            self.token_reward_BT, self.token_value_BT, self.mask_BT, lambda_=lambda_
        )


def rows_of_all_responses(instance: Instance, token_v_SP: Tensor) -> Rows:
    prefix_AT, mask_AT = tabular.response_rows()
    mask_BT = mask_AT.repeat(len(token_v_SP), 1)
    return Rows(
        token_reward_BT=terminal_token_reward(instance.values.q_SA.flatten(), mask_BT),
        token_value_BT=token_v_SP[:, prefix_AT].flatten(0, 1),
        mask_BT=mask_BT,
    )


def expected_token_advantage(instance: Instance, advantage_BT: Tensor) -> Tensor:
    """Σ_a π(a|s) A_t over the responses that have token v after prefix p: P(p) π(v|p) E[A_t | s, p, v]."""
    advantage_SAT = advantage_BT.unflatten(0, instance.prob_SA.shape)
    total_SPV = torch.zeros_like(instance.token_prob_SPV)
    for a, response in enumerate(tabular.RESPONSES):
        for t, token in enumerate(response):
            prefix = tabular.PREFIXES.index(response[:t])
            total_SPV[:, prefix, token] += instance.prob_SA[:, a] * advantage_SAT[:, a, t]
    return total_SPV


def expected_gradient(instance: Instance, advantage_BT: Tensor) -> Tensor:
    """E_{a~π}[Σ_t ∇ log π(y_t | s, y_<t) A_t]; at logit v of prefix p: E[1[y_t = v] A_t] − π(v) E[A_t]."""
    total_SPV = expected_token_advantage(instance, advantage_BT)
    return total_SPV - instance.token_prob_SPV * total_SPV.sum(-1, keepdim=True)


def test_gae_with_exact_token_values_is_the_exact_token_advantage():
    """Given V_token, GAE is the token advantage: at λ = 0 in every single sample (r_t + V_{t+1} − V_t, and
    the next prefix is no matter of chance), at every λ in expectation over how the response goes on.

    λ = 1 of a sample is Q(s,a) − V_token(s, y_<t), so its first entry is the turn advantage Q(s,a) − V(s); at
    λ = 0 the entries sum to it.
    """
    for instance in instances(6):
        token = tabular.token_values(instance.token_prob_SPV, instance.values.q_SA)
        rows = rows_of_all_responses(instance, token.v_SP)
        reach_SP = tabular.prefix_probabilities(instance.token_prob_SPV)
        exact_SPV = reach_SP[..., None] * instance.token_prob_SPV * tabular.token_advantages(token)
        turn_advantage_B = (instance.values.q_SA - instance.values.v_S[:, None]).flatten()

        one_step_BT = rows.advantages(0.0)
        assert_exact(one_step_BT, tabular.along_responses(tabular.token_advantages(token)).flatten(0, 1))
        assert_exact(one_step_BT.sum(-1), turn_advantage_B)
        for lambda_ in (0.0, 0.5, 0.95, 1.0):
            advantage_BT = rows.advantages(lambda_)
            assert_exact(expected_token_advantage(instance, advantage_BT), exact_SPV)

        full_BT = rows.advantages(1.0)
        q_minus_v_BT = instance.values.q_SA.flatten()[:, None] - rows.token_value_BT
        assert_exact(full_BT, torch.where(rows.mask_BT, q_minus_v_BT, 0.0))
        assert_exact(full_BT[:, 0], turn_advantage_B)


def test_gae_at_lambda_one_gives_the_exact_gradient_whatever_the_token_values():
    """With λ = 1 a wrong token value shifts all advantages at a prefix alike, so the expected gradient is
    still exact; with λ < 1 its error goes into the gradient. Hence λ = 1 is the choice without bias."""
    for instance in instances(6):
        token_v_SP = tabular.token_values(instance.token_prob_SPV, instance.values.q_SA).v_SP
        wrong_v_SP = token_v_SP + random_uniform(instance, *token_v_SP.shape)
        exact = single_turn_gradient(instance, torch.ones_like(token_v_SP[:, 0]), instance.values.q_SA)

        rows = rows_of_all_responses(instance, wrong_v_SP)
        assert_exact(expected_gradient(instance, rows.advantages(1.0)), exact)
        assert differ(expected_gradient(instance, rows.advantages(0.95)), exact)
        assert differ(expected_gradient(instance, rows.advantages(0.0)), exact)


# === 2. A better response in every state is a better policy =================================================


def test_performance_difference_lemma():
    """J(π') − J(π) = 1/(1−γ) E_{s~d^{π'}}[E_{a~π'} Q^π(s,a) − V^π(s)] for any two policies, exactly.

    With the states of d^π, those the logs were drawn from, it is an approximation only.
    """
    num_far_off = 0
    for instance in instances(30):
        conversation, values = instance.conversation, instance.values
        next_SA = random_policy(instance)
        gain = tabular.evaluate(conversation, next_SA).objective - values.objective
        advantage_S = (mean(next_SA, values.q_SA) - values.v_S) / (1 - conversation.gamma)
        assert_exact(tabular.discounted_state_distribution(conversation, next_SA) @ advantage_S, gain)

        logged_d_S = tabular.discounted_state_distribution(conversation, instance.prob_SA)
        num_far_off += differ(logged_d_S @ advantage_S, gain)
    assert num_far_off > 20


def mixed_until_no_worse(drawn_SA: Tensor, q_SA: Tensor, v_S: Tensor, surplus_S: Tensor) -> Tensor:
    """The drawn policy mixed with the greedy one, at each state just as far as E_{π'} Q >= V asks, and then
    by `surplus_S` of what is left."""
    greedy_SA = torch.nn.functional.one_hot(q_SA.argmax(-1), q_SA.shape[-1]).double()
    shortfall_S = (v_S - mean(drawn_SA, q_SA)).clamp(min=0.0)
    least_S = shortfall_S / (mean(greedy_SA, q_SA) - mean(drawn_SA, q_SA))
    share_S = least_S + (1 - least_S) * surplus_S
    return drawn_SA + share_S[:, None] * (greedy_SA - drawn_SA)


def test_theorem_1_better_responses_in_every_state_make_a_better_policy():
    """If E_{a~π'} Q^π(s,a) >= E_{a~π} Q^π(s,a) at every state, then V^{π'}(s) >= V^π(s) at every state.

    Many cases sit on the very edge of the condition. Turned around, worse at every state is worse everywhere.
    """
    for instance in instances(200):
        q_SA, v_S = instance.values.q_SA, instance.values.v_S
        drawn_SA = random_policy(instance, scale=2.0)
        surplus_S = 0.3 * random_uniform(instance, len(v_S)).round()

        better_SA = mixed_until_no_worse(drawn_SA, q_SA, v_S, surplus_S)
        assert (mean(better_SA, q_SA) >= v_S - EXACT).all()
        assert (tabular.evaluate(instance.conversation, better_SA).v_S >= v_S - EXACT).all()

        worse_SA = mixed_until_no_worse(drawn_SA, -q_SA, -v_S, surplus_S)
        assert (mean(worse_SA, q_SA) <= v_S + EXACT).all()
        assert (tabular.evaluate(instance.conversation, worse_SA).v_S <= v_S + EXACT).all()


def test_theorem_1_needs_every_state_not_the_average_over_the_logs():
    """E_{s~d^π}[E_{π'} Q^π − V^π] > 0 does not make π' better: what counts is where π' goes, not where π
    went.

    γ = 0.9. In s_0 `close` sells with probability 0.5, `talk` goes on to s_1; in s_1 `help` sells with 0.6,
    `push` never. π closes in s_0 with 0.99 and helps in s_1: V(s_1) = 0.6, Q(s_0, talk) = 0.54 > 0.5 and
    V(s_0) = 0.99 * 0.5 + 0.01 * 0.54 = 0.5004. π' always talks, and pushes:
        gain at s_0:  0.54 − 0.5004 = +0.0396     weight in the logs 1
        gain at s_1:  0 − 0.6       = −0.6        weight in the logs 0.9 * 0.01 = 0.009
    +0.0396 − 0.0054 = +0.0342 on average over the logs, and yet J falls from 0.5004 to 0: now that π' talks,
    the weight of s_1 is 0.9, and 0.0396 − 0.9 * 0.6 = −0.5004.
    """
    conversation = tabular.hand_made(
        gamma=0.9,
        start_S=[1.0, 0.0],
        transition_SAX=[
            [[0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]],
            [[0.0, 0.0, 0.6, 0.4], [0.0, 0.0, 0.0, 1.0]],
        ],
        reward_X=[0.0, 0.0, 1.0, 0.0],
    )
    prob_SA = torch.tensor([[0.99, 0.01], [1.0, 0.0]], dtype=torch.float64)
    next_SA = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    values = tabular.evaluate(conversation, prob_SA)
    assert values.objective.item() == pytest.approx(0.5004, abs=EXACT)
    advantage_S = mean(next_SA, values.q_SA) - values.v_S
    d_S = tabular.discounted_state_distribution(conversation, prob_SA)
    assert (d_S @ advantage_S).item() / (1 - 0.9) == pytest.approx(0.0342, abs=EXACT)
    assert tabular.evaluate(conversation, next_SA).objective.item() == pytest.approx(0.0, abs=EXACT)


# === 3. What an imperfect Q and an imperfect optimizer cost =================================================


def test_the_closed_form_maximises_and_its_gain_is_two_kls():
    """π' ∝ π exp(Q/β) maximises L(μ) = E_μ Q − β KL(μ‖π) at every state: for every μ
        L(π') − L(μ) = β KL(μ‖π') >= 0, and L(π') = β log E_π exp(Q/β).
    Its gain is exactly E_{π'} Q − E_π Q = β [KL(π'‖π) + KL(π‖π')]: both KLs, not one.
    """
    for instance in instances(30):
        prob_SA, q_SA = instance.prob_SA, instance.values.q_SA
        beta = 0.05 + random_uniform(instance).item()
        next_SA = closed_form(prob_SA, q_SA, beta)

        maximum_S = reverse_kl_objective(next_SA, prob_SA, q_SA, beta)
        assert_exact(maximum_S, beta * (prob_SA.log() + q_SA / beta).logsumexp(-1))
        for mu_SA in (prob_SA, random_policy(instance), closed_form(prob_SA, q_SA, 2 * beta)):
            below_S = reverse_kl_objective(mu_SA, prob_SA, q_SA, beta)
            assert_exact(maximum_S - below_S, beta * kl(mu_SA, next_SA))
            assert differ(maximum_S, below_S)

        gain_S = mean(next_SA, q_SA) - instance.values.v_S
        assert_exact(gain_S, beta * (kl(next_SA, prob_SA) + kl(prob_SA, next_SA)))
        assert differ(gain_S, beta * kl(next_SA, prob_SA))


def test_the_forward_kl_form_maximises_and_its_gain_is_a_chi_square():
    """μ = β π / (η − Q) maximises E_μ Q − β KL(π‖μ), with the gain E_μ Q − E_π Q = β χ²(π‖μ) exactly, where
    χ²(π‖μ) = Σ_a π²/μ − 1 >= KL(π‖μ)."""
    for instance in instances(30):
        prob_SA, q_SA = instance.prob_SA, instance.values.q_SA
        beta = 0.05 + random_uniform(instance).item()
        best_SA = forward_kl_form(prob_SA, q_SA, beta)
        assert_exact(best_SA.sum(-1), torch.ones_like(best_SA[:, 0]))

        maximum_S = forward_kl_objective(best_SA, prob_SA, q_SA, beta)
        for mu_SA in (prob_SA, random_policy(instance), closed_form(prob_SA, q_SA, beta)):
            assert (maximum_S > forward_kl_objective(mu_SA, prob_SA, q_SA, beta)).all()
        chi_square_S = (prob_SA**2 / best_SA).sum(-1) - 1
        assert_exact(mean(best_SA, q_SA) - instance.values.v_S, beta * chi_square_S)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_theorem_2_bound_with_a_wrong_q_and_a_lazy_optimizer(direction: str):
    """J(π') − J(π) >= 1/(1−γ) E_{s~d^{π'}}[β KL − δ(s) − 2ε]

    where |Q̂ − Q| <= ε, L_s(μ) = E_μ Q̂ − β KL and δ(s) = sup_μ L_s(μ) − L_s(π'): for reverse KL(μ‖π), which
    RLHF uses, and for forward KL(π‖μ), which the paper uses, if it is the same in L and in the bound.

    π' is the maximiser of L mixed with a random policy. Q̂ errs at random or, every second time, against the
    truth: Q̂ = Q − tilt * (Q − V), a ranking turned around where the tilt is above 1. Drop 2ε, or drop δ, and
    the bound fails in some instances. It is not empty: in others it proves a gain.

    An ended conversation needs no response and has no Q error: d^{π'} counts the states still on.
    """
    match direction:
        case "reverse":
            objective, maximiser = reverse_kl_objective, closed_form
        case "forward":
            objective, maximiser = forward_kl_objective, forward_kl_form
    num_proofs = num_without_epsilon = num_without_delta = 0
    for index, instance in enumerate(instances(200)):
        conversation, prob_SA, q_SA = instance.conversation, instance.prob_SA, instance.values.q_SA
        beta, size, laziness = (10 ** (torch.tensor([-2, -3, -2]) * random_uniform(instance, 3))).tolist()
        error_SA = size * (2 * random_uniform(instance, *q_SA.shape) - 1)
        if index % 2 == 1:
            error_SA = -2 * size * (q_SA - instance.values.v_S[:, None])
        wrong_q_SA, epsilon = q_SA + error_SA, error_SA.abs().max()

        best_SA = maximiser(prob_SA, wrong_q_SA, beta)
        next_SA = (1 - laziness) * best_SA + laziness * random_policy(instance, scale=2.0)
        achieved_S = objective(next_SA, prob_SA, wrong_q_SA, beta)
        delta_S = objective(best_SA, prob_SA, wrong_q_SA, beta) - achieved_S
        assert (delta_S >= -EXACT).all()
        margin_S = mean(next_SA, wrong_q_SA) - achieved_S  # β KL

        gain = tabular.evaluate(conversation, next_SA).objective - instance.values.objective
        d_S = tabular.discounted_state_distribution(conversation, next_SA) / (1 - conversation.gamma)
        bound = d_S @ (margin_S - delta_S - 2 * epsilon)
        assert gain >= bound - EXACT

        num_proofs += bool(bound > EXACT)
        num_without_epsilon += bool(gain < d_S @ (margin_S - delta_S) - EXACT)
        num_without_delta += bool(gain < d_S @ (margin_S - 2 * epsilon) - EXACT)
    assert min(num_proofs, num_without_epsilon, num_without_delta) >= 5


def test_theorem_2_does_not_hold_with_one_kl_in_the_objective_and_the_other_in_the_bound():
    """The paper maximises E_μ Q − β KL(π‖μ) but prints KL(π'‖π) in its last display: a slip, and not a
    harmless one. β = 1, π = (e^{-8}/2, 1 − e^{-8}/2), Q chosen so that the maximiser is π' = (1/2, 1/2):
        Q(a) = η − π(a)/π'(a), so Q(1) − Q(2) = 2 (1 − e^{-8}) = 1.99933
        gain = (1/2 − e^{-8}/2)(Q(1) − Q(2)) = (1 − e^{-8})² = 0.99933
        KL(π‖π')  = log 2 − H(π) = 0.6917       <= gain: the bound with the objective's own KL holds
        KL(π'‖π)  = −log 2 − log(e^{-8}/2)/2 − log(1 − e^{-8}/2)/2 = 3.6535  > gain: the printed one fails
    Maximising with KL(π'‖π), both directions are safe: the gain is β times their sum.
    """
    tiny = math.exp(-8) / 2
    prob_SA = torch.tensor([[tiny, 1 - tiny]], dtype=torch.float64)
    q_SA = 2.0 - 2.0 * prob_SA
    next_SA = forward_kl_form(prob_SA, q_SA, 1.0)
    assert_exact(next_SA, torch.full_like(next_SA, 0.5))
    gain = (mean(next_SA, q_SA) - mean(prob_SA, q_SA)).item()
    assert gain == pytest.approx((1 - math.exp(-8)) ** 2, abs=EXACT)
    assert kl(prob_SA, next_SA).item() == pytest.approx(0.6917, abs=5e-4)
    assert kl(prob_SA, next_SA) <= gain
    assert kl(next_SA, prob_SA).item() == pytest.approx(3.6535, abs=5e-4)
    assert kl(next_SA, prob_SA) > gain


def test_offsets_of_q_within_a_state_change_nothing():
    """Q(s,a) + b(s) in place of Q(s,a), b as large as you like: the same closed form, the same gradient, the
    same gain. So ε in Theorem 2 may be taken after the best offset, ε = max_s (max_a − min_a)(Q̂ − Q)/2: only
    differences within a state count, and a Q that is off by 100 in every state can be perfect.

    An offset that depends on the response, b(a), changes everything.
    """
    for instance in instances(20):
        conversation, prob_SA, q_SA = instance.conversation, instance.prob_SA, instance.values.q_SA
        offset_S1 = 100 * torch.randn(len(q_SA), 1, generator=instance.generator, dtype=torch.float64)
        ones_S = torch.ones_like(instance.values.v_S)
        next_SA = closed_form(prob_SA, q_SA, 0.3)
        gradient_SPV = single_turn_gradient(instance, ones_S, q_SA)
        gain_S = mean(next_SA, q_SA) - mean(prob_SA, q_SA)

        shifted_SA = q_SA + offset_S1
        assert_exact(closed_form(prob_SA, shifted_SA, 0.3), next_SA)
        assert_exact(single_turn_gradient(instance, ones_S, shifted_SA), gradient_SPV)
        assert_exact(mean(next_SA, shifted_SA) - mean(prob_SA, shifted_SA), gain_S)

        error_SA = 0.2 * (random_uniform(instance, *q_SA.shape) - 0.5)
        epsilon = (error_SA.amax(-1) - error_SA.amin(-1)).max() / 2
        off_SA = closed_form(prob_SA, shifted_SA + error_SA, 0.3)
        gain = tabular.evaluate(conversation, off_SA).objective - instance.values.objective
        d_S = tabular.discounted_state_distribution(conversation, off_SA) / (1 - conversation.gamma)
        assert gain >= d_S @ (0.3 * kl(off_SA, prob_SA) - 2 * epsilon) - EXACT

        tilted_SA = q_SA + offset_S1.mean() * torch.linspace(-1, 1, 7, dtype=torch.float64)
        assert differ(closed_form(prob_SA, tilted_SA, 0.3), next_SA)
        assert differ(single_turn_gradient(instance, ones_S, tilted_SA), gradient_SPV)


def test_theorem_2_needs_the_current_policy_as_its_anchor():
    """KL to π_i, the policy that Q belongs to, keeps the bound; KL to the first policy π_0 breaks it.

    One turn, two responses, Q = (1, 0) exactly (ε = 0), β = 1, solved exactly (δ = 0). Training started from
    π_0 = (0.5, 0.5) and has come to π_i = (0.9, 0.1), so J(π_i) = 0.9.
        anchor π_i:  π' = (0.9e, 0.1)/(0.9e + 0.1) = (0.9607, 0.0393)
                     gain 0.0607 >= KL(π'‖π_i) = 0.0260                            the bound holds
        anchor π_0:  π' = (e, 1)/(e + 1)           = (0.7311, 0.2689)
                     gain −0.1689, where the formula promises KL(π'‖π_0) = 0.1109  it is violated: J fell
    What does hold with anchor π_0 is the bound less β KL(π_i‖π_0) = 0.3681: −0.1689 >= 0.1109 − 0.3681.
    """
    conversation = tabular.hand_made(
        gamma=0.9,
        start_S=[1.0],
        transition_SAX=[[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]],
        reward_X=[0.0, 1.0, 0.0],
    )
    first_SA = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    current_SA = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    values = tabular.evaluate(conversation, current_SA)
    assert_exact(values.q_SA, torch.tensor([[1.0, 0.0]], dtype=torch.float64))

    def gain_and_promise(anchor_SA: Tensor) -> tuple[float, float]:
        next_SA = closed_form(anchor_SA, values.q_SA, 1.0)
        gain = tabular.evaluate(conversation, next_SA).objective - values.objective
        return gain.item(), kl(next_SA, anchor_SA).item()

    assert gain_and_promise(current_SA) == (pytest.approx(0.0607, abs=5e-5), pytest.approx(0.0260, abs=5e-5))
    gain, promise = gain_and_promise(first_SA)
    assert (gain, promise) == (pytest.approx(-0.1689, abs=5e-5), pytest.approx(0.1109, abs=5e-5))
    assert gain < 0.0 < promise
    assert gain >= promise - kl(current_SA, first_SA).item()


# === 4. Repeated, the steps reach the optimal policy ========================================================


def test_greedy_single_turn_steps_reach_the_optimal_policy():
    """π_{i+1}(s) = argmax_a Q^{π_i}(s,a), found token by token (max over the next token, discount 1), reaches
    V* in at most as many iterations as the conversation has turns: after k of them the last k turns are
    optimal.

    With a token discount of 0.5 in the same search it ends below V* in most instances.
    """
    num_short_of_optimal = 0
    for instance in instances(30):
        conversation = instance.conversation
        optimal_S = tabular.optimal_values(conversation)
        prob_SA, v_S = instance.prob_SA, instance.values.v_S
        assert differ(v_S, optimal_S)
        for _ in range(instance.num_turns):
            q_SA = tabular.evaluate(conversation, prob_SA).q_SA
            prob_SA = tabular.greedy_responses(q_SA)
            assert torch.equal(prob_SA.argmax(-1), q_SA.argmax(-1))
            previous_S, v_S = v_S, tabular.evaluate(conversation, prob_SA).v_S
            assert (v_S >= previous_S - EXACT).all()
        assert_exact(v_S, optimal_S)

        discounted_SA = instance.prob_SA
        for _ in range(instance.num_turns):
            q_SA = tabular.evaluate(conversation, discounted_SA).q_SA
            discounted_SA = tabular.greedy_responses(q_SA, token_discount=0.5)
        num_short_of_optimal += differ(tabular.evaluate(conversation, discounted_SA).v_S, optimal_S)
    assert num_short_of_optimal > 15


def test_kl_regularised_steps_never_fall_and_approach_the_optimal_policy():
    """π_{i+1} ∝ π_i exp(Q^{π_i}/β), the anchor moved on every iteration: V^{π_i}(s) never falls at any state
    and approaches V*, although each step is held close to the last.

    With Q^{π_i} but the anchor left at π_0, the same β and as many iterations, it comes to rest below V*.
    """
    beta, num_iterations = 0.1, 300
    for instance in instances(3):
        conversation = instance.conversation
        optimal_S = tabular.optimal_values(conversation)
        prob_SA, values = instance.prob_SA, instance.values
        for _ in range(num_iterations):
            prob_SA, previous_S = closed_form(prob_SA, values.q_SA, beta), values.v_S
            values = tabular.evaluate(conversation, prob_SA)
            assert (values.v_S >= previous_S - EXACT).all()
        assert (optimal_S - values.v_S).max() < 1e-3

        values = instance.values
        for _ in range(num_iterations):
            values = tabular.evaluate(conversation, closed_form(instance.prob_SA, values.q_SA, beta))
        assert (optimal_S - values.v_S).max() > 1e-2


def mean_return_by_response(instance: Instance, talks: list[Talk], rewards: list[list[float]]) -> Tensor:
    """E[G_i | s_i = s, a_i = a] over all talks, each with its probability. Returns [S, A]."""
    reward_NH, mask_NH = pad(rewards)
    returns_NH = torch.from_numpy(monte_carlo(reward_NH, mask_NH, gamma=instance.conversation.gamma))
    total_SA, weight_SA = torch.zeros(2, *instance.prob_SA.shape, dtype=torch.float64)
    for talk, returns_H in zip(talks, returns_NH, strict=True):
        for state, action, turn_return in zip(talk.states, talk.actions, returns_H.tolist(), strict=False):
            total_SA[state, action] += talk.probability * turn_return
            weight_SA[state, action] += talk.probability
    return total_SA / weight_SA


def test_monte_carlo_returns_have_q_as_their_mean():
    """E[G_i | s_i = s, a_i = a] = Q^π(s,a) at every state and every response, when the mean is over all
    conversations that can happen under π, each with its probability. Hence Q^π is the target of a regression
    of G on (s, a).

    Rewards one turn late, so that r_i is paid to a_i instead of r_{i+1}, average to something else.
    """
    for instance in instances(2, num_moods=2):
        talks = list(tabular.all_talks(instance.conversation, instance.prob_SA))
        assert sum(talk.probability for talk in talks) == pytest.approx(1.0, abs=EXACT)
        rewards = [talk.rewards for talk in talks]
        assert_exact(mean_return_by_response(instance, talks, rewards), instance.values.q_SA)

        one_turn_late = [[0.0, *row[:-1]] for row in rewards]
        assert differ(mean_return_by_response(instance, talks, one_turn_late), instance.values.q_SA)
