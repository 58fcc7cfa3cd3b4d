"""Q(prompt, response): the expected return of sending this response now and following the policy afterwards.

A transformer with a scalar head, read at a response's end-of-response token. Read at the token before the response
it is the state's value, and at every token in between the token-level value: one model, one causal pass over a
conversation, all of its decision points.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from iterative_ppo import distributed, sharding
from iterative_ppo.activation_checkpointing import gradient_pass, keep_no_activations
from iterative_ppo.adapters import (
    add_adapter,
    base_of,
    copy_sharing_frozen,
    has_adapter,
    is_frozen,
    load_adapter,
    merged,
    name_of,
    save_adapter,
    without_adapter,
)
from iterative_ppo.batching import own_micro_batches, pad_right
from iterative_ppo.conversation_features import ResponseMarks, features, num_features, word_scalars
from iterative_ppo.last_layer import hidden_states, layer_list
from iterative_ppo.losses import lower_confidence
from iterative_ppo.shared_prefix import TreeBatch, run_trees, takes_trees, tree_batches
from iterative_ppo.supervised import Progress, no_progress

Link = Literal["identity", "logistic"]
ReadOut = Literal["last", "mean"]
"""What the heads multiply at a token: its hidden state, or that and means over what it sees (`conversation_features`)."""
TokenIds = tuple[int, ...]

_SCHEMA = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class QFunctionCard:
    """What a checkpoint's `q_function.json` says beside the weights.

    Example:
        QFunctionCard(link="logistic", gamma=1.0, target="monte_carlo", policy="iteration-002", metrics={"auc": 0.8})
    """

    link: Link
    gamma: float
    target: str
    policy: str
    metrics: dict[str, object]
    read_out: ReadOut = "last"
    """This and what follows are the Q-function's own, and `save` fills them in."""
    base: str | None = None
    """Hub id or folder of the frozen model that a mean is read from; the checkpoint holds no weights of it."""
    num_layers: int | None = None
    """How many of its layers, from the first, are below the heads."""
    marks: ResponseMarks | None = None
    """How responses are told from what others said."""


