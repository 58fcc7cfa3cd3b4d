"""Fitting in passes: which optimizer fits what."""

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from iterative_ppo.batching import micro_batches
from iterative_ppo.muon import Muon
from iterative_ppo.supervised import fit_passes, hidden_matrices

RATE = 0.1
SIZE = 16


class Regression(nn.Module):
    """y = W x + b, with inputs whose first coordinate is a hundred times the others: the gradient has one large direction."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(SIZE, SIZE)
        with torch.no_grad():
            self.layer.weight.zero_()
        self.x_BD = torch.randn(64, SIZE, generator=generator)
        self.x_BD[:, 0] *= 100
        self.y_BD = torch.randn(64, SIZE, generator=generator)

    def loss_sum_and_weight(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return (self.layer(self.x_BD[rows]) - self.y_BD[rows]).square().sum(), torch.tensor(float(len(rows)))


def first_step(*, by_muon: bool) -> Tensor:
    """The change of W by one optimizer step from zero, where weight decay does nothing."""
    model = Regression()
    fit_passes(
        model,
        model.loss_sum_and_weight,
        [1] * 8,
        train_rows=range(8),
        held_out_rows=[],
        max_passes=1,
        patience_passes=1,
        learning_rate=RATE,
        tokens_per_batch=100,
        generator=np.random.default_rng(0),
        what="fit",
        matrices=[model.layer.weight] if by_muon else [],
    )
    return model.layer.weight.detach()


def test_muon_goes_equally_far_in_all_directions_of_a_matrix_and_about_as_far_as_adamw():
    """8 rows give a gradient of rank 8. Muon brings its singular values close to each other (Newton-Schulz ends within
    .6 and 1.3 of their mean); in AdamW's step, the sign of the gradient, the largest stands out. An entry moves by the
    learning rate times 1 in AdamW's first step. Muon's are scaled to .2, what AdamW is seen to do later."""
    muon, adamw = (torch.linalg.svdvals(first_step(by_muon=by_muon))[:8] for by_muon in (True, False))
    assert muon.max() / muon.min() < 2.5
    assert adamw.max() / adamw.min() > 2.5
    for singular_values, low, high in ((muon, 0.1, 0.22), (adamw, 0.5, 1.1)):
        assert low * RATE < float(singular_values.square().sum().sqrt()) / SIZE < high * RATE


def test_a_step_holds_rows_of_all_lengths():
    """The length of a logged conversation often tells its outcome (a game that counts its turns: exactly). 64 steps of 8
    random rows: the mean length of a step deviates from that of all by 1/sqrt(8) of a row's deviation. Were rows of
    one length put together, to pad less, it would deviate as a row does, and each step would drag the model to its length."""
    lengths = [100 + row % 64 for row in range(512)]
    steps: list[list[int]] = []
    model = Regression()

    def loss_sum_and_weight(rows: list[int]) -> tuple[Tensor, Tensor]:
        steps.append(rows)
        return model.loss_sum_and_weight([row % 64 for row in rows])

    fit_passes(
        model,
        loss_sum_and_weight,
        lengths,
        train_rows=range(512),
        held_out_rows=[],
        max_passes=1,
        patience_passes=1,
        learning_rate=RATE,
        tokens_per_batch=10_000,
        generator=np.random.default_rng(0),
        what="fit",
    )
    assert sorted(row for rows in steps for row in rows) == list(range(512))
    means = [np.mean([lengths[row] for row in rows]) for rows in steps]
    assert 0.2 < np.std(means) / np.std(lengths) < 0.5


def test_a_third_of_a_micro_batch_is_padding_at_most():
    """Within the budget of 60: 2, 2 and 9 would be 27 for 13 tokens; 9, 10, 10 and 13 are 52 for 42, and the other 13
    would make it 65, beyond the budget; 13 and 50 are 100; 50 goes alone, and so does 70, though beyond the budget."""
    lengths = [10, 2, 50, 9, 13, 10, 2, 13, 70]
    batches = micro_batches(lengths, tokens_per_batch=60)
    assert [[lengths[row] for row in batch] for batch in batches] == [[2, 2], [9, 10, 10, 13], [13], [50], [70]]
    assert micro_batches([4, 2], tokens_per_batch=60) == [[1, 0]]  # 8 for 6
    assert micro_batches([9, 2], tokens_per_batch=60) == [[1], [0]]  # 18 for 11


@pytest.mark.parametrize("shapes", [[(6, 6), (6, 6), (12, 6), (6, 12), (12, 6)], [(8, 3)], [(1, 5), (5, 1)]])
def test_muon_takes_the_steps_of_pytorchs_muon(shapes: list[tuple[int, int]]):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, matrix in zip(ours, theirs, start, strict=True):
        assert (mine - matrix).abs().mean() > 0.003
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-4)  # theirs, in bfloat16, has 8 bits of a step of .002


def test_hidden_matrices_are_the_layers_weights_and_nothing_else():
    model = tiny.letter_policy().model
    named = {id(p): name for name, p in model.named_parameters()}
    names = [named[id(p)] for p in hidden_matrices(model)]
    layers = [name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    assert names == layers
    assert len(names) == 7 * model.config.num_hidden_layers
