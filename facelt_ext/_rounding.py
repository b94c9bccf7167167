"""How far cosines of unit rows may be off, and which of them are equal."""

from __future__ import annotations

import torch
from torch import Tensor

# How far rounding of the rows may put equal cosines apart, and more.
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}


def tie_width(*rows: Tensor) -> float:
    """How far apart cosines of these unit rows may be and still count as equal."""
    return max(TIE[each.dtype] for each in rows)


def product_error(rows: Tensor) -> float:
    """The most by which a matrix product of unit rows in their dtype is off, in whatever order."""
    return torch.finfo(rows.dtype).eps * (rows.shape[1] / 2 + 4)


def product_dtype(rows: Tensor) -> torch.dtype:
    """In which to multiply: float64 where torch is set to round float32 to TF32 or bfloat16."""
    if rows.dtype == torch.float32:
        number = rows.new_full((64, 64), 1 + 2**-12)
        identity = torch.eye(64, dtype=rows.dtype, device=rows.device)
        if not torch.equal(number @ identity, number):
            return torch.float64
    return rows.dtype
