from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.types import compute_dtype


def super_class_mean(
    weight: Tensor, super_class: Tensor, num_super_classes: int | None = None
) -> Tensor:
    """See `facelt_ext.functional.super_class_mean`; `super_class` is a tensor in range here."""
    if num_super_classes is None:
        num_super_classes = int(super_class.max()) + 1 if len(super_class) else 0
    dtype = compute_dtype(weight.dtype)
    sums = torch.zeros(num_super_classes, weight.shape[1], dtype=dtype, device=weight.device)
    sums = sums.index_add(0, super_class, weight.to(dtype))
    counts = torch.bincount(super_class, minlength=num_super_classes)
    return (sums / counts[:, None]).to(weight.dtype)
