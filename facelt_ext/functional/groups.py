from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native
from facelt_ext._operators import operator
from facelt_ext.types import Groups


def _fake(
    labels: Tensor, ignore_index: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = labels.shape[0]
    return (
        torch.empty_like(labels, memory_format=torch.contiguous_format),
        torch.empty_like(labels, memory_format=torch.contiguous_format),
        labels.new_empty(batch + 1),
        labels.new_empty(1),
    )


@operator(
    "group_labels(Tensor labels, SymInt? ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _group_labels(
    labels: Tensor, ignore_index: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = labels.contiguous()
    outputs = _fake(labels, ignore_index, backend)
    workspace = _native.workspace(backend, labels, "group_labels", labels.shape[0])
    _native.run(backend, labels, "group_labels", labels, ignore_index, *outputs, workspace)
    return outputs


def group_labels(labels: Tensor, ignore_index: int | None, backend: str) -> Groups:
    """Puts int64 labels [B] into classes, without a host synchronisation; no gradient."""
    return Groups(*_group_labels(labels, ignore_index, backend))


def number_of_classes(groups: Groups, max_classes: int | None) -> int:
    """How many rows a per-class result gets. Reading the exact number waits for the GPU."""
    if max_classes is None:
        return int(groups.num_classes.item())
    if _backend.debugging():
        classes = int(groups.num_classes.item())
        if classes > max_classes:
            raise ValueError(f"max_classes: {max_classes} is too small for {classes} classes")
    return max_classes


def classes_and_counts(labels: Tensor, groups: Groups, rows: int) -> tuple[Tensor, Tensor]:
    """The label and the number of samples of each of the first `rows` classes, then zeros."""
    batch = labels.shape[0]
    offsets = groups.offsets
    if rows > batch:
        offsets = torch.cat([offsets, offsets[-1:].expand(rows - batch)])
    counts = offsets[1 : rows + 1] - offsets[:rows]
    if batch == 0:
        return torch.zeros_like(counts), counts
    first = groups.order[offsets[:rows].clamp(max=batch - 1)]
    return torch.where(counts > 0, labels[first], 0), counts
