from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype


@torch.no_grad()
def inter_class_compactness(
    weight: Tensor, index: Tensor | None = None, *, k: int = 100, scale: float = 64.0
) -> Tensor:
    """See `facelt_ext.functional.inter_class_compactness`."""
    rows = unit_rows(weight.to(compute_dtype(weight.dtype)))[0]
    if index is None:
        index = torch.arange(len(rows), device=rows.device)
    cosines = (rows[index] @ rows.t()).scatter(1, index[:, None], -torch.inf)
    nearest = cosines.sort(1, descending=True).values[:, : min(k, len(rows) - 1)]
    return (scale * nearest).logsumexp(1)


@torch.no_grad()
def domain_frequency_indicator(
    weight: Tensor,
    index: Tensor | None = None,
    *,
    k: int = 100,
    scale: float = 64.0,
    epsilon: float | Tensor = 5.5,
    max_indicator: float = 2.0,
) -> Tensor:
    """See `facelt_ext.functional.domain_frequency_indicator`."""
    if k == 0:
        count = len(weight) if index is None else index.shape[0]
        return weight.new_ones(count, dtype=compute_dtype(weight.dtype))
    compactness = inter_class_compactness(weight, index, k=k, scale=scale)
    return indicator(compactness, epsilon, max_indicator)


def indicator(compactness: Tensor, epsilon: float | Tensor, max_indicator: float) -> Tensor:
    """epsilon / IC (eq. 2), but max_indicator where that is larger, or IC not positive."""
    small = compactness <= epsilon / max_indicator
    # A number in `where` would be compiled anew for each of its values.
    largest = torch.ones_like(compactness) * max_indicator
    return torch.where(small, largest, epsilon / torch.where(small, 1, compactness))
