"""The token clock: pure functions from tensors to tensors, no configuration and no state.

Shape suffixes: B responses in a batch, T token positions (padded on the right), V vocabulary, K responses to
one prompt, M ensemble members. `mask_BT` is True at the response's own tokens, its end-of-response token
included; a masked position never changes a result, whatever it holds. The token discount is 1 everywhere: the
turn discount lives in `iterative_ppo.returns`.
"""

import math

import torch
from torch import Tensor, nn


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the real positions; padding may hold anything, NaN included."""
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT)).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the real positions: sum(mask * x) / sum(mask)."""
    return masked_sum(x_BT, mask_BT) / mask_BT.sum()


def token_logprobs(logits_BTV: Tensor, token_BT: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32 whatever the logits' type. Returns [B, T]."""
    logits_BTV = logits_BTV.float()
    return logits_BTV.gather(-1, token_BT.unsqueeze(-1)).squeeze(-1) - logits_BTV.logsumexp(-1)


def token_entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, in float32. Returns [B, T]."""
    logprob_BTV = logits_BTV.float().log_softmax(-1)
    return -(logprob_BTV.exp() * logprob_BTV).sum(-1)


def terminal_token_reward(reward_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The single-turn reward as a token reward: 0 everywhere, `reward_B` at each response's last real token."""
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    is_last_BT = position_T[None, :] == (mask_BT.sum(1) - 1)[:, None]
    return torch.where(is_last_BT, reward_B[:, None], torch.zeros_like(reward_B)[:, None])


def generalized_advantage_estimation(
    token_reward_BT: Tensor, token_value_BT: Tensor, mask_BT: Tensor, *, lambda_: float
) -> Tensor:
    r"""GAE(λ) on the token clock, with token discount 1 (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        A_t = Σ_{l≥0} λ^l δ_{t+l},   δ_t = r_t + V_{t+1} − V_t,   V past the last token = 0

    Args:
        token_reward_BT: reward paid for token t.
        token_value_BT: V of the prefix *before* token t, so `token_value_BT[:, 0]` is the prompt's value.
        mask_BT: real tokens, a prefix of each row.
        lambda_: 1 is unbiased whatever V is (A_t = Σ_{l≥t} r_l − V_t); below 1 trusts V.

    Returns:
        Advantages [B, T], zero at masked positions.
    """
    reward_BT = torch.where(mask_BT, token_reward_BT, torch.zeros_like(token_reward_BT))
    value_BT = torch.where(mask_BT, token_value_BT, torch.zeros_like(token_value_BT))
    advantage_BT = torch.zeros_like(value_BT)
    next_value_B = torch.zeros_like(value_BT[:, 0])
    advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + next_value_B - value_BT[:, t]
        advantage_B = (delta_B + lambda_ * advantage_B) * mask_BT[:, t]
        advantage_BT[:, t] = advantage_B
        next_value_B = value_BT[:, t]
    return advantage_BT


def normalize_advantages(advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(A − mean) / std over the real tokens; zero at padding. A constant advantage becomes zero."""
    mean = masked_mean(advantage_BT, mask_BT)
    variance = masked_mean((advantage_BT - mean).square(), mask_BT)
    return torch.where(mask_BT, (advantage_BT - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def group_advantages(reward_B: Tensor, *, num_samples: int, normalize: bool) -> Tensor:
    """Group-relative advantage of K responses to one prompt, rows of one prompt adjacent (GRPO, arXiv 2402.03300).

    A = r − mean over the group, divided by the group's standard deviation when `normalize`. A group whose
    rewards are all equal has advantage 0: it cannot rank anything.
    """
    reward_GK = reward_B.double().view(-1, num_samples)  # in float32 the mean of equal numbers may differ from them
    advantage_GK = reward_GK - reward_GK.mean(1, keepdim=True)
    if normalize:
        advantage_GK = advantage_GK / (reward_GK.std(1, keepdim=True, correction=0) + 1e-6)
    return advantage_GK.reshape(-1).to(reward_B.dtype)


def leave_one_out_advantages(reward_B: Tensor, *, num_samples: int) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): r minus the mean of the prompt's *other* responses; unbiased."""
    return group_advantages(reward_B, num_samples=num_samples, normalize=False) * (num_samples / (num_samples - 1))


def clipped_surrogate(
    logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> Tensor:
    """PPO's clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7), to be minimised.

        −(1/B) Σ_b Σ_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t),   ρ_t = π(y_t) / π_old(y_t)

    Summed over a response's tokens and averaged over responses: at ρ = 1 its gradient is the policy gradient of
    the mean reward of a *response*. A mean over tokens would weight long responses down.
    """
    ratio_BT = torch.where(mask_BT, logprob_BT - old_logprob_BT, 0.0).exp()
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantage_BT)
    return -masked_sum(surrogate_BT, mask_BT) / mask_BT.shape[0]


def clip_fraction(logprob_BT: Tensor, old_logprob_BT: Tensor, mask_BT: Tensor, *, clip: float) -> Tensor:
    """Share of real tokens whose ratio has left [1 − ε, 1 + ε]."""
    ratio_BT = torch.where(mask_BT, logprob_BT - old_logprob_BT, 0.0).exp()
    return masked_mean(((ratio_BT - 1).abs() > clip).float(), mask_BT)


def kl_k1(logprob_BT: Tensor, anchor_logprob_BT: Tensor) -> Tensor:
    """Token-wise k1 estimate of KL(π‖anchor) under samples of π: log π − log anchor. Unbiased, may be negative."""
    return logprob_BT - anchor_logprob_BT


def kl_k3(logprob_BT: Tensor, anchor_logprob_BT: Tensor) -> Tensor:
    """Token-wise k3 estimate of KL(π‖anchor) under samples of π: r − 1 − log r with r = anchor/π. Never negative.

    Unbiased as a *value*. Its gradient through log π is that of KL(anchor‖π) at π = anchor, not of KL(π‖anchor).
    """
    log_ratio_BT = anchor_logprob_BT - logprob_BT
    return log_ratio_BT.exp() - 1 - log_ratio_BT


def kl_loss(logprob_BT: Tensor, anchor_logprob_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(1/B) Σ_b ½ (Σ_t log π − log anchor)²: under fresh samples of π its expected gradient is that of KL(π‖anchor).

    This is the k2 estimator of whole responses. The sum is inside the square, so that an early token also answers for
    the KL of the tokens that it leads to. k3 as a loss would follow the gradient of KL(anchor‖π), and k1 has none on
    average.
    """
    log_ratio_BT = torch.where(mask_BT, logprob_BT - anchor_logprob_BT, 0.0)
    return 0.5 * log_ratio_BT.sum(1).square().mean()


def adapted_kl_coefficient(kl_coefficient: float, kl: float, *, kl_target: float) -> float:
    """PPO's adaptive KL penalty (Schulman et al. 2017, arXiv 1707.06347, section 4).

    β/2 where the KL is below two thirds of its target, 2β where it is above three halves of it, else β.
    """
    if kl < kl_target / 1.5:
        return kl_coefficient / 2
    if kl > kl_target * 1.5:
        return kl_coefficient * 2
    return kl_coefficient


def explained_variance(prediction: Tensor, target: Tensor) -> float:
    """1 − Var(target − prediction) / Var(target); NaN for a constant target."""
    variance = target.double().var(correction=0)
    if variance == 0:
        return math.nan
    return float(1 - (target.double() - prediction.double()).var(correction=0) / variance)


def token_value_loss(token_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """½ (V − return)², averaged over the real tokens."""
    return 0.5 * masked_mean(torch.where(mask_BT, token_value_BT - return_BT, 0.0).square(), mask_BT)


def squared_error(q_value: Tensor, target: Tensor) -> Tensor:
    """(Q − G)², element-wise: minimised by E[G | state, response]."""
    return (q_value - target).square()


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """−G log σ(z) − (1−G) log(1−σ(z)), element-wise, for targets in [0, 1]: also minimised by σ(z) = E[G]."""
    return nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")


def hl_gauss_target(target: Tensor, edges: Tensor, *, sigma: float) -> Tensor:
    """The target as a histogram: a Gaussian of width σ around it, cut to the support, integrated over each bin.

    HL-Gauss (Imani & White 2018; Farebrother et al. 2024, arXiv 2403.03950). `edges` [K+1] ascending; a target beyond
    them counts as the nearest of them; returns [..., K] that sums to 1.
    """
    target = target.clamp(edges[0], edges[-1])
    cdf = torch.special.erf((edges - target.unsqueeze(-1)) / (sigma * math.sqrt(2.0)))
    return (cdf[..., 1:] - cdf[..., :-1]) / (cdf[..., -1:] - cdf[..., :1])


def hl_gauss(bin_logits: Tensor, target: Tensor, edges: Tensor, *, sigma: float) -> Tensor:
    """Cross-entropy between the histogram of the target and softmax(bin_logits), element-wise over targets."""
    return -(hl_gauss_target(target, edges, sigma=sigma) * bin_logits.log_softmax(-1)).sum(-1)


def hl_gauss_mean(bin_logits: Tensor, edges: Tensor) -> Tensor:
    """The value a histogram stands for: Σ_k softmax(bin_logits)_k · centre_k."""
    return (bin_logits.softmax(-1) * (edges[1:] + edges[:-1]) / 2).sum(-1)


def lower_confidence(q_value_BM: Tensor, *, pessimism: float) -> Tensor:
    """Mean over the ensemble minus `pessimism` standard deviations. Returns [B]."""
    if q_value_BM.shape[1] == 1:
        return q_value_BM[:, 0]
    return q_value_BM.mean(1) - pessimism * q_value_BM.std(1)
