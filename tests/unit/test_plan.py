"""What a plan says: verdicts, remedies, sizes; its figures are held against runs on ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreamprm_dist.planning import plan as planning
from dreamprm_dist.planning.counter import Counter
from dreamprm_dist.planning.gpus import GPUS, Gpu
from dreamprm_dist.planning.iteration import count_iteration
from dreamprm_dist.planning.plan import GIB, Plan, PlanConfig
from dreamprm_dist.planning.workload import Workload
from dreamprm_dist.training.config import TrainConfig, parse_train_config

ROOT = Path(__file__).resolve().parents[2]
WORK = Workload(tiles=2, text_tokens=20, steps=2)


def config(model: Path, *flags: str) -> TrainConfig:
    return parse_train_config(["--reward_model", str(model), *flags])


def test_live_bytes_come_and_go():
    with Counter() as counter:
        first = torch.empty(100, device="meta")
        view = first[10:]  # no storage of its own
        assert (counter.live, counter.peak) == (400, 400)
        second = first + view.sum()
        assert counter.live == 800
        del first
        assert counter.live == 800  # the view holds it
        del view
        counter.restart()
        assert (counter.live, counter.peak) == (400, 400)
        torch.mm(second.view(10, 10), second.view(10, 10))
        assert (counter.live, counter.peak, counter.flops) == (400, 800, 2 * 10**3)
        counter.restart()
        assert counter.flops == 0


def test_a_partition_is_a_ranks_share(tiny_prm_dir: Path):
    """In bf16 two bytes of each parameter, and twelve of each of the rank's own."""
    run = config(tiny_prm_dir, "--hypergradient", "ghost")
    between = {ranks: count_iteration(run, WORK, ranks).between for ranks in (1, 4, 512)}
    counted = count_iteration(run, WORK, 1)
    assert counted.parameters == counted.trained > 1e5
    rest = {ranks: size - 12 * -(-counted.trained // ranks) for ranks, size in between.items()}
    assert max(rest.values()) - min(rest.values()) <= 24  # an even number of elements
    # Beside the parameters there are buffers.
    assert 2 * counted.parameters <= min(rest.values()) <= 2.1 * counted.parameters


def test_given_weights_cost_what_plain_fine_tuning_costs(tiny_prm_dir: Path):
    """Their file is not read: it may come from a run that is planned too."""
    fixed = config(tiny_prm_dir, "--reweighter", "fixed", "--instance_weights", "none.parquet")
    assert count_iteration(fixed, WORK, 2) == count_iteration(
        config(tiny_prm_dir, "--baseline"), WORK, 2
    )


@pytest.mark.parametrize(
    ("more", "less", "phase"),
    [
        ("--batch_size 8", "--batch_size 8 --gradient_checkpointing", "lower"),
        ("--hypergradient jvp", "--hypergradient finite_difference", "hypergradient"),
        ("--rollback", "", "lower"),
        ("--meta_batch_size 8", "--meta_batch_size 2 --group_meta_by_question", "meta"),
        ("", "--hypergradient_scope language_model", "meta"),
        ("", "--freeze_vision_tower", "lower"),
        ("--precision fp32", "", "optimizer"),
        ("", "--strategy zero2_offload", "between"),
    ],
)
def test_flags_that_save_memory(tiny_prm_dir: Path, more: str, less: str, phase: str):
    def bytes_of(flags: str) -> int:
        run = config(tiny_prm_dir, "--hypergradient", "ghost", *flags.split())
        counted = count_iteration(run, WORK, 2)
        return counted.between if phase == "between" else counted.peaks[phase]

    assert bytes_of(less) < bytes_of(more)


@pytest.mark.parametrize("flags", ["--hypergradient ghost", "--hypergradient jvp", "--baseline"])
def test_a_run_of_text_alone_pays_for_no_vision_tower(tiny_prm_dir: Path, flags: str):
    run = config(tiny_prm_dir, *flags.split())
    frozen = run.with_flags({"freeze_vision_tower": True})
    for tiles, same in ((0, True), (1, False)):
        text, other = (count_iteration(r, WORK._replace(tiles=tiles), 2) for r in (run, frozen))
        assert (text.flops == other.flops) == same


@pytest.fixture
def tiny_gpu(monkeypatch: pytest.MonkeyPatch):
    """Has the usual GPU small: so much memory of it may be filled."""

    def make(usable: float) -> None:
        gpu = Gpu(usable / planning.USABLE / GIB, {"bf16": 1.0, "fp32": 0.5})
        monkeypatch.setitem(GPUS, "h100-80", gpu)

    return make


def planned(run: TrainConfig) -> Plan:
    return Plan(run, PlanConfig(num_gpus=2), WORK, WORK)


def test_remedies_keep_the_global_batch_and_cost_as_little_as_they_can(
    tiny_prm_dir: Path, tiny_gpu, small_buckets
):
    small_buckets()
    run = config(
        *(tiny_prm_dir, "--hypergradient", "ghost", "--batch_size", "8", "--meta_batch_size", "4")
    )

    def peak(**flags: object) -> int:
        return count_iteration(run.with_flags(flags), WORK, 2).peak

    halved = {"batch_size": 4, "gradient_accumulation": 2}
    halved |= {"meta_batch_size": 2, "meta_gradient_accumulation": 2}
    smallest = {"batch_size": 1, "gradient_accumulation": 8}
    smallest |= {"meta_batch_size": 1, "meta_gradient_accumulation": 4}
    for flags in ({}, halved):
        tiny_gpu(peak(**flags))
        plan = planned(run)
        assert plan.fits == (not flags)
        if flags:
            assert plan.remedy() == (flags, peak(**flags))
    quarters = halved | {"batch_size": 2, "gradient_accumulation": 4}
    quarters |= {"meta_batch_size": 1, "meta_gradient_accumulation": 4}
    tiny_gpu(min(peak(**flags) for flags in ({}, halved, quarters, smallest)) - 1)
    remedy = planned(run).remedy()
    assert remedy is not None and remedy[0]["gradient_checkpointing"]
    scoped = {
        "gradient_checkpointing": True,
        "strategy": "zero2_offload",
        "hypergradient_scope": "language_model",
    }
    least = peak(**scoped, **smallest, freeze_vision_tower=True)
    tiny_gpu(least)
    plan = planned(run)
    remedy = plan.remedy()
    assert remedy is not None
    flags, found = remedy
    assert found <= least and flags["freeze_vision_tower"]
    fitted = run.with_flags(flags)
    assert fitted.global_batch_sizes(2) == run.global_batch_sizes(2)
    assert "it fits with" in plan.text() and "--freeze_vision_tower" in plan.text()
    tiny_gpu(0.9 * least)
    plan = planned(run)
    assert plan.remedy() is None and "no flag makes it fit" in plan.text()


def test_time_is_that_of_mean_instances_and_memory_that_of_the_largest(
    tiny_prm_dir: Path, tiny_gpu
):
    tiny_gpu(GIB)
    run = config(tiny_prm_dir, "--hypergradient", "ghost", "--iteration_num", "1000")
    large = WORK._replace(tiles=5)
    plan = Plan(run, PlanConfig(num_gpus=2, utilisation=0.5), large, WORK)
    assert plan.counted == count_iteration(run, large, 2)
    flops = count_iteration(run, WORK, 2).flops
    assert plan.seconds == {k: f / 0.5e12 for k, f in flops.items() if f}
    text = plan.text()
    assert "5 tiles" in text and "2 tiles" in text
    assert f"1,000 iterations x {sum(plan.seconds.values()):.3g} s" in text
    assert "at 50% of 1 TFLOP/s" in text and "fits" in text


def test_the_command_reads_shards_or_flags(tiny_prm_dir: Path, tiny_shards: Path):
    def said(*flags: object) -> str:
        command = [sys.executable, ROOT / "launch" / "plan.py", "--reward_model", tiny_prm_dir]
        recipe = ["--config", ROOT / "launch" / "recipes" / "instance_table.yaml"]
        done = subprocess.run(
            [*map(str, [*command, *recipe, *flags])],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr * (done.returncode == 2)

    assert "as --reward_model OpenGVLab/InternVL3-1B-hf" in said("--reward_model", "./runs/none")
    text = said("--num_gpus", 4, "--gpu", "a100-40")
    assert "7 tiles, 600 tokens of text and 8 steps" in text
    assert "4 x a100-40, zero2: global batch_size 4, global meta_batch_size 4" in text
    text = said("--train_json_file", tiny_shards / "train", "--tiles", 3)
    assert "memory for instances of 3 tiles, 41 tokens of text and 3 steps" in text
