"""DeepSpeed's private names are there, and mean what `zero_state` takes them for."""

from datetime import timedelta
from itertools import islice

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from dreamprm_dist import distributed
from dreamprm_dist.training.zero_state import COUNTERS


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero2_offload", "fp32")],
)
def test_fragments_are_what_deepspeeds_public_functions_say(make_run, strategy, precision):
    """And over all ranks each element of a parameter lies in exactly one of them."""
    run = make_run("--strategy", strategy, "--precision", precision)
    for window, meta in islice(run.data(), 2):
        run.trainer.iteration(window, meta)
    engine = run.trainer.engine
    for parameter in engine.parameters.values():
        truths = {
            name: safe_get_full_optimizer_state(parameter, name)
            for name in ("exp_avg", "exp_avg_sq")
        }
        whole = safe_get_full_fp32_param(parameter)
        covered = torch.zeros(parameter.numel())
        fragment = engine.zero.fragment(parameter)
        if fragment is not None:
            covered[fragment.within] += 1
            held = fragment.partition[fragment.place]
            assert held.equal(whole.flatten()[fragment.within])
            state = engine.zero.optimizer.state[fragment.partition]
            assert float(state["step"]) == 2
            for name, truth in truths.items():
                part = truth.flatten()[fragment.within]
                assert part.any() and state[name][fragment.place].equal(part)
        assert distributed.all_reduce_sum(covered).eq(1).all()
        assert parameter.equal(whole.to(parameter.dtype).view_as(parameter))


def test_a_snapshot_holds_all_that_a_lower_step_changes(make_run):
    """The same step from a snapshot has the same bits, counters and learning rate."""
    run = make_run("--unroll_steps", "3", "--unroll_window", "all")
    trainer, (window, _) = run.trainer, next(run.data())
    trainer.lower_step(window[0])
    before = trainer.engine.zero.snapshot()
    after, rates = [], []
    for _ in range(2):
        step = trainer.lower_step(window[1])
        rates.append((step.lr, trainer.engine.lr))
        after.append(trainer.engine.zero.snapshot())
        trainer.engine.zero.restore(before)
    assert rates[0] == rates[1] and rates[0][0] != rates[0][1]
    one, other = after
    counts = {"global_steps": 2, "global_samples": 4, "micro_steps": 2, "skipped_steps": 0}
    assert one.counters == other.counters == counts
    assert one.schedule == other.schedule and one.lrs == other.lrs
    for name in ("parameters", "partitions"):
        triples = zip(*(getattr(s, name) for s in (one, other, before)), strict=True)
        moved = [not a.equal(old) for a, b, old in triples if a.equal(b) or pytest.fail(name)]
        assert any(moved)
    for a, b in zip(one.optimizer, other.optimizer, strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(a[key].equal(b[key]) for key in a)


def test_what_is_set_on_deepspeed_is_there(make_run):
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert callable(deepspeed.DeepSpeedEngine._copy_recovery_script)
    zero = make_run().trainer.engine.zero
    assert isinstance(zero._zero.averaged_gradients, dict)  # for more see test_precision.py
    held = vars(zero._engine)
    assert {*COUNTERS} <= held.keys()
    assert held["_config"].load_universal_checkpoint is False
    with zero.loading_universal():
        assert zero._engine.load_universal_checkpoint()


def test_groups_of_their_own_have_the_runs_timeout():
    """c10d's defaults are set before DeepSpeed makes its groups."""
    backend = torch.distributed.new_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=30)
    distributed.barrier()  # or a rank that leaves breaks up the group while another still joins it
