"""The ghost dot product: <grad l_i, v> out of the backward pass that trains the PRM.

A module is linear in the parameters that it owns. With its input x, the gradient b of instance i's
loss by its output m(x; theta) and v in place of theta, <dl_i/dtheta, v> = <b, m(x; v) - m(x; 0)>,
taken over the rows that belong to instance i (Wang et al., arXiv:2406.11011; the idea is that of
ghost clipping). Summed over the modules this is <grad l_i, v>: exact, at one more product per
linear layer, with any attention kernel.

What is supposed of a PRM is checked on an example before the run: that each parameter is used by
the module that owns it, and that each class of module is as its tap takes it to be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dreamprm_dist.errors import InputError
from dreamprm_dist.hypergradient.tap import (
    DenseTap,
    LinearTap,
    Original,
    RowTap,
    Tap,
    TappedBatch,
    row_sums,
)
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.model import PRM


class Ghost:
    """The estimator: taps the passes of micro-batches through a PRM.

    Raises:
        InputError: naming a module that is not what a tap takes it for.
    """

    def __init__(self, prm: PRM):
        self._prm, self._taps = prm, find_taps(prm)

    @contextlib.contextmanager
    def tapping(self, batch: Batch, v: Mapping[str, Tensor]) -> Iterator[TappedBatch]:
        """Tap the forward and the backward pass of a micro-batch, both within the block."""
        tapped = TappedBatch(self._prm.instances_of_rows(batch), v)
        with contextlib.ExitStack() as stack:
            for tap in self._taps:
                stack.enter_context(tap.within(tapped))
            yield tapped


class Call(NamedTuple):
    """A module's forward pass."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any


class Watch(TorchFunctionMode):
    """Watches a PRM's forward pass.

    Args:
        recorded: modules whose calls are kept.

    Attributes:
        calls: the last call of each of them.
        rows: of the modules that ran, the first dimension of their output.
        strays: parameters that another module than their owner computed with.
    """

    def __init__(self, prm: PRM, recorded: Iterable[nn.Module]):
        super().__init__()
        self.calls: dict[nn.Module, Call] = {}
        self.rows: dict[nn.Module, int] = {}
        self.strays: set[Tensor] = set()
        self._recorded, self._running = set(recorded), [nn.Module()]
        self._hooks: list[Any] = []
        for module in prm.modules():
            self._hooks += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, with_kwargs=True),
            ]

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._running.pop()
        self.rows[module] = next((len(x) for x in _flat([output]) if isinstance(x, Tensor)), 0)
        if module in self._recorded:
            self.calls[module] = Call(args, kwargs, output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(r, Tensor) for r in _flat([result])):  # and not a shape, or a dtype
            used = _flat([*args, *(kwargs or {}).values()])
            own = set(self._running[-1].parameters(recurse=False))
            self.strays |= {p for p in used if isinstance(p, nn.Parameter)} - own
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@torch.random.fork_rng(devices=[])
@torch.no_grad()
def find_taps(prm: PRM) -> list[Tap]:
    """A tap for each module that owns trained parameters.

    Raises:
        InputError: naming a module that is not what a tap takes it for.
    """
    names = {p: name for name, p in prm.named_parameters() if p.requires_grad}
    owned = {
        path: {own: names[p] for own, p in module.named_parameters(recurse=False) if p in names}
        for path, module in prm.named_modules()
    }
    modules = {path: prm.get_submodule(path) for path, own in owned.items() if own}
    examples = {type(module): module for module in reversed(modules.values())}
    batch = prm.example_batch()
    rows = prm.instances_of_rows(batch)
    with Watch(prm, examples.values()) as watch:
        prm(batch)
    taps: list[Tap] = []
    kinds: dict[type, Callable[..., Tap]] = {}
    for path, module in modules.items():
        try:
            part = next((part for part in rows if f"{path}.".startswith(part)), None)
            if part is None or module not in watch.rows:
                raise InputError("takes no part in scoring an example")
            size = len(rows[part])
            if watch.rows[module] != size:
                raise InputError(f"gives {watch.rows[module]} rows and not {size}")
            for p in module.parameters(recurse=False):
                if p in names and p in watch.strays:
                    raise InputError(f"is not alone in computing with {names[p]}")
            if type(module) not in kinds:
                call = watch.calls[module]
                kinds[type(module)] = kind_of(module, owned[path], call, size)
            taps.append(kinds[type(module)](module, part, owned[path]))
        except InputError as reason:
            raise InputError(
                f"hypergradient ghost: {path} ({type(module).__name__}) {reason}; use jvp"
            ) from reason
    return taps


