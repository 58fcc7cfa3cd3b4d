"""Where the time of `ippo iterate` goes, stage by stage, and what its arithmetic alone would take.

Runs the loop of a configuration twice in a scratch folder: once with the clock, once counting floating-point operations of
matrix products and attention, forward and backward, padding included. The bound of a stage is that number over the rate of a
matrix product of the model's sizes, which is measured beside it.

    python benchmarks/loop.py                                     # one iteration of the default run: about nine minutes
    python benchmarks/loop.py --set iterations.count=7

Prints a line a stage and, last, one JSON object: `ratio` is the bound over the seconds, of all stages together.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flop_bound import flop_per_second
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from iterative_ppo import config as config_module
from iterative_ppo.commands.arguments import environment_maker
from iterative_ppo.config import Config
from iterative_ppo.policy_iteration import iterate
from iterative_ppo.run_directory import RunDirectory, Stage
from iterative_ppo.stages import Stages
from iterative_ppo.supervised import no_progress

aten = torch.ops.aten
# Attention as the CPU does it, which PyTorch's counter does not know.
for _of_gpu, _of_cpu in (
    (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_for_cpu),
    (aten._scaled_dot_product_flash_attention_backward, aten._scaled_dot_product_flash_attention_for_cpu_backward),
):
    flop_registry.setdefault(_of_cpu, flop_registry[_of_gpu])
_ROWS_OF_A_PRODUCT = 1024


class CountingDirectory(RunDirectory):
    """A run's folder that counts the floating-point operations of each stage."""

    def __init__(self, path: Path, config: Config) -> None:
        super().__init__(path, config, resume=False)
        self.flop: dict[str, int] = {}

    def stage(self, name: str, *, make: Callable[[Path], Any], **arguments: Any) -> Stage:
        """The stage, counted."""
        counter = FlopCounterMode(display=False)

        def counted(folder: Path) -> Any:
            with counter:
                return make(folder)

        stage = super().stage(name, make=counted, **arguments)
        self.flop[name] = counter.get_total_flops()
        return stage


def run(directory: RunDirectory) -> dict[str, float]:
    """The loop, without its pictures; the seconds of each stage."""
    config = directory.config
    stages = Stages(directory, environment_maker(config), no_progress)
    return {
        str(stage.folder.relative_to(directory.path)): stage.seconds
        for record in iterate(stages, count=config.iterations.count)
        for stage in record.stages.values()
    }


def by_stage(figures: dict[str, float]) -> dict[str, float]:
    """Sums over iterations; the start and its evaluation are one stage."""
    sums: dict[str, float] = defaultdict(float)
    for name, figure in figures.items():
        iteration, _, stage = name.partition("/")
        sums["start" if iteration == "iteration-000" else stage] += figure
    return sums


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
    width = config.policy.hidden_size
    rate = flop_per_second(_ROWS_OF_A_PRODUCT, width, 3 * width)
    flop = by_stage({name: float(number) for name, number in counting.flop.items()})
    print(f"{rate / 1e9:.0f} GFLOP/s in products [{_ROWS_OF_A_PRODUCT}, {width}] x [{width}, {3 * width}]")
    print(f"{'stage':<10} {'seconds':>8} {'GFLOP':>8} {'bound, s':>9} {'share':>6}")
    rows = []
    for stage in [*seconds, "all"]:
        total = sum(seconds.values()) if stage == "all" else seconds[stage]
        work = sum(flop.values()) if stage == "all" else flop[stage]
        bound = work / rate
        rows.append({"stage": stage, "seconds": total, "flop": work, "bound_seconds": bound, "share": bound / total})
        print(f"{stage:<10} {total:>8.1f} {work / 1e9:>8.0f} {bound:>9.1f} {bound / total:>6.0%}")
    print(json.dumps({"ratio": rows[-1]["share"], "flop_per_second": rate, "stages": rows}))


if __name__ == "__main__":
    main()
