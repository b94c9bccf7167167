from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.centroids import class_centroids, min_centroid_distance
from facelt_ext.reference.groups import taking_part
from facelt_ext.reference.ranges import class_ranges
from facelt_ext.types import compute_dtype


def range_loss(
    features: Tensor,
    labels: Tensor,
    *,
    k: int = 2,
    margin: float = 2e4,
    alpha: float = 1e-5,
    beta: float = 1e-4,
    squared: bool = True,
    ignore_index: int | None = -100,
) -> Tensor:
    """See `facelt_ext.functional.range_loss`."""
    samples = taking_part(labels, ignore_index)
    features, labels = features[samples].to(compute_dtype(features.dtype)), labels[samples]
    if not features.isfinite().all():
        return (features * torch.nan).sum()
    ranges, pairs = class_ranges(features, labels, k, squared=squared, ignore_index=None)[1:3]
    intra = harmonic_means(ranges, pairs[..., 0] >= 0).sum()
    _, centroids, counts = class_centroids(features, labels, ignore_index=None)
    distance = min_centroid_distance(centroids, counts, squared=squared).distance
    inter = torch.relu(margin - distance)
    return alpha * intra + beta * inter


def harmonic_means(ranges: Tensor, selected: Tensor) -> Tensor:
    """k_c / sum_j 1/D_cj of each row's selected entries (eq. 2); 0 where one is 0 or none is there.

    The largest reciprocal is divided out first, so that tiny ranges do not overflow.
    """
    number = selected.sum(1)
    defined = (number > 0) & ~((ranges == 0) & selected).any(1)
    kept = selected & defined[:, None]
    smallest = torch.where(kept, ranges.detach(), torch.inf).amin(1)
    smallest = torch.where(defined, smallest, 1)
    ratios = torch.where(kept, ranges, 1) / smallest[:, None]
    reciprocals = torch.where(kept, 1 / ratios, 0).sum(1)
    means = smallest * number / torch.where(defined, reciprocals, 1)
    return torch.where(defined, means, 0)
