"""Learning-rate schedules, the same on both levels; one step per optimizer step of their level."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

WARMUP_FRACTION = 0.05

SCHEDULES: dict[str, Callable[[Optimizer, int, int, float], LRScheduler]] = {
    "cosine_schedule_with_warmup": lambda optimizer, num_steps, step_size, gamma: (
        get_cosine_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * num_steps), num_steps)
    ),
    "step_lr": lambda optimizer, num_steps, step_size, gamma: StepLR(optimizer, step_size, gamma),
    "constant": lambda optimizer, num_steps, step_size, gamma: get_constant_schedule(optimizer),
}


def build_schedule(
    name: str, optimizer: Optimizer, *, num_steps: int, step_size: int, gamma: float
) -> LRScheduler:
    """A schedule by name over `num_steps` optimizer steps."""
    return SCHEDULES[name](optimizer, num_steps, step_size, gamma)


def follow_schedule(schedule: LRScheduler) -> None:
    """Set learning rates to those of the schedule's step, which an earlier run has come to.

    A schedule that is a function of the step may have another length than in that run; one that
    multiplies as it goes leaves what it has come to.
    """
    if isinstance(schedule, LambdaLR):
        groups, factors = schedule.optimizer.param_groups, schedule.lr_lambdas
        for group, lr, factor in zip(groups, schedule.base_lrs, factors, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch)
