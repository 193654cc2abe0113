"""Configuration: defaults < recipe < command line, and nothing unknown is accepted."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.run import EvaluateConfig
from dreamprm_dist.evaluation.score_file import ScoreConfig
from dreamprm_dist.flags import parse_args
from dreamprm_dist.hypergradient import ESTIMATORS, SAMA, HypergradientConfig
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.features import FEATURES
from dreamprm_dist.reweighters.row_updates import ROW_UPDATES
from dreamprm_dist.training.config import RunConfig, TrainConfig, parse_train_config, save_config

RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml"))

REFERENCE_DEFAULTS = {
    "train_json_file": "./data/train.json",
    "meta_json_file": "./data/meta.json",
    "weights_path": "./weights",
    "reward_model": "OpenGVLab/InternVL3-1B",
    "iteration_num": 100000,
    "save_every_iterations": 1000,
    "unroll_steps": 1,
    "gradient_accumulation": 1,
    "gradient_clipping": 1.0,
    "device": "auto",
    "precision": "bf16",
    "strategy": "default",
    "rollback": False,
    "baseline": False,
    "seed": 1,
    "lr": 5e-5,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "batch_size": 1,
    "scheduler_step_size": 1000,
    "scheduler_gamma": 0.95,
    "meta_lr": 0.1,
    "meta_weight_decay": 1e-3,
    "meta_batch_size": 1,
    "retrain": False,
    "activation_function": "LeakyReLU",
    "aggregation_function": "mean",
    "loss_target": "both",
    "initialization": 1.0,
    "max_patch_num": 6,
    "scheduler_type": "cosine_schedule_with_warmup",
}
REFERENCE_FLAGS = {
    *REFERENCE_DEFAULTS,
    *("local_rank", "meta_momentum", "meta_scheduler_step_size", "meta_scheduler_gamma"),
}


def test_the_reference_implementations_flags_and_defaults():
    flags = parse_train_config([]).as_dict()
    assert flags.keys() >= REFERENCE_FLAGS
    assert {name: flags[name] for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS


def test_the_reference_implementations_spelling_is_an_alias():
    config = parse_train_config(["--gradiant_accumulation", "3", "--gradiant_clipping=0.5"])
    assert config.lower.gradient_accumulation == 3
    assert config.lower.gradient_clipping == 0.5


@pytest.mark.parametrize(
    ("section", "old"),
    [(RunConfig, "weights_path"), (EvaluateConfig, "output_dir"), (ScoreConfig, "output")],
)
def test_every_command_calls_out_what_it_writes(section: type, old: str):
    ((new,), (before,)) = (parse_args((section,), [f"--{name}", "x"], "") for name in ("out", old))
    assert new == before != section()


def test_bounds_hold_for_a_flag_that_may_be_left_out_too():
    with pytest.raises(InputError, match="limit is 0; it must be at least 1"):
        ScoreConfig(limit=0)
    (config,) = parse_args((ScoreConfig,), ["--limit", "2"], "")
    assert (config.limit, ScoreConfig().limit) == (2, None)


def test_flags_override_a_recipe_and_a_recipe_the_defaults(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 0.5\nbatch_size: 4\nretrain: true\n")
    config = parse_train_config(["--config", str(recipe), "--lr", "0.25"])
    assert (config.lower.lr, config.lower.batch_size, config.run.retrain) == (0.25, 4, True)
    assert config.lower.momentum == 0.9


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path):
    assert parse_train_config(["--config", str(recipe)])


def test_the_saved_configuration_starts_the_same_run(tmp_path: Path):
    config = parse_train_config(["--lr", "3e-4", "--baseline", "--image_root", "/images"])
    save_config(config, tmp_path / "config.yaml")
    assert parse_train_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("meta_lrr: 1", "unknown flag 'meta_lrr'; the nearest valid one is 'meta_lr'"),
        ("- lr", "must hold `flag: value` lines"),
        ("lr: [", "is not YAML"),
        ("lr: 1\nseed: 2\nlr: 3", r"line 3: lr is given on line 1 too; remove one of them"),
        (
            "gradient_clipping: 1\ngradiant_clipping: 2",
            "line 2: gradiant_clipping is given on line 1",
        ),
        ("seed: {lr: 1}", "line 1: seed must be a value or a list of values"),
        ("seed: [[1]]", "line 1: seed must be a value or a list of values"),
        ("seed: 0x1f", "argument --seed: invalid int value: '0x1f'"),
        ("retrain: perhaps", "Truthy value expected: got perhaps"),
        ("on: 1", "unknown flag 'on'"),
        ("<<: {lr: 1}", "unknown flag '<<'"),
        ("lr: []", "line 1: lr has an empty list"),
        ("config: x.yaml", "unknown flag 'config'; the nearest valid one is '(?!config)"),
        ("help: true", "unknown flag 'help'; the nearest valid one is '(?!help)"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, recipe: str, message: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(ValueError, match=message) as error:
        parse_train_config(["--config", str(file)])
    assert str(file) in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing\.yaml does not exist"):
        parse_train_config(["--config", str(tmp_path / "nothing.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "1"], "unknown flag 'learning_rate'; the nearest valid one is"),
        (["--hypergradient_scope", "last_0_layers"], "hypergradient_scope 'last_0_layers'"),
        (["--hypergradient=gradient_dot"], "gradient_dot is no longer there; use ghost or jvp"),
        (
            "--hypergradient=ghost --differentiate_weights --reweighter=instance_net "
            "--activation_function=sigmoid".split(),
            "ghost gives derivatives of losses alone, and cannot differentiate weights that depend "
            "on the PRM; use jvp",
        ),
        (["--reweighter=instance_net", "--activation_function=Project"], "Project is for"),
        (["--retrain", "--baseline"], "choose one of the two"),
        (
            ["--trackers", "off"],
            "unknown tracker 'off'; leave trackers out for none, or choose from",
        ),
        (["--keep_best", "1"], "keep_best needs a meta_validation_fraction above 0"),
        (["--meta_validation_fraction", "1"], "is 1.0; it must be at least 0 and below 1"),
        (["--collective_timeout", "0"], "must be above 0"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--lr", "-1"], "lr is -1.0; it must be at least 0"),
        (["--meta_lr", "nan"], "meta_lr is nan; it must be a finite number"),
        (["--num_workers", "-3"], "num_workers is -3; it must be at least 0"),
        (["--gradient_clipping", "-1"], "gradient_clipping is -1.0; it must be at least 0"),
        (["--meta_momentum", "1.5"], "meta_momentum is 1.5; it must be at least 0 and below 1"),
        (["--scheduler_step_size", "0"], "scheduler_step_size is 0; it must be at least 1"),
        (["--meta_scheduler_gamma", "0"], "meta_scheduler_gamma is 0.0; it must be above 0"),
        (["--row_update", "adamw_lazy"], "row_update adamw_lazy is no longer there; use norm"),
        (["--activation_function", "Clip", "--initialization", "4"], "lies outside"),
        (["--reweighter", "fixed"], "name their file with instance_weights"),
        (["--instance_weights", "w"], "for reweighter fixed, and the reweighter is instance_table"),
        (
            ["--reweighter=fixed", "--instance_weights=w", "--baseline"],
            "instance_weights is for reweighter fixed, and the reweighter is uniform; leave it out",
        ),
        (
            ["--reweighter", "domain_table", "--initial_weights", "w"],
            "initial_weights is for reweighter instance_table, and the reweighter is domain_table",
        ),
        (
            ["--reweighter=fixed", "--instance_weights=w", "--initial_weights=v"],
            "initial_weights is for reweighter instance_table, and the reweighter is fixed",
        ),
        (["--initial_weights", "w", "--decay_to_initialization"], "rows that start alike; leave"),
    ],
)
def test_wrong_flags_are_refused(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse_train_config(argv)


def test_an_unknown_value_is_refused_by_a_list_of_those_there_are(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("precondition: adamw")
    choices = "--precondition: invalid choice: 'adamw' (choose from 'none', 'adam')"
    with pytest.raises(InputError, match=re.escape(choices)):
        parse_train_config(["--precondition", "adamw"])
    with pytest.raises(InputError, match=re.escape(f"{recipe}: argument {choices}")):
        parse_train_config(["--config", str(recipe)])
    with pytest.raises(InputError, match="precondition 'adamw' is unknown; use one of none, adam"):
        HypergradientConfig(precondition="adamw")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("activation_function: No", {"activation_function": "No"}),
        ("weights_path: 007", {"weights_path": "007"}),
        ("weights_path: 2026-11-26", {"weights_path": "2026-11-26"}),
        ("weights_path: 1_000", {"weights_path": "1_000"}),
        ("weights_path: 0x1f", {"weights_path": "0x1f"}),
        ("weights_path: 12:30:45", {"weights_path": "12:30:45"}),
        ("weights_path: .inf", {"weights_path": ".inf"}),
        ("weights_path: on", {"weights_path": "on"}),
        ("weights_path: 'null'", {"weights_path": "null"}),
        ("image_root: y", {"image_root": "y"}),
        ("image_root: null\nseed: ~\ntrackers:", {"image_root": None, "seed": 1}),
        ("iteration_num: 1_000\nlr: 5e-5", {"iteration_num": 1000, "lr": 5e-5}),
        ("retrain: on\nrollback: off", {"retrain": True, "rollback": False}),
        ("baseline: Yes\nrollback: No", {"baseline": True, "rollback": False}),
        ("lr: &lr 0.5\nmeta_lr: *lr", {"lr": 0.5, "meta_lr": 0.5}),
    ],
)
def test_a_recipe_says_what_is_written_in_it(tmp_path: Path, written: str, read: dict):
    """YAML has its own ideas of some words and numbers."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(written)
    config = parse_train_config(["--config", str(recipe)])
    found = config.as_dict()
    assert {name: found[name] for name in read} == read
    save_config(config, tmp_path / "saved.yaml")
    assert parse_train_config(["--config", str(tmp_path / "saved.yaml")]) == config


