"""The token clock: hand-worked values, expectations by listing every outcome, and the wrong formulas failing."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iterative_ppo import losses
from iterative_ppo.losses import (
    adapted_kl_coefficient,
    clip_fraction,
    clipped_surrogate,
    explained_variance,
    generalized_advantage_estimation,
    group_advantages,
    hl_gauss,
    hl_gauss_mean,
    hl_gauss_target,
    kl_k1,
    kl_k3,
    kl_loss,
    leave_one_out_advantages,
    lower_confidence,
    masked_mean,
    masked_sum,
    normalize_advantages,
    terminal_token_reward,
    token_entropy,
    token_logprobs,
    token_value_loss,
)

NAN = math.nan


def assert_close(actual: Tensor, expected: object, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def differ(actual: Tensor, other: object) -> bool:
    return (actual - torch.as_tensor(other, dtype=actual.dtype)).abs().max().item() > 1e-3


# --- rewards and advantages ---------------------------------------------------------------------------------


def test_the_reward_is_paid_at_the_last_real_token():
    """Two responses of three and of one token, rewards 2 and 5:

    y y y  ->  0 0 2
    y . .  ->  5 0 0        not 0 0 5, which pays a padding token
    """
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    token_reward_BT = terminal_token_reward(torch.tensor([2.0, 5.0]), mask_BT)
    assert_close(token_reward_BT, [[0, 0, 2], [5, 0, 0]])
    assert_close(token_reward_BT.sum(1), [2.0, 5.0])


def naive_advantages(
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    lambda_: float,
    *,
    discount: float = 1.0,
    masked: bool = True,
    bootstraps_after_end: bool = False,
) -> Tensor:
    """GAE written as its sum, A_t = Σ_l (g λ)^l δ_{t+l}, with the usual mistakes on demand."""
    num_rows, width = reward_BT.shape
    advantage_BT = torch.zeros_like(reward_BT)
    for b in range(num_rows):
        length = int(mask_BT[b].sum()) if masked else width
        for t in range(length):
            for s in range(t, length):
                has_next = s + 1 < (width if bootstraps_after_end else length)
                next_value = value_BT[b, s + 1] if has_next else 0.0
                delta = reward_BT[b, s] + discount * next_value - value_BT[b, s]
                advantage_BT[b, t] += (discount * lambda_) ** (s - t) * delta
    return advantage_BT


def example_of_two_responses() -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens and two; the value head has also written something (7) at the padding."""
    reward_BT = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    value_BT = torch.tensor([[0.5, 0.4, 0.2], [1.0, 3.0, 7.0]])
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    return reward_BT, value_BT, mask_BT


def test_gae_by_hand():
    """λ = 1/2, first response, rewards 0 0 1, values .5 .4 .2:

    δ_2 = 1 + 0  − .2 =  .8      A_2 =  .8
    δ_1 = 0 + .2 − .4 = −.2      A_1 = −.2 + .5 *  .8 = .2
    δ_0 = 0 + .4 − .5 = −.1      A_0 = −.1 + .5 *  .2 = 0

    and the second, rewards 0 2, values 1 3, then padding:

    δ_1 = 2 + 0 − 3 = −1         A_1 = −1               (the 7 behind it is no value of anything)
    δ_0 = 0 + 3 − 1 =  2         A_0 =  2 + .5 * −1 = 1.5
    """
    reward_BT, value_BT, mask_BT = example_of_two_responses()
    expected = [[0.0, 0.2, 0.8], [1.5, -1.0, 0.0]]
    assert_close(generalized_advantage_estimation(reward_BT, value_BT, mask_BT, lambda_=0.5), expected)
    assert_close(naive_advantages(reward_BT, value_BT, mask_BT, 0.5), expected)


