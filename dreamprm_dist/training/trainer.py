"""Bi-level training: lower steps on weighted data, then one upper step on the weights.

Lower level: theta minimises (1/N) sum_i w_i l_i(theta). Upper level: the weights minimise the meta
loss at the resulting theta. After an unroll of lower steps to theta',

    v = grad_theta L_meta(theta'),    dL/dw_i = -(1/G) <grad l_i(theta'), v>,

the one-step hypergradient of DARTS (arXiv:1806.09055) without the factor lr, for the G instances of
the last lower batch. With `unroll_window: all` each lower batch receives it, at the parameters
right after its own step and with v taken there, from one meta batch for the whole unroll. With
`rollback` the unroll is then undone and taken again with the new weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from dreamprm_dist import distributed
from dreamprm_dist.data.held_out import RowSubset, hold_out
from dreamprm_dist.data.sampler import check_divisible, check_every_shard_learns
from dreamprm_dist.data.shards import ShardFolder
from dreamprm_dist.files import whole_folder
from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.losses import Observation, instance_losses, meta_losses
from dreamprm_dist.prm.batch import Batch, InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import StepOutput, load_prm, load_tokenizer
from dreamprm_dist.reweighters import REWEIGHTERS
from dreamprm_dist.reweighters.base import Surroundings
from dreamprm_dist.training.checkpoint import load_checkpoint, save_checkpoint
from dreamprm_dist.training.config import TrainConfig, save_config
from dreamprm_dist.training.engine import Engine, LowerStep
from dreamprm_dist.training.export import export_prm, export_weights
from dreamprm_dist.training.full_pass import mean_loss, raw_weights_now
from dreamprm_dist.training.loader import RankBatches
from dreamprm_dist.training.metrics import MetricsWriter, Phases, peak_memory_bytes, truncate
from dreamprm_dist.training.preemption import StopRequest
from dreamprm_dist.training.resume import checkpoint_to_resume, fit_to_ranks, run_settings
from dreamprm_dist.training.skipped_steps import SkippedSteps
from dreamprm_dist.training.trackers import Trackers

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LOWER, UPPER = 0, 1  # the data streams' levels


class BilevelTrainer:
    """One run, from shards to an export.

    Args:
        config: what the run is.
        train_shards: training data.
        meta_shards: clean data of the upper level; None for unweighted fine-tuning.
        device: from `distributed.initialize`.

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
        self.run_folder = Path(config.run.weights_path)
        self.settings = run_settings(config, train_shards, meta_shards)
        self.checkpoint = checkpoint_to_resume(config, self.settings, self.run_folder / METRICS)
        if self.checkpoint:
            config = fit_to_ranks(config, self.checkpoint, train_shards, meta_shards)
        self.config, self.device = config, device
        torch.manual_seed(config.run.seed)

        prm = load_prm(config.model.reward_model, config.model.precision, device)
        self.tokenizer = load_tokenizer(config.model.reward_model)
        self.label_ids = label_token_ids(self.tokenizer)
        prm.freeze(config.model.freeze_vision_tower, config.model.freeze_language_model)
        if config.model.gradient_checkpointing:
            prm.checkpoint_activations()
        self.format = InputFormat(
            config.data.max_patch_num,
            prm.tile_size,
            prm.tokens_per_tile,
            prm.max_length,
            config.data.label_context,
        )

        lower, upper = config.lower, config.upper
        self.train_batches = self._batches(
            train_shards, LOWER, lower.batch_size, lower.gradient_accumulation
        )
        self.estimator = ESTIMATORS[upper.hypergradient]
        self.engine = Engine(
            prm,
            config,
            config.run.iteration_num * upper.unroll_steps,
            device,
            keep_gradients=self.estimator.precondition is not None,
        )
        self.reweighter = self.validation_batches = None
        if not config.unweighted:
            if fraction := config.data.meta_validation_fraction:
                meta_shards, held_out = hold_out(meta_shards, fraction, config.run.seed)
                self.validation_batches = self._batches(held_out, UPPER, upper.meta_batch_size, 1)
            self.meta_batches = self._batches(
                meta_shards,
                UPPER,
                upper.meta_batch_size,
                upper.meta_gradient_accumulation,
                upper.group_meta_by_question,
            )
            self.reweighter = REWEIGHTERS[upper.reweighter](
                upper,
                Surroundings(
                    train_shards.rows_per_shard,
                    lambda shard: train_shards.read_column(shard, "dataset"),
                    config.run.iteration_num,
                    device,
                    prm.model.config.text_config.hidden_size,
                    self.label_ids,
                    config.run.seed,
                ),
            )
            if self.reweighter.learns and upper.unroll_window == "last":
                size = self.train_batches.global_batch_size
                check_every_shard_learns(
                    train_shards.path, train_shards.num_shards, size, upper.unroll_steps
                )
        self.phases = Phases(device)
        self.skipped_steps = SkippedSteps(config.run.max_bad_steps)

    def _batches(
        self,
        shards: ShardFolder | RowSubset,
        level: int,
        batch_size: int,
        accumulation: int,
        by_question: bool = False,
    ) -> RankBatches:
        world_size = distributed.world_size()
        global_batch_size = batch_size * accumulation * world_size
        check_divisible(shards.path, shards.num_shards, global_batch_size, world_size)
        batches = RankBatches(
            shards,
            self.tokenizer,
            self.format,
            global_batch_size,
            batch_size,
            self.config.run.seed,
            level,
            distributed.rank(),
            world_size,
            by_question,
        )
        batches.check_lengths()
        return batches

    def train(self) -> None:
        """All iterations that are left, with checkpoints, and an export at the end.

        After SIGTERM or SIGUSR1 to any rank the run ends early, with a checkpoint to go on from.
        """
        run, is_main = self.config.run, distributed.rank() == 0
        done = self.checkpoint.iteration if self.checkpoint else 0
        if is_main:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.run_folder / "config.yaml")
            if (self.run_folder / METRICS).exists():
                truncate(self.run_folder / METRICS, done)
        settings = self.config.as_dict()
        trackers = Trackers(run.trackers, self.run_folder, settings) if is_main else None
        writer = MetricsWriter(self.run_folder / METRICS, trackers)
        unroll_steps = self.config.upper.unroll_steps
        lower_stream = self._stream(
            self.train_batches, run.iteration_num * unroll_steps, done * unroll_steps
        )
        meta_stream = (
            None
            if self.config.unweighted
            else self._stream(self.meta_batches, run.iteration_num, done)
        )
        if self.checkpoint:  # after the streams, whose workers' seeds are drawn from the RNG
            load_checkpoint(self.checkpoint, self.engine, self.reweighter)
        progress = tqdm(
            range(done + 1, run.iteration_num + 1),
            desc=self._label(),
            disable=not is_main,
            initial=done,
            total=run.iteration_num,
        )
        logged, stopping, written = done, False, {}
        with StopRequest(self.device) as stop:
            for iteration in progress:
                values = self.iteration(lower_stream, meta_stream)
                is_last = iteration == run.iteration_num
                stopping = stop.noted() and not is_last
                saving = iteration % run.save_every_iterations == 0 or is_last or stopping
                validation = self._validate() if saving else {}
                written |= validation
                if iteration % run.log_every == 0 or validation or is_last:
                    metrics = self._metrics(iteration, values, iteration - logged)
                    logged = iteration
                    writer.write(metrics | written)
                    written = {}
                    shown = (k for k in ("lower_loss", "meta_loss") if k in metrics)
                    progress.set_postfix({k: f"{metrics[k]:.3f}" for k in shown})
                self.skipped_steps.end_iteration(iteration)
                if saving:
                    written |= self._save(iteration, validation)
                if stopping:
                    break
        progress.close()
        writer.close()
        if stopping:
            logger.info("stopped by a signal; saved at iteration %d", iteration)
        else:
            self.export()

    def _validate(self) -> dict[str, float]:
        """The meta loss of the questions that are held out of the meta set, if any are."""
        if self.validation_batches is None:
            return {}
        batches = self._every_row(self.validation_batches, "validation")
        loss = mean_loss(self.engine.module, batches, self._meta_losses, self.device)
        return {"meta_validation_loss": loss}

    def _save(self, iteration: int, validation: dict[str, float]) -> dict[str, float]:
        """A checkpoint; returns what it took, for `metrics.jsonl`."""
        start = time.perf_counter()
        size = save_checkpoint(
            self.run_folder,
            {
                "iteration": iteration,
                "settings": self.settings,
                "global_batch_sizes": self.config.global_batch_sizes(distributed.world_size()),
                **validation,
            },
            self.engine,
            self.reweighter,
            self.config.run.keep_last,
            self.config.run.keep_best,
        )
        return {"seconds_checkpoint": time.perf_counter() - start, "checkpoint_bytes": size}

    def iteration(
        self, lower_stream: Iterator[list[Batch]], meta_stream: Iterator[list[Batch]] | None
    ) -> dict[str, Tensor | float]:
        """One outer iteration; returns what this rank saw of it."""
        upper = self.config.upper
        with self.phases("data"):
            window = [self._to_device(next(lower_stream)) for _ in range(upper.unroll_steps)]
            meta = None if meta_stream is None else self._to_device(next(meta_stream))
        if meta is None:
            for micro_batches in window:
                values = self._lower_step(micro_batches)
            return values

        before = self.engine.snapshot() if upper.rollback else None
        for position, micro_batches in enumerate(window, start=1):
            values = self._lower_step(micro_batches)
            if position == len(window) or upper.unroll_window == "all":
                values |= self._hypergradient(micro_batches, meta)
        values["meta_lr"] = self.reweighter.lr
        with self.phases("upper"):
            values["hypergradient_squared_norm"] = squared_norm = self.reweighter.step()
        self.skipped_steps.note(bool(squared_norm.isnan()))
        if before is not None:
            self.engine.restore(before)
            for micro_batches in window:
                values |= self._lower_step(micro_batches)
        return values

    def _to_device(self, micro_batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.device) for batch in micro_batches]

    def _lower_step(self, micro_batches: list[Batch]) -> dict[str, LowerStep | float]:
        lr = self.engine.lr
        with self.phases("lower"):
            step = self.engine.lower_step(micro_batches, self._weigh)
        self.skipped_steps.note(not step.applied)
        return {"lr": lr, "lower": step}

    def _hypergradient(
        self, micro_batches: list[Batch], meta_micro_batches: list[Batch]
    ) -> dict[str, Tensor | float]:
        """Add the hypergradient of one lower batch at the present parameters."""
        with self.phases("meta"):
            v, losses = self.engine.meta_gradient(meta_micro_batches, self._meta_losses)
            norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in v.values()]
            if self.estimator.precondition:
                v = self.engine.precondition(v, self.estimator.precondition)
        if self.reweighter.learns:
            with self.phases("hypergradient"):
                for batch in micro_batches:
                    self.reweighter.add_hypergradient(
                        batch, *self._estimate(batch, v), self.train_batches.global_batch_size
                    )
        return {"meta_losses": losses, "meta_gradient_norm": float(torch.stack(norms).norm())}

    def _weigh(self, output: StepOutput, losses: Tensor, batch: Batch) -> Tensor:
        if self.config.unweighted:
            return torch.ones(len(batch), device=self.device)
        return self.reweighter.weights(batch, self.reweighter.features(output, losses, batch))

    def _meta_losses(self, output: StepOutput, batch: Batch) -> Tensor:
        upper = self.config.upper
        return meta_losses(
            output.logits,
            batch.step_rows,
            batch.true_false,
            self.label_ids,
            upper.aggregation_function,
            upper.loss_target,
            upper.score_over,
            error=upper.meta_error,
        )

    def _estimate(self, batch: Batch, v: Mapping[str, Tensor]) -> tuple[Observation, Observation]:
        """What the upper level sees of a micro-batch, and its derivative along v."""
        module = self.engine.module

        def observe(parameters: Mapping[str, Tensor]) -> Observation:
            output = functional_call(module, dict(parameters), (batch,))
            losses = instance_losses(output.logits, batch.step_targets, batch.step_rows, len(batch))
            return Observation(losses, self.reweighter.features(output, losses, batch))

        mode = module.forward_mode() if self.estimator.forward_mode else contextlib.nullcontext()
        with mode:
            return self.estimator.function(observe, self.engine.parameters, v)

    def _stream(self, batches: RankBatches, end: int, first: int = 0) -> Iterator[list[Batch]]:
        return batches.stream(first, end - first, self.config.data.num_workers, self.device)

    def _every_row(self, batches: RankBatches, description: str) -> Iterable[Batch]:
        rows = batches.every_row(self.config.data.num_workers, self.device)
        return tqdm(rows, description, disable=distributed.rank() != 0, leave=False)

    def _label(self) -> str:
        run = self.config.run
        return "cold start" if run.retrain else "baseline" if run.baseline else "bi-level"

    def _metrics(self, iteration: int, values: dict, since: int = 1) -> dict[str, float]:
        """Global means from what each rank saw, by the names of `metrics.FIELDS`.

        Args:
            since: iterations since the last call, which the seconds add up over.
        """
        lower: LowerStep = values["lower"]
        sums = [lower.losses.sum(), (lower.weights * lower.losses).sum()]
        if "meta_losses" in values:
            meta_losses = values["meta_losses"]
            sums += [meta_losses.sum(), values["hypergradient_squared_norm"]]
            sums += [torch.ones_like(meta_losses).sum()]
        totals = distributed.all_reduce_sum(torch.stack([s.double() for s in sums])).tolist()
        size = self.train_batches.global_batch_size
        instances = size * self.config.upper.unroll_steps
        metrics = {
            "iteration": iteration,
            "epoch": iteration * instances / self.train_shards.num_rows,
            "lower_loss": totals[0] / size,
            "weighted_loss": totals[1] / size,
            "lr": values["lr"],
            "gradient_norm": lower.gradient_norm,
        }
        if "meta_losses" in values:
            metrics |= {
                "meta_loss": totals[2] / totals[4],
                "meta_lr": values["meta_lr"],
                "meta_gradient_norm": values["meta_gradient_norm"],
                "hypergradient_norm": math.sqrt(totals[3]),
            }
            metrics |= {f"weight_{k}": v for k, v in self.reweighter.statistics().items()}
        seconds = self.phases.take()
        peak = torch.tensor([float(peak_memory_bytes(self.device))], device=self.device)
        return metrics | {
            "samples_per_second": instances * since / sum(seconds.values()),
            **seconds,
            "bad_steps": self.skipped_steps.take(),
            "peak_memory_gib": float(distributed.all_reduce_max(peak)) / 2**30,
        }

    def instance_weights(self) -> tuple[Tensor, Tensor] | None:
        """Raw weights and weights of all instances by sample ID, on rank 0 only.

        Weights that the PRM's output decides take a forward pass over the training data.
        """
        reweighter = self.reweighter
        if reweighter.reads_prm:
            batches = self._every_row(self.train_batches, "weights")
            raw = raw_weights_now(self.engine.module, reweighter, batches)
        else:
            raw = reweighter.local_raw_weights()
        return reweighter.gather(raw)

    def export(self) -> None:
        """Write `export/`: the PRM as a Hugging Face folder, and the weights of all instances."""
        weights = None if self.config.unweighted else self.instance_weights()
        if distributed.rank() == 0:
            with whole_folder(self.run_folder / "export") as folder:
                export_prm(folder, self.engine.module, self.tokenizer, self.config)
                if weights is not None:
                    export_weights(folder, self.train_shards, *weights)
        distributed.barrier()
