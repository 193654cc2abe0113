"""SAMA: v seen through the lower level's Adam step (Choe et al., arXiv:2310.05674, section 3.2).

The lower step moves theta by -lr u(g), and with Adam du/dg is not the identity that the one-step
hypergradient takes it for but a diagonal matrix. SAMA multiplies v by that diagonal.
"""

import torch
from torch import Tensor


def adam_derivative(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    step: float,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """du/dg of Adam's update u = m^ / (sqrt(v^) + eps) by the gradient of the step just taken.

    Args:
        exp_avg, exp_avg_sq: the moments after the step, one shape.
        gradient: what the optimizer was given, after clipping.
        step: steps taken so far, from 1.

    Returns:
        The diagonal, of the moments' shape; 0 at step 1, where Adam moves by the sign alone.
    """
    beta1, beta2 = betas
    first, second = 1 - beta1**step, 1 - beta2**step
    root = (exp_avg_sq / second).sqrt()
    denominator = root + eps
    direct = (1 - beta1) / first / denominator
    # d sqrt(v^)/dg = (1 - beta2) g / (second * root), which is 0 where nothing was ever seen.
    slope = torch.where(root > 0, (1 - beta2) * gradient / (second * root), 0.0)
    return direct - exp_avg / first * slope / denominator.square()
