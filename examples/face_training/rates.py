"""Learning rates over the steps of a phase."""

from __future__ import annotations

import math

import torch

from .recipes import Phase


def make_rates(
    phase: Phase, optimizer: torch.optim.Optimizer, schedule: str, batches: int, done: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that depends on nothing but the phase and the step in it.

    A phase that gets more epochs when it goes on therefore has the rates of one that was begun
    with as many.

    Args:
        schedule: "step", a tenth after each of the phase's milestones, or "cosine", to 0.
        batches: steps of an epoch.
        done: steps of the phase so far.
    """
    steps = phase.epochs * batches
    # Of few epochs milestones fall together: one division at each, none at the start.
    ends = {round(share * phase.epochs) for share in phase.milestones} - {0, phase.epochs}

    def share(step: int) -> float:
        if schedule == "cosine":
            return (1 + math.cos(math.pi * step / steps)) / 2
        return 1 / 10 ** sum(step >= end * batches for end in ends)

    for group in optimizer.param_groups:
        group["initial_lr"] = phase.rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share, last_epoch=done - 1)
