from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend
from facelt_ext._checks import check_class_range, is_exporting
from facelt_ext._kept_tensors import check_saved_integers
from facelt_ext._operators import operator

# What a label that is to be ignored is mapped to; every class is mapped to 0 or more.
IGNORED = -1


def mapped_labels(labels: Tensor, label_map: Tensor, ignore_index: int) -> Tensor:
    """label_map[labels] of int64 labels; those out of range become len(label_map), on CUDA."""
    if is_exporting():
        return _looked_up(labels, label_map, ignore_index)
    check = not labels.is_cuda or _backend.debugging()
    return _mapped_labels(labels, label_map, ignore_index, check)


def check_label_map(label_map: Tensor, classes: int, rows: int) -> Tensor:
    """As saved: for each class a row, and each row used. A rounded map lacks rows."""
    label_map = check_saved_integers(label_map, "label_map", classes)
    check_class_range(label_map, "label_map", rows, None)
    unused = (label_map.bincount(minlength=rows) == 0).nonzero()
    if len(unused):
        raise ValueError(
            f"label_map: expected a class for each of the {rows} rows in the state_dict, got none "
            f"for {len(unused)} of them, the first of which is {int(unused[0])}"
        )
    return label_map


def _mapped_fake(labels, label_map, ignore_index, check):
    return torch.empty_like(labels)


@operator(
    "mapped_labels(Tensor labels, Tensor label_map, SymInt ignore_index, bool check) -> Tensor",
    _mapped_fake,
)
def _mapped_labels(labels, label_map, ignore_index, check):
    if check:
        check_class_range(labels, "labels", len(label_map), ignore_index)
    return _looked_up(labels, label_map, ignore_index)


def _looked_up(labels: Tensor, label_map: Tensor, ignore_index: int) -> Tensor:
    classes = len(label_map)
    valid = (labels >= 0) & (labels < classes)
    mapped = torch.where(valid, label_map[labels.clamp(0, classes - 1)], classes)
    return torch.where(labels == ignore_index, IGNORED, mapped)
