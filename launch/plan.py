"""Plan a run before anything is started: memory by phase, time, and what would make it fit.

    python launch/plan.py --config launch/recipes/instance_table.yaml --num_gpus 8 --gpu a100-80

Everything is counted on shapes: of the model its `config.json` is read, of the data, where its
shards are there, sizes of images and lengths of texts. It takes seconds, and no GPU.
"""

from pathlib import Path

from dreamprm_dist.data.shards import ShardFolder, shards_at
from dreamprm_dist.errors import InputError
from dreamprm_dist.flags import run
from dreamprm_dist.planning.plan import Plan, PlanConfig
from dreamprm_dist.planning.workload import Workload, workloads_of
from dreamprm_dist.prm.batch import InputFormat
from dreamprm_dist.prm.model import load_shapes, load_tokenizer
from dreamprm_dist.prm.model_folder import fetch_model
from dreamprm_dist.training.config import TrainConfig, parse_with_train_config


def workloads(train: TrainConfig, config: PlanConfig) -> tuple[Workload, Workload]:
    """The largest and the mean instance: by flags, else of the shards, else with a large image."""
    tiles = train.data.max_patch_num
    found = (Workload(tiles=tiles + (tiles > 1), text_tokens=600, steps=8),) * 2
    folder = Path(train.data.train_json_file)
    if folder.is_dir():
        prm = load_shapes(train.model.reward_model)
        format = InputFormat(tiles, prm.tile_size, prm.tokens_per_tile)
        shards = ShardFolder(shards_at(folder, "training"))
        found = workloads_of(shards, load_tokenizer(train.model.reward_model), format)
    given = {
        name: value for name in Workload._fields if (value := getattr(config, name)) is not None
    }
    largest, mean = (work._replace(**given) for work in found)
    return largest, mean


def main(argv: list[str] | None = None) -> None:
    train, config = parse_with_train_config(
        (PlanConfig,), argv, "Plan a training run: memory, time, remedies."
    )
    model = train.model.reward_model
    try:
        folder = fetch_model(model)  # once, for it is read for every setting that is counted
    except InputError as error:
        raise InputError(
            f"{error}; a model that is yet to be trained is planned as the one that it starts "
            "from, as --reward_model OpenGVLab/InternVL3-1B-hf"
        ) from error
    train = train.with_flags({"reward_model": str(folder)})
    print(f"{model}: {Plan(train, config, *workloads(train, config)).text()}")


if __name__ == "__main__":
    run(main)
