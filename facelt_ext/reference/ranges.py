from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.groups import taking_part
from facelt_ext.types import ClassRanges, compute_dtype


def class_ranges(
    features: Tensor,
    labels: Tensor,
    k: int = 2,
    *,
    squared: bool = True,
    max_classes: int | None = None,
    ignore_index: int | None = -100,
) -> ClassRanges:
    """See `facelt_ext.functional.class_ranges`."""
    features = features.to(compute_dtype(features.dtype))
    classes, counts = torch.unique(labels[taking_part(labels, ignore_index)], return_counts=True)
    rows = [_ranges_of_class(features, (labels == c).nonzero()[:, 0], k) for c in classes]
    padding = (0 if max_classes is None else max_classes) - len(classes)
    if max_classes is not None and padding < 0:
        raise ValueError(f"max_classes: {max_classes} is too small for {len(classes)} classes")
    ranges = (
        torch.stack([r for r, _ in rows]) if rows else features.sum() * features.new_zeros(0, k)
    )
    pairs = torch.stack([p for _, p in rows]) if rows else labels.new_zeros(0, k, 2)
    if padding > 0:
        classes = torch.nn.functional.pad(classes, (0, padding))
        counts = torch.nn.functional.pad(counts, (0, padding))
        ranges = torch.nn.functional.pad(ranges, (0, 0, 0, padding))
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, padding), value=-1)
    return ClassRanges(classes, ranges if squared else _safe_sqrt(ranges), pairs, counts)


def _ranges_of_class(features: Tensor, members: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest squared distances among one class's samples, and their pairs, padded to k."""
    first, second = torch.triu_indices(len(members), len(members), 1, device=members.device)
    first, second = members[first], members[second]
    distances = (features[first] - features[second]).square().sum(1)
    largest = torch.sort(distances, descending=True, stable=True).indices[:k]
    missing = k - len(largest)
    pairs = torch.stack([first[largest], second[largest]], dim=1)
    return (
        torch.nn.functional.pad(distances[largest], (0, missing)),
        torch.nn.functional.pad(pairs, (0, 0, 0, missing), value=-1),
    )


def _safe_sqrt(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
