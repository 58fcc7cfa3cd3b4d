"""The arithmetic that an update cannot do without, and how fast this machine does it: a lower bound on its seconds."""

import statistics
import time

import torch
from torch import nn


def num_matrix_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token: the matrices of the layers, not the embeddings, which are looked up."""
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embedded)


def flop_per_second(num_tokens: int, width_in: int, width_out: int, *, batch: int = 1, repetitions: int = 25) -> float:
    """Measured rate of `batch` products [num_tokens, width_in] × [width_in, width_out] in float32, the median."""
    x, weight = torch.randn(batch, num_tokens, width_in), torch.randn(batch, width_out, width_in)
    multiply = (lambda: nn.functional.linear(x[0], weight[0])) if batch == 1 else (lambda: torch.bmm(x, weight.mT))
    seconds = []
    with torch.inference_mode():
        for _ in range(repetitions):
            started = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - started)
    return 2 * batch * num_tokens * width_in * width_out / statistics.median(seconds[repetitions // 5 :])
