"""What the demo compares with what, and the order of its stages."""

import threading
from collections.abc import Callable

import pytest

from data_tools.demo_data import NUM_META, NUM_TRAIN
from data_tools.demo_methods import (
    COLD_START,
    FREE,
    KEPT,
    LEARNED,
    META_SIZES,
    METHODS,
    OTHER,
    PAIRS,
    SIZED,
    pairs_among,
)
from launch.demo import Stages

TRAINED = {"cold_start": COLD_START} | METHODS | LEARNED | FREE | SIZED | OTHER
# What a table would replace, whatever that has seen: told apart as such in the report.
UNEQUAL = {
    ("instance_table", "baseline_plus_meta"),
    ("table_plus_meta", "cold_start"),
    ("instance_table", "cold_start"),
}
ALONE = "meta_only"  # has trained on the meta set without a flag that says so


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_two_that_are_compared_have_trained_on_the_same_clean_data(pair: tuple[str, str]):
    one, other = (TRAINED[name] for name in pair)
    seen = [
        ("--train_on_meta" in method.flags or method.train.startswith(ALONE), method.start)
        for method in (one, other)
    ]
    assert (seen[0] == seen[1]) != (pair in UNEQUAL)
    if all(on_meta for on_meta, _ in seen):
        sets = [m.train.replace(ALONE, "meta") if m.train.startswith(ALONE) else m.meta
                for m in (one, other)]  # fmt: skip
        assert sets[0] == sets[1]


def test_pairs_are_of_what_was_trained():
    assert pairs_among(METHODS)[:2] == [
        ("table_plus_meta", "baseline_plus_meta"),
        ("instance_table", "baseline"),
    ]
    assert not any("cold_start" in pair for pair in pairs_among(METHODS))
    assert pairs_among(TRAINED) == PAIRS


def test_meta_batches_are_no_larger_than_their_meta_set():
    assert META_SIZES[-1] < NUM_META
    for name, method in SIZED.items():
        size, flags = int(name.split("-")[1]), [*method.flags]
        assert method.meta == f"meta-{size}" and size % 8 == 0  # whole questions, of every kind
        assert 2 * flags[flags.index("--meta_batch_size") + 1] <= size


def test_free_baselines_keep_a_part():
    assert all(0 < number < NUM_TRAIN for number in KEPT.values())


def test_a_stage_follows_what_it_needs():
    seen: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def stage(name: str, wait: bool = False) -> Callable:
        def work() -> str:
            if wait:
                both.wait()
            seen.append(name)
            return name

        return work

    stages = Stages(2)
    first = stages.add(stage("first"))
    # Two at once, or neither would come to its end.
    together = [stages.add(stage(name, wait=True), first) for name in ("left", "right")]
    last = stages.add(stage("last"), *together)
    assert last.result() == "last"
    assert (seen[0], seen[-1]) == ("first", "last") and {*seen[1:3]} == {"left", "right"}


def test_after_a_failure_nothing_is_started():
    seen: list[str] = []

    def fail() -> None:
        raise RuntimeError("it broke")

    stages = Stages(1)
    broken = stages.add(fail)
    needs_it = stages.add(lambda: seen.append("needs it"), broken)
    with pytest.raises(RuntimeError, match="it broke"):
        needs_it.result()
    release = threading.Event()
    stages.add(release.wait)
    later = stages.add(lambda: seen.append("later"))
    stages.stop()
    release.set()
    assert later.cancelled() and seen == []