def kind_of(module: nn.Module, own: dict[str, str], call: Call, rows: int) -> Callable[..., Tap]:
    """The tap for modules of a class, by one of them and a call of it.

    Args:
        own: names of its trained parameters in the PRM, by its own names.
        rows: of the module's tensors.

    Raises:
        InputError: the sentence's end that says why there is none.
    """
    if any(module.children()):
        (output, *_) = (value for value in _flat([call.output]) if isinstance(value, Tensor))
        by_row = partial(RowTap, dimensions=output.dim())
        if not _gives_each_row_its_own(by_row(module, "", own), call, rows):
            raise InputError("uses parameters of its own otherwise than row by row")
        return by_row
    if len(call.args) != 1 or call.kwargs:
        raise InputError("is not called with one tensor")
    (x,) = call.args
    original = Original(module)
    zeros = {name: torch.zeros_like(getattr(module, name)) for name in own}
    one, other = ({name: torch.randn_like(p) for name, p in zeros.items()} for _ in range(2))
    at_zero = original.at(zeros, x)
    both = {name: one[name] + other[name] for name in own}
    a, b, c = (original.at(values, x) - at_zero for values in (one, other, both))
    if not _near(a + b, c):
        raise InputError("is not linear in its own parameters")
    affine = not at_zero.is_meta and bool(at_zero.any())
    kind: Callable[..., Tap] = (
        DenseTap if type(module) is nn.Linear else partial(LinearTap, affine=affine)
    )
    if not _goes_back_as_autograd(kind(module, "", own), x):
        raise InputError("has another gradient than autograd's")
    return kind


def _goes_back_as_autograd(tap: Tap, x: Tensor) -> bool:
    """Whether gradients and products are those of plain backward passes, one for each row."""
    module, parameters = tap.module, list(tap.parameters.values())
    v = [torch.randn_like(p) for p in parameters]
    rows = torch.arange(len(x), device=x.device)
    batch = TappedBatch({tap.part: rows}, dict(zip(tap.names.values(), v, strict=True)))
    x = x.detach().requires_grad_(x.is_floating_point())
    inputs = parameters + [x] * x.requires_grad
    with torch.enable_grad():
        gradient = torch.randn_like(module(x))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        weights = torch.linspace(-1, 2, len(x), dtype=wide, device=x.device)

        def losses() -> Tensor:
            return (module(x) * gradient).flatten(1).sum(1, dtype=wide)

        plain = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses()]
        with tap.within(batch):
            loss = batch.weigh_in_backward(losses(), weights).mean()
            found = torch.autograd.grad(loss, inputs)
    by_row = [torch.stack(gradients) for gradients in zip(*plain, strict=True)]
    owned = by_row[: len(parameters)]
    truth = [torch.einsum("r,r...->...", weights.to(g.dtype), g) / len(x) for g in owned]
    truth += [g.mean(0) for g in by_row[len(parameters) :]]  # by the input, without weights
    products = torch.stack([row_sums(g * t) for g, t in zip(owned, v, strict=True)]).sum(0)
    pairs = zip([*found, batch.products], [*truth, products], strict=True)
    return all(_near(one.to(gradient.dtype), other.to(gradient.dtype)) for one, other in pairs)


def _gives_each_row_its_own(tap: RowTap, call: Call, rows: int) -> bool:
    """Whether a row comes out of parameters of its own as if all rows had them."""
    apart = {own: tap.rows_of(p, rows) for own, p in tap.parameters.items()}
    apart = {own: copies + torch.randn_like(copies) for own, copies in apart.items()}

    def output(parameters: Mapping[str, Tensor]) -> Tensor:
        return next(_flat([tap.original.at(parameters, *call.args, **call.kwargs)]))

    try:
        together = output(apart)
    except RuntimeError:  # shapes that do not broadcast
        return False
    alone = []
    for row in range(rows):
        of_row = {own: copies[row].view_as(tap.parameters[own]) for own, copies in apart.items()}
        alone.append(output(of_row)[row])
    return _near(together, torch.stack(alone))


def _near(found: Tensor, truth: Tensor) -> bool:
    """Equal in half of their digits; what is wrong differs in all."""
    if truth.is_meta:  # shapes without values, of a run that is only planned
        return found.shape == truth.shape
    # Norms compute in float32, whatever the dtype.
    eps = max(torch.finfo(dtype).eps for dtype in (truth.dtype, torch.float32))
    return bool((found - truth).norm() <= eps**0.5 * truth.norm())
