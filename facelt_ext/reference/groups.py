from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.types import Groups


def group_labels(labels: Tensor, ignore_index: int | None = -100) -> Groups:
    """See `facelt_ext.functional.groups.group_labels`."""
    samples = taking_part(labels, ignore_index)
    others = (torch.ones_like(labels).index_fill(0, samples, 0)).nonzero()[:, 0]
    classes, inverse, counts = torch.unique(
        labels[samples], return_inverse=True, return_counts=True
    )
    offsets = torch.full((len(labels) + 1,), len(samples), device=labels.device)
    offsets[: len(classes)] = counts.cumsum(0) - counts
    return Groups(
        order=torch.cat([samples[torch.argsort(labels[samples], stable=True)], others]),
        segment=torch.full_like(labels, -1).index_copy(0, samples, inverse),
        offsets=offsets,
        num_classes=torch.tensor([len(classes)], device=labels.device),
    )


def taking_part(labels: Tensor, ignore_index: int | None) -> Tensor:
    """The samples that are not ignored, in batch order."""
    if ignore_index is None:
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero()[:, 0]
