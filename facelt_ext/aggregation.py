"""Aggregation: tail classes that look alike are put together into super classes.

Step I of Aggregate-and-Disperse (Ma et al., Pattern Recognition 2020, section 3.3.1): the mean
feature of each class, the split into head and tail, k-means within each tail group.

    means, counts = class_means(model, loader, num_classes)
    super_classes = aggregate(means, counts)
    labels = super_classes.coarse_labels(labels)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import (
    LARGEST_INTEGER,
    check_class_range,
    check_count,
    check_counts,
    check_data,
    check_flag,
    check_integers,
    check_matrix,
    zeros_of_size,
)
from facelt_ext._model_features import batches_of, checked_features, chosen_device, evaluating
from facelt_ext._super_classes import SuperClasses
from facelt_ext.clustering import kmeans

__all__ = [
    "ClassGroups",
    "ClassMeans",
    "SuperClasses",
    "aggregate",
    "class_means",
    "split_classes",
]


class ClassMeans(NamedTuple):
    """means float32 [num_classes, D] and counts int64 [num_classes], the samples of each class.

    A class without samples has the mean 0.
    """

    means: Tensor
    counts: Tensor


class ClassGroups(NamedTuple):
    """Class labels, int64, ascending: those of the head, and those of each tail group."""

    head: Tensor
    tails: tuple[Tensor, ...]


def class_means(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[Sequence[Tensor]],
    num_classes: int,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ClassMeans:
    """The mean feature of each class (eq. 4), in one pass over the data.

    Features are added up in float64 on the CPU, in the order of the loader: two passes over the
    same features give the same bits. Each batch waits for the device.

    Args:
        model: inputs -> features [B, D], finite. It runs under the caller's autocast. A module is
            set to eval during the pass; each of its submodules has its own mode again afterwards,
            also after an error.
        loader: yields tuples or lists that begin with inputs (a tensor) and labels (integers [B]
            in [0, num_classes)). No gradients are recorded.
        num_classes: how many rows the result has.
        device: where inputs are moved to; the model is not moved. Default: where the first
            parameter or buffer of the model is, else the CPU.
        progress: whether to show a progress bar, which needs tqdm.

    Returns:
        ClassMeans on the CPU.

    Raises:
        ImportError: `progress` without tqdm.
        TypeError, ValueError: a batch, its features or its labels are not as above, with the
            number of the batch; the loader yields nothing.
    """
    num_classes = check_count(num_classes, "num_classes")
    device = chosen_device(model, device)
    counts = zeros_of_size("num_classes", num_classes, dtype=torch.int64)
    sums = None
    # No inference mode: a model that keeps tensors from its forward could not be trained later.
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches_of(loader, progress, "class means")):
            features, labels = checked_features(model, batch, device, number)
            check_class_range(labels, f"loader: labels of batch {number}", num_classes, None)
            if sums is None:
                sizes = num_classes, features.shape[1]
                sums = zeros_of_size("num_classes", *sizes, dtype=torch.float64)
            if features.shape[1] != sums.shape[1]:
                raise ValueError(
                    f"model: features of batch {number}: expected {sums.shape[1]} dimensions, as "
                    f"in batch 0, got {features.shape[1]}"
                )
            sums.index_add_(0, labels, features.double())
            counts += labels.bincount(minlength=num_classes)
    if sums is None:
        raise ValueError("loader: expected at least one batch, got none")
    return ClassMeans((sums / counts.clamp(min=1)[:, None]).float(), counts)


def split_classes(counts: Tensor, minimums: Sequence[int] = (10, 4, 1)) -> ClassGroups:
    """Splits classes into the head and tail groups by their numbers of images.

    The default is the paper's split (Table 1): its groups A and B, 10 to 217 images, are the head,
    C (4 to 9) and D (1 to 3) the tail groups.

    Args:
        counts: images of each class, integers [num_classes].
        minimums: images that a class of the head has at least, and a class of each tail group;
            descending, at least 1.

    Raises:
        TypeError: `counts` or `minimums` are not integers.
        ValueError: `minimums` are not as above; a class has fewer images than the last of them.
    """
    minimums = _checked_minimums(minimums)
    counts = _checked_counts(counts)
    if (counts < minimums[-1]).any():
        short = (counts < minimums[-1]).nonzero().flatten()
        raise ValueError(
            f"counts: expected at least {minimums[-1]} images of each class, the last of minimums, "
            f"got fewer for {len(short)} classes, the first of them class {int(short[0])} with "
            f"{int(counts[short[0]])}"
        )
    tails = [
        ((counts >= least) & (counts < below)).nonzero().flatten()
        for below, least in pairwise(minimums)
    ]
    return ClassGroups((counts >= minimums[0]).nonzero().flatten(), tuple(tails))


def aggregate(
    means: Tensor,
    counts: Tensor,
    *,
    minimums: Sequence[int] = (10, 4, 1),
    num_super_classes: Sequence[int] | None = None,
    spherical: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> SuperClasses:
    """Puts tail classes together by k-means on their mean features, each tail group by itself.

    By default a super class holds about as many images as a head class does on average, which is
    the paper's aim (section 4.1): a tail group gets its images / (images of the head / N_h) super
    classes, rounded, at least one. For the groups of the paper's
    Table 1 (28 images per head class; C with 163.5K images, D with 49.9K) that gives 5,801 super
    classes for C and 1,770 for D. The paper took 1,800 for C and 5,400 for D, by its text, which
    is 91 and 9 images per super class; the other way round it would be 30 and 28.

    Args:
        means: a row per class [num_classes, D], on the device that is to find the clusters; the
            rows of head classes are not used.
        counts: images of each class, integers [num_classes].
        minimums: see `split_classes`.
        num_super_classes: how many for each tail group, in [1, classes of the group]; 0 for an
            empty one.
        spherical, seed, progress: see `facelt_ext.clustering.kmeans`.

    Returns:
        SuperClasses with `head` and `tail` in ascending order of the class labels, and super
        classes numbered group after group.

    Raises:
        TypeError, ValueError: an argument is not as above; no class is in the head and
            `num_super_classes` is None.
    """
    means = check_matrix(check_data(means, "means"), "means")
    counts = _checked_counts(counts, means)
    spherical, progress = check_flag(spherical, "spherical"), check_flag(progress, "progress")
    seed = check_count(seed, "seed", minimum=0)
    head, tails = split_classes(counts, minimums)
    _check_finite(means, tails)
    if num_super_classes is None:
        num_super_classes = _default_numbers(counts, head, tails)
    else:
        num_super_classes = _checked_numbers(num_super_classes, tails)
    super_class = torch.empty_like(counts)
    first = 0
    for labels, number in zip(tails, num_super_classes, strict=True):
        if number:
            rows = means[labels.to(means.device)]
            found = kmeans(rows, number, spherical=spherical, seed=seed, progress=progress)
            super_class[labels] = first + found.assignments.cpu()
        first += number
    tail = torch.cat([counts[:0], *tails]).sort().values
    groups = torch.arange(len(tails), device="cpu").repeat_interleave(
        counts.new_tensor(num_super_classes)
    )
    return SuperClasses(head, tail, super_class[tail], counts, groups)


def _checked_counts(counts: Tensor, means: Tensor | None = None) -> Tensor:
    """`counts` as int64 on the CPU, one for each row of `means`."""
    counts = check_integers(check_data(counts, "counts"), "counts")
    if counts.ndim != 1 or (means is not None and len(counts) != len(means)):
        wanted = "[num_classes]" if means is None else f"[{len(means)}], one for each row of means"
        raise ValueError(f"counts: expected shape {wanted}, got {list(counts.shape)}")
    if counts.double().sum() > LARGEST_INTEGER:
        raise ValueError("counts: expected a sum of 64 bits, got a larger one")
    return counts.cpu()


def _checked_minimums(minimums: Sequence[int]) -> list[int]:
    minimums = check_counts(minimums, "minimums")
    if not minimums:
        raise TypeError(f"minimums: expected a tuple or list of ints, got {minimums!r}")
    if any(below <= least for below, least in pairwise(minimums)):
        raise ValueError(f"minimums: expected descending numbers, got {tuple(minimums)}")
    return minimums


def _check_finite(means: Tensor, tails: Sequence[Tensor]) -> None:
    for labels in tails:
        finite = means[labels.to(means.device)].isfinite().all(dim=1)
        if not finite.all():
            row = int(labels[int((~finite).nonzero()[0])])
            raise ValueError(
                f"means: expected finite numbers of tail classes, got others in row {row}"
            )


def _default_numbers(counts: Tensor, head: Tensor, tails: Sequence[Tensor]) -> list[int]:
    head_images = int(counts[head].sum())
    if any(map(len, tails)) and head_images == 0:
        raise ValueError(
            "num_super_classes: expected a number for each tail group, as the default follows the "
            "head and no class is in it"
        )
    return [
        max(1, round(int(counts[labels].sum()) * len(head) / head_images)) if len(labels) else 0
        for labels in tails
    ]


def _checked_numbers(numbers: Sequence[int], tails: Sequence[Tensor]) -> list[int]:
    numbers = check_counts(numbers, "num_super_classes", minimum=0)
    if len(numbers) != len(tails):
        raise ValueError(
            f"num_super_classes: expected {len(tails)} numbers, one for each tail group, "
            f"got {len(numbers)}"
        )
    for group, (number, labels) in enumerate(zip(numbers, tails, strict=True)):
        name = f"num_super_classes[{group}]"
        check_count(number, name, minimum=min(1, len(labels)))
        if number > len(labels):
            raise ValueError(
                f"{name}: expected at most {len(labels)}, the classes of the tail group, "
                f"got {number}"
            )
    return numbers
