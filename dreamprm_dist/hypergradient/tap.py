"""Taps: what a backward pass through a module says of each instance.

The backward pass carries the gradients of the *unweighted* losses. Where it forms the gradients of
a module's parameters, the tap applies the weights and takes the products with v, row by row. So an
instance of weight 0 has its product as any other, and adds exactly 0 to the gradient that trains.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call


class TappedBatch:
    """A micro-batch of B instances on its way forward and back.

    Args:
        rows: by part of the PRM, the instance that each row of its modules' tensors belongs to.
        v: the meta gradient, by name of the parameters that it covers.
    """

    def __init__(self, rows: Mapping[str, Tensor], v: Mapping[str, Tensor]):
        self.rows, self.v = rows, v

    def weigh_in_backward(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The losses (B,) to go back from, which the backward pass multiplies by weights (B,)."""
        self._weights = {part: weights.detach()[rows] for part, rows in self.rows.items()}
        # In float64, for modules' products cancel each other, and these are B numbers.
        self._sums = torch.zeros_like(losses, dtype=torch.float64)
        # Whatever the losses are divided by on the way to what is differentiated.
        losses.register_hook(self._note_scale)
        return losses

    def _note_scale(self, gradient: Tensor) -> None:
        self._scale = gradient

    def add(self, part: str, products: Tensor) -> None:
        """Add products (R,) of a module's rows to those of their instances."""
        self._sums.index_add_(0, self.rows[part], products.to(self._sums.dtype))

    def weighted(self, part: str, rows: Tensor) -> Tensor:
        """Rows (R, …) of a module, each times the weight of its instance."""
        weights = self._weights[part].view(-1, *[1] * (rows.dim() - 1))
        # Rounded once, for a weight is not exact in bf16.
        return torch.mul(rows, weights, out=torch.empty_like(rows))

    @property
    def products(self) -> Tensor:
        """<grad l_i, v> (B,) in float32 or wider, once the backward pass is done."""
        return (self._sums / self._scale).to(self._scale.dtype)


class Original(nn.Module):
    """A module's own forward, whatever stands in its place."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self._forward = module, module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def at(self, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Its output with other values for some of the module's own parameters."""
        named = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(self, named, args, kwargs)


class Tap(ABC):
    """A module that owns trained parameters.

    Args:
        part: of the PRM, in which the module lies; see `PRM.instances_of_rows`.
        names: the parameters' names in the PRM by those in the module.
    """

    def __init__(self, module: nn.Module, part: str, names: Mapping[str, str]):
        self.module, self.part, self.names = module, part, names
        self.original = Original(module)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters that the module owns, by its own names."""
        return {own: getattr(self.module, own) for own in self.names}

    @abstractmethod
    def within(self, batch: TappedBatch) -> contextlib.AbstractContextManager[None]:
        """Tap a forward pass and its backward pass, both within the block."""


class LinearTap(Tap):
    """One that is linear in them, called with one tensor.

    Args:
        affine: its output is not 0 where its parameters are 0.
    """

    def __init__(
        self, module: nn.Module, part: str, names: Mapping[str, str], affine: bool = False
    ):
        super().__init__(module, part, names)
        self._affine = affine

    @contextlib.contextmanager
    def within(self, batch: TappedBatch) -> Iterator[None]:
        module: Any = self.module
        module.forward = lambda x: _AtOutput.apply(self, batch, x, *self.parameters.values())
        try:
            yield
        finally:
            del module.forward

    def backward(
        self, batch: TappedBatch, x: Tensor, gradient: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Gradients by x, unweighted, and by the parameters, weighted; products to the batch.

        Args:
            x: the input.
            gradient: of the unweighted losses by the output.
        """
        parameters = list(self.parameters.values())
        x = x.detach()
        if v := {own: batch.v[name] for own, name in self.names.items() if name in batch.v}:
            batch.add(self.part, row_sums(self.moved(x, v).mul_(gradient)))
        with torch.enable_grad():
            x.requires_grad_(needs_x)
            output = self.original(x)
        by_x = None
        if needs_x:
            (by_x,) = torch.autograd.grad(output, x, gradient, retain_graph=True)
        weighted = batch.weighted(self.part, gradient)
        return by_x, torch.autograd.grad(output, parameters, weighted)

    def moved(self, x: Tensor, v: Mapping[str, Tensor]) -> Tensor:
        """m(x; v) - m(x; 0), with 0 for what v does not cover."""
        zeros = {own: p.new_zeros(()).expand_as(p) for own, p in self.parameters.items()}
        output = self.original.at(zeros | dict(v), x)
        if self._affine:
            output = output - self.original.at(zeros, x)
        module = self.module
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # A row to which autograd gives no gradient.
            output.masked_fill_((x == module.padding_idx)[..., None], 0)
        return output


