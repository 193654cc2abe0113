"""Time and memory of the instance table's upper step against the number of rows.

    python tests/benchmarks/bench_table.py [--out bench.json]

One rank holds all rows. `table_step_ms` is the recipe's row update; `table_step_ms_by_update` all.
12.5 million rows are the part of one of eight ranks in a table of 10^8.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from standin import write_results

from dreamprm_dist import distributed
from dreamprm_dist.losses import Observation
from dreamprm_dist.reweighters.base import ReweighterContext
from dreamprm_dist.reweighters.config import MetaOptimizerConfig, ReweighterConfig
from dreamprm_dist.reweighters.instance_table import InstanceTable
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES

ROWS = {"1e4": 10**4, "1e6": 10**6, "1.25e7": 12_500_000, "1e8": 10**8}
RECIPE = "normalized_sgd"
BATCH_SIZE = 16
REPEATS = 5


class Ids:
    """As much of a batch as a table reads."""

    def __init__(self, sample_ids: torch.Tensor):
        self.sample_ids = sample_ids


def make_table(rows: int, row_update: str) -> InstanceTable:
    config = ReweighterConfig(row_update=row_update, activation_function="Project", weight_min=0.0)
    context = ReweighterContext(
        rows_per_shard=[rows],
        read_datasets=lambda shard: [],
        num_steps=1000,
        device=torch.device("cpu"),
        hidden_size=1,
        label_ids={},
        seed=0,
    )
    return InstanceTable(config, MetaOptimizerConfig(), context)


def step_ms(table: InstanceTable, rows: int) -> float:
    """One upper step on a batch of rows drawn at random."""
    batch = Ids(torch.randint(rows, (BATCH_SIZE,)))
    nothing = torch.zeros(0, 0)
    observed = (Observation(torch.randn(BATCH_SIZE), nothing) for _ in range(2))
    start = time.perf_counter()
    table.add_hypergradient(batch, *observed, BATCH_SIZE)
    table.step()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    distributed.initialize("cpu")
    milliseconds: dict = {}
    bytes_a_row: dict = {}
    for update in ROW_UPDATES:
        for name, rows in ROWS.items():
            table = make_table(rows, update)
            step_ms(table, rows)  # makes the optimizer's state
            times = [step_ms(table, rows) for _ in range(REPEATS)]
            milliseconds.setdefault(update, {})[name] = statistics.median(times)
            held = sum(t.nbytes for t in table.state_dict().values())
            bytes_a_row.setdefault(update, {})[name] = held / rows
            del table
    write_results(
        arguments.out,
        {
            "table_step_ms": milliseconds[RECIPE],
            "table_step_ms_by_update": milliseconds,
            "table_bytes_a_row": {update: sizes["1e6"] for update, sizes in bytes_a_row.items()},
        },
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
