"""Where turns meet tokens: logged conversations as what the Q-function is fitted to and the policy is prompted with."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from iterative_ppo import returns
from iterative_ppo.conversations import Conversation, chat_messages, decision_points, turn_rewards
from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.q_fit import Predictions
from iterative_ppo.rendering import Renderer, TokenIds, TurnSequence, pack_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedTurns:
    """A conversation's decision points in tokens.

    Example:
        TokenizedTurns(conversation_id="c-001", prompts=((1, 8),), responses=((9, 2),), next_messages=((7,),), ...)
    """

    conversation_id: str
    prompts: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]
    messages_seen: tuple[int, ...]
    """Messages before each response, the system's not counted."""
    next_messages: tuple[TokenIds, ...]
    """The customer's answer to each response, the text alone; empty where there is none."""
    last_state: TokenIds
    """The prompt after the customer's last word; empty where the policy had the last word."""
    num_messages: int
    num_dropped_messages: int
    """Over all prompts, messages that the context had no room for."""
    num_cut_messages: int
    """Over all prompts and responses, single messages so long that the context had room for a part of them only."""


def tokenize(conversation: Conversation, renderer: Renderer) -> TokenizedTurns:
    """Prompts and responses of a conversation, exactly as the policy reads and writes them."""
    points = decision_points(conversation)
    prompts = [
        renderer.prompt(point.chat) if point.prompt is None else renderer.prompt_from_text(point.prompt)
        for point in points
    ]
    responses = tuple(
        _cut(renderer.response(point.response), renderer.context_tokens - len(prompt.token_ids), renderer.end_id)
        for point, prompt in zip(points, prompts, strict=True)
    )
    num_cut = sum(prompt.num_cut_tokens > 0 for prompt in prompts) + sum(is_cut for _, is_cut in responses)
    chat = chat_messages(conversation.messages)
    ends_with_customer = bool(points) and chat[-1]["role"] == "user"
    return TokenizedTurns(
        conversation_id=conversation.id,
        prompts=tuple(prompt.token_ids for prompt in prompts),
        responses=tuple(response for response, _ in responses),
        messages_seen=tuple(_num_spoken(point.chat) for point in points),
        next_messages=tuple(renderer.encode(text) if text else () for text in _answers(conversation)),
        last_state=renderer.prompt(chat).token_ids if ends_with_customer else (),
        num_messages=_num_spoken(chat),
        num_dropped_messages=sum(prompt.num_dropped_messages for prompt in prompts),
        num_cut_messages=num_cut,
    )


def response_sequences(turns: TokenizedTurns) -> list[TurnSequence]:
    """What cloning reads: the conversation's responses in as few sequences as are exact."""
    return pack_turns(turns.prompts, turns.responses)


def labelled_sequences(
    conversation: Conversation, turns: TokenizedTurns, *, gamma: float, index: int, group: str
) -> list[LabelledSequence]:
    """What the Q-function is fitted to: decision points with their Monte Carlo returns.

    Empty for a censored conversation, one without a known outcome, or one without a decision point: they have no label.
    """
    rewards = turn_rewards(conversation)
    if not rewards:
        return []
    reward_1H = np.array([rewards], dtype=np.float64)
    return_H = returns.monte_carlo(reward_1H, np.ones_like(reward_1H, dtype=bool), gamma=gamma)[0].tolist()
    prompts, responses, seen, answers = turns.prompts, turns.responses, turns.messages_seen, turns.next_messages
    if turns.last_state:
        prompts, responses, answers = (*prompts, turns.last_state), (*responses, ()), (*answers, ())
        return_H, seen = [*return_H, rewards[-1]], (*seen, turns.num_messages)
    return [
        LabelledSequence(
            token_ids=sequence.token_ids,
            spans=sequence.spans,
            turns=sequence.turns,
            returns=tuple(return_H[turn] for turn in sequence.turns),
            conversation=index,
            group=group,
            messages_seen=tuple(seen[turn] for turn in sequence.turns),
            num_messages=turns.num_messages,
            next_messages=tuple(answers[turn] for turn in sequence.turns),
        )
        for sequence in pack_turns(prompts, responses)
    ]


def td_lambda_targets(
    sequences: Sequence[LabelledSequence], predictions: Predictions, *, gamma: float, lambda_: float
) -> list[tuple[float, ...]]:
    """TD(λ) returns of every span, bootstrapped from predictions of Q on the same sequences.

    A state without a response (a conversation's end) keeps its return.
    """
    place = {
        (sequence.conversation, turn): (row, position)
        for row, sequence in enumerate(sequences)
        for position, (turn, (start, end)) in enumerate(zip(sequence.turns, sequence.spans, strict=True))
        if end > start
    }
    q_value = dict(zip(place, predictions.q_value.tolist(), strict=True))
    by_conversation: dict[int, list[tuple[int, int]]] = {}
    for key in sorted(place):
        by_conversation.setdefault(key[0], []).append(key)
    keys = list(by_conversation.values())
    return_NH, mask_NH = returns.pad([[sequences[place[k][0]].returns[place[k][1]] for k in row] for row in keys])
    q_value_NH, _ = returns.pad([[q_value[k] for k in row] for row in keys])
    following_NH = np.concatenate([return_NH[:, 1:], np.zeros((len(keys), 1))], axis=1)
    target_NH = returns.td_lambda(return_NH - gamma * following_NH, q_value_NH, mask_NH, gamma=gamma, lambda_=lambda_)
    targets = [list(sequence.returns) for sequence in sequences]
    for n, row in enumerate(keys):
        for h, key in enumerate(row):
            targets[place[key][0]][place[key][1]] = float(target_NH[n, h])
    return [tuple(target) for target in targets]


def all_prompts(tokenized: Iterable[TokenizedTurns]) -> list[TokenIds]:
    """The prompts that the policy saw: the data set of the single-turn problem."""
    return [prompt for turns in tokenized for prompt in turns.prompts]


def _answers(conversation: Conversation) -> Iterator[str]:
    """What the customer said to each response; empty where it had no answer."""
    for message, following in zip_longest(conversation.messages, conversation.messages[1:]):
        if message.role == "assistant":
            yield following.content if following is not None and following.role == "user" else ""


def _cut(response: TokenIds, room: int, end_id: int) -> tuple[TokenIds, bool]:
    """A response that another policy wrote may be longer than this one's context: its beginning and its end token.

    Returns what there is room for, and whether that is less than all.
    """
    return (response, False) if len(response) <= room else ((*response[: room - 1], end_id), True)


def _num_spoken(chat: Sequence[dict[str, str]]) -> int:
    return sum(message["role"] != "system" for message in chat)
