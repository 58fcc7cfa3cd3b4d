"""Batched sampling of responses with a key-value cache that lives as long as the conversation.

Each row remembers the tokens it has cached and where they lie. A new prompt keeps the longest prefix that it
shares with them and encodes the rest: with a template that only appends, a conversation's tokens are encoded once,
and with one that rewrites the past (or a context that overflows) the result is the same, only slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from iterative_ppo import sharding
from iterative_ppo.last_layer import extend_cache
from iterative_ppo.losses import token_logprobs
from iterative_ppo.rendering import TokenIds, common_prefix_length

_CACHE_CHUNK_SLOTS = 64
_SMALLEST_SHRINKING_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledResponses:
    """Responses, one a prompt, with the log-probabilities of the distribution that they were drawn from.

    Example:
        SampledResponses(token_ids=((8, 9, 2), (9, 2)), token_logprobs=((-.1, -2.3, -.2), (-1.2, -.1)))
    """

    token_ids: tuple[TokenIds, ...]
    """End-of-response token included; absent where the response was cut at the cap."""
    token_logprobs: tuple[tuple[float, ...], ...]


class _GrowingLayer(DynamicLayer):
    """A cache layer with room to grow: appending a token copies that token, not the whole cache."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            grown = (_with_room(key_states, len(key_states), end), _with_room(value_states, len(value_states), end))
            if start:
                grown[0][..., :start, :] = self.keys
                grown[1][..., :start, :] = self.values
            self._buffers = grown
        self._buffers[0][..., start:end, :] = key_states
        self._buffers[1][..., start:end, :] = value_states
        self.keys = self._buffers[0][..., :end, :]
        self.values = self._buffers[1][..., :end, :]
        return self.keys, self.values

    def rows(self, index_N: Tensor) -> "_GrowingLayer":
        """A layer of its own with some of the rows, copied once."""
        part = _GrowingLayer()
        if self.is_initialized:
            part.lazy_initialization(self.keys, self.values)
            num_slots = self.get_seq_length()
            part._buffers = (
                _with_room(self.keys, len(index_N), num_slots),
                _with_room(self.values, len(index_N), num_slots),
            )
            part.keys, part.values = (buffer[..., :num_slots, :] for buffer in part._buffers)
            torch.index_select(self.keys, 0, index_N, out=part.keys)
            torch.index_select(self.values, 0, index_N, out=part.values)
        return part

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self._buffers = keys, values, None


