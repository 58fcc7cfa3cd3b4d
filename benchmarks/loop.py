"""Where the time of `ippo iterate` goes, stage by stage, and what its arithmetic alone would take.

Runs the loop of a configuration twice in a scratch folder: once with the clock, once counting floating-point operations of
matrix products and attention, forward and backward, padding included. The bound of a stage is what these operations would
take at the rates of matrix products of their own sizes, each measured afterwards; an attention counts as the product of its
queries with its keys.

    python benchmarks/loop.py                                     # one iteration of the default run: about nine minutes
    python benchmarks/loop.py --set iterations.count=7

Prints a line a stage and, last, one JSON object: `ratio` is the bound over the seconds, of all stages together.
"""

import argparse
import functools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flop_bound import flop_per_second
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from iterative_ppo import config as config_module
from iterative_ppo.commands.arguments import environment_maker
from iterative_ppo.config import Config
from iterative_ppo.policy_iteration import iterate
from iterative_ppo.run_directory import RunDirectory, Stage
from iterative_ppo.stages import Stages
from iterative_ppo.supervised import no_progress

aten = torch.ops.aten
Size = tuple[int, int, int, int]
"""Of a product: how many at a time, rows, inner size, columns."""
_REPETITIONS = 5


def _of_product(a: Tensor, b: Tensor) -> Size:
    *batch, rows, inner = a.shape
    return math.prod(batch), rows, inner, b.shape[-1]


def _of_attention(query: Tensor, key: Tensor) -> Size:
    return _of_product(query, key.mT)


# What is counted, as what PyTorch's counter takes it for, and its size. It does not know attention as the CPU does it.
_COUNTED: dict[Any, tuple[Any, Callable[..., Size]]] = {
    aten.mm: (aten.mm, lambda a, b, *_: _of_product(a, b)),
    aten.addmm: (aten.addmm, lambda _, a, b, *__: _of_product(a, b)),
    aten.bmm: (aten.bmm, lambda a, b, *_: _of_product(a, b)),
    aten.baddbmm: (aten.baddbmm, lambda _, a, b, *__: _of_product(a, b)),
    aten._scaled_dot_product_flash_attention_for_cpu: (
        aten._scaled_dot_product_flash_attention,
        lambda query, key, *_: _of_attention(query, key),
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward,
        lambda _, query, key, *__: _of_attention(query, key),
    ),
}


class CountingDirectory(RunDirectory):
    """A run's folder that counts the floating-point operations of each stage, by the sizes of the products."""

    def __init__(self, path: Path, config: Config) -> None:
        super().__init__(path, config, resume=False)
        self.flop: dict[str, Counter[Size]] = {}

    def stage(self, name: str, *, make: Callable[[Path], Any], **arguments: Any) -> Stage:
        """The stage, counted."""
        flop: Counter[Size] = Counter()

        def counted(folder: Path) -> Any:
            with FlopCounterMode(display=False, custom_mapping=_counters(flop)) as counter:
                result = make(folder)
            assert counter.get_total_flops() == flop.total(), "something else was multiplied"
            return result

        stage = super().stage(name, make=counted, **arguments)
        self.flop[name] = flop
        return stage


def _counters(flop: Counter[Size]) -> dict[Any, Any]:
    """For PyTorch's counter: functions that note their operations' sizes."""

    def counter_of(known_as: Any, size_of: Callable[..., Size]) -> Callable[..., int]:
        def count(*inputs: Any, **options: Any) -> int:
            number = int(flop_registry[known_as](*inputs, **options))
            flop[size_of(*inputs)] += number
            return number

        count._get_raw = True  # type: ignore[attr-defined]  # of tensors, not of their shapes
        return count

    return {operation: counter_of(*counted) for operation, counted in _COUNTED.items()}


def run(directory: RunDirectory) -> dict[str, float]:
    """The loop, without its pictures; the seconds of each stage."""
    config = directory.config
    stages = Stages(directory, environment_maker(config), no_progress)
    return {
        str(stage.folder.relative_to(directory.path)): stage.seconds
        for record in iterate(stages, count=config.iterations.count)
        for stage in record.stages.values()
    }


def by_stage(figures: dict[str, Any]) -> dict[str, Any]:
    """Sums over iterations; the start and its evaluation are one stage."""
    sums: dict[str, Any] = {}
    for name, figure in figures.items():
        iteration, _, stage = name.partition("/")
        stage = "start" if iteration == "iteration-000" else stage
        sums[stage] = sums[stage] + figure if stage in sums else figure
    return sums


def bound_seconds(flop: Counter[Size], rate: Callable[[Size], float]) -> float:
    """What the products take at the rates of their sizes."""
    return sum(number / rate(size) for size, number in flop.items() if number)


@functools.cache
def measured_rate(size: Size) -> float:
    """FLOP/s of a product of this size, alone."""
    batch, rows, inner, columns = size
    return flop_per_second(rows, inner, columns, batch=batch, repetitions=_REPETITIONS)


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    arguments = parser.parse_args()
    tables: dict[str, Any] = {"iterations": {"count": 1}}
    for setting in arguments.settings:
        tables = config_module.with_setting(tables, setting)
    config = config_module.from_dict(tables)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = by_stage(run(RunDirectory(Path(scratch) / "timed", config, resume=False)))
        counting = CountingDirectory(Path(scratch) / "counted", config)
        run(counting)
    flop = by_stage(counting.flop)
    bound = {stage: bound_seconds(products, measured_rate) for stage, products in flop.items()}
    print(f"{'stage':<10} {'seconds':>8} {'GFLOP':>8} {'at GFLOP/s':>11} {'bound, s':>9} {'share':>6}")
    rows = []
    for stage in [*seconds, "all"]:
        of = list(seconds) if stage == "all" else [stage]
        row = {
            "stage": stage,
            "seconds": sum(seconds[name] for name in of),
            "flop": sum(flop[name].total() for name in of),
            "bound_seconds": sum(bound[name] for name in of),
        }
        row |= {"flop_per_second": row["flop"] / row["bound_seconds"], "share": row["bound_seconds"] / row["seconds"]}
        rows.append(row)
        print(
            f"{stage:<10} {row['seconds']:>8.1f} {row['flop'] / 1e9:>8.0f} {row['flop_per_second'] / 1e9:>11.0f} "
            f"{row['bound_seconds']:>9.1f} {row['share']:>6.0%}"
        )
    print(json.dumps({"ratio": rows[-1]["share"], "stages": rows}))


if __name__ == "__main__":
    main()
