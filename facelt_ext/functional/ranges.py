from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native, reference
from facelt_ext._checks import (
    check_count,
    check_flag,
    check_ignore_index,
    check_integers,
    check_matrix,
    check_size,
    check_tensor,
)
from facelt_ext._operators import operator
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.functional.groups import classes_and_counts, group_labels, number_of_classes
from facelt_ext.types import ClassRanges, compute_dtype


def class_ranges(
    features: Tensor,
    labels: Tensor,
    k: int = 2,
    *,
    squared: bool = True,
    max_classes: int | None = None,
    ignore_index: int | None = -100,
) -> ClassRanges:
    """The k largest distances between samples of each class in the batch (Range Loss, eq. 2).

    Classes come in ascending label order. A class of n samples has n(n-1)/2 distinct pairs; of
    those the min(k, pairs) largest are given, largest first. Ties go to the pair that comes first
    in the batch. Distances are sums of squared differences, so near-duplicates do not cancel.

    Args:
        features: [B, D], float64, float32, bfloat16 or float16.
        labels: [B], any integers.
        k: how many ranges of each class, at least 1.
        squared: squared Euclidean distances; otherwise the distances, with gradient 0 at 0.
        max_classes: the number of rows to give, for no host synchronisation on CUDA and for
            torch.compile. None gives exactly as many as there are classes. A number too small is a
            ValueError on CPU; on CUDA the ranges are NaN, unless `debug_checks` are on.
        ignore_index: samples with this label take no part, and their gradient is 0, whatever their
            features are. None: every label is a class.

    Returns:
        ClassRanges: `classes` int64 [C]; `ranges` [C, k], float64 for float64 features and float32
        otherwise, differentiable; `pairs` int64 [C, k, 2], the samples a < b of each range;
        `counts` int64 [C]. Ranges that a class lacks are 0 and their pairs -1; rows beyond the
        classes have count 0 and class 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    k = check_count(k, "k")
    squared = check_flag(squared, "squared")
    if max_classes is not None:
        max_classes = check_count(max_classes, "max_classes", minimum=0)
        check_size("max_classes, k", max_classes, k)
    check_size("k", features.shape[0], k)
    ignore_index = check_ignore_index(ignore_index)
    backend = _backend.of_call("class_ranges", features)
    if backend == "reference":
        return reference.class_ranges(
            features, labels, k, squared=squared, max_classes=max_classes, ignore_index=ignore_index
        )
    groups = group_labels(labels, ignore_index, backend)
    rows = number_of_classes(groups, max_classes)
    ranges, pairs = ClassRangesFunction.apply(
        features, labels, groups, rows, k, squared, ignore_index, backend
    )
    classes, counts = classes_and_counts(labels, groups, rows)
    return ClassRanges(classes, ranges, pairs, counts)


class ClassRangesFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, labels, groups, rows, k, squared, ignore_index, backend):
        ranges, pairs = _forward(
            features, labels, groups.order, groups.offsets, groups.num_classes, rows, k, squared,
            backend,
        )  # fmt: skip
        ctx.save_for_backward(features, labels, groups.segment, ranges, pairs)
        ctx.squared, ctx.ignore_index, ctx.backend = squared, ignore_index, backend
        ctx.mark_non_differentiable(pairs)
        return ranges, pairs

    @staticmethod
    def backward(ctx, grad_ranges, _):
        features, labels, segment, ranges, pairs = ctx.saved_tensors
        grad_ranges = check_tensor(grad_ranges, "grad_ranges")
        if torch.is_grad_enabled():
            rows, k = ranges.shape

            def again(x: Tensor) -> Tensor:
                return reference.class_ranges(
                    x, labels, k, squared=ctx.squared, max_classes=rows,
                    ignore_index=ctx.ignore_index,
                ).ranges  # fmt: skip

            grad = gradient_through_reference(again, features, grad_ranges)
        else:
            scale = 2 * grad_ranges if ctx.squared else grad_ranges / ranges
            if not ctx.squared:
                scale = torch.where(ranges == 0, 0, scale)
            scale = torch.where(ranges.isnan(), ranges, scale)
            grad = _backward(features, segment, pairs, scale, ctx.backend)
        return grad, *[None] * 7


def _forward_fake(features, labels, order, offsets, num_classes, rows, k, squared, backend):
    return (
        features.new_empty(rows, k, dtype=compute_dtype(features.dtype)),
        labels.new_empty(rows, k, 2),
    )


@operator(
    "class_ranges_forward(Tensor features, Tensor labels, Tensor order, Tensor offsets,"
    " Tensor num_classes, SymInt rows, SymInt k, bool squared, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(features, labels, order, offsets, num_classes, rows, k, squared, backend):
    features, labels = features.contiguous(), labels.contiguous()
    ranges, pairs = _forward_fake(
        features, labels, order, offsets, num_classes, rows, k, squared, backend
    )
    workspace = _native.workspace(backend, features, "class_ranges", features.shape[0], k)
    _native.run(
        backend, features, "class_ranges_forward", features, labels, order, offsets, num_classes,
        squared, ranges, pairs, workspace,
    )  # fmt: skip
    return ranges, pairs


def _backward_fake(features, segment, pairs, pair_scale, backend):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@operator(
    "class_ranges_backward(Tensor features, Tensor segment, Tensor pairs, Tensor pair_scale,"
    " str backend) -> Tensor",
    _backward_fake,
)
def _backward(features, segment, pairs, pair_scale, backend):
    features = features.contiguous()
    grad = torch.empty_like(features)
    _native.run(
        backend, features, "class_ranges_backward", features, segment, pairs,
        pair_scale.contiguous(), grad,
    )  # fmt: skip
    return grad
