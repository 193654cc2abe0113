"""Bytes that a bi-level iteration hands to collectives, against the formula.

    python tests/benchmarks/bench_collectives.py [--out bench.json]

Two ranks. ZeRO-2 reduces every gradient and gathers every parameter once per lower step; the upper
level adds one all-reduce of v, and one of the instance net's gradient or nothing for the table,
whose rows stay where they are. Counted on rank 0 where torch hands tensors to the backend.
"""

import argparse
import json
import tempfile
from pathlib import Path

from standin import make_data, make_run, run_on_ranks, saved_model, write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamprm_dist import distributed
from dreamprm_dist.planning.iteration import net_bytes, sent_bytes

NUM_RANKS = 2
KINDS = {
    "instance_table": ("--reweighter", "instance_table"),
    "instance_net": ("--reweighter", "instance_net", "--instance_net_input", "representation"),
}
FEW = 256  # smaller tensors carry counts and norms: not part of the formula


class CollectiveBytes(TorchDispatchMode):
    """Bytes of what collectives are given (or, for gathers, give) while the mode is on."""

    def __init__(self):
        super().__init__()
        self.large = self.small = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            size = max(_bytes(args[0]), _bytes(args[1]) if len(args) > 1 else 0)
            if size < FEW:
                self.small += size
            else:
                self.large += size
        return function(*args, **(kwargs or {}))


def _bytes(value) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def worker(folder: Path) -> None:
    results = {}
    for name, flags in KINDS.items():
        run = make_run(
            *(folder, folder / "model", "--precision", "fp32", "--device", "cpu", *flags),
            *("--batch_size", 2, "--meta_batch_size", 2, "--activation_function", "Clip"),
        )
        trainer, data = run.trainer, run.data()
        trainer.iteration(*next(data))  # the first one also makes the optimizer's state
        batches = next(data)
        with CollectiveBytes() as counted:
            trainer.iteration(*batches)
        scope = run.config.hypergradient.hypergradient_scope
        sizes = {name: p.nbytes for name, p in trainer.engine.parameters.items()}
        results[name] = {
            "measured": counted.large,
            "formula": sent_bytes(
                run.config,
                stage=2,
                trained=sum(sizes.values()),
                in_scope=sum(sizes[name] for name in trainer.engine.module.parameters_in(scope)),
                net=net_bytes(run.config.reweighter, trainer.engine.module.hidden_size),
            ),
            "measured_small": counted.small,
        }
    if distributed.rank() == 0:
        (folder / "counted.json").write_text(json.dumps(results))
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        saved_model(folder / "model", divisor=8, image_size=112)
        make_data(folder, 16, 16, (112, 112), num_shards=NUM_RANKS)
        run_on_ranks(NUM_RANKS, __file__, "--worker", folder)
        results = json.loads((folder / "counted.json").read_text())
    write_results(
        arguments.out,
        {
            "collective_bytes": {
                **{key: results["instance_table"][key] for key in ("measured", "formula")},
                "by_reweighter": results,
            }
        },
    )


if __name__ == "__main__":
    main()
