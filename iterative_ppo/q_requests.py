"""What a request to the Q service may say: JSON in, prompts and responses in tokens out.

Every check raises a FieldError that names the place, as `items[3].response`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from iterative_ppo.conversation_checks import (
    MESSAGE_KEYS,
    FieldError,
    check_conversation,
    check_text,
    parse_json,
    required,
    wrong_kind,
)
from iterative_ppo.conversations import chat_messages
from iterative_ppo.q_scoring import Item, QScorer
from iterative_ppo.rendering import TokenIds

_PROMPT_FORMS = ("prompt", "prompt_ids", "messages")
_RESPONSE_FORMS = ("response", "response_ids")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemsRequest:
    """What is to be scored.

    Example:
        ItemsRequest(items=[Item(prompt=(1, 8, 9, 4), response=(5, 6, 2))], model="q_function")
    """

    items: list[Item]
    model: str | None = None
    """The name that the client gave."""


def parse_q(body: bytes, scorer: QScorer) -> ItemsRequest:
    """`{"items": [{"prompt" | "prompt_ids" | "messages": ..., "response" | "response_ids": ...}, ...]}`."""
    record = _object(parse_json(body), ("items",))
    return ItemsRequest(items=required(record, "items", lambda value: _each(value, lambda item: _item(item, scorer))))


def parse_reward(body: bytes, scorer: QScorer) -> ItemsRequest:
    """OpenRLHF's remote reward: `{"query": [text, ...], "prompts": [text, ...], "labels": [anything, ...]}`.

    A query is prompt and response in one text. Labels are not looked at.
    """
    record = _object(parse_json(body), ("query", "prompts", "labels"))
    queries = required(record, "query", lambda value: _each(value, check_text))
    prompts: Sequence[str | None] = [None] * len(queries)
    if record.get("prompts") is not None:
        prompts = required(record, "prompts", lambda value: _each(value, check_text))
        if len(prompts) != len(queries):
            raise FieldError("prompts", f"must be as many as the queries, {len(queries)}, not {len(prompts)}")
    pairs = list(zip(queries, prompts, strict=True))
    try:
        return ItemsRequest(items=_each(pairs, lambda pair: _text_item(pair[0], pair[1], scorer)))
    except FieldError as error:
        raise error.inside("query") from None


def parse_classify(body: bytes, scorer: QScorer) -> ItemsRequest:
    """vLLM's classification: `{"model": name, "input": text | [text, ...]}`, each prompt and response in one text."""
    record = _object(parse_json(body), ("model", "input"))
    texts = required(record, "input", lambda value: [value] if isinstance(value, str) else value)
    try:
        items = _each(texts, lambda text: _text_item(check_text(text), None, scorer))
    except FieldError as error:
        raise error.inside("input") from None
    return ItemsRequest(
        items=items, model=None if record.get("model") is None else required(record, "model", check_text)
    )


def _item(value: object, scorer: QScorer) -> Item:
    record = _object(value, (*_PROMPT_FORMS, *_RESPONSE_FORMS))
    prompt_form, response_form = _form(record, _PROMPT_FORMS), _form(record, _RESPONSE_FORMS)
    prompt = required(record, prompt_form, lambda value: _prompt(prompt_form, value, scorer))

    def response(value: object) -> Item:
        if response_form == "response":
            return _fitting(lambda: scorer.item(prompt, scorer.renderer.response(check_text(value))))
        return _fitting(lambda: scorer.item(prompt, _token_ids(value, scorer.vocabulary_size)))

    return required(record, response_form, response)


def _form(record: dict[str, Any], forms: tuple[str, ...]) -> str:
    given = [form for form in forms if record.get(form) is not None]
    if len(given) != 1:
        raise FieldError("", f"give exactly one of {', '.join(forms)}, not {' and '.join(given) or 'none'}")
    return given[0]


def _prompt(form: str, value: object, scorer: QScorer) -> TokenIds:
    match form:
        case "prompt":
            token_ids = scorer.renderer.prompt_from_text(check_text(value)).token_ids
        case "prompt_ids":
            token_ids = _token_ids(value, scorer.vocabulary_size)
        case _:
            chat = _chat(value)
            try:
                token_ids = scorer.renderer.prompt(chat).token_ids
            except TemplateError as error:
                raise FieldError("", f"the chat template refuses them: {error}") from None
    if not token_ids:
        raise FieldError("", "holds no token")
    return token_ids


def _chat(value: object) -> Sequence[dict[str, str]]:
    """Messages as a log has them: of one side joined, with what was suggested and what was sent."""
    _each(value, lambda message: _object(message, MESSAGE_KEYS))
    try:
        return chat_messages(check_conversation({"id": "request", "messages": value}).messages)
    except FieldError as error:
        raise FieldError(error.field.removeprefix("messages"), error.reason) from None


def _text_item(text: str, prompt: str | None, scorer: QScorer) -> Item:
    return _fitting(lambda: scorer.item_of_text(text, prompt=prompt))


def _fitting(make: Callable[[], Item]) -> Item:
    try:
        return make()
    except ValueError as error:
        raise FieldError("", str(error)) from None


def _token_ids(value: object, vocabulary_size: int) -> TokenIds:
    if not isinstance(value, list):
        raise FieldError("", wrong_kind(value, "a list of token ids"))
    for place, token in enumerate(value):
        if type(token) is not int:
            raise FieldError(f"[{place}]", wrong_kind(token, "a token id"))
        if not 0 <= token < vocabulary_size:
            raise FieldError(f"[{place}]", f"must be from 0 to {vocabulary_size - 1}, not {token}")
    return tuple(value)


def _object(value: object, known: Sequence[str] | frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError("", wrong_kind(value, "an object"))
    for key in value:
        if key not in known:
            raise FieldError("", "is not a known key").inside(key)
    return value


def _each(value: object, check: Callable[[Any], _T]) -> list[_T]:
    if not isinstance(value, list):
        raise FieldError("", wrong_kind(value, "a list"))
    if not value:
        raise FieldError("", "must not be empty")
    checked = []
    for place, item in enumerate(value):
        try:
            checked.append(check(item))
        except FieldError as error:
            raise error.inside(place) from None
    return checked
