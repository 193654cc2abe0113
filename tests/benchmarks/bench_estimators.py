"""How exact each estimator is, and how near the one-step hypergradient is to the true one.

    python tests/benchmarks/bench_estimators.py [--device cpu] [--out bench.json]

`estimator_error`: ||g^ - g|| / ||g|| over a batch, where g_i = <grad l_i, v> is taken in float32 by
reverse mode at the same (rounded) parameters with the same v. Two model sizes. In bf16 that of
`ghost` is to be 0.5 % at most.

`unrolled_cosine`: in float64, cosine between -<grad l_i, v> and the derivative of the meta loss
through the lower step theta -> theta' itself, one step of SGD and one of AdamW that has taken
others before. `jvp` and `sama` take both factors at theta', `ghost` both at theta; `sama` and
`ghost_adam` multiply v by the derivative of AdamW's step, `ghost_adam` by that of the step before.
"""

import argparse
import copy
import tempfile
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from standin import make_data, make_run, saved_model, write_results
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamprm_dist import distributed
from dreamprm_dist.hypergradient import ESTIMATORS, SAMA
from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.hypergradient.sama import adam_derivative
from dreamprm_dist.losses import Observation, instance_losses
from dreamprm_dist.training.trainer import BilevelTrainer

DIVISORS = {"small": 8, "large": 4}
BATCH_SIZE = 8
EARLIER_STEPS = 3
LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8


def exact(trainer: BilevelTrainer, batch, v: dict[str, Tensor]) -> Tensor:
    """<grad l_i, v> in float32, one reverse pass an instance."""
    module = copy.deepcopy(trainer.engine.module).float()
    parameters = dict(module.named_parameters())
    losses = losses_of(module, batch)
    products = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, [parameters[n] for n in v], retain_graph=True, materialize_grads=True
        )
        products.append(
            sum((g * d.float()).sum() for g, d in zip(gradients, v.values(), strict=True))
        )
    return torch.stack(products).detach()


def losses_of(module, batch) -> Tensor:
    logits = module(batch).logits
    return instance_losses(logits, batch)


def estimator_error(
    folder: Path, model: Path, device: str, precision: str, estimator: str
) -> float:
    run = make_run(
        *(folder, model, "--device", device, "--precision", precision),
        *("--activation_function", "No", "--lr", LR),
        *("--batch_size", BATCH_SIZE, "--meta_batch_size", BATCH_SIZE),
        *("--hypergradient", estimator),
    )
    trainer = run.trainer
    *earlier, ((micro_batches,), meta) = islice(run.data(), EARLIER_STEPS + 1)
    for (before,), _ in earlier:
        trainer.lower_step(before)  # the preconditioner of the first step is 0
    v, *_ = trainer.meta_gradient(meta)
    (batch,) = micro_batches
    truth = exact(trainer, batch, v)
    if trainer.ghost:
        found = trainer.lower_step(micro_batches, v).products
    else:
        found = trainer.directional_derivative(batch, v)[1].losses
    return float((found - truth).norm() / truth.norm())


