"""Accuracy where classes are not equally frequent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import INTEGER, check_count, check_counts, zeros_of_size
from facelt_ext.evaluation._arrays import Array, as_tensor, indices, integers


class BalancedAccuracy(NamedTuple):
    """per_attribute float64 [A], and mean, over the attributes that have a number."""

    per_attribute: Tensor
    mean: float


class Band(NamedTuple):
    """Classes of a band of frequencies.

    Attributes:
        minimum: training images that a class of the band has at least.
        maximum: that it has at most; None for the most frequent.
        accuracy: share of the test images that are told rightly; NaN without test images.
        images: number of test images.
        classes: of how many classes they are.
    """

    minimum: int
    maximum: int | None
    accuracy: float
    images: int
    classes: int


def balanced_accuracy(predicted: Array, targets: Array) -> BalancedAccuracy:
    """0.5 (tp / positives + tn / negatives) of each binary attribute, and the mean over them.

    The measure of CLMLE on CelebA's 40 attributes (Huang et al., TPAMI 2020). An attribute of which
    `targets` has no positive or no negative image gets NaN and does not enter the mean.

    Args:
        predicted, targets: bool [N, A], or [N] for one attribute; integers 0 and 1 will do.

    Raises:
        TypeError, ValueError: wrong types or shapes; other numbers than 0 and 1.
    """
    predicted, targets = _binary(predicted, "predicted"), _binary(targets, "targets")
    if predicted.shape != targets.shape:
        raise ValueError(
            f"predicted: expected shape {list(targets.shape)}, that of targets, "
            f"got {list(predicted.shape)}"
        )
    predicted = predicted.to(targets.device)
    true_positives = (predicted & targets).sum(0).double() / targets.sum(0)
    true_negatives = (~predicted & ~targets).sum(0).double() / (~targets).sum(0)
    accuracies = ((true_positives + true_negatives) / 2).cpu()
    return BalancedAccuracy(accuracies, float(accuracies.nanmean()))


def class_accuracy(predicted: Array, labels: Array, num_classes: int) -> Tensor:
    """The share of each class's test images that are told rightly.

    Args:
        predicted, labels: integers [N]; labels in [0, num_classes).

    Returns:
        float64 [num_classes] on the CPU, NaN for classes without test images.
    """
    num_classes = check_count(num_classes, "num_classes")
    predicted = integers(predicted, "predicted")
    labels = integers(labels, "labels", len(predicted), predicted)
    labels = indices(labels, "labels", num_classes, predicted).cpu()
    right = zeros_of_size("num_classes", num_classes, dtype=torch.float64)
    images = torch.zeros_like(right)
    one = torch.ones_like(labels, dtype=torch.float64)
    right.index_add_(0, labels, one.where(predicted.cpu() == labels, 0))
    images.index_add_(0, labels, one)
    return right.div_(images)


def accuracy_by_band(
    predicted: Array, labels: Array, train_counts: Array, minimums: Sequence[int] = (101, 20, 1)
) -> list[Band]:
    """Accuracy on head, middle and tail: on classes by their number of training images.

    Args:
        predicted, labels: integers [N] of the test images; labels in [0, C).
        train_counts: integers [C], training images of each class.
        minimums: training images that a class of each band has at least, descending; the band ends
            below the one before. The default is the many-, medium- and few-shot split that
            long-tailed benchmarks have (more than 100, 20 to 100, fewer than 20); (10, 4, 1) are
            the groups of Aggregate-and-Disperse. Classes with fewer images than the last are left
            out.

    Returns:
        one `Band` for each of `minimums`.
    """
    counts = integers(train_counts, "train_counts").cpu()
    minimums = check_counts(minimums, "minimums", minimum=0)
    if not minimums or any(a <= b for a, b in pairwise(minimums)):
        raise ValueError(f"minimums: expected one or more numbers, descending, got {minimums}")
    predicted = integers(predicted, "predicted")
    labels = integers(labels, "labels", len(predicted), predicted)
    labels = indices(labels, "labels", len(counts), predicted).cpu()
    right = predicted.cpu() == labels
    bands = []
    for least, above in zip(minimums, [None, *minimums], strict=False):
        inside = counts[labels] >= least
        if above is not None:
            inside &= counts[labels] < above
        bands.append(
            Band(
                least,
                None if above is None else above - 1,
                float(right[inside].double().mean()),
                int(inside.sum()),
                len(labels[inside].unique()),
            )
        )
    return bands


def _binary(value: Array, name: str) -> Tensor:
    value = as_tensor(value, name)
    if value.dtype not in (torch.bool, *INTEGER):
        raise TypeError(f"{name}: expected dtype bool or integers, got {value.dtype}")
    if value.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [N] or [N, attributes], got {list(value.shape)}")
    if ((value != 0) & (value != 1)).any():
        raise ValueError(f"{name}: expected 0 and 1 only")
    return (value if value.ndim == 2 else value[:, None]).bool()