def test_wrong_versions_of_gae_give_other_numbers():
    """On the second response above, of which the right advantages are 1.5 −1:

    no mask: the padding is a third token with δ_2 = 0 + 0 − 7 = −7, and δ_1 = 2 + 7 − 3 = 6, so
        A_1 = 6 − 3.5 = 2.5 and A_0 = 2 + 1.25 = 3.25;
    the value after the end token as a bootstrap: A_1 = δ_1 = 6 and A_0 = 2 + 3 = 5;
    a token discount of 1/2: δ_1 = −1, δ_0 = 0 + 1.5 − 1 = .5, A_0 = .5 + .25 * −1 = .25.
    """
    reward_BT, value_BT, mask_BT = example_of_two_responses()
    right_BT = generalized_advantage_estimation(reward_BT, value_BT, mask_BT, lambda_=0.5)

    without_mask_BT = naive_advantages(reward_BT, value_BT, mask_BT, 0.5, masked=False)
    assert_close(without_mask_BT[1], [3.25, 2.5, -7.0])
    after_end_BT = naive_advantages(reward_BT, value_BT, mask_BT, 0.5, bootstraps_after_end=True)
    assert_close(after_end_BT[1], [5.0, 6.0, 0.0])
    discounted_BT = naive_advantages(reward_BT, value_BT, mask_BT, 0.5, discount=0.5)
    assert_close(discounted_BT[1], [0.25, -1.0, 0.0])
    for wrong_BT in (without_mask_BT, after_end_BT, discounted_BT):
        assert differ(right_BT[1], wrong_BT[1])


def test_gae_at_lambda_one_needs_no_value_to_be_right():
    """λ = 1: A_t = Σ_{l≥t} r_l − V_t, whatever V says elsewhere; λ = 0: A_t = r_t + V_{t+1} − V_t."""
    reward_BT, value_BT, mask_BT = example_of_two_responses()
    at_one_BT = generalized_advantage_estimation(reward_BT, value_BT, mask_BT, lambda_=1.0)
    assert_close(at_one_BT, [[1 - 0.5, 1 - 0.4, 1 - 0.2], [2 - 1, 2 - 3, 0]])
    at_zero_BT = generalized_advantage_estimation(reward_BT, value_BT, mask_BT, lambda_=0.0)
    assert_close(at_zero_BT, [[0.4 - 0.5, 0.2 - 0.4, 1 - 0.2], [3 - 1, 2 - 3, 0]])
    assert differ(at_one_BT, at_zero_BT)


def test_normalized_advantages_by_hand():
    """Real tokens 1 2 3: mean 2, variance 2/3, so ∓1.2247 and 0; with its padding (0) counted the mean were 1.5.

    All equal: nothing to tell apart, so 0 and not a division by 0.
    """
    advantage_BT = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    assert_close(normalize_advantages(advantage_BT, mask_BT), [[-math.sqrt(1.5), 0.0], [math.sqrt(1.5), 0.0]])
    over_padding_BT = (advantage_BT - advantage_BT.mean()) / advantage_BT.std(correction=0)
    assert differ(normalize_advantages(advantage_BT, mask_BT)[mask_BT], over_padding_BT[mask_BT])
    assert_close(normalize_advantages(torch.full((2, 2), 3.0), mask_BT), torch.zeros(2, 2))


def test_group_advantages_by_hand():
    """Two prompts, three responses each, rewards 1 2 6 and 0 0 3.

    Means 3 and 1: −2 −1 3 and −1 −1 2. Deviations sqrt(14/3) = 2.1602 and sqrt(2) = 1.4142:
    −.9258 −.4629 1.3887 and −.7071 −.7071 1.4142. The mean over all six would be 2: −1 0 4 and −2 −2 1.
    """
    reward_B = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    plain_B = group_advantages(reward_B, num_samples=3, normalize=False)
    assert_close(plain_B, [-2, -1, 3, -1, -1, 2])
    normalized_B = group_advantages(reward_B, num_samples=3, normalize=True)
    assert_close(normalized_B, [-0.9258, -0.4629, 1.3887, -0.7071, -0.7071, 1.4142], 1e-4)
    assert differ(plain_B, reward_B - reward_B.mean())


@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 9))
@settings(deadline=None)
@example(1000.1, 3)
@example(-21.7, 7)
def test_a_group_of_equal_rewards_ranks_nothing(reward: float, num_samples: int):
    """In float32 the mean of equal numbers may be off by one unit in the last place. That is no preference, and
    dividing it by a deviation of next to nothing would make it the largest advantage of the batch."""
    reward_B = torch.full((2 * num_samples,), reward)
    zeros_B = torch.zeros(2 * num_samples)
    assert_close(group_advantages(reward_B, num_samples=num_samples, normalize=True), zeros_B, 1e-2)
    assert_close(leave_one_out_advantages(reward_B, num_samples=num_samples), zeros_B, 1e-2)