def _with_room(states: Tensor, num_rows: int, num_slots: int) -> Tensor:
    """Memory for rows of such states, with a number of slots and a quarter more."""
    _, num_heads, _, size = states.shape
    room = max(_CACHE_CHUNK_SLOTS, num_slots // 4)
    return states.new_empty((num_rows, num_heads, num_slots + room, size))


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """What the keys and values of one token take."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * num_heads * head_size * model.dtype.itemsize)


class ConversationCache:
    """Samples responses for a batch of conversations, turn after turn, keeping what was encoded.

    Args:
        model: a causal language model, in evaluation mode.
        end_id: the token that ends a response.
        temperature: logits are divided by it; the policy *is* this distribution.
        max_response_tokens: a longer response is cut there, without an end-of-response token.
    """

    def __init__(self, model: PreTrainedModel, *, end_id: int, temperature: float, max_response_tokens: int) -> None:
        self.model = model
        self.end_id = end_id
        self.temperature = temperature
        self.max_response_tokens = max_response_tokens
        # Sliding windows are measured in cache slots: there, no gap may lie between a row's tokens.
        self._is_gapless = getattr(model.config.get_text_config(), "sliding_window", None) is not None
        self.num_encoded_tokens = 0
        self._token_ids: list[list[int]] = []
        self._slots: list[list[int]] = []
        self._mask_BS = torch.zeros((0, 0), dtype=torch.long)
        self._cache = Cache(layers=[])
        self._reset(0)

    def sample(self, prompts: Sequence[TokenIds], uniforms_BT: np.ndarray) -> SampledResponses:
        """Draws one response a prompt by inverting its cumulative distribution at the given uniform numbers.

        Args:
            prompts: one a row; the rows are those of the last call, less those dropped by `keep`.
            uniforms_BT: uniform numbers in [0, 1), [B, max_response_tokens]. A row's response depends on its own
                numbers alone, so it is the same in any batch.
        """
        self.encode(prompts)
        with torch.inference_mode():
            return self._decode([prompt[-1] for prompt in prompts], uniforms_BT[:, : self.max_response_tokens])

    def encode(self, prompts: Sequence[TokenIds]) -> None:
        """Encodes what the rows do not hold yet of their prompts, up to the last token."""
        if len(self._token_ids) != len(prompts):
            self._reset(len(prompts))
        with torch.inference_mode():
            self._encode([prompt[:-1] for prompt in prompts])

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, in that order (a row may be kept several times), and forgets the others.

        Before the first prompts there is nothing to keep.
        """
        if not self._token_ids:
            return
        part = self._part(rows)
        self._token_ids, self._slots = part._token_ids, part._slots
        self._mask_BS, self._cache = part._mask_BS, part._cache

    def _part(self, rows: Sequence[int]) -> "ConversationCache":
        """A cache of its own with the given rows."""
        part = ConversationCache(
            self.model,
            end_id=self.end_id,
            temperature=self.temperature,
            max_response_tokens=self.max_response_tokens,
        )
        part._token_ids = [self._token_ids[row].copy() for row in rows]
        part._slots = [self._slots[row].copy() for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        part._mask_BS = self._mask_BS[index]
        part._cache = Cache(layers=[layer.rows(index) for layer in self._cache.layers])
        return part

    def _reset(self, num_rows: int) -> None:
        num_layers = self.model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_GrowingLayer() for _ in range(num_layers)])
        self._token_ids = [[] for _ in range(num_rows)]
        self._slots = [[] for _ in range(num_rows)]
        self._mask_BS = torch.zeros((num_rows, 0), dtype=torch.long, device=self.model.device)

    def _layers(self) -> list[Any]:
        return [layer for layer in self._cache.layers if layer.is_initialized]

    def _encode(self, prefixes: Sequence[TokenIds]) -> None:
        """Brings every row's cache to exactly its prefix: forgets what differs, encodes what is missing."""
        fresh: list[list[int]] = []
        for row, prefix in enumerate(prefixes):
            shared = common_prefix_length(tuple(self._token_ids[row]), prefix)
            if shared < len(self._token_ids[row]):
                self._mask_BS[row, self._slots[row][shared:]] = 0
                del self._token_ids[row][shared:], self._slots[row][shared:]
            fresh.append(list(prefix[shared:]))
        self._compact(always=self._is_gapless)
        width = max((len(tokens) for tokens in fresh), default=0)
        if width:
            self._append(fresh, width)
            if self._is_gapless:
                self._compact(always=True)

    def _append(self, fresh: Sequence[Sequence[int]], width: int) -> None:
        """Runs the model over new tokens of every row, padded on the right."""
        start = self._mask_BS.shape[1]
        length_B1 = np.array([[len(tokens)] for tokens in fresh])
        seen_B1 = np.array([[len(tokens)] for tokens in self._token_ids])
        column_T = np.arange(width)
        block = np.zeros((3, len(fresh), width), dtype=np.int64)
        token_BT, mask_BT, position_BT = block
        mask_BT[:] = column_T < length_B1
        position_BT[:] = seen_B1 + np.minimum(column_T, np.maximum(length_B1 - 1, 0))
        token_BT[mask_BT > 0] = [token for tokens in fresh for token in tokens]
        token, mask, position = torch.from_numpy(block).to(self.model.device)
        mask_BS = torch.cat([self._mask_BS, mask], dim=1)
        sharding.within(
            self.model,
            lambda: extend_cache(
                self.model, self._cache, input_ids=token, attention_mask=mask_BS, position_ids=position
            ),
        )
        self._note(fresh, start, mask_BS)

    def _note(self, fresh: Sequence[Sequence[int]], start: int, mask_BS: Tensor) -> None:
        """Notes tokens of every row that the model ran over: they lie from slot `start` on, and the mask is now this."""
        for row, tokens in enumerate(fresh):
            self._token_ids[row].extend(tokens)
            self._slots[row].extend(range(start, start + len(tokens)))
        self._mask_BS = mask_BS
        self.num_encoded_tokens += sum(map(len, fresh))

    def _decode(self, last_tokens: Sequence[int], uniforms_BT: np.ndarray) -> SampledResponses:
        """Draws token after token, beginning with what follows each row's last token, which is not encoded yet."""
        num_rows, num_steps = uniforms_BT.shape
        device, start = self.model.device, self._mask_BS.shape[1]
        uniform_BT = torch.from_numpy(uniforms_BT).to(device)
        mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_zeros(num_rows, num_steps)], dim=1)
        token_B = torch.tensor(last_tokens, device=device)
        position_B = torch.tensor([len(tokens) for tokens in self._token_ids], device=device)
        is_running_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        drawn: list[Tensor] = []
        drawn_logprobs: list[Tensor] = []
        num_running = num_rows
        while len(drawn) < num_steps and num_running and not _is_worth_shrinking(num_running, num_rows):
            t = len(drawn)
            mask_BS[:, start + t] = is_running_B
            output = self.model(
                input_ids=token_B[:, None],
                attention_mask=mask_BS[:, : start + t + 1],
                position_ids=position_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits_BV = output.logits[:, -1].float() / self.temperature
            token_B = _invert_cumulative(logits_BV, uniform_BT[:, t])
            drawn.append(token_B)
            drawn_logprobs.append(token_logprobs(logits_BV, token_B))
            position_B += is_running_B
            is_running_B &= token_B != self.end_id
            num_running = int(is_running_B.sum())
        token_BT, logprob_BT = torch.stack(drawn, dim=1).tolist(), torch.stack(drawn_logprobs, dim=1).tolist()
        lengths = mask_BS[:, start:].sum(1).tolist()
        token_ids = [tokens[:length] for tokens, length in zip(token_BT, lengths, strict=True)]
        logprobs = [values[:length] for values, length in zip(logprob_BT, lengths, strict=True)]
        encoded = [[last, *tokens[:-1]] for last, tokens in zip(last_tokens, token_ids, strict=True)]
        self._note(encoded, start, mask_BS[:, : start + len(drawn)])
        if num_running and len(drawn) < num_steps:
            # Most have finished: the others go on by themselves. What they still say is encoded again with the next prompt.
            running = is_running_B.nonzero().squeeze(1).tolist()
            rest = self._part(running)
            said = rest._decode([token_ids[row][-1] for row in running], uniforms_BT[running, len(drawn) :])
            self.num_encoded_tokens += rest.num_encoded_tokens
            for row, tokens, values in zip(running, said.token_ids, said.token_logprobs, strict=True):
                token_ids[row] += tokens
                logprobs[row] += values
        return SampledResponses(token_ids=tuple(map(tuple, token_ids)), token_logprobs=tuple(map(tuple, logprobs)))

    def _compact(self, *, always: bool) -> None:
        """Gathers each row's live slots at the right end: always, or once padding and forgotten tokens are the larger half."""
        width = max((len(slots) for slots in self._slots), default=0)
        if not self._layers() or (not always and self._mask_BS.shape[1] < 2 * width + _CACHE_CHUNK_SLOTS):
            return
        index_BS = torch.zeros((len(self._slots), width), dtype=torch.long)
        mask_BS = torch.zeros_like(index_BS)
        for row, slots in enumerate(self._slots):
            first = width - len(slots)
            index_BS[row, first:] = torch.tensor(slots, dtype=torch.long)
            mask_BS[row, first:] = 1
            self._slots[row] = list(range(first, width))
        self._mask_BS = mask_BS.to(self.model.device)
        index_BHSD = index_BS.to(self.model.device)[:, None, :, None]
        for layer in self._layers():
            keys, values = (
                states.gather(2, index_BHSD.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )
            layer.replace(keys, values)


def _is_worth_shrinking(num_running: int, num_rows: int) -> bool:
    """Whether so few of the rows are left that it pays to copy what their cache holds, and to go on with them alone."""
    return 2 * num_running <= num_rows and num_rows >= _SMALLEST_SHRINKING_BATCH


def _invert_cumulative(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which each row's cumulative distribution, added up in float64, passes its uniform number."""
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
