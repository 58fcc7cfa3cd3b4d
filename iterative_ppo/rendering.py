"""Chats to token ids: what exactly the policy reads, and which tokens are its response.

A chat is a sequence of `{"role": ..., "content": ...}` messages. A prompt is the chat rendered by the model's own
template, up to and including the generation prompt; a response is the tokens that the policy adds, its
end-of-response token included.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]
TokenIds = tuple[int, ...]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_PROBE = "PROBE"
_MAX_REMEMBERED_CHARACTERS = 20_000_000
_MAX_REMEMBERED_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """A prompt as token ids.

    Example:
        RenderedPrompt(token_ids=(1, 530, 7, 2), num_dropped_messages=0, num_cut_tokens=0)
    """

    token_ids: TokenIds
    num_dropped_messages: int
    """Oldest messages left out because the conversation is longer than the model's context."""
    num_cut_tokens: int
    """Tokens cut from the beginning because even the latest message was longer than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSequence:
    """Several decision points of one conversation as one token sequence: each prompt and response is a prefix of it.

    Example:
        TurnSequence(token_ids=(1, 8, 9, 2, 5, 9, 2), spans=((2, 4), (5, 7)), turns=(0, 1))
    """

    token_ids: TokenIds
    spans: tuple[tuple[int, int], ...]
    """Start and end (exclusive) of each response in `token_ids`."""
    turns: tuple[int, ...]
    """Which decision point each span is."""


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def pack_turns(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> list[TurnSequence]:
    """Packs the decision points of one conversation, in order, into as few sequences as are exact.

    A decision point joins a sequence when its prompt and response are a prefix of it, so that a causal model reads
    the same there as from the prompt alone. A template that rewrites the past (thinking dropped from history,
    oldest messages out of the context) breaks the prefix, and the turn starts a sequence of its own.
    """
    packed: list[TurnSequence] = []
    token_ids: TokenIds = ()
    spans: list[tuple[int, int]] = []
    turns: list[int] = []
    for turn in reversed(range(len(prompts))):
        own = prompts[turn] + responses[turn]
        if token_ids[: len(own)] != own:
            if turns:
                packed.append(TurnSequence(token_ids=token_ids, spans=tuple(spans[::-1]), turns=tuple(turns[::-1])))
            token_ids, spans, turns = own, [], []
        spans.append((len(prompts[turn]), len(own)))
        turns.append(turn)
    if turns:
        packed.append(TurnSequence(token_ids=token_ids, spans=tuple(spans[::-1]), turns=tuple(turns[::-1])))
    return packed[::-1]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, a longer one before one that it begins with; nothing where there are none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


class _Memory(dict[_Key, _Value]):
    """What has been found so far; all of it is forgotten when it would grow too large."""

    def __init__(self) -> None:
        super().__init__()
        self._size = 0

    def remember(self, key: _Key, value: _Value, *, size: int, most: int) -> None:
        self._size += size
        if self._size > most:
            self.clear()
            self._size = size
        self[key] = value


class Renderer:
    """Renders chats with a tokenizer's chat template, inside a model's context.

    Templates differ in what they accept. Where one refuses a system message it is put before the first user
    message; where one wants the user to speak first, an empty user message is put in front.

    Args:
        tokenizer: a tokenizer with a chat template.
        context_tokens: the most tokens that prompt and response may hold together.
        max_response_tokens: room kept for the response.

    Raises:
        ValueError: the tokenizer has no chat template, or the context leaves no room for a prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, max_response_tokens: int) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model"
            )
        # A response that the cap cuts is sent, and read from then on, with an end-of-response token on top.
        self.prompt_budget = context_tokens - max_response_tokens - 1
        if self.prompt_budget < 1:
            raise ValueError(
                f"a context of {context_tokens} tokens leaves no room for a prompt beside a response of "
                f"{max_response_tokens} tokens (policy.max_response_tokens)"
            )
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self._require_valid_template()
        self._takes_system = self._renders([{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}])
        self._takes_assistant_first = self._renders(
            [{"role": "assistant", "content": _PROBE}, {"role": "user", "content": "a"}]
        )
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._pieces: _Memory[str, TokenIds] = _Memory()
        self._prompts: _Memory[tuple[tuple[str, str], ...], RenderedPrompt] = _Memory()
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
            tokenizer.all_special_tokens
        )
        self._marks = _any_of(special)
        self._special = self._special_tokens()
        self._takes_no_user = self._renders([{"role": "system", "content": _PROBE}])
        self.end_id = self._find_end_id()
        self.generation_prompt = self._find_generation_prompt()
        """What the template writes between a customer's message and the response; empty where it writes nothing."""

    def prompt_text(self, chat: Chat) -> str:
        """The prompt for the next response, as text."""
        return self._apply(self._adapted(chat), generate=True)

    def prompt(self, chat: Chat) -> RenderedPrompt:
        """The prompt for the next response, as tokens.

        Longer than the context: the oldest messages are dropped whole, the system message and the latest message
        stay; if those alone are too long, the beginning of what is left is cut. Remembered: what a policy was asked when
        conversations were collected is asked again when Q is fitted and when the policy is improved.
        """
        key = tuple((message["role"], message["content"]) for message in chat)
        rendered = self._prompts.get(key)
        if rendered is None:
            rendered = self._rendered(chat)
            self._prompts.remember(key, rendered, size=len(rendered.token_ids), most=_MAX_REMEMBERED_TOKENS)
        return rendered

    def renders_as(self, other: "Renderer") -> bool:
        """Whether the other one makes the same tokens of every chat."""
        return (
            self._backend is not None
            and other._backend is not None
            and (self.context_tokens, self.prompt_budget) == (other.context_tokens, other.prompt_budget)
            and self.tokenizer.chat_template == other.tokenizer.chat_template
            and self.tokenizer.special_tokens_map == other.tokenizer.special_tokens_map
            and self._backend.to_str() == other._backend.to_str()
        )

    def _rendered(self, chat: Chat) -> RenderedPrompt:
        chat = list(chat)
        num_system = int(bool(chat) and chat[0]["role"] == "system")
        num_droppable = len(chat) - num_system - 1

        def without(num_dropped: int) -> TokenIds:
            return self.encode(self.prompt_text([*chat[:num_system], *chat[num_system + num_dropped :]]))

        token_ids, num_dropped = without(0), 0
        if len(token_ids) > self.prompt_budget and num_droppable > 0:
            fewer = range(1, num_droppable)
            num_dropped = 1 + bisect_left(fewer, True, key=lambda n: len(without(n)) <= self.prompt_budget)
            token_ids = without(num_dropped)
        return self._cut(token_ids, num_dropped_messages=num_dropped)

    def template_messages(self, chat: Chat, *, num_dropped: int) -> list[dict[str, str]]:
        """The messages from which the template writes a prompt: a chat without its `num_dropped` oldest, as adapted."""
        chat = list(chat)
        num_system = int(bool(chat) and chat[0]["role"] == "system")
        return self._adapted(chat[:num_system] + chat[num_system + num_dropped :])

    def prompt_from_text(self, text: str) -> RenderedPrompt:
        """A prompt whose exact text was logged; its beginning is cut where it exceeds the context."""
        return self._cut(self.encode(text), num_dropped_messages=0)

    def _cut(self, token_ids: TokenIds, *, num_dropped_messages: int) -> RenderedPrompt:
        return RenderedPrompt(
            token_ids=token_ids[-self.prompt_budget :],
            num_dropped_messages=num_dropped_messages,
            num_cut_tokens=max(0, len(token_ids) - self.prompt_budget),
        )

    def response(self, text: str) -> TokenIds:
        """A response as tokens, with its end-of-response token. The empty response (abstaining) is that token alone."""
        return (*self.encode(self._without_marks(text)), self.end_id)

    def ended(self, response: TokenIds) -> TokenIds:
        """A response as it is sent: with its end-of-response token, which one that a cap cut does not have."""
        return response if response[-1:] == (self.end_id,) else (*response, self.end_id)

    def response_text(self, token_ids: TokenIds) -> str:
        """The text that the customer sees."""
        if token_ids and token_ids[-1] == self.end_id:
            token_ids = token_ids[:-1]
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def encode(self, text: str) -> TokenIds:
        """Tokens of a text, nothing added."""
        if self._special is None:
            return self._encode_piece(text)
        return tuple(itertools.chain.from_iterable(map(self._encode_piece, self._special.split(text))))

    def _encode_piece(self, text: str) -> TokenIds:
        """Tokens of a text. Remembered: a conversation's messages come again with each of its turns."""
        token_ids = self._pieces.get(text)
        if token_ids is None:
            token_ids = self._tokenized(text) if text else ()
            self._pieces.remember(text, token_ids, size=len(text), most=_MAX_REMEMBERED_CHARACTERS)
        return token_ids

    def _tokenized(self, text: str) -> TokenIds:
        if self._backend is None:
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # The same without the places of tokens in the text, which take as long as the tokens.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def _special_tokens(self) -> re.Pattern[str] | None:
        """What splits a text into pieces that are tokenized independently; None where the tokenizer does not do that."""
        specials = [
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and not (t.lstrip or t.rstrip)
        ]
        if not specials:
            return None
        pattern = _any_of(specials)
        probe = self._apply(
            [{"role": "user", "content": " a  b\n c"}, {"role": "assistant", "content": "d "}], generate=True
        )
        pieces = [self._encode_piece(piece) for piece in pattern.split(probe)]
        return pattern if tuple(itertools.chain.from_iterable(pieces)) == self._encode_piece(probe) else None

    def _without_marks(self, text: str) -> str:
        """The text with every special token that it spells broken by a zero-width space.

        Somebody who writes `<|end|>` must not end a turn, or begin one of the other side.
        """
        return self._marks.sub(lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)

    def _adapted(self, chat: Chat) -> list[dict[str, str]]:
        messages = [{"role": m["role"], "content": self._without_marks(m["content"])} for m in chat]
        if not self._takes_system and messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
            if messages and messages[0]["role"] == "user":
                messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "user", "content": system})
        first = int(bool(messages) and messages[0]["role"] == "system")
        if len(messages) == first:
            needs_user = not self._takes_no_user or not messages
        else:
            needs_user = not self._takes_assistant_first and messages[first]["role"] == "assistant"
        if needs_user:
            messages.insert(first, {"role": "user", "content": ""})
        return messages

    def _apply(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def _renders(self, messages: list[dict[str, str]]) -> bool:
        try:
            return _PROBE in self._apply(messages, generate=True)
        except TemplateError:
            return False

    def _require_valid_template(self) -> None:
        try:
            self._apply([{"role": "user", "content": _PROBE}], generate=True)
        except TemplateError as error:
            raise ValueError(f"{self.tokenizer.name_or_path}: the chat template is broken: {error}") from error

    def _find_generation_prompt(self) -> TokenIds:
        chat = [{"role": "user", "content": _PROBE}]
        answered, asked = self._apply(chat, generate=True), self._apply(chat, generate=False)
        return self.encode(answered.removeprefix(asked)) if answered.startswith(asked) else ()

    def _find_end_id(self) -> int:
        """The first token that the template writes after a response; a tokenizer's EOS where it writes none."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        tail = self.encode(self._apply(chat, generate=False).rpartition(_PROBE)[2])
        if tail:
            return tail[0]
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: neither the chat template nor the tokenizer ends a response"
            )
        return self.tokenizer.eos_token_id
