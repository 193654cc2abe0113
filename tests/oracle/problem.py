"""A PRM, its two batches and v, and what estimators and plain autograd make of them."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from gradient_dot import gradient_dot
from reweighting import rank_batches
from torch import Tensor
from torch.func import functional_call

from dreamprm_dist.hypergradient import ESTIMATORS
from dreamprm_dist.hypergradient.ghost import Ghost
from dreamprm_dist.losses import (
    LowerLossConfig,
    MetaLossConfig,
    Observation,
    instance_losses,
    meta_losses,
)
from dreamprm_dist.prm.batch import Batch, InputFormat
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import PRM
from dreamprm_dist.reweighters.base import Reweighter
from dreamprm_dist.training.loader import RankBatches

SIZE = 6
# A central difference errs by the square of its step times third derivatives, which are large in a
# random network: 0.5 % at the default step of length 0.01, so 5e-7 at 1e-4.
RADIUS = 1e-4


class Problem:
    """A PRM with a window of two lower batches and a meta batch, and v at its parameters.

    Estimates are of the batch that is `lower`, at first the window's first.
    """

    def __init__(self, prm: PRM, tokenizer, shards: Path):
        self.prm, self.lower_loss = prm.train(), LowerLossConfig()
        self.format = InputFormat(6, prm.tile_size, prm.tokens_per_tile)
        lower = self._batches(tokenizer, shards / "train", 0, share_tiles=False)
        self.window = [lower[step][0] for step in range(2)]
        self.lower = self.window[0]
        self.meta = self._batches(tokenizer, shards / "meta", 1)[0][0]
        self.label_ids = label_token_ids(tokenizer)
        self.parameters = {n: p for n, p in prm.named_parameters() if p.requires_grad}
        loss = meta_losses(
            prm(self.meta).logits,
            self.meta.step_rows,
            self.meta.true_false.to(next(prm.parameters()).dtype),
            self.label_ids,
            MetaLossConfig(),
        ).mean()
        gradients = torch.autograd.grad(
            loss, list(self.parameters.values()), materialize_grads=True
        )
        self.v = dict(zip(self.parameters, gradients, strict=True))

    def _batches(self, tokenizer, folder: Path, level: int, **settings) -> RankBatches:
        return rank_batches(folder, tokenizer, self.format, SIZE, level, **settings)

    def train_only(self, names: set[str]) -> None:
        """Freeze all but some parameters."""
        for name, p in self.parameters.items():
            p.requires_grad_(name in names)
        self.parameters = {n: p for n, p in self.parameters.items() if n in names}
        self.v = {n: self.v[n] for n in self.parameters}

    def observe(self, run: Callable, reweighter: Reweighter | None = None) -> Observation:
        """The upper level's view of the lower batch; `run` is the PRM, at some parameters."""
        batch = self.lower
        output = run(batch)
        losses = instance_losses(output.logits, batch, self.lower_loss, self.label_ids)
        if reweighter is None:
            return Observation(losses, losses.new_zeros(0, 0))
        return Observation(losses, reweighter.features(output, losses, batch))

    def losses(self) -> Tensor:
        return self.observe(self.prm).losses

    def products(self, v: dict[str, Tensor] | None = None) -> Tensor:
        """<grad l_i, v> by one backward pass for each instance."""
        return gradient_dot(self.losses(), self.parameters, self.v if v is None else v)

    def estimate(
        self,
        name: str,
        reweighter: Reweighter | None = None,
        v: dict[str, Tensor] | None = None,
        radius: float = RADIUS,
    ) -> tuple[Observation, Observation]:
        """Values and derivatives of an estimator along v."""
        v, estimator = self.v if v is None else v, ESTIMATORS[name]
        if estimator.function is None:
            return self.go_back(v, reweighter=reweighter)
        settings = {"radius": radius} if name == "finite_difference" else {}

        def observe(parameters: dict[str, Tensor]) -> Observation:
            def run(batch: Batch):
                return functional_call(self.prm, parameters, (batch,), tie_weights=False)

            return self.observe(run, reweighter)

        with self.prm.forward_mode() if estimator.forward_mode else contextlib.nullcontext():
            return estimator.function(observe, *self.prm.by_use(self.parameters, v), **settings)

    def go_back(
        self,
        v: dict[str, Tensor],
        weights: Tensor | None = None,
        reweighter: Reweighter | None = None,
        ghost: Ghost | None = None,
    ) -> tuple[Observation, Observation]:
        """A tapped pass of weights (B,): as `estimate`; `grad` holds half the mean's gradient."""
        for p in self.parameters.values():
            p.grad = None
        with (ghost or Ghost(self.prm)).tapping(self.lower, v) as tapped:
            values = self.observe(self.prm, reweighter)
            weights = torch.ones_like(values.losses) if weights is None else weights
            # Halved as by two accumulation steps.
            (tapped.weigh_in_backward(values.losses, weights).mean() / 2).backward()
        derivatives = Observation(tapped.products, torch.zeros_like(values.features))
        return Observation(*(value.detach() for value in values)), derivatives


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