def test_leave_one_out_by_hand():
    """Rewards 1 2 6: 1 − (2+6)/2 = −3, 2 − (1+6)/2 = −1.5, 6 − (1+2)/2 = 4.5. Only with the *other* responses
    as the baseline is the gradient unbiased; the group mean scales it by (K−1)/K = 2/3: −2 −1 3."""
    reward_B = torch.tensor([1.0, 2.0, 6.0])
    assert_close(leave_one_out_advantages(reward_B, num_samples=3), [-3.0, -1.5, 4.5])
    assert differ(leave_one_out_advantages(reward_B, num_samples=3), reward_B - reward_B.mean())


def test_the_leave_one_out_gradient_is_unbiased():
    """Over all pairs of responses from π = (.2, .3, .5) with rewards 1 −2 4, E[Σ_k A_k ∇log π(y_k)]/2 is the
    gradient of the mean reward. With the group mean as the baseline it is half of that."""
    logits_V = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().requires_grad_()
    reward_V = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    (expected_V,) = torch.autograd.grad((logits_V.softmax(0) * reward_V).sum(), logits_V)

    def expected_gradient(advantages: Callable[[Tensor], Tensor]) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for pair in itertools.product(range(3), repeat=2):
            logprob_K = logits_V.log_softmax(0)[list(pair)]
            weight = logprob_K.detach().sum().exp()
            loss = loss + weight * (advantages(reward_V[list(pair)]) * logprob_K).sum() / 2
        return torch.autograd.grad(loss, logits_V)[0]

    assert_close(expected_gradient(lambda r: leave_one_out_advantages(r, num_samples=2)), expected_V, 1e-12)
    by_group_V = expected_gradient(lambda r: group_advantages(r, num_samples=2, normalize=False))
    assert_close(by_group_V, expected_V / 2, 1e-12)


# --- clipped surrogate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.5, 1.0, 1.2, 0.0),  # min(1.5, 1.2): gone far enough, no further push
        (1.5, -1.0, -1.5, -1.5),  # min(−1.5, −1.2): went the wrong way, pulled back
        (0.5, 1.0, 0.5, 0.5),  # min(.5, .8): went the wrong way, pulled back
        (0.5, -1.0, -0.8, 0.0),  # min(−.5, −.8): gone far enough
        (1.1, 2.0, 2.2, 2.2),  # inside the range: ρ A, gradient ρ A
        (0.9, -2.0, -1.8, -1.8),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, expected: float, gradient: float):
    """min(ρ A, clip(ρ, .8, 1.2) A) and its derivative by log π, which is ρ A or nothing."""
    logprob_BT = torch.tensor([[math.log(0.4 * ratio)]], requires_grad=True)
    old_BT = torch.tensor([[math.log(0.4)]])
    loss = clipped_surrogate(logprob_BT, old_BT, torch.tensor([[advantage]]), torch.tensor([[True]]), clip=0.2)
    loss.backward()
    assert_close(-loss.detach(), expected)
    assert_close(-logprob_BT.grad, [[gradient]])


def test_at_ratio_one_every_response_weighs_the_same():
    """A response of one token and one of three, all advantages 1: d(−loss)/d log π_t = A_t / B = 1/2 at each token.

    The mean over the four tokens gives 1/4; the mean over positions, padding included, 1/6; the mean over each
    response's own tokens gives 1/2 and three times 1/6, which makes a long response's reward count a third.
    """
    logprob_BT = torch.full((2, 3), -1.0, requires_grad=True)
    mask_BT = torch.tensor([[True, False, False], [True, True, True]])
    advantage_BT = mask_BT.float()

    def gradient(loss: Tensor) -> Tensor:
        return -torch.autograd.grad(loss, logprob_BT, retain_graph=True)[0]

    right_BT = gradient(clipped_surrogate(logprob_BT, logprob_BT.detach(), advantage_BT, mask_BT, clip=0.2))
    assert_close(right_BT, [[0.5, 0, 0], [0.5, 0.5, 0.5]])
    surrogate_BT = (logprob_BT - logprob_BT.detach()).exp() * advantage_BT
    over_tokens_BT = gradient(-surrogate_BT.sum() / mask_BT.sum())
    over_padding_BT = gradient(-surrogate_BT.mean())
    by_response_BT = gradient(-(surrogate_BT.sum(1) / mask_BT.sum(1)).mean())
    assert_close(over_tokens_BT, [[0.25, 0, 0], [0.25, 0.25, 0.25]])
    assert_close(over_padding_BT, [[1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6]])
    assert_close(by_response_BT, [[0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]])
    for wrong_BT in (over_tokens_BT, over_padding_BT, by_response_BT):
        assert differ(right_BT, wrong_BT)


