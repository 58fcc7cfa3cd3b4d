"""Within-state ranking: does Q order several responses to the same prompt as their true values do?

Only differences of Q within one state move the policy, and most of the variance of outcomes lies between states: a Q
with a fine AUC may rank responses at random. This needs a simulator whose running conversation can be copied; from
logs alone, where each state has one response, it cannot be measured.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from iterative_ppo.conversations import chat_messages
from iterative_ppo.environments import BranchingEnvironment, TextEnvironment
from iterative_ppo.environments.rollout import RolloutStatistics, Talk, finish, start_talk
from iterative_ppo.intervals import Interval, mean_interval
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction
from iterative_ppo.supervised import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Q's order of responses against the order of their mean outcomes over rollouts.

    Example:
        Ranking(num_states=64, num_responses=6, num_rollouts=32, kendall_tau=Interval(...), correlation=.6, ceiling=Interval(...),
            regret=Interval(...), random_regret=Interval(...), exact_branches=True)
    """

    num_states: int
    num_responses: int
    """Distinct responses sampled from the policy in each state, at most."""
    num_rollouts: int
    kendall_tau: Interval
    """Kendall's τ-b of Q against the mean over rollouts, averaged over states: 1 the same order, 0 none."""
    correlation: float
    """Of Q with the mean over rollouts, each less its mean over the state's responses, over all states' responses."""
    ceiling: Interval
    """Kendall's τ-b between two independent halves of the rollouts: what noise in the truth lets any Q reach, roughly."""
    regret: Interval
    """True value of the best response less that of Q's choice. Best and choice are judged by different rollouts."""
    random_regret: Interval
    """The same for a response taken at random."""
    exact_branches: bool
    """Whether the environment redraws what is hidden (`branch`); otherwise copies share the hidden state."""


def rank_within_states(
    policy: Policy,
    q_function: QFunction,
    make_environment: Callable[[], TextEnvironment],
    *,
    num_states: int,
    num_responses: int,
    num_rollouts: int,
    max_turns: int,
    lockstep: int,
    tokens_per_batch: int,
    seed: int,
    progress: Progress,
) -> Ranking:
    """Measures the ranking on states that the policy visits.

    Each state is the start of a random turn of a conversation of its own. From it, responses are sampled until
    `num_responses` distinct ones are there (or four times as many have been tried); each is sent in `num_rollouts`
    branches, which the policy then plays to the end.

    Raises:
        ValueError: no state had two distinct responses.
    """
    generator = np.random.default_rng(seed)
    environment = make_environment()
    taus: list[float] = []
    within_states: list[np.ndarray] = []
    ceilings: list[float] = []
    regrets: list[float] = []
    random_regrets: list[float] = []
    for state in range(num_states):
        progress("rank responses", state, num_states)
        talk = _random_state(policy, environment, seed=seed, index=state, generator=generator, max_turns=max_turns)
        prompt = policy.renderer.prompt(chat_messages(talk.messages)).token_ids
        tries = 4 * num_responses
        sampled = policy.respond([prompt] * tries, generator.random((tries, policy.config.max_response_tokens)))
        responses = list(dict.fromkeys(sampled))[:num_responses]
        if len(responses) < 2:
            continue
        q_value_K = q_function.values([prompt] * len(responses), responses, tokens_per_batch=tokens_per_batch).numpy()
        texts = [policy.renderer.response_text(response) for response in responses]
        branches = [_branch(talk, text, generator, max_turns=max_turns) for text in texts for _ in range(num_rollouts)]
        for start in range(0, len(branches), lockstep):
            finish(policy, branches[start : start + lockstep], max_turns=max_turns, statistics=RolloutStatistics())
        value_KR = np.array([branch.total_reward for branch in branches]).reshape(len(responses), num_rollouts)
        first_K, second_K = value_KR[:, ::2].mean(1), value_KR[:, 1::2].mean(1)
        mean_value_K = value_KR.mean(1)
        taus.append(_kendall_tau(q_value_K, mean_value_K))
        within_states.append(np.stack([q_value_K - q_value_K.mean(), mean_value_K - mean_value_K.mean()]))
        ceilings.append(_kendall_tau(first_K, second_K))
        best = int(first_K.argmax())
        regrets.append(float(second_K[best] - second_K[q_value_K.argmax()]))
        random_regrets.append(float(second_K[best] - second_K.mean()))
    progress("rank responses", num_states, num_states)
    if not taus:
        raise ValueError("the policy gave one response only in every state: there is nothing to rank")
    return Ranking(
        num_states=len(taus),
        num_responses=num_responses,
        num_rollouts=num_rollouts,
        kendall_tau=mean_interval(taus),
        correlation=_correlation(*np.concatenate(within_states, axis=1)),
        ceiling=mean_interval(ceilings),
        regret=mean_interval(regrets),
        random_regret=mean_interval(random_regrets),
        exact_branches=isinstance(environment, BranchingEnvironment),
    )


def _random_state(
    policy: Policy,
    environment: TextEnvironment,
    *,
    seed: int,
    index: int,
    generator: np.random.Generator,
    max_turns: int,
) -> Talk:
    """A conversation of the policy, stopped before a turn chosen evenly among its turns."""
    played = start_talk(environment, name=f"state-{index}", seed=seed, index=index)
    finish(policy, [played], max_turns=max_turns, statistics=RolloutStatistics())
    num_turns = int(generator.integers(played.num_turns))
    responses = [message.action for message in played.messages if message.role == "assistant"]
    talk = start_talk(environment, name=f"state-{index}", seed=seed, index=index)
    for response in responses[:num_turns]:
        talk.say(response, None, max_turns=max_turns)
    return talk


def _branch(talk: Talk, response: str, generator: np.random.Generator, *, max_turns: int) -> Talk:
    """A copy of the talk that has sent the response, with a future of its own."""
    [future, own] = generator.spawn(2)
    if isinstance(talk.environment, BranchingEnvironment):
        environment: TextEnvironment = talk.environment.branch(future)
    else:
        environment = copy.deepcopy(talk.environment)
        environment.np_random = future  # type: ignore[attr-defined]
    branch = Talk(
        name=talk.name,
        environment=environment,
        generator=own,
        messages=list(talk.messages),
        num_turns=talk.num_turns,
    )
    branch.say(response, None, max_turns=max_turns)
    return branch


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 where either side is constant, which tells nothing."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def _kendall_tau(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """τ-b; 0 where either side is constant, which is no order at all."""
    tau = float(stats.kendalltau(a, b).statistic)
    return 0.0 if np.isnan(tau) else tau
