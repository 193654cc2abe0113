"""The same run on 1 and 2 ranks, at other micro-batch splits, and without DeepSpeed at all."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bilevel_worker import ITERATIONS, starting_weights
from gradient_dot import gradient_dot
from reweighting import rank_batches
from started_run import run_on_ranks

from dreamprm_dist.losses import MetaLossConfig, instance_losses, meta_losses
from dreamprm_dist.prm.batch import InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import load_prm, load_tokenizer

# Sums in float32 in another order differ by about 1e-7 relative, and AdamW, which divides by small
# second moments, carries that on over 6 lower steps: 4e-7 is seen, and 1e-5 leaves room for other
# processors. The mutants change v by a quarter and more.
TOLERANCE = 1e-5
LOOSE = {"adamw": 1e-4, "finite_difference": 1e-2}
SIZE = 8


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm().clamp_min(1e-300))


def batches(size: int, accumulation: int = 1) -> list[str]:
    return [
        *("--batch_size", str(size), "--gradient_accumulation", str(accumulation)),
        *("--meta_batch_size", str(size), "--meta_gradient_accumulation", str(accumulation)),
    ]


GHOST = "--hypergradient ghost"
# All that the estimator may read: every batch of a window, and the optimizer's state.
GHOST_ADAM = f"{GHOST} --unroll_window all --precondition adam"
# What a run may choose; each is run on one rank and, in other micro-batches, on two.
OPTIONS = {
    "adamw": "--row_update adamw --activation_function Clip",
    "sama": "--hypergradient sama",
    "finite_difference": "--hypergradient finite_difference",
    "last_layer": "--hypergradient_scope last_1_layers",
    "window_all": "--unroll_window all",
    "rollback": "--rollback",
    "pair": "--score_over pair --loss_target +",
    "absolute": "--meta_error absolute --loss_target +",
    "net_representation": "--reweighter instance_net --instance_net_input representation "
    "--activation_function Clip --weight_min 0 --meta_lr 0.02",
    "net_loss_through": "--reweighter instance_net --instance_net_input loss "
    "--differentiate_weights --activation_function sigmoid --meta_gradient_clipping 0.001",
    "by_question": "--group_meta_by_question",
    "ghost": GHOST,
    "ghost_all": f"{GHOST} --unroll_window all",
    "ghost_adam": GHOST_ADAM,
    "ghost_rollback": f"{GHOST} --rollback",
    "ghost_language_model": f"{GHOST} --hypergradient_scope language_model",
    "ghost_net": f"{GHOST} --reweighter instance_net --activation_function sigmoid --meta_lr 0.02",
    "ghost_domain_table": f"{GHOST} --reweighter domain_table",
}
VARIANTS = {
    1: {f"one_{name}": {"flags": [*batches(8), *flags.split()]} for name, flags in OPTIONS.items()}
    | {
        "one_rank": {"flags": batches(8)},
        "one_rank_accumulated": {"flags": batches(2, 4)},
        "one_rank_half_text": {"flags": batches(8), "shards": "half_text"},
        "ghost_accumulated": {"flags": [*batches(2, 4), *GHOST_ADAM.split()]},
        "one_ghost_half_text": {"flags": [*batches(8), *GHOST.split()], "shards": "half_text"},
    },
    4: {
        "four_ranks": {"flags": batches(2)},
        "ghost_on_four_ranks": {"flags": [*batches(2), *GHOST_ADAM.split()]},
    },
    2: {
        f"two_{name}": {"flags": [*batches(2, 2), *flags.split()]}
        for name, flags in OPTIONS.items()
    }
    | {
        "two_ranks": {"flags": batches(4)},
        "two_ranks_accumulated": {"flags": batches(2, 2)},
        "two_ranks_half_text": {"flags": batches(4), "shards": "half_text"},
        "two_ghost_half_text": {"flags": [*batches(4), *GHOST.split()], "shards": "half_text"},
        "checkpointed": {"flags": [*batches(4), "--gradient_checkpointing"]},
        "zero2_offload": {"flags": [*batches(4), "--strategy", "zero2_offload"]},
        "bf16": {"flags": [*batches(4), "--precision", "bf16"], "iterations": 1},
        "ghost_frozen": {
            "flags": [*batches(4), *GHOST.split(), "--freeze_vision_tower"],
            "iterations": 1,
        },
        "v_not_averaged": {"flags": batches(4), "mutant": "v_not_averaged", "iterations": 1},
        "v_not_reduced": {"flags": batches(4), "mutant": "v_not_reduced", "iterations": 1},
        "swapped_shards": {"flags": batches(4), "mutant": "swapped_shards"},
    }
    | {
        f"ghost_{name}": {"flags": [*batches(4), *GHOST_ADAM.split(), *flags]}
        for name, flags in {
            "checkpointed": ["--gradient_checkpointing"],
            **{s: ["--strategy", s] for s in ("zero1", "zero2", "zero2_offload")},
        }.items()
    },
}
# Runs that are one run, by the name of that on one rank.
SAME = {
    "one_rank": [
        *("one_rank_accumulated", "two_ranks", "two_ranks_accumulated", "four_ranks"),
        *("checkpointed", "zero2_offload"),
    ],
    "one_ghost_adam": [
        *("ghost_accumulated", "ghost_on_four_ranks", "ghost_checkpointed"),
        *("ghost_zero1", "ghost_zero2", "ghost_zero2_offload"),
    ],
}


@pytest.fixture(scope="module")
def shard_folders(tiny_shards: Path, half_text) -> dict[str, Path]:
    """By name; in `half_text` the second of two ranks has training records without an image."""
    return {"all_images": tiny_shards, "half_text": half_text(1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_prm_dir: Path, shard_folders: dict[str, Path]) -> dict:
    """What the worker computed, by variant, from one spawn for each world size, all at once."""
    out = tmp_path_factory.mktemp("world_sizes")
    worker = Path(__file__).with_name("bilevel_worker.py")

    def spawn(world_size: int, variants: dict) -> None:
        for variant in variants.values():
            variant["shards"] = str(shard_folders[variant.get("shards", "all_images")])
        run_on_ranks(world_size, worker, out, tiny_prm_dir, json.dumps(variants), "cpu")

    with ThreadPoolExecutor() as pool:
        list(pool.map(spawn, *zip(*VARIANTS.items(), strict=True)))
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


def plain_torch_run(
    model: Path,
    shards: Path,
    ghost: bool = False,
    precondition: bool = False,
    window_all: bool = False,
    rollback: bool = False,
    by_question: bool = False,
    loss_target: str = "both",
    meta_error: str = "squared",
) -> dict:
    """The run written out in plain PyTorch: dense table, no ranks, one backward an instance."""
    torch.set_num_threads(1)
    prm, tokenizer = load_prm(str(model), "fp32").train(), load_tokenizer(str(model))
    label_ids = label_token_ids(tokenizer)
    parameters = [p for p in prm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    format = InputFormat(6, prm.tile_size, prm.tokens_per_tile, label_context="data")
    lower = rank_batches(shards / "train", tokenizer, format, SIZE)
    meta = rank_batches(shards / "meta", tokenizer, format, SIZE, 1, by_question=by_question)
    table = starting_weights(lower.shards.num_rows)
    directions, metrics = [], []

    def instances(batch):
        return instance_losses(prm(batch).logits, batch)

    def lower_step(batch):
        losses = instances(batch)
        (table[batch.sample_ids] * losses).sum().div(SIZE).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach(), norm

    def meta_gradient(batch):
        config = MetaLossConfig(loss_target=loss_target, meta_error=meta_error)
        logits = prm(batch).logits
        values = meta_losses(logits, batch.step_rows, batch.true_false, label_ids, config)
        v = torch.autograd.grad(values.mean(), parameters, materialize_grads=True)
        directions.append(torch.cat([t.flatten() for t in v]))
        if precondition:
            v = [
                t * adam_derivative_before_a_step(optimizer, p)
                for t, p in zip(v, parameters, strict=True)
            ]
        return v, values.detach()

    def hypergradient_of(batch, v):
        named = dict(enumerate(parameters)), dict(enumerate(v))
        products = gradient_dot(instances(batch), *named)
        return torch.zeros_like(table).index_add(0, batch.sample_ids, -products / SIZE)

    for iteration in range(ITERATIONS):
        window = [lower[step][0] for step in (2 * iteration, 2 * iteration + 1)]
        (meta_batch,) = meta[iteration]
        start = copy.deepcopy((prm.state_dict(), optimizer.state_dict()))
        hypergradient = torch.zeros_like(table)
        if ghost:
            v, values = meta_gradient(meta_batch)
        for position, batch in enumerate(window):
            learns = window_all or position == 1
            if ghost and learns:
                hypergradient += hypergradient_of(batch, v)
            losses, norm = lower_step(batch)
            if learns and not ghost:
                v, values = meta_gradient(meta_batch)
                hypergradient += hypergradient_of(batch, v)
        drawn = torch.cat([b.sample_ids for b in (window if window_all else window[1:])]).unique()
        scale = hypergradient[drawn].abs().mean()
        decay = torch.ones_like(table)
        decay[drawn] = 1 - 0.2 * 1e-3
        table = (table * decay - 0.2 * hypergradient / scale).clamp(0, 3)
        if rollback:
            prm.load_state_dict(start[0])
            optimizer.load_state_dict(start[1])
            for batch in window:
                losses, norm = lower_step(batch)
        metrics.append(
            {
                "gradient_norm": norm,
                "lower_loss": losses.mean(),
                "meta_loss": values.mean(),
                "hypergradient_norm": hypergradient.norm(),
            }
        )
    return {
        "v": torch.stack(directions),
        "weights": table,
        "metrics": {name: torch.tensor([m[name] for m in metrics]) for name in metrics[0]},
    }


def adam_derivative_before_a_step(optimizer: torch.optim.AdamW, parameter) -> torch.Tensor:
    """du/dg of the last update u by its gradient g, had this been the first moment m^; else 1."""
    state = optimizer.state.get(parameter)
    if not state:
        return torch.ones(())
    (first, second), eps = optimizer.defaults["betas"], optimizer.defaults["eps"]
    corrections = [1 - beta ** int(state["step"]) for beta in (first, second)]
    unbiased = state["exp_avg"] / corrections[0]
    gradient = unbiased.clone().requires_grad_()
    mean = state["exp_avg"] + (1 - first) * (gradient - unbiased)
    square = state["exp_avg_sq"] + (1 - second) * (gradient**2 - unbiased**2)
    # What Adam never saw has no slope there.
    root = torch.where(state["exp_avg_sq"] > 0, square, 1.0).sqrt() * (state["exp_avg_sq"] > 0)
    update = mean / corrections[0] / (root / corrections[1] ** 0.5 + eps)
    return torch.autograd.grad(update.sum(), gradient)[0] * (state["exp_avg_sq"] > 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("one_rank", {}),
        ("one_window_all", {"window_all": True}),
        ("one_rollback", {"rollback": True}),
        ("one_by_question", {"by_question": True}),
        ("one_absolute", {"loss_target": "+", "meta_error": "absolute"}),
        ("one_ghost", {"ghost": True}),
        ("one_ghost_all", {"ghost": True, "window_all": True}),
        ("one_ghost_adam", {"ghost": True, "window_all": True, "precondition": True}),
        ("one_ghost_rollback", {"ghost": True, "rollback": True}),
    ],
)
def test_one_rank_is_the_run_in_plain_pytorch(
    runs, tiny_prm_dir: Path, tiny_shards: Path, name: str, settings: dict
):
    plain = plain_torch_run(tiny_prm_dir, tiny_shards, **settings)
    assert relative(runs[name]["v"], plain["v"]) < TOLERANCE
    assert relative(runs[name]["weights"], plain["weights"]) < TOLERANCE
    assert relative(plain["weights"], starting_weights(len(plain["weights"]))) > 0.05
    for metric, values in plain["metrics"].items():
        assert relative(runs[name]["metrics"][metric], values) < TOLERANCE, metric


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_the_same_run_on_two_ranks(runs, name: str):
    one, two = runs[f"one_{name}"], runs[f"two_{name}"]
    # Adam divides by the root of the second moment: a hypergradient near 0 of a drawn row becomes a
    # whole step either way, and with it the rounding of a finite difference.
    tolerance = LOOSE.get(name, TOLERANCE)
    assert relative(two["v"], one["v"]) < tolerance
    assert relative(two["weights"], one["weights"]) < tolerance
    assert one["metrics"].keys() == two["metrics"].keys()
    for metric, values in one["metrics"].items():
        assert relative(two["metrics"][metric], values) < tolerance, metric
    assert one["weights"].std() > 1e-6  # of a net: it was constant
    assert relative(one["weights"], starting_weights(len(one["weights"]))) > 0.01


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"finite_difference"}))
def test_options_make_a_difference(runs, name: str):
    base = "one_ghost" if name.startswith("ghost_") else "one_rank"
    # Rollback moves ghost's next v alone, by lr. It is 60 times the tolerance.
    assert relative(runs[f"one_{name}"]["weights"], runs[base]["weights"]) > 50 * TOLERANCE


def test_the_meta_step_leaves_zeros_state_bit_identical(runs):
    assert all(run["untouched"] for run in runs.values() if "untouched" in run)


@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, others in SAME.items() for other in others]
)
def test_the_same_global_batch_gives_the_same_run(runs, name: str, other: str):
    one, other = runs[name], runs[other]
    assert relative(other["v"], one["v"]) < TOLERANCE
    assert relative(other["weights"], one["weights"]) < TOLERANCE
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, values in one["metrics"].items():
        assert relative(other["metrics"][name], values) < TOLERANCE, name


@pytest.mark.parametrize(
    ("name", "other", "all_images"),
    [
        ("one_rank_half_text", "two_ranks_half_text", "one_rank"),
        ("one_ghost_half_text", "two_ghost_half_text", "one_ghost"),
    ],
)
def test_a_rank_without_images_gives_the_same_run(runs, name: str, other: str, all_images: str):
    """ZeRO adds gradients up in the order in which they appear: it must be that of other ranks."""
    one, two = runs[name], runs[other]
    assert relative(two["v"], one["v"]) < TOLERANCE
    assert relative(two["weights"], one["weights"]) < TOLERANCE
    for name, values in one["metrics"].items():
        assert relative(two["metrics"][name], values) < TOLERANCE, name
    assert relative(one["weights"], runs[all_images]["weights"]) > 1e-3


@pytest.mark.parametrize("mutant", ["v_not_averaged", "v_not_reduced"])
def test_a_wrong_all_reduce_is_found(runs, mutant: str):
    assert relative(runs[mutant]["v"], runs["one_rank"]["v"][:1]) > 0.1


def test_rows_on_the_wrong_rank_are_refused(runs):
    assert "belongs to rank" in runs["swapped_shards"]["error"]


@pytest.mark.parametrize("name", ["one_rank", "one_sama", "one_ghost_adam"])
def test_the_logged_norm_is_that_of_v(runs, name: str):
    """Also where v is preconditioned before its use."""
    norms = runs[name]["v"].double().norm(dim=1)
    assert relative(runs[name]["metrics"]["meta_gradient_norm"], norms) < TOLERANCE


def test_bf16_follows_the_run_in_float32(runs):
    # 8 bits: v keeps its direction, not its digits.
    bf16, fp32 = runs["bf16"]["v"][0], runs["two_ranks"]["v"][0]
    assert torch.nn.functional.cosine_similarity(bf16.float(), fp32, dim=0) > 0.99


def test_a_frozen_part_has_no_share_in_v(runs):
    frozen, whole = runs["ghost_frozen"]["v"], runs["two_ranks"]["v"]
    assert 0 < frozen.shape[1] < whole.shape[1]
