"""Checks of command lines that the examples share."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch

from .errors import DataError

LARGEST_SEED = 2**63 - 1


def check_at_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, least: int, names: Sequence[str]
) -> None:
    """Whole numbers that are given."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_finite(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]
) -> None:
    """Numbers that are given: not negative, and finite in float32."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= torch.finfo(torch.float32).max:
            parser.error(
                f"--{name.replace('_', '-')} must be a finite number of at least 0, got {value}"
            )


def check_seed(parser: argparse.ArgumentParser, seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        parser.error(f"--seed must be at least 0 and at most {LARGEST_SEED}, got {seed}")


def usable_device(name: str, amp: torch.dtype | None = None) -> torch.device:
    """A device that is there and can compute, with ``amp`` if that is given.

    Raises:
        DataError: it is not, or cannot.
    """
    try:
        device = torch.device(name)
        float(torch.ones(1, device=device))
    except Exception as error:  # Each backend has its own kinds.
        reason = str(error).splitlines()[0].split(". ")[0]
        raise DataError(f"--device {name}: there is no such device ({reason})") from error
    if amp is not None:
        try:
            with warnings.catch_warnings():
                # A type that autocast cannot have is only a warning.
                warnings.simplefilter("error")
                with torch.autocast(device.type, amp):
                    torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        except Exception as error:
            raise DataError(f"--amp: {name} cannot compute in {amp}: {error}") from error
    return device
