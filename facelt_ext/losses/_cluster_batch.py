from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import check_count, check_ignore_index, check_integers, check_matrix
from facelt_ext.functional._unit_rows import unit_rows
from facelt_ext.types import compute_dtype


class ClusterBatch(NamedTuple):
    """units [B, D], the features divided by their norms, in the compute dtype; int64 labels [B];
    int64 cluster_index [B]; taking_part [B], False where the label is the ignored one."""

    units: Tensor
    labels: Tensor
    cluster_index: Tensor
    taking_part: Tensor


def checked_cluster_batch(
    features: Tensor, labels: Tensor, size: int, ignore_index: int | None
) -> ClusterBatch:
    """A batch of whole clusters, one after another with `size` samples each."""
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    size = check_count(size, "samples_per_cluster")
    batch = labels.shape[0]
    if batch % size:
        raise ValueError(
            f"features: expected rows of whole clusters of samples_per_cluster = {size} samples, "
            f"got {batch} rows"
        )
    ignore_index = check_ignore_index(ignore_index)
    if ignore_index is None:
        taking_part = torch.ones_like(labels, dtype=torch.bool)
    else:
        taking_part = labels != ignore_index
    units = unit_rows(features.to(compute_dtype(features.dtype)), taking_part)
    cluster_index = torch.arange(batch, device=labels.device) // size
    return ClusterBatch(units, labels, cluster_index, taking_part)
