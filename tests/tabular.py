"""A conversation small enough to solve exactly: turns, customer moods, and responses made of tokens.

The agent answers with words over {a, b} closed by an end token, at most three tokens in all: seven responses
from the empty one (abstaining) to `b b <end>`. The customer reacts at random: goes on to the next turn in
some mood, buys, or goes silent. Everything is float64 and exact. Autograd flows through `token_policy`,
`response_probabilities` and `evaluate`, so the gradient of J is exact too.

Shapes: `S` states, one per (turn, mood); `X` landings = the S states, then bought, then silent; `A`
responses; `P` prefixes; `V` tokens; `T` positions within a response. Response a is prefix a closed by the end
token, so A = P. The functions on the turn clock take a table `prob_SA` and work for any number of responses.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

END, WORDS, MAX_TOKENS = 0, (1, 2), 3
NUM_TOKENS = 1 + len(WORDS)
PREFIXES = [words for length in range(MAX_TOKENS) for words in itertools.product(WORDS, repeat=length)]
RESPONSES = [(*prefix, END) for prefix in PREFIXES]
CHILD = {
    (PREFIXES.index(longer[:-1]), longer[-1]): index for index, longer in enumerate(PREFIXES) if longer
}  # (prefix, word) -> the prefix one word longer; the longest prefixes have none: there only END is allowed
ALLOWED_PV = torch.tensor(
    [[token == END or (p, token) in CHILD for token in range(NUM_TOKENS)] for p in range(len(PREFIXES))]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A multi-turn MDP. `reward_X` is paid on *reaching* a landing, once: an ended conversation pays no more.

    Example, one turn, two responses that sell with probability 0.9 and 0.1:
    `Conversation(gamma=0.9, start_S=[1], transition_SAX=[[[0, .9, .1], [0, .1, .9]]], reward_X=[0, 1, 0])`
    (as float64 tensors; `hand_made` makes them).
    """

    gamma: float
    start_S: Tensor
    transition_SAX: Tensor
    reward_X: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnValues:
    """What one policy is worth: Q(s, a), V(s), and J = E[V(s_0)]."""

    q_SA: Tensor
    v_S: Tensor
    objective: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """The same within one response: V(s, prefix) and Q(s, prefix, token), 0 where no such token may come."""

    v_SP: Tensor
    q_SPV: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """A conversation that has ended: `Talk(probability=0.1, states=[0, 9], actions=[2], rewards=[1.0])`."""

    probability: float
    states: list[int]
    actions: list[int]
    rewards: list[float]


# --- Instances ----------------------------------------------------------------------------------------------


def hand_made(*, gamma: float, start_S: list, transition_SAX: list, reward_X: list) -> Conversation:
    """A conversation from nested lists."""
    start, transition, reward = (
        torch.tensor(numbers, dtype=torch.float64) for numbers in (start_S, transition_SAX, reward_X)
    )
    return Conversation(gamma=gamma, start_S=start, transition_SAX=transition, reward_X=reward)


def random_distribution(generator: torch.Generator, *shape: int) -> Tensor:
    """Random and rather peaked over the last axis."""
    weight = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) ** 2
    return weight / weight.sum(-1, keepdim=True)