class DenseTap(LinearTap):
    """A linear layer, in closed form: for others the output is computed once more."""

    def backward(
        self, batch: TappedBatch, x: Tensor, gradient: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        weight: Any = self.module.weight
        by_x = gradient @ weight if needs_x else None
        # What is of the size of the narrower side is multiplied elementwise.
        narrow_input = weight.shape[1] <= weight.shape[0]
        by: dict[str, Tensor] = {}
        if (name := self.names.get("weight")) is not None:
            if (v := batch.v.get(name)) is not None:
                moved, other = (gradient @ v, x) if narrow_input else (x @ v.T, gradient)
                batch.add(self.part, row_sums(moved.mul_(other)))
                del moved
            if narrow_input:
                x = batch.weighted(self.part, x)
            weighted = gradient if narrow_input else batch.weighted(self.part, gradient)
            by["weight"] = weighted.flatten(0, -2).T @ x.flatten(0, -2)
        if (name := self.names.get("bias")) is not None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums = gradient.unsqueeze(1).flatten(1, -2).sum(1, dtype=wide)  # (R, out)
            if (v := batch.v.get(name)) is not None:
                batch.add(self.part, sums @ v.to(wide))
            by["bias"] = batch.weighted(self.part, sums).sum(0).to(gradient.dtype)
        return by_x, [by[own] for own in self.names]


class _AtOutput(torch.autograd.Function):
    """A module's output, and what a `LinearTap` makes of the gradient by it."""

    @staticmethod
    def forward(ctx: Any, tap: LinearTap, batch: TappedBatch, x: Tensor, *_: Tensor) -> Tensor:
        ctx.tap, ctx.batch = tap, batch
        ctx.save_for_backward(x)
        return tap.original(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_parameters = ctx.tap.backward(
            ctx.batch, *ctx.saved_tensors, gradient, ctx.needs_input_grad[2]
        )
        return None, None, by_x, *by_parameters


class RowTap(Tap):
    """One with modules of its own inside, whose own parameters meet rows elementwise.

    Each row is given its own copy, the gradient of which is that of the row: as of the scale of a
    layer, a class token, positions.

    Args:
        dimensions: of the tensors that the parameters meet.
    """

    def __init__(self, module: nn.Module, part: str, names: Mapping[str, str], dimensions: int):
        super().__init__(module, part, names)
        self._dimensions = dimensions

    @contextlib.contextmanager
    def within(self, batch: TappedBatch) -> Iterator[None]:
        # Where they stand and not by `functional_call`: a layer whose activations are checkpointed
        # runs again in the backward pass, and must find them there.
        own: dict[str, Any] = self.module._parameters
        before = self.parameters
        for name, parameter in before.items():
            own[name] = _AtRows.apply(self, batch, name, parameter)
        try:
            yield
        finally:
            own.update(before)

    def rows_of(self, parameter: Tensor, rows: int) -> Tensor:
        """A parameter, or its v, for each of R rows: (R, …)."""
        shape = [1] * (self._dimensions - parameter.dim()) + list(parameter.shape)
        return parameter.reshape(shape).expand(rows, *shape[1:])


class _AtRows(torch.autograd.Function):
    """A parameter for each row, and what a `RowTap` makes of the gradients by them."""

    @staticmethod
    def forward(ctx: Any, tap: RowTap, batch: TappedBatch, own: str, parameter: Tensor) -> Tensor:
        ctx.tap, ctx.batch, ctx.own, ctx.shape = tap, batch, own, parameter.shape
        return tap.rows_of(parameter, len(batch.rows[tap.part]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tap, batch = ctx.tap, ctx.batch
        weighted = batch.weighted(tap.part, gradient).sum(0).view(ctx.shape)
        if (v := batch.v.get(tap.names[ctx.own])) is not None:
            batch.add(tap.part, row_sums(gradient * tap.rows_of(v, 1)))
        return None, None, None, weighted


def row_sums(rows: Tensor) -> Tensor:
    """The sum (R,) of each row of (R, …), in float32 or wider."""
    return rows.flatten(1).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
