"""Are two models of one kind? The first difference in words; empty where there is none."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def architecture_difference(model: PreTrainedModel, other: PreTrainedModel) -> str:
    """The first difference in the kind of model and in the names and shapes of its weights."""
    names = type(model.config).__name__, type(other.config).__name__
    if names[0] != names[1]:
        return f"the architecture is {names[1]}, not {names[0]}"
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    other_shapes = {name: tuple(weight.shape) for name, weight in other.named_parameters()}
    for name in [*shapes, *other_shapes]:
        if shapes.get(name) != other_shapes.get(name):
            return f"the weight {name} has shape {_or_none(other_shapes.get(name))}, not {_or_none(shapes.get(name))}"
    return ""


def tokenizer_difference(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, texts: Sequence[str]
) -> str:
    """The first difference in vocabulary, chat template, and what some texts become."""
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    for token in sorted({*ids, *other_ids}):
        if ids.get(token) != other_ids.get(token):
            return f"the token {token!r} has id {_or_none(other_ids.get(token))}, not {_or_none(ids.get(token))}"
    if tokenizer.chat_template != other.chat_template:
        return "the chat template is another"
    for text in texts:
        if _encode(tokenizer, text) != _encode(other, text):
            return f"the text {text[:60]!r} becomes other tokens"
    return ""


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _or_none(value: object) -> object:
    return "none" if value is None else value
