"""Products whose dtype does not follow the surrounding autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def autocast_off(device: str) -> contextlib.AbstractContextManager:
    """For products whose dtype was decided before."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def without_autocast(function: F) -> F:
    """For functions that compute in the dtypes of their arguments, wherever these are."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        with autocast_off("cpu"), autocast_off("cuda"):
            return function(*args, **kwargs)

    return run
