from __future__ import annotations

import torch
from torch import Tensor, nn

from facelt_ext._checks import check_count, check_integers, check_matrix
from facelt_ext.types import compute_dtype


def checked_cluster_batch(
    features: Tensor, labels: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch of whole clusters, one after another with `size` samples each: the features
    divided by their norms in the compute dtype, the labels, and the cluster of each sample."""
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    size = check_count(size, "samples_per_cluster")
    batch = labels.shape[0]
    if batch % size:
        raise ValueError(
            f"features: expected rows of whole clusters of samples_per_cluster = {size} samples, "
            f"got {batch} rows"
        )
    wide = features.to(compute_dtype(features.dtype))
    units = nn.functional.normalize(wide, eps=torch.finfo(wide.dtype).tiny)
    return units, labels, torch.arange(batch, device=labels.device) // size
