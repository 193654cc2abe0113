"""Reweighters whose few parameters every rank holds, with their hypergradient all-reduced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import AdamW

from dreamprm_dist import distributed
from dreamprm_dist.losses import Observation
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.reweighters.base import Reweighter, weight_statistics


class ReplicatedReweighter(Reweighter):
    """A module of parameters, the same on every rank for ever.

    The hypergradient is summed over the ranks (each holds its part of 1/G) once per upper step, so
    that equal replicas take equal steps.
    """

    def _learn(self, module: nn.Module) -> None:
        # Only the hypergradient differentiates the parameters: a lower step whose weights depend
        # on the PRM goes back through the module and must leave nothing in it.
        self.module = module.requires_grad_(False)
        config = self.optimizer_config
        self._learn_by(
            AdamW(
                module.parameters(),
                lr=config.meta_lr,
                betas=(config.meta_momentum, 0.999),
                weight_decay=config.meta_weight_decay,
            )
        )
        self._seen: list[Tensor] = []

    def weights(self, batch: Batch, features: Tensor) -> Tensor:
        weights = super().weights(batch, features)
        self._seen.append(weights.detach()[batch.weighted])
        return weights

    def add_hypergradient(
        self, batch: Batch, values: Observation, derivatives: Observation, size: int
    ) -> None:
        self.module.requires_grad_(True)
        with torch.enable_grad(), forward_ad.dual_level():
            features = values.features
            if self.differentiate_weights:
                features = forward_ad.make_dual(features, derivatives.features)
            dual = forward_ad.unpack_dual(self.activate(self.raw_weights_of(batch, features)))
            terms = dual.primal * derivatives.losses
            if dual.tangent is not None:
                terms = terms + dual.tangent * values.losses
            (-terms[batch.weighted].sum() / size).backward()
        self.module.requires_grad_(False)

    def hypergradient(self) -> Tensor:
        """The hypergradient that the next step applies, flat, before clipping.

        A collective: call it on every rank.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return distributed.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))

    def forget(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> Tensor:
        if all(p.grad is None for p in self.module.parameters()):
            return torch.tensor(torch.nan, device=self.device)
        total = self.hypergradient()
        squared_norm = total.square().sum()
        if not squared_norm.isfinite():
            self.forget()
            return squared_norm * torch.nan
        total = total * self._clipping_factor(squared_norm)
        parameters = list(self.module.parameters())
        for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        self._optimizer.step()
        self._schedule.step()
        self.forget()
        return squared_norm / distributed.world_size()

    def statistics(self) -> dict[str, float]:
        """Those of the instances drawn since the last call.

        Raises:
            RuntimeError: the replicas are no longer bit-equal.
        """
        flat = torch.cat([p.detach().flatten() for p in self.module.parameters()])
        highest, lowest = distributed.all_reduce_max(torch.stack([flat, -flat]))
        if not torch.equal(highest, -lowest):
            raise RuntimeError("the reweighter's replicas differ between ranks")
        seen, self._seen = torch.cat(self._seen), []
        return weight_statistics(seen)
