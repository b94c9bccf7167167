"""What the functions return, and the few helpers that every room shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """A batch of B labels put into classes, classes in ascending label order.

    order: int64 [B], the sample at each sorted position (a stable sort by label), ignored ones
        last.
    segment: int64 [B], the class of each sample, in [0, C), or -1 for an ignored one.
    offsets: int64 [B + 1], where each class starts in `order`; from entry C on the number of
        samples that are not ignored.
    num_classes: int64 [1], C.
    """

    order: Tensor
    segment: Tensor
    offsets: Tensor
    num_classes: Tensor


class ClassRanges(NamedTuple):
    """classes int64 [C], ranges [C, k] (largest first), pairs int64 [C, k, 2], counts int64 [C]."""

    classes: Tensor
    ranges: Tensor
    pairs: Tensor
    counts: Tensor


class ClassCentroids(NamedTuple):
    """classes int64 [C], centroids [C, D], counts int64 [C]."""

    classes: Tensor
    centroids: Tensor
    counts: Tensor


class MinCentroidDistance(NamedTuple):
    """distance [] and the pair of rows it was found at, int64 [2] (-1 where there is none)."""

    distance: Tensor
    pair: Tensor


class DomainFrequency(NamedTuple):
    """indicators [N], compactness [N], and how many indicators were clamped, int64 []."""

    indicators: Tensor
    compactness: Tensor
    clamped: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