def random_conversation(generator: torch.Generator, *, num_turns: int, num_moods: int) -> Conversation:
    """A random customer. Buying pays 1, silence 0, a third of the states a small reward of either sign."""
    num_states = num_turns * num_moods
    transition_SAX = torch.zeros(num_states, len(RESPONSES), num_states + 2, dtype=torch.float64)
    for turn in range(num_turns):
        here = slice(turn * num_moods, (turn + 1) * num_moods)
        following = list(range(here.stop, min(here.stop + num_moods, num_states)))
        landings = [*following, num_states, num_states + 1]
        shape = (num_moods, len(RESPONSES), len(landings))
        transition_SAX[here, :, landings] = random_distribution(generator, *shape)
    start_S = torch.zeros(num_states, dtype=torch.float64)
    start_S[:num_moods] = random_distribution(generator, num_moods)
    on_the_way_S = 0.2 * torch.randn(num_states, generator=generator, dtype=torch.float64)
    on_the_way_S *= torch.rand(num_states, generator=generator) < 1 / 3
    gamma = 0.7 + 0.29 * torch.rand((), generator=generator).item()
    reward_X = torch.cat([on_the_way_S, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    return Conversation(gamma=gamma, start_S=start_S, transition_SAX=transition_SAX, reward_X=reward_X)


def random_logits(generator: torch.Generator, conversation: Conversation, scale: float = 1.0) -> Tensor:
    """Logits of a token policy, one row of V for every (state, prefix)."""
    shape = (len(conversation.start_S), len(PREFIXES), NUM_TOKENS)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


# --- The turn clock -----------------------------------------------------------------------------------------


def evaluate(conversation: Conversation, prob_SA: Tensor) -> TurnValues:
    """V = (I − γ P_π)^{-1} R_π and Q(s, a) = Σ_x P(x | s, a) [r(x) + γ V(x)], with V = 0 once ended."""
    reward_SA = conversation.transition_SAX @ conversation.reward_X
    walk_SS = _walk(conversation, prob_SA, conversation.gamma)
    v_S = torch.linalg.solve(walk_SS, (prob_SA * reward_SA).sum(-1))
    q_SA = reward_SA + conversation.gamma * conversation.transition_SAX[..., : len(v_S)] @ v_S
    return TurnValues(q_SA=q_SA, v_S=v_S, objective=conversation.start_S @ v_S)


def discounted_state_distribution(conversation: Conversation, prob_SA: Tensor) -> Tensor:
    """d^π(s) = (1 − γ) Σ_t γ^t P(s_t = s). The ended conversations hold the rest of the mass."""
    return (1 - conversation.gamma) * state_visits(conversation, prob_SA, discount=conversation.gamma)


def state_visits(conversation: Conversation, prob_SA: Tensor, *, discount: float) -> Tensor:
    """Σ_t discount^t P(s_t = s); with discount 1, how often a log holds each state."""
    return torch.linalg.solve(_walk(conversation, prob_SA, discount).T, conversation.start_S)


def _walk(conversation: Conversation, prob_SA: Tensor, discount: float) -> Tensor:
    """I − discount * P_π over the states in which the conversation is still on."""
    num_states = len(prob_SA)
    step_SS = torch.einsum("sa,sax->sx", prob_SA, conversation.transition_SAX[..., :num_states])
    return torch.eye(num_states, dtype=torch.float64) - discount * step_SS


def optimal_values(conversation: Conversation) -> Tensor:
    """V*(s) = max_a Σ_x P(x | s, a) [r(x) + γ V*(x)]; a sweep per state is exact, as no state comes back."""
    num_states = len(conversation.start_S)
    v_S = torch.zeros(num_states, dtype=torch.float64)
    for _ in range(num_states):
        v_X = torch.cat([v_S, torch.zeros(2, dtype=torch.float64)])
        v_S = (conversation.transition_SAX @ (conversation.reward_X + conversation.gamma * v_X)).amax(-1)
    return v_S


def all_talks(conversation: Conversation, prob_SA: Tensor) -> Iterator[Talk]:
    """Every conversation that can happen, with its probability."""
    transition, reward = conversation.transition_SAX.tolist(), conversation.reward_X.tolist()
    prob, start = prob_SA.tolist(), conversation.start_S.tolist()

    def continued(talk: Talk) -> Iterator[Talk]:
        state = talk.states[-1]
        for action, prob_action in enumerate(prob[state]):
            for landing, prob_landing in enumerate(transition[state][action]):
                if prob_action * prob_landing == 0.0:
                    continue
                longer = Talk(
                    probability=talk.probability * prob_action * prob_landing,
                    states=[*talk.states, landing],
                    actions=[*talk.actions, action],
                    rewards=[*talk.rewards, reward[landing]],
                )
                if landing < len(start):
                    yield from continued(longer)
                else:
                    yield longer

    for state, probability in enumerate(start):
        if probability > 0.0:
            yield from continued(Talk(probability=probability, states=[state], actions=[], rewards=[]))


# --- The token clock ----------------------------------------------------------------------------------------


def token_policy(logits_SPV: Tensor) -> Tensor:
    """π(y_t | s, y_<t): softmax of the logits over the tokens that are allowed after each prefix."""
    return logits_SPV.masked_fill(~ALLOWED_PV, -torch.inf).softmax(-1)


def prefix_probabilities(token_prob_SPV: Tensor) -> Tensor:
    """The probability that a response from s begins with each prefix: Π_t π(y_t | s, y_<t)."""
    reach = [torch.ones(len(token_prob_SPV), dtype=torch.float64)]
    for (parent, word), _ in sorted(CHILD.items(), key=lambda item: item[1]):
        reach.append(reach[parent] * token_prob_SPV[:, parent, word])
    return torch.stack(reach, dim=1)


def response_probabilities(token_prob_SPV: Tensor) -> Tensor:
    """π(a | s) = Π_t π(y_t | s, y_<t), the end token included."""
    return prefix_probabilities(token_prob_SPV) * token_prob_SPV[:, :, END]


def token_conditionals(prob_SA: Tensor) -> Tensor:
    """The token policy of any positive table of responses: π(v | s, p) = mass below (p, v) / mass below p."""
    mass_SP = prob_SA.clone()
    for (parent, _), child in sorted(CHILD.items(), key=lambda item: -item[1]):
        mass_SP[:, parent] += mass_SP[:, child]
    token_prob_SPV = torch.zeros(*prob_SA.shape, NUM_TOKENS, dtype=torch.float64)
    token_prob_SPV[..., END] = prob_SA / mass_SP
    for (parent, word), child in CHILD.items():
        token_prob_SPV[:, parent, word] = mass_SP[:, child] / mass_SP[:, parent]
    return token_prob_SPV


def token_values(token_prob_SPV: Tensor, reward_SA: Tensor, *, token_discount: float = 1.0) -> TokenValues:
    """Backward over the tree of prefixes: nothing is paid until the end token, which pays reward(s, a).

    Q(s, p, end) = reward(s, p end),   Q(s, p, word) = discount * V(s, p word),
    V(s, p) = Σ_v π(v | s, p) Q(s, p, v)
    """
    num_states = len(reward_SA)
    v_SP = torch.zeros(num_states, len(PREFIXES), dtype=torch.float64)
    q_SPV = torch.zeros(num_states, len(PREFIXES), NUM_TOKENS, dtype=torch.float64)
    for prefix in reversed(range(len(PREFIXES))):
        q_SPV[:, prefix, END] = reward_SA[:, prefix]
        for word in WORDS:
            if (prefix, word) in CHILD:
                q_SPV[:, prefix, word] = token_discount * v_SP[:, CHILD[prefix, word]]
        v_SP[:, prefix] = (token_prob_SPV[:, prefix] * q_SPV[:, prefix]).sum(-1)
    return TokenValues(v_SP=v_SP, q_SPV=q_SPV)


def token_advantages(token: TokenValues) -> Tensor:
    """A(s, p, v) = Q(s, p, v) − V(s, p), and 0 where the token is not allowed. Returns [S, P, V]."""
    return torch.where(ALLOWED_PV, token.q_SPV - token.v_SP[..., None], 0.0)


def greedy_responses(reward_SA: Tensor, *, token_discount: float = 1.0) -> Tensor:
    """The best response, by dynamic programming over tokens: max instead of mean at every prefix. [S, A]"""
    num_states, num_prefixes = reward_SA.shape
    best_SP = reward_SA.clone()
    answer_SP = torch.arange(num_prefixes).repeat(num_states, 1)
    for (parent, _), child in sorted(CHILD.items(), key=lambda item: -item[1]):
        longer_S = token_discount * best_SP[:, child]
        better_S = longer_S > best_SP[:, parent]
        best_SP[:, parent] = torch.where(better_S, longer_S, best_SP[:, parent])
        answer_SP[:, parent] = torch.where(better_S, answer_SP[:, child], answer_SP[:, parent])
    return torch.nn.functional.one_hot(answer_SP[:, 0], num_prefixes).double()


def response_rows() -> tuple[Tensor, Tensor]:
    """For every response, the prefix before each of its tokens, [A, T], and the mask of its real tokens."""
    prefix_AT = torch.zeros(len(RESPONSES), MAX_TOKENS, dtype=torch.long)
    mask_AT = torch.zeros(len(RESPONSES), MAX_TOKENS, dtype=torch.bool)
    for a, response in enumerate(RESPONSES):
        for t in range(len(response)):
            prefix_AT[a, t], mask_AT[a, t] = PREFIXES.index(response[:t]), True
    return prefix_AT, mask_AT


def along_responses(table_SPV: Tensor) -> Tensor:
    """A table of (state, prefix, token) read along every response: [S, A, T], 0 in the padding."""
    prefix_AT, mask_AT = response_rows()
    token_AT = torch.tensor([(*response, *[END] * MAX_TOKENS)[:MAX_TOKENS] for response in RESPONSES])
    return torch.where(mask_AT, table_SPV[:, prefix_AT, token_AT], 0.0)