def test_clip_fraction_counts_real_tokens_on_both_sides():
    """Ratios 1.5, .5, 1.1 and a padding token at 9: two of three, not three of four."""
    ratio_BT = torch.tensor([[1.5, 0.5], [1.1, 9.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    assert_close(clip_fraction(ratio_BT.log(), torch.zeros(2, 2), mask_BT, clip=0.2), 2 / 3)


# --- KL -----------------------------------------------------------------------------------------------------

POLICY_V = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
ANCHOR_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def kl(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V * (p_V.log() - q_V.log())).sum()


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """π = (.1 .2 .3 .4), anchor = (.4 .3 .2 .1):

    KL(π‖anchor) = .1 log ¼ + .2 log ⅔ + .3 log 3/2 + .4 log 4 = .3 log 4 + .1 log 3/2 = .4564.
    k1 is log ¼ = −1.386 at the first token; k3 there is 4 − 1 − log 4 = 1.614.
    """
    exact = 0.3 * math.log(4) + 0.1 * math.log(1.5)
    k1_V, k3_V = kl_k1(POLICY_V.log(), ANCHOR_V.log()), kl_k3(POLICY_V.log(), ANCHOR_V.log())
    assert_close((POLICY_V * k1_V).sum(), exact, 1e-12)
    assert_close((POLICY_V * k3_V).sum(), exact, 1e-12)
    assert_close(k1_V[0], -math.log(4), 1e-12)
    assert_close(k3_V[0], 3 - math.log(4), 1e-12)
    assert k1_V.min() < 0 <= k3_V.min()
    turned_around_V = kl_k3(ANCHOR_V.log(), POLICY_V.log())
    assert differ((POLICY_V * turned_around_V).sum(), exact)


@given(st.floats(-30, 5), st.floats(-30, 5))
def test_k3_is_never_negative(logprob: float, anchor_logprob: float):
    k3 = kl_k3(torch.tensor(logprob, dtype=torch.float64), torch.tensor(anchor_logprob, dtype=torch.float64))
    assert k3 >= -1e-12


def expected_gradient(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """E_{y~π}[∇ loss(log π(y), log anchor(y))] by listing the four tokens; the samples are π's and fixed."""
    logits_V = POLICY_V.log().requires_grad_()
    logprob_V = logits_V.log_softmax(0)
    loss = sum(POLICY_V[y] * loss_of(logprob_V[y].view(1, 1), ANCHOR_V[y].log().view(1, 1)) for y in range(4))
    return torch.autograd.grad(loss, logits_V)[0]


def test_only_the_kl_loss_follows_the_gradient_of_the_kl():
    """For a response of one token: `kl_loss` has the gradient of KL(π‖anchor), k3 that of KL(anchor‖π), k1 none."""
    logits_V = POLICY_V.log().requires_grad_()
    (reverse_V,) = torch.autograd.grad(kl(logits_V.softmax(0), ANCHOR_V), logits_V)
    (forward_V,) = torch.autograd.grad(kl(ANCHOR_V, logits_V.softmax(0)), logits_V)
    one = torch.ones(1, 1, dtype=torch.bool)
    assert_close(expected_gradient(lambda p, q: kl_loss(p, q, one)), reverse_V, 1e-12)
    assert_close(expected_gradient(lambda p, q: kl_k3(p, q).sum()), forward_V, 1e-12)
    assert_close(expected_gradient(lambda p, q: kl_k1(p, q).sum()), torch.zeros(4), 1e-12)
    assert differ(reverse_V, forward_V)


def test_the_kl_loss_follows_the_gradient_of_the_kl_of_whole_responses():
    """Responses of two tokens from three, π(y_1) π(y_2|y_1), all nine of them listed.

    KL(π‖anchor) = Σ_y π(y) (ρ_1 + ρ_2) with ρ_t the log-ratio of token t. Moving π(y_1) also moves how often
    the second token's KL is paid, so y_1 must carry ρ_1 + ρ_2. Half the squares of the single ρ_t, summed,
    lets y_1 carry ρ_1 alone, and is the gradient of something else.
    """
    generator = torch.Generator().manual_seed(0)
    logits_PV = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()  # root, after 0, 1, 2
    anchor_PV = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprob_PV = logits_PV.log_softmax(-1)
    responses = list(itertools.product(range(3), repeat=2))

    def along(table_PV: Tensor, response: tuple[int, int]) -> Tensor:
        return torch.stack([table_PV[0, response[0]], table_PV[1 + response[0], response[1]]])

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits_PV, retain_graph=True)[0]

    exact = sum(
        along(logprob_PV, y).sum().exp() * (along(logprob_PV, y) - along(anchor_PV, y)).sum() for y in responses
    )
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    loss = sum(
        along(logprob_PV, y).sum().exp().detach()
        * kl_loss(along(logprob_PV, y)[None], along(anchor_PV, y)[None], mask_BT)
        for y in responses
    )
    token_by_token = sum(
        along(logprob_PV, y).sum().exp().detach() * 0.5 * (along(logprob_PV, y) - along(anchor_PV, y)).square().sum()
        for y in responses
    )
    assert differ(gradient(token_by_token), gradient(exact))
    assert_close(gradient(loss), gradient(exact), 1e-12)


def test_kl_loss_by_hand():
    """Log-ratios .2 −.4 and, in a second response, 1 with padding: the losses of the two responses are averaged."""
    mask_BT = torch.tensor([[True, False], [True, False]])
    logprob_BT = torch.tensor([[-0.8, 9.0], [-1.0, 9.0]])
    anchor_BT = torch.tensor([[-1.0, 0.0], [-2.0, 0.0]])
    assert_close(kl_loss(logprob_BT, anchor_BT, mask_BT), (0.5 * 0.2**2 + 0.5 * 1.0**2) / 2)


# --- masks --------------------------------------------------------------------------------------------------


def test_masked_sum_and_mean_by_hand():
    """1 2 | 3 .: sum 6 and mean 6/3 = 2; the mean with the padding (100) in it is 26.5, over its count 6/4."""
    x_BT = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    assert_close(masked_sum(x_BT, mask_BT), 6.0)
    assert_close(masked_mean(x_BT, mask_BT), 2.0)
    assert differ(masked_mean(x_BT, mask_BT), x_BT.mean())
    assert differ(masked_mean(x_BT, mask_BT), (x_BT * mask_BT).mean())


MASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked_sum": lambda x, _, mask: masked_sum(x, mask),
    "masked_mean": lambda x, _, mask: masked_mean(x, mask),
    "gae": lambda x, y, mask: generalized_advantage_estimation(x, y, mask, lambda_=0.9),
    "normalize_advantages": lambda x, _, mask: normalize_advantages(x.detach(), mask),  # advantages are constants
    "surrogate_logprob": lambda x, y, mask: clipped_surrogate(x, y, torch.ones_like(x), mask, clip=0.2),
    "surrogate_advantage": lambda x, y, mask: clipped_surrogate(x, torch.zeros_like(x), y, mask, clip=0.2),
    "clip_fraction": lambda x, y, mask: clip_fraction(x, y, mask, clip=0.2),
    "kl_loss": kl_loss,
    "token_value_loss": token_value_loss,
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
def test_what_stands_at_the_padding_changes_neither_value_nor_gradient(name: str, garbage: float):
    mask_BT = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    generator = torch.Generator().manual_seed(1)

    def value_and_gradients(padding: float) -> list[Tensor]:
        generator.manual_seed(1)
        x_BT, y_BT = (
            torch.where(mask_BT, torch.randn(3, 3, generator=generator), padding).requires_grad_() for _ in range(2)
        )
        value = MASKED[name](x_BT, y_BT, mask_BT)
        if not value.requires_grad:
            return [value]
        gradients = torch.autograd.grad(value.sum(), (x_BT, y_BT), allow_unused=True)
        return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]

    for clean, dirty in zip(value_and_gradients(0.0), value_and_gradients(garbage), strict=True):
        assert torch.isfinite(clean).all()
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


# --- tokens -------------------------------------------------------------------------------------------------


def test_token_logprobs_and_entropy_by_hand():
    """Logits log 1, log 2, log 5: probabilities 1/8 2/8 5/8. Equal logits: entropy log V. Half precision comes in,
    float32 goes out."""
    logits_BTV = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]]).log()
    assert_close(token_logprobs(logits_BTV, torch.tensor([[2, 0]])), [[math.log(5 / 8), math.log(1 / 3)]])
    by_hand = (3 + 2 * 2 + 5 * (3 - math.log2(5))) / 8 * math.log(2)  # Σ p log2(1/p), in nats
    assert_close(token_entropy(logits_BTV), [[by_hand, math.log(3)]])
    half = token_logprobs(logits_BTV.bfloat16(), torch.tensor([[2, 0]]))
    assert half.dtype == torch.float32
    assert_close(half.exp(), [[5 / 8, 1 / 3]], 5e-3)
    shifted = logits_BTV + 1e4  # a softmax without the maximum taken out overflows
    assert_close(token_logprobs(shifted, torch.tensor([[2, 0]])), [[math.log(5 / 8), math.log(1 / 3)]], 2e-3)


