"""Supervised fitting in passes over sequences, with early stopping on a held-out part: cloning and the Q-function."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iterative_ppo import distributed
from iterative_ppo.batching import own_micro_batches
from iterative_ppo.muon import Muon
from iterative_ppo.sharding import adamw, clip_gradients, gathered, has_shards

_WEIGHT_DECAY = 0.01

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and out of how much."""


def no_progress(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitHistory:
    """Losses by pass; the weights kept are those of `best_pass` (0: as they were before the first pass).

    Example:
        FitHistory(train_losses=(0.61, 0.52), held_out_losses=(0.69, 0.60, 0.55), best_pass=2)
    """

    train_losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    """One more than passes: the first is before any training."""
    best_pass: int


def fit_passes(
    model: nn.Module,
    loss_sum_and_weight: Callable[[list[int]], tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    *,
    train_rows: Sequence[int],
    held_out_rows: Sequence[int],
    max_passes: int,
    patience_passes: int,
    learning_rate: float,
    tokens_per_batch: int,
    generator: np.random.Generator,
    what: str,
    progress: Progress = no_progress,
    before_pass: Callable[[int], None] | None = None,
    matrices: Sequence[nn.Parameter] = (),
    max_rows_per_step: int = 16,
) -> FitHistory:
    """Minimises the mean loss over rows by AdamW with a cosine schedule, and keeps the best pass.

    Args:
        model: its parameters that require a gradient are fitted; left with the weights of the best pass.
        loss_sum_and_weight: for a micro-batch of row indices, the summed loss and its weight. Sums of both are
            accumulated over an optimizer step, so the split into micro-batches changes nothing.
        lengths: tokens of each row.
        train_rows: rows to train on; steps hold 1/64 of them, between 8 and `max_rows_per_step` rows.
        held_out_rows: rows that decide when to stop; without any, all passes are made.
        patience_passes: passes without a better loss after which it stops; the first, at the highest learning rate, is
            forgiven.
        before_pass: called before each pass with its number, from 1.
        matrices: parameters that Muon fits instead; see `hidden_matrices`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows_per_step = int(np.clip(len(train_rows) // 64, 8, max_rows_per_step))
    steps_per_pass = math.ceil(len(train_rows) / rows_per_step)
    total_steps = max_passes * steps_per_pass
    optimizer = _ScheduledOptimizer(
        parameters,
        matrices,
        learning_rate=learning_rate,
        warmup_steps=min(steps_per_pass // 2 + 1, 50),
        total_steps=total_steps,
    )

    def held_out_loss() -> float | None:
        if not held_out_rows:
            return None
        return mean_loss(model, loss_sum_and_weight, lengths, held_out_rows, tokens_per_batch=tokens_per_batch)

    best = _BestPass(model)
    best.look(0, held_out_loss())
    train_losses: list[float] = []
    [dropout] = generator.spawn(1)
    for pass_ in range(1, max_passes + 1):
        if before_pass:
            model.eval()
            before_pass(pass_)
        model.train()
        pass_loss, pass_weight = 0.0, 0.0
        # At random, and not sorted by length: in many logs the length of a conversation tells its outcome, and a step of
        # equally long ones would drive all predictions to theirs.
        order = generator.permutation(np.asarray(train_rows)).tolist()
        for step in range(steps_per_pass):
            rows = order[step * rows_per_step : (step + 1) * rows_per_step]
            with _dropout_seeded(int(dropout.integers(2**63)), parameters[0].device):
                loss, weight = accumulate_gradient(
                    loss_sum_and_weight,
                    rows,
                    [lengths[row] for row in rows],
                    parameters,
                    tokens_per_batch=tokens_per_batch,
                )
            pass_loss, pass_weight = pass_loss + loss, pass_weight + weight
            optimizer.step()
            progress(what, (pass_ - 1) * steps_per_pass + step + 1, total_steps)
        train_losses.append(pass_loss / max(pass_weight, 1e-12))
        best.look(pass_, held_out_loss())
        if pass_ - max(best.pass_, 1) >= patience_passes:
            break
    progress(what, total_steps, total_steps)
    restore_weights(model, best.weights)
    model.eval()
    return FitHistory(
        train_losses=tuple(train_losses),
        held_out_losses=tuple(best.losses),
        best_pass=best.pass_,
    )


class _BestPass:
    """The pass with the smallest held-out loss so far, and its weights; the last one where nothing is held out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: list[float] = []
        self.pass_ = 0
        self.weights = trained_weights(model)

    def look(self, pass_: int, held_out_loss: float | None) -> None:
        """Looks at the model as it is after a pass (0: before the first)."""
        is_best = held_out_loss is None or not self.losses or held_out_loss < self.losses[self.pass_]
        if held_out_loss is not None:
            self.losses.append(held_out_loss)
        if is_best and pass_ > 0:
            self.pass_, self.weights = pass_, trained_weights(self.model)


@contextmanager
def _dropout_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, dropout is decided by the seed and the process; the generators outside are as they were."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed + distributed.rank())
        yield


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives parameters the values of an earlier `trained_weights`."""
    for name, weight in weights.items():
        module.get_parameter(name).copy_(weight)


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weight matrices of a model's layers: what Muon is for. Embeddings, heads and norms are left to AdamW.

    A step of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) goes equally far in all directions of a
    matrix, also where the gradient is small. A model made from scratch learns sooner to compare two words of a
    conversation (docs/log.md).
    """
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    return [p for p in model.base_model.parameters() if p.ndim == 2 and p.requires_grad and id(p) not in embedded]


class _ScheduledOptimizer:
    """AdamW, and Muon for the matrices, with clipped gradients, a warm-up and a cosine schedule."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        warmup_steps: int,
        total_steps: int,
    ) -> None:
        def share_of_peak(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * step / max(total_steps, 1)))
            return min(1.0, (step + 1) / warmup_steps) * (0.05 + 0.95 * cosine)

        by_muon = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in by_muon]
        self.parameters = parameters
        self.optimizers: list[torch.optim.Optimizer] = [
            adamw(others, learning_rate=learning_rate, weight_decay=_WEIGHT_DECAY)
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=_WEIGHT_DECAY))
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, share_of_peak) for o in self.optimizers]

    def step(self) -> None:
        """Takes a step along the gradients and forgets them."""
        clip_gradients(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def accumulate_gradient(
    loss_sum_and_weight: Callable[[list[int]], tuple[Tensor, Tensor]],
    rows: Sequence[int],
    lengths: Sequence[int],
    parameters: Sequence[nn.Parameter],
    *,
    tokens_per_batch: int,
) -> tuple[float, float]:
    """Adds the gradient of (sum of losses / sum of weights) over rows, in micro-batches of bounded size.

    Of several processes each computes its share of the rows, and all have the same gradient afterwards.

    Returns the sum of losses and the sum of weights.
    """
    total_loss, total_weight = 0.0, 0.0
    for batch in own_micro_batches(lengths, tokens_per_batch=tokens_per_batch, in_step=has_shards(parameters)):
        if not batch:  # the other processes cannot gather their weights without this one
            loss, _ = loss_sum_and_weight([rows[0]])
            (0.0 * loss).backward()
            continue
        loss, weight = loss_sum_and_weight([rows[i] for i in batch])
        loss.backward()
        total_loss += float(loss.detach())
        total_weight += float(weight)
    total_loss, total_weight = distributed.sums(total_loss, total_weight)
    distributed.sum_gradients(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(total_weight, 1e-12))
    return total_loss, total_weight


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss_sum_and_weight: Callable[[list[int]], tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    tokens_per_batch: int,
) -> float:
    """Weighted mean loss over rows, without training."""
    model.eval()
    total_loss, total_weight = 0.0, 0.0
    with gathered(model):
        for batch in own_micro_batches([lengths[row] for row in rows], tokens_per_batch=tokens_per_batch):
            loss, weight = loss_sum_and_weight([rows[i] for i in batch])
            total_loss += float(loss)
            total_weight += float(weight)
    total_loss, total_weight = distributed.sums(total_loss, total_weight)
    return total_loss / max(total_weight, 1e-12)