class QFunction(nn.Module):
    """An ensemble of linear heads on one trunk; the checkpoint's single label is the mean head.

    q_m = link(head_m · features) for ensemble member m, and Q = link(mean_m head_m · features). The features are the
    token's hidden state; of a frozen trunk also its means over what the token sees, and the words that others than the
    policy said (`conversation_features`), which no label can say.

    Args:
        model: a sequence-classification model with one label: its trunk is used, its `score` is the mean head.
        link: from the scalar to Q.
        heads: [M, features] ensemble heads.
        marks: of a frozen trunk, from which means are read: how responses are told from what others said.
    """

    word_values: Tensor
    """What each token is worth as somebody else's word, to each member [V, M]; of a read-out of a frozen trunk."""

    def __init__(
        self, model: PreTrainedModel, *, link: Link, heads: Tensor, marks: ResponseMarks | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.link: Link = link
        self.marks = marks
        self.heads = nn.Parameter(heads.float())
        num_words = 0 if marks is None else model.config.get_text_config().vocab_size
        self.register_buffer("word_values", torch.zeros(num_words, len(heads), device=heads.device))
        self.model.score.weight.requires_grad_(False)
        if marks is not None:
            self.model.requires_grad_(False)
        self.eval()

    @classmethod
    def from_policy(
        cls, policy: PreTrainedModel, *, link: Link, num_heads: int, pad_id: int, lora_rank: int, seed: int
    ) -> "QFunction":
        """A new Q-function on a policy's weights, with small random heads; frozen weights are shared.

        Args:
            lora_rank: of a new adapter, where all of the policy's weights are frozen.
        """
        trunk = sharding.unsharded_copy(policy) if sharding.is_sharded(policy) else copy_sharing_frozen(policy)
        q_function = cls.on_trunk(trunk, link=link, num_heads=num_heads, pad_id=pad_id, seed=seed)
        if is_frozen(policy):
            add_adapter(q_function.model, rank=lora_rank, seed=seed)
        return q_function._placed_like(policy)

    @classmethod
    def on_trunk(cls, policy: PreTrainedModel, *, link: Link, num_heads: int, pad_id: int, seed: int) -> "QFunction":
        """A new Q-function that shares the trunk of a policy's model, not a copy of it, with small random heads."""
        model = _classifier_around(policy)
        model.config.pad_token_id = pad_id
        generator = torch.Generator().manual_seed(seed)
        heads = 0.02 * torch.randn(num_heads, model.config.get_text_config().hidden_size, generator=generator)
        return cls(model, link=link, heads=heads.to(model.device))

    @classmethod
    def on_base(
        cls, policy: PreTrainedModel, *, depth: float, link: Link, num_heads: int, marks: ResponseMarks
    ) -> "QFunction":
        """A read-out, its heads still 0, of the frozen weights below a policy's adapter, which are shared.

        Args:
            depth: the share of their layers, from the first, that is read.
            marks: how responses are told from what others said.
        """
        model = _classifier_around(without_adapter(policy))
        _cut(model, max(1, round(depth * _num_layers(model))))
        heads = torch.zeros(num_heads, num_features(model.config.get_text_config().hidden_size), device=model.device)
        return cls(model, link=link, heads=heads, marks=marks)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", backbone: PreTrainedModel | None = None) -> "QFunction":
        """Loads a checkpoint of `save`; a plain one-label checkpoint without our JSON is refused by name.

        Args:
            device: where there is no backbone.
            backbone: a model whose frozen weights are shared if the checkpoint is an adapter or a read-out of them, and
                which says whether activations are kept and whether the weights are sharded.
        """
        card = load_card(folder)
        try:
            base = backbone_of(folder)
            if base is None:
                model = _load_classifier(folder)
            elif backbone is not None and name_of(backbone) == base:
                model = _classifier_around(without_adapter(backbone))
            else:
                model = _load_classifier(base)
            if card.num_layers is not None:
                _cut(model, card.num_layers)
            elif base is not None:
                load_adapter(model, folder)
            if backbone is not None and backbone.is_activation_checkpointing:
                keep_no_activations(model)
            tensors = load_file(Path(folder) / "heads.safetensors")
            q_function = cls(model, link=card.link, heads=tensors["heads"], marks=card.marks)
            if card.marks is not None:
                q_function.set_words(tensors["word_ids"], tensors["word_values"])
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"Q-function cannot be loaded from {str(folder)!r}: {reason}") from error
        return q_function.to(device) if backbone is None else q_function._placed_like(backbone)

    def _placed_like(self, model: PreTrainedModel) -> "QFunction":
        """On the model's device, and sharded as it is."""
        if not sharding.is_sharded(model):
            return self.to(model.device)
        sharding.shard(self.model, model.device)
        self.heads.data = self.heads.data.to(model.device)
        return self

    def save(self, folder: Path, card: QFunctionCard, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a transformers sequence-classification folder, the ensemble's heads and `q_function.json`.

        Where the trunk has an adapter, it is a peft folder of that task, and of a mean there are the heads alone. Of
        several processes the main one writes.
        """
        model = sharding.whole(self.model)
        if not distributed.is_main():
            return
        if self.read_out == "mean":
            folder.mkdir(parents=True, exist_ok=True)
        else:
            with torch.no_grad():
                model.score.weight.copy_(self.heads.mean(0, keepdim=True))
            tokenizer = _padded_by_another_than_its_end(tokenizer)
            model.config.pad_token_id = tokenizer.pad_token_id
            if has_adapter(model):
                save_adapter(model, folder, heads={"score": model.score.weight})
            else:
                model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tensors = {"heads": self.heads.detach().cpu().contiguous()}
        card = replace(card, read_out=self.read_out)
        if self.read_out == "mean":
            card = replace(card, base=name_of(model), num_layers=self.num_layers, marks=self.marks)
            word_ids = self.word_values.any(-1).nonzero()[:, 0]
            tensors |= {"word_ids": word_ids.cpu(), "word_values": self.word_values[word_ids].cpu()}
        save_file(tensors, folder / "heads.safetensors")
        text = json.dumps({"schema": _SCHEMA, **asdict(card)}, indent=1, allow_nan=False)
        (folder / "q_function.json").write_text(text + "\n", encoding="utf-8")

    def merged(self) -> "QFunction":
        """The same Q-function as a plain model, all weights its own.

        Raises:
            ValueError: it reads a mean, which the label of a plain model cannot.
        """
        if self.read_out == "mean":
            raise ValueError(
                "the Q-function reads a mean over the conversation from a frozen model, and the label of a plain model "
                'reads one token: fit it with q_function.trunk = "trained" (`ippo serve-q` serves it as it is)'
            )
        return QFunction(merged(self.model), link=self.link, heads=self.heads.detach().clone())

    @property
    def read_out(self) -> ReadOut:
        return "last" if self.marks is None else "mean"

    @property
    def device(self) -> torch.device:
        return self.heads.device

    @property
    def num_layers(self) -> int:
        """How many layers are below the heads."""
        return _num_layers(self.model)

    def hidden(self, token_BT: Tensor, read_BT: Tensor | None = None) -> Tensor:
        """The trunk's last hidden states [B, T, hidden] of rows padded on the right, float32.

        Padding needs no mask there: no real token sees what comes after it.

        Args:
            read_BT: True at the tokens that are read; what stands at the others means nothing. Default: all are read.
        """
        return self._last_hidden(read_BT, input_ids=token_BT.to(self.device))

    def set_words(self, word_ids: Tensor, values_WM: Tensor) -> None:
        """What words are worth; those not named are worth nothing."""
        self.word_values.zero_()
        self.word_values[word_ids.to(self.device)] = values_WM.to(self.word_values)

    def features(self, token_BT: Tensor, read_BT: Tensor | None = None) -> Tensor:
        """What the heads multiply at every token of rows padded on the right: [B, T, F]; `read_BT` as of `hidden`."""
        hidden_BTD = self.hidden(token_BT, read_BT)
        return hidden_BTD if self.marks is None else features(hidden_BTD, self.marks.others(token_BT))

    def scalars_of_trees(self, batch: TreeBatch, read_BT: Tensor) -> Tensor:
        """Every member's scalar at tokens of prompts that share their prefixes: [B, T, M]; `read_BT` as of `hidden`."""
        hidden_BTD = run_trees(
            lambda **inputs: self._last_hidden(read_BT, **inputs), batch, device=self.device, dtype=self.model.dtype
        )
        return self._scalars(hidden_BTD, batch.token_BT, batch)

    def scalars_at(self, row: TokenIds, places: Sequence[int], feature_PF: Tensor) -> Tensor:
        """The same at places of a row whose features are known, of a frozen trunk: [P, M]."""
        assert self.marks is not None
        token_1T = torch.tensor([row])
        words_1TM = word_scalars(self._word_values_of(token_1T), self.marks.others(token_1T))
        return feature_PF.to(self.device) @ self.heads.T + words_1TM[0, list(places)]

    def forward(self, token_BT: Tensor, read_BT: Tensor | None = None) -> Tensor:
        """Every ensemble member's scalar, before the link, at every token of rows padded on the right: [B, T, M];
        `read_BT` as of `hidden`."""
        return self._scalars(self.hidden(token_BT, read_BT), token_BT)

    def _scalars(self, hidden_BTD: Tensor, token_BT: Tensor, tree: TreeBatch | None = None) -> Tensor:
        if self.marks is None:
            return hidden_BTD @ self.heads.T
        others_BT = self.marks.others(token_BT, tree)
        words_BTM = word_scalars(self._word_values_of(token_BT), others_BT, tree)
        return features(hidden_BTD, others_BT, tree) @ self.heads.T + words_BTM

    def _word_values_of(self, token_BT: Tensor) -> Tensor:
        """What each token is worth as somebody else's word [B, T, M]."""
        return nn.functional.embedding(token_BT.to(self.device), self.word_values)

    def _last_hidden(self, read_BT: Tensor | None, **inputs: Tensor) -> Tensor:
        read_BT = read_BT if self.marks is None else None  # a mean is over all tokens
        with gradient_pass(self.model):
            return sharding.within(self.model, lambda: hidden_states(self.model, read_BT, **inputs)).float()

    def to_value(self, scalar: Tensor) -> Tensor:
        """The link."""
        return scalar.sigmoid() if self.link == "logistic" else scalar

    @torch.no_grad()
    def ensemble_scalars(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int
    ) -> Tensor:
        """Every member's scalar, before the link, at the last token of each response: [B, M] on the CPU."""
        scalar_BM = torch.zeros(len(prompts), self.heads.shape[0])
        with sharding.gathered(self.model):
            for rows, batch in tree_batches(
                prompts, responses, tokens_per_batch=tokens_per_batch, share=takes_trees(self.model)
            ):
                scalar_BM[rows] = batch.end(self.scalars_of_trees(batch, batch.at_ends())).cpu()
        return distributed.add_up(scalar_BM)  # each row is 0 but in one process

    def values(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, tokens_per_batch: int) -> Tensor:
        """Q = link(mean head · features) of each response [B]: what the one-label checkpoint gives."""
        return self.mean_value(self.ensemble_scalars(prompts, responses, tokens_per_batch=tokens_per_batch))

    def pessimistic_values(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, pessimism: float, tokens_per_batch: int
    ) -> Tensor:
        """Ensemble mean minus `pessimism` standard deviations of each response [B]: the improvement step's reward."""
        scalar_BM = self.ensemble_scalars(prompts, responses, tokens_per_batch=tokens_per_batch)
        return self.pessimistic_value(scalar_BM, pessimism=pessimism)

    def mean_value(self, scalar_BM: Tensor) -> Tensor:
        """`values` from every member's scalar."""
        return self.to_value(scalar_BM.mean(1))

    def pessimistic_value(self, scalar_BM: Tensor, *, pessimism: float) -> Tensor:
        """`pessimistic_values` from every member's scalar."""
        return lower_confidence(self.to_value(scalar_BM), pessimism=pessimism)

    def read(
        self, rows: Sequence[TokenIds], positions: Sequence[Sequence[int]], *, tokens_per_batch: int
    ) -> list[list[float]]:
        """Q's scalar, before the link, at given token positions of each row, in one pass a row."""
        members = self.read_members(rows, positions, tokens_per_batch=tokens_per_batch)
        return [scalar_PM.mean(-1).tolist() for scalar_PM in members]

    def read_members(
        self, rows: Sequence[TokenIds], positions: Sequence[Sequence[int]], *, tokens_per_batch: int
    ) -> list[Tensor]:
        """The same of every ensemble member: for each row [P, M] on the CPU, P positions."""
        return self._read(rows, positions, self, tokens_per_batch=tokens_per_batch)

    def read_features(
        self,
        rows: Sequence[TokenIds],
        positions: Sequence[Sequence[int]],
        *,
        tokens_per_batch: int,
        progress: Progress = no_progress,
    ) -> list[Tensor]:
        """What the heads multiply there: for each row [P, F] on the CPU."""
        return self._read(rows, positions, self.features, tokens_per_batch=tokens_per_batch, progress=progress)

    @torch.no_grad()
    def _read(
        self,
        rows: Sequence[TokenIds],
        positions: Sequence[Sequence[int]],
        of: Callable[[Tensor, Tensor], Tensor],
        *,
        tokens_per_batch: int,
        progress: Progress = no_progress,
    ) -> list[Tensor]:
        """What `of` makes of token rows [B, T], at positions of each row; of several processes each reads its share.

        Args:
            of: from the rows, and True at the positions.
        """
        read: dict[int, Tensor] = {}
        with sharding.gathered(self.model):
            batches = own_micro_batches([len(row) for row in rows], tokens_per_batch=tokens_per_batch)
            num_tokens = sum(len(rows[b]) for batch in batches for b in batch)
            num_read = 0
            for batch in batches:
                token_BT, _ = pad_right([rows[b] for b in batch])
                read_BT = torch.zeros_like(token_BT, dtype=torch.bool)
                for b, row in enumerate(batch):
                    read_BT[b, list(positions[row])] = True
                x_BTX = of(token_BT, read_BT).cpu()
                for b, row in enumerate(batch):
                    read[row] = x_BTX[b, list(positions[row])]
                num_read += sum(len(rows[b]) for b in batch)
                progress("read features", num_read, num_tokens)
        read = distributed.gathered(read)
        return [read[row] for row in range(len(rows))]


class TokenValue(nn.Module):
    """The token-level value of PPO, started from a Q-function: Q's reading at every token, link included."""

    def __init__(self, q_function: QFunction) -> None:
        super().__init__()
        self.q_function = q_function

    def forward(self, batch: TreeBatch) -> Tensor:
        """Value of the prefix that ends before each response token, and at each response's last: there, in [B, T]."""
        scalar_BTM = self.q_function.scalars_of_trees(batch, batch.at_responses())
        return self.q_function.to_value(scalar_BTM.mean(-1))


def load_card(folder: str | Path) -> QFunctionCard:
    """Reads `q_function.json`. Raises ValueError with one line where there is none or it is broken."""
    path = Path(folder) / "q_function.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        schema = fields.pop("schema")
        if (marks := fields.pop("marks", None)) is not None:
            marks = ResponseMarks(opening=tuple(marks["opening"]), end_id=marks["end_id"])
        card = QFunctionCard(**fields, marks=marks)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no Q-function checkpoint (q_function.json is missing)") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a Q-function card: {error}") from error
    known = card.link in get_args(Link) and card.read_out in get_args(ReadOut)
    is_mean = card.read_out == "mean"
    needed = (isinstance(card.base, str), isinstance(card.num_layers, int), marks is not None)
    if schema != _SCHEMA or not known or set(needed) != {is_mean}:
        raise ValueError(
            f"{path}: schema {schema!r} with link {card.link!r} and read_out {card.read_out!r} is not known to this version"
        )
    return card


