from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend
from facelt_ext._checks import check_class_range
from facelt_ext._operators import operator

# What a label that is to be ignored is mapped to; every class is mapped to 0 or more.
IGNORED = -1


def mapped_labels(labels: Tensor, label_map: Tensor, ignore_index: int) -> Tensor:
    """label_map[labels] of int64 labels; those out of range become len(label_map), on CUDA."""
    check = not labels.is_cuda or _backend.debugging()
    return _mapped_labels(labels, label_map, ignore_index, check)


def _mapped_fake(labels, label_map, ignore_index, check):
    return torch.empty_like(labels)


@operator(
    "mapped_labels(Tensor labels, Tensor label_map, SymInt ignore_index, bool check) -> Tensor",
    _mapped_fake,
)
def _mapped_labels(labels, label_map, ignore_index, check):
    classes = len(label_map)
    if check:
        check_class_range(labels, "labels", classes, ignore_index)
    valid = (labels >= 0) & (labels < classes)
    mapped = torch.where(valid, label_map[labels.clamp(0, classes - 1)], classes)
    return torch.where(labels == ignore_index, IGNORED, mapped)
