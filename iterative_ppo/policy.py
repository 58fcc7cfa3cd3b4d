"""A language model as the policy π(response | prompt): load, sample, score, clone from logs, save."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from iterative_ppo import adapters, distributed, sharding
from iterative_ppo.activation_checkpointing import gradient_pass, keep_no_activations
from iterative_ppo.batching import marked, pad_right
from iterative_ppo.config import PolicyConfig
from iterative_ppo.last_layer import hidden_states
from iterative_ppo.losses import token_logprobs
from iterative_ppo.rendering import Renderer, TokenIds, TurnSequence
from iterative_ppo.sampling import ConversationCache, SampledResponses
from iterative_ppo.sampling_chunks import own_chunks, rows_in_memory
from iterative_ppo.shared_prefix import run_trees, takes_trees, tree_batches
from iterative_ppo.supervised import FitHistory, Progress, fit_passes, hidden_matrices, no_progress

TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SMALLEST_FOR_ADAPTERS = 10_000_000
_TINY_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogits:
    """Next-token logits at the tokens of some responses, already divided by the temperature.

    B responses of at most T tokens; N tokens in all, response after response.
    """

    rows: list[int]
    """Which of the rows that were asked for these are. None, where a sharded model computes something only because the
    other processes do."""
    logits_NV: Tensor
    token_N: Tensor
    mask_BT: Tensor

    def logprobs(self) -> Tensor:
        """log π of every token, zero at padding; differentiable."""
        logprob_N = token_logprobs(self.logits_NV, self.token_N)
        return torch.zeros(self.mask_BT.shape, device=logprob_N.device).masked_scatter(self.mask_BT, logprob_N)


class Policy:
    """π(response | prompt) = Π_t softmax(logits / temperature)[y_t], up to and including the end-of-response token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        config: context, response length and temperature are read; the model's own context limit is kept if smaller.
        renderer: of a policy with the same tokenizer and context. Default: one of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PolicyConfig,
        renderer: Renderer | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.temperature = config.temperature
        self.renderer = renderer or Renderer(
            tokenizer,
            context_tokens=context_limit(model, config),
            max_response_tokens=config.max_response_tokens,
        )
        self.pad_id = self.renderer.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = self.pad_id

    @classmethod
    def load(
        cls,
        source: str | Path,
        config: PolicyConfig,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        checkpoint_activations: bool = False,
        shard_weights: bool = False,
    ) -> "Policy":
        """Loads a hub id or a folder, of a whole model or of an adapter.

        The weights of a model that is trained by an adapter are frozen.

        Args:
            dtype: of frozen weights; trained ones are float32.
            checkpoint_activations: see `activation_checkpointing`.
            shard_weights: whether several processes each keep a part of the weights; see `sharding`.

        Raises:
            ValueError: with one line where there is no such model, or it cannot be sharded.
        """
        try:
            base = adapters.base_of(source)
            if base is not None and adapters.is_of_classifier(source):
                raise ValueError("it is the adapter of a classifier, which scores texts and writes none")
            tokenizer = AutoTokenizer.from_pretrained(source)
            freezes = base is not None or _is_trained_by_adapter(source, config)
            model, loading = AutoModelForCausalLM.from_pretrained(
                base or source, dtype=dtype if freezes else torch.float32, output_loading_info=True
            )
            if base is not None:
                adapters.load_adapter(model, source)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"policy {str(source)!r} cannot be loaded: {reason}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(f"policy {str(source)!r} cannot be loaded: it lacks the weights {', '.join(missing[:3])}")
        scorer = next((name for name in model.config.architectures or () if name.endswith("Classification")), None)
        if scorer:  # where embeddings are tied it lacks no weight
            raise ValueError(
                f"policy {str(source)!r} cannot be loaded: it is a {scorer}, which scores texts and writes none"
            )
        if base is None:
            model.requires_grad_(not freezes)
        if checkpoint_activations:
            keep_no_activations(model)
        if not shard_weights or distributed.world_size() == 1:
            return cls(model.to(device), tokenizer, config)
        if adapters.has_adapter(model) or adapters.is_frozen(model):
            raise ValueError(
                "compute.shard_weights: the frozen weights that adapters share are not sharded; train all weights "
                "(policy.lora_rank = 0), or shard none"
            )
        sharding.shard(model, device)
        return cls(model, tokenizer, config)

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

    def branch(self, *, seed: int) -> "Policy":
        """A policy of its own that starts as this one and can be trained; they share what is frozen."""
        model = adapters.copy_sharing_frozen(self.model)
        if adapters.is_frozen(model):
            adapters.add_adapter(model, rank=self.config.lora_rank, seed=seed)
        return Policy(model, self.tokenizer, self.config, self.renderer)

    def merged(self) -> "Policy":
        """The same policy as a plain model, all weights its own."""
        return Policy(adapters.merged(self.model), self.tokenizer, self.config, self.renderer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_float32(self) -> bool:
        """Whether all weights are; where they are not, log-probabilities depend a little on what shares a batch."""
        return all(p.dtype == torch.float32 for p in self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def save(self, folder: Path) -> None:
        """Writes an ordinary transformers folder, or peft folder, whose generation settings are exactly this policy.

        Of several processes the main one does.
        """
        model = sharding.whole(self.model)
        if not distributed.is_main():
            return
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.config.max_response_tokens,
            eos_token_id=self.renderer.end_id,
            pad_token_id=self.pad_id,
        )
        if adapters.has_adapter(model):
            adapters.save_adapter(model, folder)
            model.generation_config.save_pretrained(folder)
        else:
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def conversation_cache(self) -> ConversationCache:
        """A sampler for one batch of conversations; see `iterative_ppo.sampling`."""
        return ConversationCache(
            self.model,
            end_id=self.renderer.end_id,
            temperature=self.temperature,
            max_response_tokens=self.config.max_response_tokens,
        )

    def rows_in_memory(self, prompt_tokens: int) -> int:
        """How many prompts as long as this can be answered at a time, by what their keys and values take; one at least."""
        return rows_in_memory(self.model)(prompt_tokens + self.config.max_response_tokens)

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
        return [self.renderer.ended(tokens) for tokens in sampled.token_ids]

    def sample(
        self,
        prompts: Sequence[TokenIds],
        uniforms_BT: np.ndarray,
        *,
        progress: Progress = no_progress,
        what: str = "sample",
    ) -> SampledResponses:
        """One response to each of many prompts; `uniforms_BT` as in `ConversationCache.sample`.

        What prompts share is encoded once: the prompts of one conversation, and one prompt given several times. Several
        processes each sample their share of the responses.
        """
        responses: dict[int, tuple[TokenIds, tuple[float, ...]]] = {}
        num_done = 0
        with sharding.gathered(self.model):
            for chunk in own_chunks(prompts, self.model, max_response_tokens=self.config.max_response_tokens):
                rows = [row for family in chunk for row in family]
                cache = self.conversation_cache()
                cache.encode([prompts[family[-1]] for family in chunk])
                cache.keep([place for place, family in enumerate(chunk) for _ in family])
                sampled = cache.sample([prompts[row] for row in rows], uniforms_BT[rows])
                responses |= zip(rows, zip(sampled.token_ids, sampled.token_logprobs, strict=True), strict=True)
                num_done += len(rows)
                progress(what, num_done, len(prompts))
        responses = distributed.gathered(responses)
        return SampledResponses(
            token_ids=tuple(responses[row][0] for row in range(len(prompts))),
            token_logprobs=tuple(responses[row][1] for row in range(len(prompts))),
        )

    def response_logits(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int
    ) -> Iterator[ResponseLogits]:
        """Logits at every response token, in micro-batches of bounded size; differentiable.

        Of several processes each has its share of the responses.
        Prompts that share a prefix are computed together (`shared_prefix`), and the vocabulary, the widest thing that
        a model computes, at the responses alone.
        """
        for rows, batch in tree_batches(
            prompts,
            responses,
            tokens_per_batch=tokens_per_batch,
            share=takes_trees(self.model),
            ends=False,
            in_step=torch.is_grad_enabled() and sharding.is_sharded(self.model),
        ):
            mask_BT = batch.mask_RL
            logits_NV = run_trees(
                lambda mask_BT=mask_BT, batch=batch, **inputs: self._logits_at(
                    lambda x_BSD: batch.before(x_BSD)[mask_BT], batch.at_responses(), **inputs
                ),
                batch,
                device=self.device,
                dtype=self.model.dtype,
            )
            yield ResponseLogits(
                rows=rows,
                logits_NV=logits_NV,
                token_N=batch.response_RL[mask_BT].to(self.device),
                mask_BT=mask_BT.to(self.device),
            )

    @torch.no_grad()
    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int
    ) -> list[list[float]]:
        """log π of every response token, one list a response."""
        logprobs: dict[int, list[float]] = {}
        with sharding.gathered(self.model):
            for batch in self.response_logits(prompts, responses, tokens_per_batch=tokens_per_batch):
                for row, values in zip(batch.rows, batch.logprobs().tolist(), strict=True):
                    logprobs[row] = values[: len(responses[row])]
        logprobs = distributed.gathered(logprobs)
        return [logprobs[row] for row in range(len(prompts))]

    def clone(
        self,
        sequences: Sequence[TurnSequence],
        *,
        held_out: Sequence[bool],
        tokens_per_batch: int,
        generator: np.random.Generator,
        from_scratch: bool = False,
        progress: Progress = no_progress,
    ) -> FitHistory:
        """Fits the responses in sequences by maximum likelihood (behaviour cloning), stopping by held-out loss.

        Args:
            from_scratch: whether the model has random weights; their matrices are then fitted by Muon.
        """
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
            matrices=hidden_matrices(self.model) if from_scratch else (),
        )

    @functools.cached_property
    def _has_plain_head(self) -> bool:
        """Whether logits are the output embedding of the hidden state and nothing else (no cap, no scale)."""
        token_BT = torch.tensor([[self.renderer.end_id, self.pad_id]], device=self.device)
        with torch.no_grad(), sharding.gathered(self.model):
            plain_BTV = sharding.within(self.model, lambda: self._plain_logits(lambda x: x, None, input_ids=token_BT))
            return torch.allclose(plain_BTV, self.model(input_ids=token_BT, use_cache=False).logits, atol=1e-5)

    def _logits_at(self, choose: Callable[[Tensor], Tensor], read_BS: Tensor, **inputs: Tensor) -> Tensor:
        """Logits [N, V] at the positions that `choose` takes from hidden states [B, S, D] (or logits [B, S, V]).

        Args:
            read_BS: True wherever it may take something.
        """
        has_plain_head = self._has_plain_head
        with gradient_pass(self.model):
            if not has_plain_head:
                return choose(self.model(**inputs, use_cache=False).logits).float() / self.temperature
            logits_NV = sharding.within(self.model, lambda: self._plain_logits(choose, read_BS, **inputs))
            return logits_NV.float() / self.temperature

    def _plain_logits(self, choose: Callable[[Tensor], Tensor], read_BS: Tensor | None, **inputs: Tensor) -> Tensor:
        hidden_ND = choose(hidden_states(self.model, read_BS, **inputs))
        logits_NV: Tensor = self.model.get_output_embeddings()(hidden_ND)
        return logits_NV

    def _negative_log_likelihood(
        self, sequences: Sequence[TurnSequence]
    ) -> Callable[[list[int]], tuple[Tensor, Tensor]]:
        def loss_sum_and_weight(rows: list[int]) -> tuple[Tensor, Tensor]:
            batch = response_targets([(sequences[row].token_ids, sequences[row].spans) for row in rows])
            precedes_BT = batch.precedes_target_BT.to(self.device)
            logits_NV = self._logits_at(
                lambda x_BTD: x_BTD[precedes_BT],
                batch.precedes_target_BT,
                input_ids=batch.token_BT.to(self.device),
            )
            return -token_logprobs(logits_NV, batch.target_N.to(self.device)).sum(), precedes_BT.sum()

        return loss_sum_and_weight


