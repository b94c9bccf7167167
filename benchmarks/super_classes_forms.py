"""The mean row of each super class, as users have it; what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import functional
from facelt_ext.functional import SuperClassIndex


def ours(weight: Tensor, index: SuperClassIndex) -> Tensor:
    return functional.super_class_mean(weight, index)


def index_add(weight: Tensor, index: SuperClassIndex) -> Tensor:
    sums = weight.new_zeros(index.num_super_classes, weight.shape[1])
    return sums.index_add(0, index.index, weight) / index.counts()[:, None]


def scatter_reduce(weight: Tensor, index: SuperClassIndex) -> Tensor:
    target = weight.new_zeros(index.num_super_classes, weight.shape[1])
    rows = index.index[:, None].expand(-1, weight.shape[1])
    return target.scatter_reduce(0, rows, weight, "mean", include_self=False)


def segment_reduce(weight: Tensor, index: SuperClassIndex) -> Tensor:
    """From rows sorted beforehand, which no weight that is trained is."""
    return torch.segment_reduce(weight[index.order], "mean", lengths=index.counts(), axis=0)