def test_token_value_loss_by_hand():
    """½ mean of (1−3)², (2−2)², (4−3)² = ½ · 5/3; the padding's (0−9)² is not among them."""
    mask_BT = torch.tensor([[True, True], [True, False]])
    value_BT, return_BT = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[3.0, 2.0], [3.0, 9.0]])
    assert_close(token_value_loss(value_BT, return_BT, mask_BT), 5 / 6)
    assert differ(token_value_loss(value_BT, return_BT, mask_BT), 0.5 * (value_BT - return_BT).square().mean())


def test_explained_variance_by_hand():
    """Target 1 2 3, variance 2/3. Itself: 1. A constant: 0. An offset is no variance: 1. Turned around, 3 2 1:
    the residuals −2 0 2 have variance 8/3, so 1 − 4 = −3. A constant target cannot be explained."""
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((3,), 5.0), target) == 0.0
    assert explained_variance(target + 7, target) == 1.0
    assert explained_variance(target.flip(0), target) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(target, torch.ones(3)))


# --- regression losses of Q ---------------------------------------------------------------------------------


def test_binary_cross_entropy_by_hand():
    """z = log 3, so σ = ¾, and target ¼: −¼ log ¾ − ¾ log ¼ = 1.1116; the gradient is σ − G = ½.

    A logit of ±100 is a probability of 0 or 1 in float32; the loss is 100 or 0, never infinite.
    """
    logit = torch.tensor(math.log(3.0), requires_grad=True)
    loss = losses.binary_cross_entropy(logit, torch.tensor(0.25))
    loss.backward()
    assert_close(loss.detach(), -0.25 * math.log(0.75) - 0.75 * math.log(0.25))
    assert_close(logit.grad, 0.5)
    assert_close(losses.binary_cross_entropy(torch.tensor([100.0, -100.0]), torch.tensor([0.0, 0.0])), [100.0, 0.0])