def test_sama_is_jvp_with_adams_preconditioner():
    sama = parse_train_config(["--hypergradient", "sama"]).hypergradient
    assert sama.estimator is ESTIMATORS["jvp"] and sama.preconditions
    for name, estimator in ESTIMATORS.items():
        config = parse_train_config(["--hypergradient", name]).hypergradient
        assert config.estimator is estimator and not config.preconditions
        config = parse_train_config(["--hypergradient", name, "--precondition", "adam"])
        assert config.hypergradient.preconditions


@pytest.mark.parametrize(
    ("world_size", "lower", "meta"),
    [(1, (4, 6), (5, 2)), (2, (4, 3), (5, 1)), (4, (3, 2), None), (6, (4, 1), None)],
)
def test_the_global_batch_stays_on_any_number_of_ranks(world_size, lower, meta):
    """24 instances and, where the ranks divide them, 10 meta solutions."""
    flags = "--batch_size 4 --gradient_accumulation 3 --meta_batch_size 5".split()
    config = parse_train_config([*flags, *([] if meta else ["--baseline"])])
    sizes = config.global_batch_sizes(2)
    assert sizes == {"batch_size": 24} | ({"meta_batch_size": 10} if meta else {})
    fitted = config.with_global_batch_sizes(sizes, world_size)
    assert (fitted.lower.batch_size, fitted.lower.gradient_accumulation) == lower
    if meta:
        assert (fitted.upper.meta_batch_size, fitted.upper.meta_gradient_accumulation) == meta
    assert fitted.global_batch_sizes(world_size) == sizes