def backbone_of(folder: str | Path) -> str | None:
    """The model whose frozen weights a Q-function's folder goes without; None where it holds all of its weights.

    Raises:
        ValueError: with one line where the folder holds no Q-function.
    """
    return load_card(folder).base or base_of(folder)


def _padded_by_another_than_its_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that does not pad with the token that ends a response.

    transformers reads the label at the last token that is not padding; the end of the response must not be that. Any
    other token will do, since a response always ends with its own.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    pad_id = next(token for token in [*tokenizer.all_special_ids, 0, 1] if token != tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def _classifier_around(policy: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier with one label on the trunk of a policy's model, the same and not a copy."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    model.score = nn.Linear(model.score.in_features, 1, bias=False, device=policy.device, dtype=torch.float32)
    setattr(model, model.base_model_prefix, policy.base_model)
    return model


def _num_layers(model: PreTrainedModel) -> int:
    return int(model.base_model.config.get_text_config().num_hidden_layers)


def _cut(model: PreTrainedModel, num_layers: int) -> None:
    """Leaves the first layers of a model's trunk, and what follows after its last.

    Raises:
        ValueError: its layers cannot be told from its other parts.
    """
    trunk, whole, name = model.base_model, _num_layers(model), layer_list(model)
    if name is None or not 1 <= num_layers <= whole:
        raise ValueError(f"the first {num_layers} of {whole} layers of {name_of(model)} cannot be taken out of it")
    layers = trunk.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    trunk.set_submodule(name, layers[:num_layers])
    trunk.config.get_text_config().num_hidden_layers = num_layers


def _load_classifier(folder: str | Path) -> PreTrainedModel:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    finally:
        transformers_logging.set_verbosity(verbosity)