def test_both_regression_losses_are_minimised_by_the_mean():
    """A return of 1 in one of four cases: the best Q is ¼, by squared error and by cross-entropy alike. (The best
    by absolute error is the median, 0, which says nothing about chances.)"""
    target_N, q_M = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.linspace(0.01, 0.99, 99)
    squared_M = losses.squared_error(q_M[:, None], target_N).mean(1)
    cross_M = losses.binary_cross_entropy(q_M.logit()[:, None].expand(-1, 4), target_N.expand(99, -1)).mean(1)
    assert_close(q_M[squared_M.argmin()], 0.25)
    assert_close(q_M[cross_M.argmin()], 0.25)
    assert q_M[(q_M[:, None] - target_N).abs().mean(1).argmin()] < 0.1


EDGES = torch.linspace(-0.2, 1.2, 29)  # 28 bins of width 0.05
SIGMA = 0.75 * 0.05


@given(st.floats(0.0, 1.0))
@settings(deadline=None)
def test_the_histogram_sums_to_one_and_its_mean_is_the_target(target: float):
    """Far enough inside the support: total 1, and a mean within a hundredth of a bin's width (0.05)."""
    histogram_K = hl_gauss_target(torch.tensor(target), EDGES, sigma=SIGMA)
    assert histogram_K.shape == (28,)
    assert histogram_K.min() >= 0
    assert_close(histogram_K.sum(), 1.0, 1e-5)
    assert abs(float(hl_gauss_mean(histogram_K.log(), EDGES)) - target) < 5e-4


