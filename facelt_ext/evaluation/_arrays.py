"""What the protocols take: tensors and NumPy arrays, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext._checks import INTEGER, check_matrix
from facelt_ext.types import compute_dtype

Array = Tensor | np.ndarray

# Scores that are held at a time: blocks of rows and columns.
BLOCK_ROWS, BLOCK_COLUMNS = 1 << 10, 1 << 14


def as_tensor(value: Array, name: str) -> Tensor:
    if isinstance(value, np.ndarray):
        # Read-only arrays, as of files mapped into memory, are copied: chunk by chunk where large.
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(value).__name__}")
    return value.detach()


def unit_features(value: Array, name: str, dimensions: int | None = None) -> Tensor:
    """Rows of length 1, float64 for float64 and float32 otherwise; rows of zeros stay."""
    value = as_tensor(value, name)
    check_matrix(value, name)
    if dimensions is not None and value.shape[1] != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got {value.shape[1]}")
    value = value.to(compute_dtype(value.dtype))
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
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
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


def rates(value: float | Sequence[float], name: str) -> list[float]:
    """Numbers in [0, 1]."""
    values = [value] if isinstance(value, int | float) else list(value)
    for each in values:
        if not isinstance(each, int | float) or not 0 <= each <= 1:
            raise ValueError(f"{name}: expected rates in [0, 1], got {each!r}")
    if not values:
        raise ValueError(f"{name}: expected at least one rate, got none")
    return [float(each) for each in values]


def blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The products of all rows with all columns, block by block, and where each block begins.

    Columns may lie on another device; the blocks lie where the rows do.
    """
    for left in range(0, len(columns), BLOCK_COLUMNS):
        some = columns[left : left + BLOCK_COLUMNS].to(rows.device).t()
        for top in range(0, len(rows), BLOCK_ROWS):
            yield top, left, rows[top : top + BLOCK_ROWS] @ some
