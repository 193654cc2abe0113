"""One training run, from shards to an export: folder, data, resume, metrics, checkpoints."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dreamprm_dist import distributed
from dreamprm_dist.data.held_out import RowSubset, hold_out
from dreamprm_dist.data.joined import JoinedRows
from dreamprm_dist.data.sampler import check_every_shard_learns, check_ranks
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.files import whole_folder, whole_lines
from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.losses import LowerLossConfig
from dreamprm_dist.prm.batch import Batch, InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import load_prm, load_tokenizer
from dreamprm_dist.prm.model_folder import EXPORT
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.base import Reweighter, ReweighterContext
from dreamprm_dist.training.announce import end_text, setting_of, start_text, time_text
from dreamprm_dist.training.checkpoint import load_checkpoint, save_checkpoint
from dreamprm_dist.training.config import TrainConfig, save_config
from dreamprm_dist.training.engine import Engine
from dreamprm_dist.training.export import export_losses, export_prm, export_weights
from dreamprm_dist.training.full_pass import instance_losses_now, mean_loss, raw_weights_now
from dreamprm_dist.training.given_weights import given_weights
from dreamprm_dist.training.loader import RankBatches
from dreamprm_dist.training.metrics import MetricsWriter, peak_memory_bytes, truncate
from dreamprm_dist.training.model_card import ModelCard, data_set_counts, origin
from dreamprm_dist.training.preemption import StopRequest
from dreamprm_dist.training.resume import checkpoint_to_resume, fit_to_ranks, run_settings
from dreamprm_dist.training.trackers import Trackers
from dreamprm_dist.training.trainer import BilevelTrainer, Iteration

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LOWER, UPPER = 0, 1  # the data streams' levels
TIMED = 10  # iterations after which the time of the others is known


class TrainingRun:
    """A run in its folder.

    Args:
        config: of the run.
        train_shards: training data.
        meta_shards: clean data of the upper level; None where `config.reads_meta` is false.
        device: from `distributed.initialize`.

    Attributes:
        trainer: the algorithm, with engine and reweighter.
        lower_batches, meta_batches: this rank's part of every global batch; `meta_batches` is
            None where no weights are learned.
        validation_batches: the meta questions that are only measured on, if any.

    Raises:
        InputError: configuration, data and world size do not go together.
    """

    def __init__(
        self,
        config: TrainConfig,
        train_shards: ShardFolder,
        meta_shards: ShardFolder | None,
        device: torch.device,
    ):
        self.train_shards, self.meta_shards = train_shards, meta_shards
        self.folder = Path(config.run.weights_path)
        self.settings = run_settings(config, train_shards, meta_shards)
        self.checkpoint = checkpoint_to_resume(config, self.settings, self.folder / METRICS)
        if self.checkpoint:
            config = fit_to_ranks(config, self.checkpoint, train_shards, meta_shards)
        else:
            folders = filter(None, (train_shards, meta_shards))
            check_ranks({f.path: f.num_shards for f in folders}, distributed.world_size())
        self.config, self.device = config, device
        torch.manual_seed(config.run.seed)
        weights = given_weights(config.reweighter, train_shards)

        prm = load_prm(config.model.reward_model, config.model.precision, device)
        self.tokenizer = load_tokenizer(config.model.reward_model)
        self.origin = origin(config.model.reward_model)
        prm.freeze(config.model.freeze_vision_tower, config.model.freeze_language_model)
        if config.model.gradient_checkpointing:
            prm.checkpoint_activations()
        self.format = InputFormat(
            max_tiles=config.data.max_patch_num,
            tile_size=prm.tile_size,
            tokens_per_tile=prm.tokens_per_tile,
            max_length=prm.max_length,
            label_context=config.data.label_context,
            tile_dtype=prm.model.dtype,
        )

        lower, upper = config.lower, config.upper
        estimator = config.hypergradient.estimator
        ghost = Ghost(prm) if config.learns and estimator.in_lower_step else None
        self.meta_batches = self.validation_batches = None
        meta: ShardFolder | RowSubset | None = meta_shards
        if meta_shards and (fraction := config.data.meta_validation_fraction):
            meta, held_out = hold_out(meta_shards, fraction, config.run.seed)
            self.validation_batches = self._batches(held_out, UPPER, upper.meta_batch_size, 1)
        trained: ShardFolder | JoinedRows = train_shards
        if meta and (labels := config.data.train_on_meta) != "none":
            trained = JoinedRows(train_shards, meta, labels)
        self.lower_batches = self._batches(
            trained,
            LOWER,
            lower.batch_size,
            lower.gradient_accumulation,
            share_tiles=ghost is None,
            labels=config.lower_loss,
        )
        if meta and config.learns:
            self.meta_batches = self._batches(
                meta,
                UPPER,
                upper.meta_batch_size,
                upper.meta_gradient_accumulation,
                by_question=upper.group_meta_by_question,
            )
            if upper.unroll_window == "last":
                size = self.lower_batches.global_batch_size
                check_every_shard_learns(
                    train_shards.path, train_shards.num_shards, size, upper.unroll_steps
                )
            if config.model.precision == "bf16" and not estimator.exact_in_bf16:
                logger.warning(
                    "%s in bf16 has an error of tens of percent, for its step vanishes in the "
                    "rounding of the parameters; use ghost or jvp, or precision fp32",
                    config.hypergradient.hypergradient,
                )
        for batches in filter(None, (self.lower_batches, self.meta_batches)):
            batches.check_size()
        streams = filter(None, (self.lower_batches, self.meta_batches, self.validation_batches))
        if not any(batches.num_images for batches in streams):
            prm.see_no_images()
        engine = Engine(prm, config, config.run.iteration_num * upper.unroll_steps, device)
        label_ids = label_token_ids(self.tokenizer)
        context = ReweighterContext(
            rows_per_shard=train_shards.rows_per_shard,
            read_datasets=lambda shard: train_shards.read_column(shard, "dataset"),
            num_steps=config.run.iteration_num,
            device=device,
            hidden_size=prm.hidden_size,
            label_ids=label_ids,
            seed=config.run.seed,
            given_weights=weights,
        )
        make = REWEIGHTERS[config.reweighter.reweighter]
        reweighter: Reweighter = make(config.reweighter, config.meta_optimizer, context)
        self.trainer = BilevelTrainer(engine, reweighter, config, label_ids, ghost)
        self._warned_of_negative_weights = False
        setting = setting_of(prm, config, device, distributed.world_size())
        rows = self.lower_batches.shards.num_rows
        logger.info(start_text(config, train_shards, meta_shards, rows, setting))

    def _batches(
        self,
        shards: ShardFolder | RowSubset | JoinedRows,
        level: int,
        batch_size: int,
        accumulation: int,
        *,
        by_question: bool = False,
        share_tiles: bool = True,
        labels: LowerLossConfig | None = None,
    ) -> RankBatches:
        world_size = distributed.world_size()
        global_batch_size = batch_size * accumulation * world_size
        batches = RankBatches(
            shards=shards,
            tokenizer=self.tokenizer,
            format=self.format,
            global_batch_size=global_batch_size,
            micro_batch_size=batch_size,
            seed=self.config.run.seed,
            level=level,
            rank=distributed.rank(),
            world_size=world_size,
            by_question=by_question,
            share_tiles=share_tiles,
            labels=labels,
        )
        batches.check_rows(self.device)
        return batches

    def data(self, done: int = 0) -> Iterator[tuple[list[list[Batch]], list[Batch]]]:
        """For each iteration after `done`, the lower batches of its unroll and its meta batch."""
        run, steps = self.config.run, self.config.upper.unroll_steps
        left = run.iteration_num - done
        lower = self._stream(self.lower_batches, done * steps, left * steps)
        meta = self._stream(self.meta_batches, done, left) if self.meta_batches else None
        return ((list(islice(lower, steps)), next(meta) if meta else []) for _ in range(left))

    def _stream(self, batches: RankBatches, first: int, count: int) -> Iterator[list[Batch]]:
        return batches.stream(first, count, self.config.data.num_workers, self.device)

    def train(self) -> None:
        """All iterations that are left, with checkpoints, and an export at the end.

        After one of `STOP_SIGNALS` to any rank it ends early, with a checkpoint to go on from.
        """
        run, is_main = self.config.run, distributed.rank() == 0
        done = self.checkpoint.iteration if self.checkpoint else 0
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.folder / "config.yaml")
            if (self.folder / METRICS).exists():
                truncate(self.folder / METRICS, done)
        settings = self.config.as_dict()
        trackers = Trackers(run.trackers, self.folder, settings) if is_main else None
        writer = MetricsWriter(self.folder / METRICS, trackers)
        trainer, data = self.trainer, self.data(done)
        if self.checkpoint:  # after the streams, whose workers' seeds are drawn from the RNG
            load_checkpoint(self.checkpoint, trainer.engine, trainer.reweighter)
        progress = tqdm(
            range(done + 1, run.iteration_num + 1),
            desc=self.config.kind,
            disable=not is_main,
            initial=done,
            total=run.iteration_num,
        )
        logged, stopping = done, False
        timed = done + 1  # the first iteration warms up
        written: dict[str, float] = {}
        with StopRequest(self.device) as stop:
            for iteration in progress:
                with trainer.phases("data"):
                    window, meta = next(data)
                seen = trainer.iteration(window, meta)
                is_last = iteration == run.iteration_num
                stopping = stop.noted() and not is_last
                saving = iteration % run.save_every_iterations == 0 or is_last or stopping
                validation = self._validate() if saving else {}
                written |= validation
                if iteration % run.log_every == 0 or validation or is_last:
                    metrics = self.metrics(iteration, seen, iteration - logged)
                    logged = iteration
                    writer.write(metrics | written)
                    written = {}
                    shown = (k for k in ("lower_loss", "meta_loss") if k in metrics)
                    progress.set_postfix({k: f"{metrics[k]:.3f}" for k in shown})
                trainer.skipped_steps.end_iteration(iteration)
                if saving:
                    written |= self._save(iteration, validation)
                if stopping:
                    break
                if iteration == timed:
                    start = time.perf_counter()
                elif iteration == timed + TIMED and is_main and not is_last:
                    seconds = (time.perf_counter() - start) / TIMED
                    progress.write(time_text(seconds, run.iteration_num - iteration), sys.stderr)
        progress.close()
        writer.close()
        if stopping:
            logger.info(
                "stopped by a signal; saved at iteration %d: start the same command again to go on",
                iteration,
            )
        else:
            self.export()
            logger.info(end_text(self.folder))

    def _validate(self) -> dict[str, float]:
        """The meta loss of the questions that are held out of the meta set, if any are."""
        if self.validation_batches is None:
            return {}
        batches = self._every_row(self.validation_batches, "validation")
        trainer = self.trainer
        loss = mean_loss(trainer.engine.module, batches, trainer.meta_losses, self.device)
        return {"meta_validation_loss": loss}

    def _save(self, iteration: int, validation: dict[str, float]) -> dict[str, float]:
        """A checkpoint; returns what it took, for `metrics.jsonl`."""
        start = time.perf_counter()
        size = save_checkpoint(
            self.folder,
            {
                "iteration": iteration,
                "settings": self.settings,
                "global_batch_sizes": self.config.global_batch_sizes(distributed.world_size()),
                **validation,
            },
            self.trainer.engine,
            self.trainer.reweighter,
            keep_last=self.config.run.keep_last,
            keep_best=self.config.run.keep_best,
        )
        return {"seconds_checkpoint": time.perf_counter() - start, "checkpoint_bytes": size}

    def _every_row(self, batches: RankBatches, description: str) -> Iterable[Batch]:
        rows = batches.every_row(self.config.data.num_workers, self.device)
        return tqdm(rows, description, disable=distributed.rank() != 0, leave=False)

    def metrics(self, iteration: int, seen: Iteration, since: int = 1) -> dict[str, float]:
        """Global means from what each rank saw, by the names of `metrics.FIELDS`.

        Args:
            since: iterations since the last call, which the seconds add up over.
        """
        lower, upper = seen.lower, seen.upper
        sums = [lower.losses.sum(), (lower.weights * lower.losses).sum()]
        if upper:
            sums += [upper.meta_losses.sum(), upper.squared_norm]
            sums += [torch.ones_like(upper.meta_losses).sum()]
        totals = distributed.all_reduce_sum(torch.stack([s.double() for s in sums])).tolist()
        size = self.lower_batches.global_batch_size
        instances = size * self.config.upper.unroll_steps
        metrics = {
            "iteration": iteration,
            "epoch": iteration * instances / self.lower_batches.shards.num_rows,
            "lower_loss": totals[0] / size,
            "weighted_loss": totals[1] / size,
            "lr": lower.lr,
            "gradient_norm": lower.gradient_norm,
        }
        if upper:
            metrics |= {
                "meta_loss": totals[2] / totals[4],
                "meta_lr": upper.lr,
                "meta_gradient_norm": float(upper.meta_gradient_norm),
                "hypergradient_norm": math.sqrt(totals[3]),
            }
            statistics = self.trainer.reweighter.statistics()
            metrics |= {f"weight_{k}": v for k, v in statistics.items()}
            self._warn_of_negative_weights(statistics)
        seconds = self.trainer.phases.take()
        peak = torch.tensor([float(peak_memory_bytes(self.device))], device=self.device)
        return metrics | {
            "samples_per_second": instances * since / sum(seconds.values()),
            **seconds,
            "bad_steps": self.trainer.skipped_steps.take(),
            "peak_memory_gib": float(distributed.all_reduce_max(peak)) / 2**30,
        }

    def _warn_of_negative_weights(self, statistics: dict[str, float]) -> None:
        if statistics.get("min", 0) < 0 and not self._warned_of_negative_weights:
            self._warned_of_negative_weights = True
            if distributed.rank() == 0:
                logger.warning(
                    "a weight is negative: the lower level now climbs on its instance; use "
                    "activation_function Project or Clip with weight_min 0 to prevent it"
                )

    def instance_weights(self) -> tuple[Tensor, Tensor] | None:
        """Raw weights and weights of all instances by sample ID, on rank 0 only.

        Weights that the PRM's output decides take a forward pass over the training data.
        """
        reweighter = self.trainer.reweighter
        if reweighter.reads_prm:
            batches = self._every_row(self._weighted_batches(), "weights")
            trainer = self.trainer
            raw = raw_weights_now(trainer.engine.module, reweighter, batches, trainer.lower_losses)
        else:
            raw = reweighter.local_raw_weights()
        return reweighter.gather(raw)

    def _weighted_batches(self) -> RankBatches:
        """Those of the training set alone, whether or not the meta set has joined it."""
        return replace(self.lower_batches, shards=self.train_shards)

    def instance_losses(self) -> Tensor | None:
        """Losses of all instances by sample ID by the present PRM, on rank 0 only.

        A forward pass over the training data.
        """
        batches = self._every_row(self._weighted_batches(), "losses")
        trainer = self.trainer
        prm, partition = trainer.engine.module, trainer.reweighter.partition
        losses = instance_losses_now(prm, partition, batches, trainer.lower_losses, self.device)
        return partition.gather(losses)

    def _card(self) -> ModelCard:
        read = {"training": self.train_shards, "meta": self.meta_shards}
        counts = {
            kind: data_set_counts(
                name for s in range(shards.num_shards) for name in shards.read_column(s, "dataset")
            )
            for kind, shards in read.items()
            if shards is not None
        }
        metrics = json.loads(whole_lines(self.folder / METRICS)[-1])
        return ModelCard.of_run(self.config.as_dict(), metrics, self.origin, counts)

    def export(self) -> None:
        """Write `export/`: the PRM as a Hugging Face folder, and what is known of all instances.

        That is their weights, where any were learned, and their losses, where they are asked for.
        """
        weights = self.instance_weights() if self.config.learns else None
        losses = self.instance_losses() if self.config.run.export_losses else None
        if distributed.rank() == 0:
            with whole_folder(self.folder / EXPORT) as folder:
                export_prm(folder, self.trainer.engine.module, self.tokenizer, self._card())
                if weights is not None:
                    export_weights(folder, self.train_shards, *weights)
                if losses is not None:
                    export_losses(folder, self.train_shards, losses)
        distributed.barrier()