def test_the_histogram_by_hand():
    """Bins −1..0..1 and a target of 0: half and half. σ = 1, target 0, edges −1 0 1 2, cut to the support:
    Φ(0) − Φ(−1) = .3413, the same, Φ(2) − Φ(1) = .1359, divided by their sum .8186."""
    assert_close(hl_gauss_target(torch.tensor(0.0), torch.tensor([-1.0, 0.0, 1.0]), sigma=0.3), [0.5, 0.5])
    histogram_K = hl_gauss_target(torch.tensor(0.0), torch.tensor([-1.0, 0.0, 1.0, 2.0]), sigma=1.0)
    assert_close(histogram_K, [0.3413 / 0.8186, 0.3413 / 0.8186, 0.1359 / 0.8186], 2e-4)


@pytest.mark.parametrize("target", [-5.0, -0.2, 1.2, 7.0])
def test_a_target_beyond_the_support_is_its_outermost_bin(target: float):
    """Far out there is no probability left to normalise; the histogram must not become 0/0."""
    histogram_K = hl_gauss_target(torch.tensor(target), EDGES, sigma=SIGMA)
    assert_close(histogram_K.sum(), 1.0, 1e-5)
    assert histogram_K.argmax() == (0 if target < 0 else 27)


def test_the_gradient_of_hl_gauss_is_softmax_minus_histogram():
    """So it vanishes where softmax is the histogram, and there the loss is the histogram's entropy."""
    target_N = torch.tensor([0.2, 0.7])
    histogram_NK = hl_gauss_target(target_N, EDGES, sigma=SIGMA)
    logits_NK = torch.zeros(2, 28, requires_grad=True)
    hl_gauss(logits_NK, target_N, EDGES, sigma=SIGMA).sum().backward()
    assert_close(logits_NK.grad, 1 / 28 - histogram_NK)

    at_best_N = hl_gauss((histogram_NK + 1e-30).log(), target_N, EDGES, sigma=SIGMA)
    entropy_N = -(histogram_NK * (histogram_NK + 1e-30).log()).sum(-1)
    assert_close(at_best_N, entropy_N, 1e-5)
    assert (hl_gauss(torch.zeros(2, 28), target_N, EDGES, sigma=SIGMA) > entropy_N).all()


def test_lower_confidence_by_hand():
    """Members 1 2 3: mean 2, standard deviation 1 (from three, so divided by two). One member is certain."""
    q_value_BM = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    assert_close(lower_confidence(q_value_BM, pessimism=1.0), [1.0, 2.0])
    assert_close(lower_confidence(q_value_BM, pessimism=0.0), [2.0, 2.0])
    assert_close(lower_confidence(torch.tensor([[0.3]]), pessimism=5.0), [0.3])


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.0, 0.05), (0.066, 0.05), (0.067, 0.1), (0.1, 0.1), (0.15, 0.1), (0.151, 0.2), (9.0, 0.2)]
)
def test_the_adaptive_kl_penalty_of_ppo_by_hand(kl: float, expected: float):
    """β = 0.1 and a target of 0.1: halved below 0.1 / 1.5 = 0.0667, doubled above 0.1 * 1.5 = 0.15."""
    assert adapted_kl_coefficient(0.1, kl, kl_target=0.1) == expected
