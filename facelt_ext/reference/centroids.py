from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.groups import taking_part
from facelt_ext.types import ClassCentroids, MinCentroidDistance, compute_dtype


def class_centroids(
    features: Tensor,
    labels: Tensor,
    *,
    max_classes: int | None = None,
    ignore_index: int | None = -100,
) -> ClassCentroids:
    """See `facelt_ext.functional.class_centroids`."""
    samples = taking_part(labels, ignore_index)
    features, labels = features[samples].to(compute_dtype(features.dtype)), labels[samples]
    classes, segment, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if max_classes is not None and max_classes < len(classes):
        raise ValueError(f"max_classes: {max_classes} is too small for {len(classes)} classes")
    padding = 0 if max_classes is None else max_classes - len(classes)
    classes = torch.nn.functional.pad(classes, (0, padding))
    counts = torch.nn.functional.pad(counts, (0, padding))
    sums = features.new_zeros(len(classes), features.shape[1]).index_add(0, segment, features)
    return ClassCentroids(classes, sums / counts.clamp(min=1)[:, None], counts)


def min_centroid_distance(
    centroids: Tensor, counts: Tensor | None = None, *, squared: bool = True
) -> MinCentroidDistance:
    """See `facelt_ext.functional.min_centroid_distance`."""
    centroids = centroids.to(compute_dtype(centroids.dtype))
    live = torch.ones(len(centroids), dtype=torch.bool, device=centroids.device)
    live = live if counts is None else counts > 0
    candidates = live.nonzero()[:, 0]
    none = candidates.new_full((2,), -1)
    if not centroids[candidates].isfinite().all():
        poison = centroids[candidates].new_full((), torch.nan)
        return MinCentroidDistance((centroids * poison).sum(), none)
    pair = _nearest_pair(centroids.detach()[candidates])
    if pair is None:
        return MinCentroidDistance((centroids * 0).sum() + torch.inf, none)
    q, r = candidates[pair[0]], candidates[pair[1]]
    distance = (centroids[q] - centroids[r]).square().sum()
    if not squared:
        # At distance 0 the root's gradient would be infinite; the chosen subgradient is 0.
        distance = distance.sqrt() if distance > 0 else (centroids * 0).sum()
    return MinCentroidDistance(distance, torch.stack([q, r]))


def _nearest_pair(points: Tensor) -> tuple[int, int] | None:
    """The first pair (a < b) of the smallest squared distance, or None for fewer than two."""
    best, pair = torch.inf, None
    for a in range(len(points) - 1):
        distances = (points[a + 1 :] - points[a]).square().sum(1)
        nearest = int(torch.sort(distances, stable=True).indices[0])
        if pair is None or distances[nearest] < best:
            best, pair = distances[nearest], (a, a + 1 + nearest)
    return pair
