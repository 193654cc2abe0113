"""A plan's figures against those of real runs of two ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bench_collectives import CollectiveBytes
from live_tensors import PhasePeaks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from dreamprm_dist import distributed
from dreamprm_dist.planning.iteration import count_iteration
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM

WORKLOAD = Workload(tiles=3, text_tokens=40, steps=2)
SIZE = 8
FLAGS = ("--batch_size", str(SIZE), "--meta_batch_size", str(SIZE), "--scheduler_type", "constant")
GHOST = ("--hypergradient", "ghost")
ONE = ("--batch_size", "1", "--meta_batch_size", "1")
TWICE = ("--gradient_accumulation", "2")


def of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """One of torch's formulas as its counter takes it for a kernel that it does not know."""
    taken: Any = partial(formula)
    taken._get_raw = True
    return taken


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_tensors(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: of_tensors(
        sdpa_backward_flop
    ),
}


def real_batch(prm: PRM, size: int) -> Batch:
    """A batch of noise with the workload's shapes and this rank's sample IDs."""
    planned = WORKLOAD.batch(prm, size)
    image_tokens = WORKLOAD.tiles * prm.tokens_per_tile
    input_ids = torch.ones(planned.input_ids.shape, dtype=torch.long)
    input_ids[:, :image_tokens] = prm.model.config.image_token_id
    tiles = size * WORKLOAD.tiles
    assert planned.pixel_values is not None
    return Batch(
        input_ids=input_ids,
        pixel_values=torch.randn(planned.pixel_values.shape, dtype=planned.pixel_values.dtype),
        shown_tiles=torch.arange(tiles),
        tile_rows=torch.arange(size).repeat_interleave(WORKLOAD.tiles),
        step_rows=torch.arange(size).repeat_interleave(WORKLOAD.steps),
        step_positions=image_tokens + torch.arange(WORKLOAD.steps).repeat(size),
        step_targets=torch.arange(WORKLOAD.steps).repeat(size),
        step_counts=torch.zeros(size * WORKLOAD.steps, 2, dtype=torch.long),
        sample_ids=2 * torch.arange(size) + distributed.rank(),
        true_false=torch.arange(size) % 2.0,
    )


def iteration_of(run: Any) -> tuple:
    prm, config = run.trainer.engine.module, run.config
    lower = [
        [
            real_batch(prm, config.lower.batch_size)
            for _ in range(config.lower.gradient_accumulation)
        ]
        for _ in range(config.upper.unroll_steps)
    ]
    upper = config.upper
    count = upper.meta_gradient_accumulation if config.learns else 0
    return lower, [real_batch(prm, upper.meta_batch_size) for _ in range(count)]


@pytest.mark.parametrize(
    "flags",
    [
        GHOST,
        (*GHOST, "--gradient_checkpointing", "--unroll_steps", "2", "--unroll_window", "all"),
        (
            *GHOST,
            "--gradient_accumulation",
            "2",
            "--meta_gradient_accumulation",
            "3",
            "--meta_batch_size",
            "4",
            "--batch_size",
            "4",
        ),
        (*GHOST, "--precision", "bf16", "--gradient_accumulation", "2", "--strategy", "zero2"),
        (*GHOST, "--strategy", "zero2", "--precondition", "adam"),
        ("--hypergradient", "jvp", "--unroll_steps", "2", "--unroll_window", "all"),
        ("--hypergradient", "sama", "--hypergradient_scope", "language_model"),
        ("--hypergradient", "finite_difference", "--freeze_vision_tower"),
        ("--hypergradient", "jvp", "--rollback"),
        ("--baseline",),
        # Beside gradients and buckets, activations are small here.
        (*GHOST, *ONE),
        (*GHOST, *ONE, "--strategy", "zero2"),
        (*GHOST, *ONE, "--strategy", "zero2", "--precision", "bf16"),
        (*GHOST, *ONE, "--strategy", "zero2", "--precision", "bf16", *TWICE),
        ("--baseline", *ONE, "--strategy", "zero2", *TWICE),
        ("--baseline", *ONE, "--strategy", "zero1", *TWICE),
    ],
    ids=" ".join,
)
def test_memory_is_what_is_planned_by_phase(make_run, small_buckets, flags: tuple[str, ...]):
    """But for what kernels, gloo and the reweighter take."""
    small_buckets()
    with PhasePeaks(torch.device("cpu")) as measured:
        run = make_run(*FLAGS, *flags)
        run.trainer.iteration(*iteration_of(run))  # makes the optimizer's state
        run.trainer.phases = measured
        for _ in range(5):
            batches = iteration_of(run)
            measured.start()
            run.trainer.iteration(*batches)
    planned = count_iteration(run.config, WORKLOAD, 2, "cpu").peaks
    del planned["export"]
    planned["lower"] = max(planned["lower"], planned.pop("optimizer"))
    if distributed.rank() == 1:  # the one that is planned
        for phase, peak in planned.items():
            # Less than what v, or this rank's gradients, are where activations are small.
            assert peak == pytest.approx(measured.peaks[phase], rel=0.1), phase


@pytest.mark.parametrize(
    "flags",
    [
        ("--hypergradient", "jvp", "--unroll_steps", "2", "--unroll_window", "all"),
        ("--hypergradient", "finite_difference", "--hypergradient_scope", "language_model"),
        ("--baseline", "--gradient_checkpointing", "--gradient_accumulation", "3"),
    ],
    ids=" ".join,
)
def test_multiplications_are_those_of_torchs_counter(make_run, flags: tuple[str, ...]):
    """To the last one. In a backward pass within one, as `ghost`'s, that counter fails."""
    run = make_run(*FLAGS, *flags)
    batches = iteration_of(run)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run.trainer.iteration(*batches)
    planned = count_iteration(run.config, WORKLOAD, 2, "cpu")
    assert sum(planned.flops.values()) == counter.get_total_flops() > 0


def test_ghost_takes_one_product_more_for_each_linear_layer(make_run):
    """As many as a forward pass without attention; two for the patches, whose output it repeats."""
    lower = [
        count_iteration(make_run(*FLAGS, *flags).config, WORKLOAD, 2, "cpu").flops["lower"]
        for flags in (GHOST, ("--baseline",))
    ]
    prm = make_run(*FLAGS).trainer.engine.module
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # knows no attention here
        prm(real_batch(prm, SIZE))
    patches = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert lower[0] - lower[1] == counter.get_total_flops() + patches


@pytest.mark.parametrize(
    "flags",
    [
        GHOST,
        (*GHOST, "--unroll_steps", "2", "--gradient_accumulation", "2"),
        ("--hypergradient", "jvp", "--unroll_steps", "2", "--unroll_window", "all"),
        ("--hypergradient", "sama", "--hypergradient_scope", "language_model", "--rollback"),
        ("--reweighter", "instance_net", "--instance_net_input", "representation"),
        ("--baseline", "--strategy", "zero1", "--gradient_accumulation", "2"),
    ],
    ids=" ".join,
)
def test_bytes_through_collectives_are_the_formulas(make_run, flags: tuple[str, ...]):
    run = make_run(*FLAGS, "--activation_function", "Clip", *flags)
    run.trainer.iteration(*iteration_of(run))
    batches = iteration_of(run)
    with CollectiveBytes() as counted:
        run.trainer.iteration(*batches)
    planned = count_iteration(run.config, WORKLOAD, 2, "cpu")
    # Partitions are padded to an even number of elements.
    assert counted.large == pytest.approx(planned.sent, rel=1e-4)
