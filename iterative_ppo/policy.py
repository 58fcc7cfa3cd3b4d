"""A language model as the policy π(response | prompt): load, sample, score, clone from logs, save."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from iterative_ppo.batching import micro_batches, pad_right
from iterative_ppo.config import PolicyConfig
from iterative_ppo.losses import token_logprobs
from iterative_ppo.rendering import Renderer, TokenIds, TurnSequence
from iterative_ppo.sampling import ConversationCache, SampledResponses
from iterative_ppo.supervised import FitHistory, Progress, fit_passes, no_progress

TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SAMPLING_ROWS = 256
_TINY_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogits:
    """Next-token logits at the tokens of each response, already divided by the temperature."""

    logits_BTV: Tensor
    token_BT: Tensor
    mask_BT: Tensor


class Policy:
    """π(response | prompt) = Π_t softmax(logits / temperature)[y_t], up to and including the end-of-response token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        config: context, response length and temperature are read; the model's own context limit is kept if smaller.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PolicyConfig) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.temperature = config.temperature
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.context_tokens
        self.renderer = Renderer(
            tokenizer,
            context_tokens=min(config.context_tokens, limit),
            max_response_tokens=config.max_response_tokens,
        )
        self.pad_id = self.renderer.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = self.pad_id

    @classmethod
    def load(cls, source: str | Path, config: PolicyConfig, *, device: str = "cpu") -> "Policy":
        """Loads a hub id or a folder. Raises ValueError with one line where there is no such model."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, loading = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"policy {str(source)!r} cannot be loaded: {reason}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(f"policy {str(source)!r} cannot be loaded: it lacks the weights {', '.join(missing[:3])}")
        return cls(model.to(device), tokenizer, config)

    @classmethod
    def tiny(cls, texts: Iterable[str], config: PolicyConfig, *, seed: int, device: str = "cpu") -> "Policy":
        """A small Llama with random weights and a byte-level BPE tokenizer trained on the texts."""
        tokenizer = _tiny_tokenizer(texts, config)
        num_heads = max(1, config.hidden_size // 32)
        if config.hidden_size % num_heads or (config.hidden_size // num_heads) % 2:
            raise ValueError(f"policy.hidden_size: must be a multiple of 32, not {config.hidden_size}")
        llama = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=config.context_tokens,
            tie_word_embeddings=True,
            initializer_range=config.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(llama)
        return cls(model.to(device), tokenizer, config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def save(self, folder: Path) -> None:
        """Writes an ordinary transformers folder whose generation settings sample from exactly this policy."""
        self.model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.config.max_response_tokens,
            eos_token_id=self.renderer.end_id,
            pad_token_id=self.pad_id,
        )
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def conversation_cache(self) -> ConversationCache:
        """A sampler for one batch of conversations; see `iterative_ppo.sampling`."""
        return ConversationCache(
            self.model,
            end_id=self.renderer.end_id,
            temperature=self.temperature,
            max_response_tokens=self.config.max_response_tokens,
        )

    def respond(
        self,
        prompts: Sequence[TokenIds],
        uniforms_BT: np.ndarray,
        *,
        progress: Progress = no_progress,
        what: str = "sample",
    ) -> list[TokenIds]:
        """One complete response a prompt, end-of-response token included even where the cap cut it: what is sent."""
        sampled = self.sample(prompts, uniforms_BT, progress=progress, what=what)
        end_id = self.renderer.end_id
        return [tokens if tokens[-1] == end_id else (*tokens, end_id) for tokens in sampled.token_ids]

    def sample(
        self,
        prompts: Sequence[TokenIds],
        uniforms_BT: np.ndarray,
        *,
        progress: Progress = no_progress,
        what: str = "sample",
    ) -> SampledResponses:
        """One response to each of many unrelated prompts; `uniforms_BT` as in `ConversationCache.sample`."""
        token_ids: list[TokenIds] = [()] * len(prompts)
        logprobs: list[tuple[float, ...]] = [()] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(by_length), _SAMPLING_ROWS):
            rows = by_length[start : start + _SAMPLING_ROWS]
            sampled = self.conversation_cache().sample([prompts[row] for row in rows], uniforms_BT[rows])
            for row, tokens, values in zip(rows, sampled.token_ids, sampled.token_logprobs, strict=True):
                token_ids[row], logprobs[row] = tokens, values
            progress(what, start + len(rows), len(prompts))
        return SampledResponses(token_ids=tuple(token_ids), token_logprobs=tuple(logprobs))

    def response_logits(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> ResponseLogits:
        """Logits at every response token of one padded batch; differentiable.

        Prompts are padded on the left and responses on the right, so that the model computes its (large) vocabulary
        projection for the responses alone.
        """
        width = max(map(len, prompts))
        response_BT, mask_BT = pad_right(responses, pad_id=self.pad_id)
        num_rows, response_width = response_BT.shape
        token_BS = np.full((num_rows, width), self.pad_id, dtype=np.int64)
        mask_BS = np.zeros((num_rows, width), dtype=bool)
        for b, prompt in enumerate(prompts):
            token_BS[b, width - len(prompt) :] = prompt
            mask_BS[b, width - len(prompt) :] = True
        token = torch.cat([torch.from_numpy(token_BS), response_BT], dim=1)[:, :-1]
        mask = torch.cat([torch.from_numpy(mask_BS), mask_BT], dim=1)[:, :-1]
        output = self.model(
            input_ids=token.to(self.device),
            attention_mask=mask.long().to(self.device),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0).to(self.device),
            use_cache=False,
            logits_to_keep=response_width,
        )
        return ResponseLogits(
            logits_BTV=output.logits.float() / self.temperature,
            token_BT=response_BT.to(self.device),
            mask_BT=mask_BT.to(self.device),
        )

    @torch.no_grad()
    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int
    ) -> list[list[float]]:
        """log π of every response token, one list a response."""
        logprobs: list[list[float]] = [[] for _ in prompts]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        for rows in micro_batches(lengths, tokens_per_batch=tokens_per_batch):
            batch = self.response_logits([prompts[row] for row in rows], [responses[row] for row in rows])
            for row, values in zip(rows, token_logprobs(batch.logits_BTV, batch.token_BT).tolist(), strict=True):
                logprobs[row] = values[: len(responses[row])]
        return logprobs

    def clone(
        self,
        sequences: Sequence[TurnSequence],
        *,
        held_out: Sequence[bool],
        tokens_per_batch: int,
        generator: np.random.Generator,
        progress: Progress = no_progress,
    ) -> FitHistory:
        """Fits the responses in sequences by maximum likelihood (behaviour cloning), stopping by held-out loss."""
        rows = range(len(sequences))
        return fit_passes(
            self.model,
            self._negative_log_likelihood(sequences),
            [len(sequence.token_ids) for sequence in sequences],
            train_rows=[row for row in rows if not held_out[row]],
            held_out_rows=[row for row in rows if held_out[row]],
            max_passes=self.config.clone_passes,
            patience_passes=3,
            learning_rate=self.config.clone_learning_rate,
            tokens_per_batch=tokens_per_batch,
            generator=generator,
            what="clone the start policy",
            progress=progress,
        )

    @functools.cached_property
    def _has_plain_head(self) -> bool:
        """Whether logits are the output embedding of the hidden state and nothing else (no cap, no scale)."""
        token_BT = torch.tensor([[self.renderer.end_id, self.pad_id]], device=self.device)
        with torch.no_grad():
            hidden_BTD = self.model.base_model(input_ids=token_BT, use_cache=False).last_hidden_state
            plain_BTV = self.model.get_output_embeddings()(hidden_BTD)
            return torch.allclose(plain_BTV, self.model(input_ids=token_BT, use_cache=False).logits, atol=1e-5)

    def _logits_at(self, token_BT: Tensor, mask_BT: Tensor, chosen_BT: Tensor) -> Tensor:
        """Logits at chosen positions only [N, V]: the vocabulary is the widest thing that a model computes."""
        arguments = {"input_ids": token_BT, "attention_mask": mask_BT.long(), "use_cache": False}
        if not self._has_plain_head:
            return self.model(**arguments).logits[chosen_BT].float() / self.temperature
        hidden_ND = self.model.base_model(**arguments).last_hidden_state[chosen_BT]
        return self.model.get_output_embeddings()(hidden_ND).float() / self.temperature

    def _negative_log_likelihood(
        self, sequences: Sequence[TurnSequence]
    ) -> Callable[[list[int]], tuple[Tensor, Tensor]]:
        def loss_sum_and_weight(rows: list[int]) -> tuple[Tensor, Tensor]:
            token_BT, mask_BT = pad_right([sequences[row].token_ids for row in rows], pad_id=self.pad_id)
            is_response_BT = torch.zeros_like(mask_BT)
            for b, row in enumerate(rows):
                for start, end in sequences[row].spans:
                    is_response_BT[b, start:end] = True
            token_BT, mask_BT = token_BT.to(self.device), mask_BT.to(self.device)
            precedes_target_BT = is_response_BT.roll(-1, dims=1).to(self.device)
            precedes_target_BT[:, -1] = False
            target_N = token_BT.roll(-1, dims=1)[precedes_target_BT]
            logits_NV = self._logits_at(token_BT, mask_BT, precedes_target_BT)
            return -token_logprobs(logits_NV, target_N).sum(), precedes_target_BT.sum()

        return loss_sum_and_weight


def _tiny_tokenizer(texts: Iterable[str], config: PolicyConfig) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=_TINY_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TINY_TEMPLATE,
        model_max_length=config.context_tokens,
    )
