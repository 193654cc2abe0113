"""What the demo compares: how each PRM is trained, and which are held against each other."""

from collections.abc import Collection
from dataclasses import dataclass, replace

PLUS_META = ("--train_on_meta", "steps")
# Of `make demo-seeds`: sizes of smaller meta sets, in solutions, and how many training solutions
# each free baseline keeps.
META_SIZES = (48, 144)
KEPT = {"bis": 300, "mc_agreement": 300, "small_loss": 300, "random": 300}


@dataclass(frozen=True)
class Method:
    """How a PRM of the demo is trained, from a cold start on.

    Attributes:
        recipe: file in recipes/, less `demo_`.
        flags: beside it.
        train, meta: shard folders.
        start: the run whose export it starts from.
    """

    recipe: str
    flags: tuple[object, ...] = ()
    train: str = "train"
    meta: str = "meta"
    start: str = "cold_start"


COLD_START = Method("cold_start", ("--export_losses",), start="base")
METHODS = {
    "baseline": Method("baseline"),
    "baseline_plus_meta": Method("baseline", PLUS_META),
    "meta_only": Method("baseline", train="meta_only"),
    "instance_table": Method("instance_table"),
    "table_plus_meta": Method("instance_table", PLUS_META),
}
# Those of `make demo-seeds`.
SIZED = {
    f"{name}-{size}": replace(
        method,
        # A global meta batch, twice that, is no larger than the meta set.
        flags=(*method.flags, *("--meta_batch_size", min(96, size // 2))),
        train=f"meta_only-{size}" if name == "meta_only" else method.train,
        meta=f"meta-{size}",
    )
    for size in META_SIZES
    for name, method in METHODS.items()
    if name != "baseline"
}
FREE = {f"{name}_plus_meta": Method("baseline", PLUS_META, train=name) for name in KEPT}
LEARNED = {
    "instance_net": Method("instance_net"),
    "net_plus_meta": Method("instance_net", PLUS_META),
    "domain_table": Method("domain_table"),
    "shuffled_meta": Method("instance_table", meta="shuffled_meta"),
}
# Another model with the weights that the first one has learned.
OTHER_COLD_START = Method("cold_start", start="other_base")
OTHER = {
    "other_baseline": Method("baseline", PLUS_META, start="other_cold_start"),
    "other_fixed": Method(
        "instance_table", (*PLUS_META, "--reweighter", "fixed"), start="other_cold_start"
    ),
}
PAIRS = [
    ("table_plus_meta", "baseline_plus_meta"),
    ("instance_table", "baseline"),
    ("instance_table", "baseline_plus_meta"),
    *((name, "cold_start") for name in ("table_plus_meta", "instance_table")),
    *(("table_plus_meta", name) for name in ("meta_only", *FREE)),
    *((name, "baseline_plus_meta") for name in ("meta_only", *FREE)),
    ("net_plus_meta", "baseline_plus_meta"),
    ("instance_net", "baseline"),
    ("other_fixed", "other_baseline"),
    *((f"table_plus_meta-{n}", f"baseline_plus_meta-{n}") for n in META_SIZES),
    *((f"table_plus_meta-{n}", f"meta_only-{n}") for n in META_SIZES),
    *((f"instance_table-{n}", "baseline") for n in META_SIZES),
]


def pairs_among(prms: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of which both were trained."""
    return [pair for pair in PAIRS if {*pair} <= {*prms}]
