"""Prompts in a form from which another stack's tokenizer makes the very token ids that the policy read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from iterative_ppo.conversations import Conversation, DecisionPoint, decision_points
from iterative_ppo.rendering import RenderedPrompt, Renderer, TokenIds

RAW_TEMPLATE = "{{ messages[0].content }}"
"""A chat template that writes one message as it stands: a prompt's text, for stacks that always apply a template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactPrompt:
    """A prompt that survives the way through another stack.

    Example:
        ExactPrompt(id="17:c-001:0", token_ids=(2, 70, 5, 3), text="<|user|>hi<|end|><|assistant|>",
                    messages=({"role": "user", "content": "hi"},))
    """

    id: str
    """Number and id of the conversation, and which of its decision points this is."""
    token_ids: TokenIds
    text: str
    """What the tokenizer turns into `token_ids`, with nothing added."""
    messages: tuple[Mapping[str, str], ...] | None
    """What the tokenizer's own chat template turns into `token_ids`; None where no messages do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactPrompts:
    """All prompts of a step that can be handed over.

    Example:
        ExactPrompts(prompts=(ExactPrompt(...), ...), num_left_out={"its text is tokenized otherwise": 3})
    """

    prompts: tuple[ExactPrompt, ...]
    num_left_out: dict[str, int]
    """By reason."""

    @property
    def are_messages(self) -> bool:
        """Whether the chat template makes every one of them from its messages."""
        return all(prompt.messages is not None for prompt in self.prompts)


def exact_prompts(conversations: Iterable[Conversation], renderer: Renderer) -> ExactPrompts:
    """The prompts of all decision points, each checked: what its text and its messages become is what the policy read."""
    prompts: list[ExactPrompt] = []
    num_left_out: Counter[str] = Counter()
    for i, conversation in enumerate(conversations):
        for point in decision_points(conversation):
            rendered = renderer.prompt(point.chat) if point.prompt is None else renderer.prompt_from_text(point.prompt)
            messages = _messages(point, rendered, renderer)
            text = _text(point, rendered, messages, renderer.tokenizer)
            if text is None:
                num_left_out["its text is tokenized otherwise"] += 1
                continue
            prompts.append(
                ExactPrompt(
                    id=f"{i}:{conversation.id}:{point.turn}",
                    token_ids=rendered.token_ids,
                    text=text,
                    messages=messages
                    if messages and template_ids(renderer.tokenizer, messages) == rendered.token_ids
                    else None,
                )
            )
    return ExactPrompts(prompts=tuple(prompts), num_left_out=dict(num_left_out))


def template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, str]], **template_arguments: str
) -> TokenIds:
    """What a stack that applies the tokenizer's chat template makes of messages."""
    return tuple(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **template_arguments,
        )
    )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """What a stack that tokenizes a prompt's text, adding nothing, makes of it."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _messages(
    point: DecisionPoint, rendered: RenderedPrompt, renderer: Renderer
) -> tuple[Mapping[str, str], ...] | None:
    if point.prompt is not None or rendered.num_cut_tokens:
        return None
    return tuple(renderer.template_messages(point.chat, num_dropped=rendered.num_dropped_messages))


def _text(
    point: DecisionPoint,
    rendered: RenderedPrompt,
    messages: tuple[Mapping[str, str], ...] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """A text that becomes the prompt's tokens; None where neither the rendered nor the decoded one does."""

    def candidates() -> Iterator[str]:
        if messages is not None:
            yield tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        elif point.prompt is not None and not rendered.num_cut_tokens:
            yield point.prompt
        yield tokenizer.decode(rendered.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return next((text for text in candidates() if text_ids(tokenizer, text) == rendered.token_ids), None)