def unrolled_cosines(folder: Path, model: Path, device: str) -> dict[str, dict[str, float]]:
    """Estimator against the derivative through the whole lower step, by lower optimizer."""
    run = make_run(
        *(folder, model, "--device", device, "--precision", "fp32"),
        *("--batch_size", BATCH_SIZE, "--meta_batch_size", BATCH_SIZE),
    )
    trainer = run.trainer
    module = copy.deepcopy(trainer.engine.module).double()
    start = {n: p.detach() for n, p in module.named_parameters()}
    data = list(islice(run.data(), EARLIER_STEPS + 1))
    lower = (window[0] for window, _ in data)
    (meta,) = data[0][1]

    def gradient(parameters: dict[str, Tensor], batch, weights: Tensor, graph: bool = False):
        logits = functional_call(module, parameters, (batch,)).logits
        losses = instance_losses(logits, batch)
        gradients = torch.autograd.grad(
            (weights * losses).mean(), list(parameters.values()), create_graph=graph
        )
        return dict(zip(parameters, gradients, strict=True))

    def meta_loss(parameters: dict[str, Tensor]) -> Tensor:
        output = functional_call(module, parameters, (meta,))
        return trainer.meta_losses(output, meta).mean()

    first = {n: torch.zeros_like(p) for n, p in start.items()}
    second = {n: torch.zeros_like(p) for n, p in start.items()}

    def adam(parameters, gradients, first, second, step):
        """AdamW's moments and parameters after a step, without weight decay."""
        first = {n: torch.lerp(first[n], g, 1 - BETAS[0]) for n, g in gradients.items()}
        second = {n: torch.lerp(second[n], g * g, 1 - BETAS[1]) for n, g in gradients.items()}
        moved = {
            n: p - LR * (first[n] / (1 - BETAS[0] ** step))
            / ((second[n] / (1 - BETAS[1] ** step)).sqrt() + EPS)
            for n, p in parameters.items()
        }  # fmt: skip
        return first, second, moved

    parameters, ones = start, torch.ones(BATCH_SIZE, dtype=torch.float64, device=run.device)
    for step in range(1, EARLIER_STEPS + 1):
        (batch,) = next(lower)
        leaves = {n: p.requires_grad_() for n, p in parameters.items()}
        first, second, parameters = adam(leaves, gradient(leaves, batch, ones), first, second, step)
        parameters = {n: p.detach() for n, p in parameters.items()}
    (batch,) = next(lower)
    step = EARLIER_STEPS + 1

    def meta_gradient(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(meta_loss(parameters), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    def preconditioned(v, first, second, gradients, step: int) -> dict[str, Tensor]:
        return {
            n: t * adam_derivative(first[n], second[n], gradients[n].detach(), step, BETAS, EPS)
            for n, t in v.items()
        }

    def estimate(parameters: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
        def observe(parameters) -> Observation:
            logits = functional_call(module, dict(parameters), (batch,)).logits
            losses = instance_losses(logits, batch)
            return Observation(losses, losses.new_zeros(0, 0))

        with module.forward_mode():
            return -jvp(observe, parameters, v)[1].losses

    cosines = {}
    for optimizer in ("sgd", "adamw"):
        weights = ones.clone().requires_grad_()
        leaves = {n: p.requires_grad_() for n, p in parameters.items()}
        with sdpa_kernel(SDPBackend.MATH):  # it knows second derivatives
            gradients = gradient(leaves, batch, weights, graph=True)
            if optimizer == "sgd":
                moved = {n: p - LR * gradients[n] for n, p in leaves.items()}
            else:
                moments = adam(leaves, gradients, first, second, step)
                moved = moments[2]
            (true,) = torch.autograd.grad(meta_loss(moved), weights)
        moved = {n: p.detach().requires_grad_() for n, p in moved.items()}
        v, v_before = meta_gradient(moved), meta_gradient(leaves)
        estimates = {"jvp": estimate(moved, v), "ghost": estimate(leaves, v_before)}
        if optimizer == "adamw":
            moments = [{n: t.detach() for n, t in m.items()} for m in moments]
            seen = preconditioned(v, *moments[:2], gradients, step)
            estimates["sama"] = estimate(moved, seen)
            # The step's gradient is not known yet; the first moment stands for it.
            expected = {n: m / (1 - BETAS[0] ** (step - 1)) for n, m in first.items()}
            seen = preconditioned(v_before, first, second, expected, step - 1)
            estimates["ghost_adam"] = estimate(leaves, seen)
        cosines[optimizer] = {
            name: float(F.cosine_similarity(value, true, dim=0))
            for name, value in estimates.items()
        }
    return cosines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    errors: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data, 32, 32, (224, 224))
        for size, divisor in DIVISORS.items():
            model = saved_model(Path(folder) / size, divisor, image_size=112)
            for precision in ("bf16", "fp32"):
                errors.setdefault(size, {})[precision] = {
                    name: estimator_error(data, model, arguments.device, precision, name)
                    for name in (*ESTIMATORS, SAMA)
                }
        # Second derivatives of the whole step take the smallest model there is.
        tiny = Path(folder) / "tiny"
        make_data(tiny / "data", 32, 32, (56, 56))
        model = saved_model(tiny / "model", 16, image_size=56)
        cosines = unrolled_cosines(tiny / "data", model, arguments.device)
    write_results(
        arguments.out,
        {
            "estimator_error": errors["large"],
            "estimator_error_small": errors["small"],
            "unrolled_cosine": cosines,
        },
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
