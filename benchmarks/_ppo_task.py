"""The task of `ppo_update.py`, the same for every worker, and how a worker measures itself.

Imported in environments that hold PyTorch and transformers and not this project.
"""

import itertools
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Algorithm = Literal["ppo", "rloo", "grpo"]

NUM_RESPONSES = 16
NUM_SAMPLES = 4
"""Responses to a prompt in RLOO and GRPO; one in PPO."""
RESPONSE_TOKENS = 32
NUM_PPO_PASSES = 2
LEARNING_RATE = 1e-5
KL_COEFFICIENT = 0.05
GAE_LAMBDA = 0.95
_NUM_WARM_UP_UPDATES = 2
_UNLIKELY_LOGIT = -1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker is asked for on its command line: algorithm, folder of the models, number of timed updates."""

    algorithm: Algorithm
    folder: Path
    num_updates: int

    @classmethod
    def from_command_line(cls) -> "Order":
        algorithm, folder, num_updates = sys.argv[1:]
        assert algorithm in ("ppo", "rloo", "grpo")
        return cls(algorithm=algorithm, folder=Path(folder), num_updates=int(num_updates))

    @property
    def all_updates(self) -> int:
        """Those that warm up included."""
        return _NUM_WARM_UP_UPDATES + self.num_updates

    def prompts(self) -> list[str]:
        texts: list[str] = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        return texts


def never_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the model give no probability to the tokens that end or pad a response: all are of full length."""
    never = [tokenizer.eos_token_id, tokenizer.pad_token_id]

    def hook(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits[..., never] = _UNLIKELY_LOGIT
        return logits

    model.get_output_embeddings().register_forward_hook(hook)


class Stopwatch:
    """Notes the end of every update. An update's seconds are those since the end of the one before."""

    def __init__(self) -> None:
        self.imports_mib = _peak_mib()
        self.update_mib = 0.0
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def update_done(self) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.update_mib = _peak_mib()

    def report(self) -> None:
        """Prints, as the last line, the medians over the updates that did not warm up, and the most memory so far.

        `imports_mib` is the process before it made a model.
        """
        seconds, cpu_seconds = (
            statistics.median(end - start for start, end in itertools.pairwise(ends[_NUM_WARM_UP_UPDATES - 1 :]))
            for ends in (self.ends, self.cpu_ends)
        )
        figures = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_mib": self.update_mib,
            "imports_mib": self.imports_mib,
        }
        print(json.dumps(figures))


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def one_thread() -> None:
    """Both sides compute on one thread."""
    torch.set_num_threads(1)
