from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.types import Groups


def group_labels(labels: Tensor) -> Groups:
    """See `facelt_ext.functional.groups.group_labels`."""
    classes, segment, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    offsets = torch.full((len(labels) + 1,), len(labels), device=labels.device)
    offsets[: len(classes)] = counts.cumsum(0) - counts
    return Groups(
        order=torch.argsort(labels, stable=True),
        segment=segment,
        offsets=offsets,
        num_classes=torch.tensor([len(classes)], device=labels.device),
    )
