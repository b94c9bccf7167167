"""What the protocols take: tensors and NumPy arrays, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext._checks import (
    FLOATING,
    INTEGER,
    LARGEST_INTEGER,
    check_data,
    check_matrix,
    check_number,
)
from facelt_ext.types import compute_dtype

Array = Tensor | np.ndarray


def as_tensor(value: Array, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(value).__name__}")
    return check_data(value, name)


def _from_numpy(value: np.ndarray, name: str) -> Tensor:
    """Unsigned integers of more than 8 bits, which torch hardly computes with, become int64."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked one")
    dtype = value.dtype.newbyteorder("=")
    if dtype.kind == "u" and dtype.itemsize > 1:
        if value.size and value.max() > LARGEST_INTEGER:
            raise ValueError(f"{name}: expected integers of 64 bits, got {value.max()}")
        dtype = np.dtype(np.int64)
    # Read-only arrays, as of files mapped into memory, are copied: chunk by chunk where large.
    value = np.require(value.astype(dtype, copy=False), requirements=["C", "W"])
    if not value.size or min(value.strides, default=0) < 0:
        # To NumPy any strides of nothing, or of one row, are in order.
        value = value.copy(order="C")
    try:
        return torch.from_numpy(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an array of numbers, got dtype {dtype}") from error


def unit_features(value: Array, name: str, dimensions: int | None = None) -> Tensor:
    """Rows of length 1, float64 for float64 and float32 otherwise; rows of zeros stay."""
    value = check_matrix(as_tensor(value, name), name)
    if dimensions is not None and value.shape[1] != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got {value.shape[1]}")
    # Contiguous, so that the lengths of all copies of a row are added up in one order.
    value = value.to(compute_dtype(value.dtype)).contiguous()
    finite = value.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: expected finite numbers, got others in row {row}")
    # Divided by the largest entry first, so that no square is lost.
    largest = value.abs().amax(dim=1, keepdim=True) if len(value) else value[:, :1]
    return F.normalize(value / largest.where(largest > 0, torch.ones_like(largest)), eps=0.5)


def integers(
    value: Array, name: str, length: int | None = None, like: Tensor | None = None
) -> Tensor:
    """int64 [length], on the device of `like`."""
    value = as_tensor(value, name)
    if value.dtype not in INTEGER:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if value.ndim != 1 or (length is not None and len(value) != length):
        wanted = "n" if length is None else length
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")
    return value.to(value.device if like is None else like.device, torch.int64)


def indices(value: Array, name: str, size: int, like: Tensor) -> Tensor:
    """int64 [n] in [0, size)."""
    value = integers(value, name, like=like)
    wrong = (value < 0) | (value >= size)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers in [0, {size}), got {int(value[position])} at position "
            f"{position}"
        )
    return value


def scored_pairs(scores: Array, same: Array) -> tuple[Tensor, Tensor]:
    """Scores floating [P] and same bool [P], with pairs of both kinds."""
    scores, same = as_tensor(scores, "scores"), as_tensor(same, "same")
    if scores.dtype not in FLOATING:
        raise TypeError(
            f"scores: expected dtype float64, float32, bfloat16 or float16, got {scores.dtype}"
        )
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape [pairs], got {list(scores.shape)}")
    if scores.isnan().any():
        position = int(scores.isnan().nonzero()[0])
        raise ValueError(f"scores: expected numbers, got NaN at position {position}")
    if same.dtype != torch.bool:
        raise TypeError(f"same: expected dtype bool, got {same.dtype}")
    if same.shape != scores.shape:
        raise ValueError(
            f"same: expected shape {list(scores.shape)}, one for each of scores, "
            f"got {list(same.shape)}"
        )
    same = same.to(scores.device)
    genuine = int(same.sum())
    if genuine in (0, len(same)):
        raise ValueError(
            f"same: expected pairs of the same and of different identities, got {genuine} and "
            f"{len(same) - genuine}"
        )
    return scores, same


def rates(value: float | Sequence[float] | Array, name: str) -> list[float]:
    """Numbers in [0, 1]: one, or a tuple, list, array or tensor of them."""
    if isinstance(value, np.ndarray | Tensor):
        value = as_tensor(value, name)
        if value.ndim > 1 or value.dtype not in FLOATING + INTEGER:
            raise TypeError(
                f"{name}: expected numbers [n], got {value.dtype} of shape {list(value.shape)}"
            )
        value = value.reshape(-1).tolist()
    values = list(value) if isinstance(value, tuple | list) else [value]
    if not values:
        raise ValueError(f"{name}: expected at least one rate, got none")
    return [rate(each, name) for each in values]


def rate(value: float, name: str) -> float:
    """A number in [0, 1]."""
    value = check_number(value, name, torch.float64)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected rates in [0, 1], got {value!r}")
    return float(value)


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count] on the CPU, 0 .. count - 1 in random order."""
    return torch.randperm(count, generator=generator, device="cpu")