def context_limit(model: PreTrainedModel, config: PolicyConfig) -> int:
    """Most tokens of prompt and response together: the configured number, or the model's own limit if that is smaller."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.context_tokens
    return min(config.context_tokens, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTargets:
    """Sequences padded on the right, and what maximum likelihood predicts in them: every token of every response.

    Example:
        ResponseTargets(token_BT=[[5, 6, 9, 2]], precedes_target_BT=[[0, 1, 1, 0]], target_N=[9, 2])
    """

    token_BT: Tensor
    precedes_target_BT: Tensor
    target_N: Tensor


def response_targets(sequences: Sequence[tuple[TokenIds, Sequence[tuple[int, int]]]]) -> ResponseTargets:
    """The targets of some sequences, each its tokens and the spans of its responses."""
    token_BT, _ = pad_right([token_ids for token_ids, _ in sequences])
    precedes_BT = marked(
        [[(start - 1, end - 1) for start, end in spans] for _, spans in sequences], width=token_BT.shape[1]
    )
    return ResponseTargets(
        token_BT=token_BT,
        precedes_target_BT=precedes_BT,
        target_N=token_BT.roll(-1, dims=1)[precedes_BT],
    )


def _is_trained_by_adapter(source: str | Path, config: PolicyConfig) -> bool:
    """Whether a whole model is so large that an adapter of it is trained instead of its weights."""
    if not config.lora_rank:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return sum(p.numel() for p in model.parameters()) >= _SMALLEST_FOR_ADAPTERS


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
