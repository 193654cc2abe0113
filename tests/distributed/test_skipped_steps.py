"""A NaN or infinite value on one rank: the step is skipped on all, counted, and not for ever."""

import json
from pathlib import Path

import pytest
import torch
from started_run import run_on_ranks

VARIANTS = {
    "table": "--strategy zero2_cpu",
    "net": "--reweighter instance_net --activation_function sigmoid --strategy zero1 "
    "--precision bf16",
    "sama": "--hypergradient sama --strategy zero2_offload",
    "ghost_table": "--hypergradient ghost --precondition adam --strategy zero2_offload",
    "ghost_net": "--hypergradient ghost --reweighter instance_net --activation_function sigmoid "
    "--strategy zero1 --precision bf16",
    "ghost_domain_table": "--hypergradient ghost --reweighter domain_table",
    "ghost_window": "--hypergradient ghost --unroll_steps 2 --unroll_window all",
}
# Whether PRM and weights move in an iteration, and the steps that are skipped; by what is NaN or
# infinite in it: first lower batch, meta batch, lower losses, nothing. The hypergradient is taken
# at the same batch whatever its loss is, but by `ghost`: a lower step that is skipped has none.
EXPECTED = [(False, False, 2), (True, False, 1), (False, True, 1), (True, True, 0)]
EXPECTED_OF_GHOST = [(False, False, 2), (True, False, 1), (False, False, 2), (True, True, 0)]
# The first of two lower steps is skipped: the other one moves both.
EXPECTED_OF_WINDOW = [(True, True, 1), (True, False, 1), (False, False, 3), (True, True, 0)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_prm_dir: Path, tiny_shards: Path) -> list[dict]:
    out = tmp_path_factory.mktemp("bad_steps")
    variants = json.dumps({name: flags.split() for name, flags in VARIANTS.items()})
    worker = Path(__file__).with_name("skipped_steps_worker.py")
    run_on_ranks(2, worker, out, tiny_prm_dir, tiny_shards, variants, "cpu")
    results = [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    lines = (out / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    results[0]["lines"] = [json.loads(line) for line in lines.splitlines()]
    return results


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        *((name, EXPECTED) for name in ("table", "net", "sama")),
        *((name, EXPECTED_OF_GHOST) for name in ("ghost_table", "ghost_net", "ghost_domain_table")),
        ("ghost_window", EXPECTED_OF_WINDOW),
    ],
    ids=VARIANTS,
)
def test_a_bad_step_is_skipped_on_all_ranks_and_the_run_goes_on(
    ranks, variant: str, expected: list[tuple[bool, bool, int]]
):
    for rank in ranks:
        states, counts = rank[variant]["states"], rank[variant]["counts"]
        for step, (moves, reweighs, skipped) in enumerate(expected):
            before, after = states[step : step + 2]
            assert all(t.isfinite().all() for t in after.values()), step
            assert counts[step] == skipped, step
            assert before["parameters"].equal(after["parameters"]) != moves, step
            if step:  # the first step makes the moments
                assert before["optimizer"].equal(after["optimizer"]) != moves, step
            assert before["raw_weights"].equal(after["raw_weights"]) != reweighs, step
    both = zip(*(rank[variant]["states"] for rank in ranks), strict=True)
    assert all(one["parameters"].equal(other["parameters"]) for one, other in both)


def test_bad_steps_without_end_are_an_error(ranks):
    for rank in ranks:
        assert rank["message"].startswith(
            "iteration 3: a loss or gradient was NaN or infinite in 3"
        )
    assert [line["bad_steps"] for line in ranks[0]["lines"]] == [1, 1, 1]
    assert all(line["lower_loss"] is None for line in ranks[0]["lines"])
