"""Checks of arguments: they name the argument, what came and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Tuples: torch.compile of torch 2.6 does not trace unions of types.
WHOLE = (int, torch.SymInt)
NUMBER = (int, float, torch.SymFloat)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float64, torch.float32)}


def check_matrix(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected dtype float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.ndim != 2 or value.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [rows, dimensions >= 1], got {list(value.shape)}")


def checked_integers(value: Tensor, name: str, like: Tensor, like_name: str) -> Tensor:
    """`value` as int64, one for each row of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in INTEGER:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if value.ndim != 1 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name}: expected shape [{like.shape[0]}], one for each row of {like_name}, "
            f"got {list(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, where {like_name} is, got {value.device}"
        )
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def check_count(value: int, name: str, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, WHOLE):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_number(value: float, name: str, dtype: torch.dtype) -> None:
    """A number that is finite in `dtype` too, in which it will be reckoned with."""
    if isinstance(value, bool) or not isinstance(value, NUMBER):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    largest = LARGEST[dtype]
    if not -largest <= value <= largest:
        raise ValueError(f"{name}: expected a number that is finite in {dtype}, got {value}")


def check_positive(value: float, name: str, dtype: torch.dtype) -> None:
    check_number(value, name, dtype)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def check_integer(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, WHOLE):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_weight(weight: Tensor, features: Tensor) -> None:
    """A row per class, to be multiplied with features."""
    check_matrix(features, "features")
    check_matrix(weight, "weight")
    if weight.shape[0] < 1 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight: expected shape [classes >= 1, {features.shape[1]}], the features' dimensions,"
            f" got {list(weight.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(
            f"weight: expected device {features.device}, where features is, got {weight.device}"
        )


def checked_margin(
    value: float | Tensor, name: str, features: Tensor, weight: Tensor, minimum: float
) -> float | Tensor:
    """A number of at least `minimum`, or one per class [N] or per sample [B, 1]."""
    if not isinstance(value, Tensor):
        check_number(value, name, torch.float32)
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        return value
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    per_class, per_sample = [weight.shape[0]], [features.shape[0], 1]
    if list(value.shape) not in (per_class, per_sample):
        raise ValueError(
            f"{name}: expected a number, or shape {per_class}, one per class, or {per_sample}, "
            f"one per sample, got {list(value.shape)}"
        )
    if value.device != features.device:
        raise ValueError(
            f"{name}: expected device {features.device}, where features is, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: no gradient goes to margins; expected {name}.detach()")
    return value


def check_class_range(index: Tensor, name: str, classes: int, ignore_index: int | None) -> None:
    """Waits for the device."""
    wrong = (index < 0) | (index >= classes)
    if ignore_index is not None:
        wrong &= index != ignore_index
    if wrong.any():
        position = int(wrong.nonzero()[0])
        allowed = "" if ignore_index is None else f" or {ignore_index}"
        raise ValueError(
            f"{name}: expected numbers in [0, {classes}){allowed}, got {int(index[position])} "
            f"at position {position}"
        )
