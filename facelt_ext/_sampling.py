"""What the batch samplers share."""

from __future__ import annotations

import operator

import torch.distributed as dist


def checked_integer(name: str, value: int, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def distributed_defaults() -> tuple[int, int]:
    """World size and rank of this process; 1 and 0 without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
