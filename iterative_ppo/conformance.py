"""Known-answer problems for the improvement step: does a backend solve the single-turn problem that the paper needs?

A tiny policy, a few prompts, every response listed, a reward for each. The best policy for E[Q] − β KL(π'‖π_i) is known,
π' ∝ π_i exp(Q/β), and so is how far a candidate is from it. What a backend does by default and the theorem forbids shows:
another anchor than the policy handed in, tokens discounted, a KL that is not in the gradient, a reward that does not
reach the token that ends a response.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.improvement import backends
from iterative_ppo.improvement.base import RewardFunction
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, TokenValue
from iterative_ppo.rendering import TokenIds
from iterative_ppo.supervised import Progress, no_progress

Backend = Callable[[Policy, Sequence[TokenIds], RewardFunction, ImprovementConfig, int], Policy]
"""backend(policy, prompts, reward, config, seed) -> candidate: one improvement step, from the policy as start and anchor.

`prompts` are token ids, `reward(prompts, responses)` gives one number a response, and `config` says the price of the KL
(`kl_coefficient`), the algorithm and the size of the work.
"""

_END = 0
_LETTERS = "abc"
_MAX_TOKENS = 3
_BETA = 0.3
_TOKENS_PER_BATCH = 8192
_PROMPTS: tuple[TokenIds, ...] = ((1, 2, 0), (3, 0), (2, 3, 1, 0))

LARGEST_KL_TO_OPTIMUM = 0.05
SMALLEST_SHARE_OF_GAIN = 0.9
KL_RATIO_LIMITS = (0.75, 1.25)
LARGEST_DRIFT = 0.02
LARGEST_LENGTH_SHIFT = 0.15


class BackendError(ValueError):
    """There is no candidate to judge; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that the theorem needs.

    Example:
        Check(name="anchor", passed=True, value=0.004, limit="at most 0.02", meaning="...")
    """

    name: str
    passed: bool
    value: float
    limit: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """What a backend did with the known-answer problems."""

    passed: bool
    kl_to_optimum: float
    """Mean over prompts of KL(candidate ‖ optimum), in nats."""
    share_of_gain: float
    """What the candidate gained of E[Q] − β KL over what can be gained."""
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Prompts, all responses, and the reward of each. S prompts, A responses.

    Args:
        anchor_SA: log π of the policy that is start and anchor.
        q_SA: rewards.
    """

    anchor_SA: Tensor
    q_SA: Tensor

    def reward(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
        """Of whole responses; one that the cap cut comes with an end-of-response token behind, or without.

        Raises:
            ValueError: a prompt that was not given, or tokens that are no response of the policy.
        """
        rows, columns = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            if tuple(prompt) not in _PROMPTS:
                raise ValueError(f"the reward was asked about the prompt {list(prompt)}, which was not given")
            if tuple(response[:_MAX_TOKENS]) not in _COLUMN:
                raise ValueError(
                    f"the reward was asked about the tokens {list(response)}: a response has at most {_MAX_TOKENS}, "
                    f"of 1 to {len(_LETTERS)}, and ends with {_END} unless it is cut there"
                )
            rows.append(_PROMPTS.index(tuple(prompt)))
            columns.append(_COLUMN[tuple(response[:_MAX_TOKENS])])
        return self.q_SA[rows, columns].float()

    def optimum(self) -> Tensor:
        """log of the best policy, π exp(Q/β) normalised."""
        return (self.anchor_SA + self.q_SA / _BETA).log_softmax(1)

    def objective(self, logp_SA: Tensor) -> float:
        """E[Q] − β KL(π'‖π), mean over prompts."""
        return float(((logp_SA.exp() * self.q_SA).sum(1) - _BETA * kl_by_prompt(logp_SA, self.anchor_SA)).mean())

    def share_of_gain(self, logp_SA: Tensor) -> float:
        """What a policy gained of the objective over what can be gained."""
        start = self.objective(self.anchor_SA)
        return (self.objective(logp_SA) - start) / (self.objective(self.optimum()) - start)


def _responses() -> list[TokenIds]:
    """All of them: those that end, and those that the cap cuts."""
    letters = range(1, len(_LETTERS) + 1)
    ended = [(*said, _END) for length in range(_MAX_TOKENS) for said in itertools.product(letters, repeat=length)]
    return ended + list(itertools.product(letters, repeat=_MAX_TOKENS))


RESPONSES = _responses()
_COLUMN = {response: column for column, response in enumerate(RESPONSES)}
_LENGTH_A = torch.tensor([len(response) for response in RESPONSES])


def start_policy(seed: int) -> Policy:
    """A random policy over three letters and the end of a response, far from uniform."""
    vocabulary = {"<end>": _END} | {letter: i for i, letter in enumerate(_LETTERS, start=1)}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.decoder = decoders.Fuse()
    letters.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<end>",
        chat_template="{% for message in messages %}{{ message['content'] }}<end>{% endfor %}",
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=_END,
        pad_token_id=_END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Policy(model, tokenizer, PolicyConfig(context_tokens=32, max_response_tokens=_MAX_TOKENS, lora_rank=0))


def logprobs(policy: Policy) -> Tensor:
    """log π of every response to every prompt, float64."""
    rows = [(prompt, response) for prompt in _PROMPTS for response in RESPONSES]
    logprobs = policy.logprobs(
        *(list(column) for column in zip(*rows, strict=True)), tokens_per_batch=_TOKENS_PER_BATCH
    )
    return torch.tensor([sum(values) for values in logprobs], dtype=torch.float64).view(len(_PROMPTS), -1)


def kl_by_prompt(logp_SA: Tensor, logq_SA: Tensor) -> Tensor:
    """KL(p‖q) of each prompt."""
    return (logp_SA.exp() * (logp_SA - logq_SA)).sum(1)


def backend_of(name: Literal["native", "trl"]) -> Backend:
    """A backend of ours by its name in `improvement.backend`; its token value starts without knowing anything."""

    def backend(
        policy: Policy, prompts: Sequence[TokenIds], reward: RewardFunction, config: ImprovementConfig, seed: int
    ) -> Policy:
        q_function = QFunction.from_policy(
            policy.model, link="identity", num_heads=1, pad_id=policy.pad_id, lora_rank=0, seed=seed
        )
        return backends.improve(
            policy,
            prompts,
            reward,
            dataclasses.replace(config, backend=name),
            token_value=TokenValue(q_function),
            generator=np.random.default_rng(seed),
            tokens_per_batch=_TOKENS_PER_BATCH,
        ).candidate

    return backend


def problems(seed: int) -> dict[str, Problem]:
    """The four problems: a random reward; none; the same for long and short responses; one for ending."""
    anchor_SA = logprobs(start_policy(seed))
    shape = anchor_SA.shape
    q_SA = {
        "optimum": torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        "anchor": torch.zeros(shape, dtype=torch.float64),
        "length": (_LENGTH_A != 2).double().expand(shape),
        "end": torch.tensor([response[-1] == _END for response in RESPONSES]).double().expand(shape),
    }
    return {name: Problem(anchor_SA=anchor_SA, q_SA=rewards) for name, rewards in q_SA.items()}


def solve(backend: Backend, problem: Problem, *, algorithm: str, kl_in: str, seed: int) -> Tensor:
    """log of the candidate's probabilities [S, A].

    Raises:
        BackendError: the backend raised something, or gave back no policy, or one whose probabilities are not finite or do not
            add up to 1 over the responses.
    """
    config = ImprovementConfig(
        algorithm=algorithm,  # type: ignore[arg-type]  # checked by the configuration
        kl_in=kl_in,  # type: ignore[arg-type]
        kl_coefficient=_BETA,
        adaptive_kl=False,
        kl_target=50.0,
        early_stop_kl=50.0,
        num_updates=100,
        prompts_per_update=len(_PROMPTS),
        num_samples=128,
        num_passes=1,
        num_minibatches=1,
        learning_rate=2e-3,
        token_value_learning_rate=2e-3,
    )
    try:
        # A policy of its own: a backend that changes the one handed in must not move the yardstick.
        candidate = backend(start_policy(seed), list(_PROMPTS), problem.reward, config, seed)
    except BackendError:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and exit(0) must not look like a pass
        raise BackendError(f"the backend failed: {type(error).__name__}: {error}") from error
    if not isinstance(candidate, Policy):
        raise BackendError(f"the backend gave back {type(candidate).__name__}, not a Policy")
    logp_SA = logprobs(candidate)
    if not logp_SA.isfinite().all():
        raise BackendError("the candidate's log-probabilities are not finite: its training has diverged")
    total_S = logp_SA.exp().sum(1)
    if not torch.allclose(total_S, torch.ones_like(total_S), atol=1e-3):
        raise BackendError(
            f"the candidate says something else than the problem's responses with probability {1 - float(total_S.min()):.3g}: it is "
            "a policy over another vocabulary"
        )
    return logp_SA


def check_backend(
    backend: Backend, *, algorithm: str = "ppo", kl_in: str = "loss", seed: int = 0, progress: Progress = no_progress
) -> Conformance:
    """Lets a backend solve the problems, and compares with their answers.

    Raises:
        BackendError: as `solve`.
    """
    todo = problems(seed)
    candidates = {}
    for number, (name, problem) in enumerate(todo.items()):
        progress("conformance", number, len(todo))
        candidates[name] = solve(backend, problem, algorithm=algorithm, kl_in=kl_in, seed=seed)
    progress("conformance", len(todo), len(todo))
    return judge(todo, candidates)


def judge(asked: Mapping[str, Problem], candidates: Mapping[str, Tensor]) -> Conformance:
    """What the candidates [S, A] of all problems show."""
    problem, candidate_SA = asked["optimum"], candidates["optimum"]
    anchor_SA, optimum_SA = problem.anchor_SA, problem.optimum()
    kl_to_optimum = float(kl_by_prompt(candidate_SA, optimum_SA).mean())
    share = problem.share_of_gain(candidate_SA)
    kl_ratio = float(kl_by_prompt(candidate_SA, anchor_SA).mean() / kl_by_prompt(optimum_SA, anchor_SA).mean())
    drift = float(kl_by_prompt(candidates["anchor"], anchor_SA).mean())
    shift = float((_long_over_short(candidates["length"]) - _long_over_short(anchor_SA)).mean())
    end_share = asked["end"].share_of_gain(candidates["end"])
    checks = (
        _at_most("kl_to_optimum", kl_to_optimum, LARGEST_KL_TO_OPTIMUM, "the candidate is π exp(Q/β), normalised"),
        _at_least("share_of_gain", share, SMALLEST_SHARE_OF_GAIN, "it gains what can be gained of E[Q] − β KL"),
        _between(
            "kl_penalty",
            kl_ratio,
            KL_RATIO_LIMITS,
            "its KL to the anchor over the optimum's: the penalty is in the gradient, at the price that was set",
        ),
        _at_most("anchor", drift, LARGEST_DRIFT, "without a reward it stays at the policy that was handed in"),
        _between(
            "token_discount",
            shift,
            (-LARGEST_LENGTH_SHIFT, LARGEST_LENGTH_SHIFT),
            "long and short responses of the same reward keep their log odds: tokens are not discounted",
        ),
        _at_least(
            "end_of_response", end_share, SMALLEST_SHARE_OF_GAIN, "it learns when to end: the reward is paid there"
        ),
    )
    return Conformance(
        passed=all(check.passed for check in checks), kl_to_optimum=kl_to_optimum, share_of_gain=share, checks=checks
    )


def _long_over_short(logp_SA: Tensor) -> Tensor:
    """log odds of three tokens against one, for each prompt."""
    return logp_SA[:, _LENGTH_A == _MAX_TOKENS].logsumexp(1) - logp_SA[:, _LENGTH_A == 1].logsumexp(1)


def _at_most(name: str, value: float, limit: float, meaning: str) -> Check:
    return Check(name=name, passed=value <= limit, value=value, limit=f"at most {limit:g}", meaning=meaning)


def _at_least(name: str, value: float, limit: float, meaning: str) -> Check:
    return Check(name=name, passed=value >= limit, value=value, limit=f"at least {limit:g}", meaning=meaning)


def _between(name: str, value: float, limits: tuple[float, float], meaning: str) -> Check:
    low, high = limits
    return Check(name=name, passed=low <= value <= high, value=value, limit=f"{low:g} to {high:g}", meaning=meaning)