def test_a_run_on_given_weights_learns_none():
    config = parse_train_config(["--reweighter", "fixed", "--instance_weights", "w.parquet"])
    assert (config.learns, config.reads_meta, config.kind) == (False, False, "fixed weights")
    table = parse_train_config(
        ["--initial_weights", "w", "--activation_function", "Clip", "--weight_max", "0.5"]
    )
    assert table.learns  # the bounds are held against the file, for nothing starts at 1


@pytest.mark.parametrize("flag", ["--retrain", "--baseline", "--reweighter=uniform"])
def test_plain_fine_tuning_is_one_thing(flag: str):
    config = parse_train_config([flag])
    assert config.reweighter.reweighter == "uniform"
    assert not config.learns and not config.reads_meta
    assert parse_train_config([flag, "--meta_validation_fraction", "0.5"]).reads_meta
    assert parse_train_config([flag, "--train_on_meta", "answer"]).reads_meta


def test_saved_yaml_is_flat(tmp_path: Path):
    save_config(parse_train_config([]), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved == parse_train_config([]).as_dict()


def test_a_list_in_a_recipe(tmp_path):
    @dataclasses.dataclass
    class Several:
        model: list[str] = dataclasses.field(default_factory=lambda: ["a"])

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: [b, c=d]")
    (config,) = parse_args((Several,), ["--config", str(recipe)], "")
    assert config.model == ["b", "c=d"]
    (config,) = parse_args((Several,), ["--config", str(recipe), "--model", "e"], "")
    assert config.model == ["e"]


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("reweighter", REWEIGHTERS),
        ("hypergradient", {**ESTIMATORS, SAMA: None}),
        ("row_update", ROW_UPDATES),
        ("instance_net_input", FEATURES),
        ("aggregation_function", AGGREGATIONS),
    ],
)
def test_a_flag_offers_all_that_there_is(name: str, registry: dict) -> None:
    """And what it does not offer is refused by a list of what it does, from Python too."""
    sections = get_type_hints(TrainConfig).values()
    (section,) = (s for s in sections if name in {f.name for f in dataclasses.fields(s)})
    with pytest.raises(ValueError, match=f"{name} 'new' is unknown; use one of") as error:
        section(**{name: "new"})
    assert all(choice in str(error.value) for choice in registry)
    for choice in registry:
        section(**{name: choice})
