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
    check_values,
)
from facelt_ext._operators import operator
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.functional.groups import classes_and_counts, group_labels, number_of_classes
from facelt_ext.types import ClassCentroids, MinCentroidDistance, compute_dtype


def class_centroids(
    features: Tensor,
    labels: Tensor,
    *,
    max_classes: int | None = None,
    ignore_index: int | None = -100,
) -> ClassCentroids:
    """The mean feature of each class in the batch (Range Loss, eq. 4).

    Args:
        features: [B, D], float64, float32, bfloat16 or float16.
        labels: [B], any integers.
        max_classes: the number of rows to give, for no host synchronisation on CUDA and for
            torch.compile. None gives exactly as many as there are classes. A number too small is a
            ValueError on CPU; on CUDA the centroids are NaN, unless `debug_checks` are on.
        ignore_index: samples with this label take no part, and their gradient is 0, whatever their
            features are. None: every label is a class.

    Returns:
        ClassCentroids: `classes` int64 [C] in ascending order; `centroids` [C, D], float64 for
        float64 features and float32 otherwise, differentiable; `counts` int64 [C]. Rows beyond the
        classes are zeros with count 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    features = check_matrix(features, "features")
    labels = check_integers(labels, "labels", features, "features")
    if max_classes is not None:
        max_classes = check_count(max_classes, "max_classes", minimum=0)
        check_size("max_classes", max_classes, features.shape[1])
    ignore_index = check_ignore_index(ignore_index)
    backend = _backend.of_call("class_centroids", features)
    if backend == "reference":
        return reference.class_centroids(
            features, labels, max_classes=max_classes, ignore_index=ignore_index
        )
    groups = group_labels(labels, ignore_index, backend)
    rows = number_of_classes(groups, max_classes)
    centroids, counts = ClassCentroidsFunction.apply(
        features, labels, groups, rows, ignore_index, backend
    )
    return ClassCentroids(classes_and_counts(labels, groups, rows)[0], centroids, counts)


def min_centroid_distance(
    centroids: Tensor, counts: Tensor | None = None, *, squared: bool = True
) -> MinCentroidDistance:
    """The smallest distance between two centroids (D_center of Range Loss, eq. 3).

    Args:
        centroids: [C, D], float64, float32, bfloat16 or float16.
        counts: [C] integers; rows of count 0 are ignored. None: no row is.
        squared: the squared Euclidean distance; otherwise the distance, with gradient 0 at 0.

    Returns:
        MinCentroidDistance: `distance` [], differentiable; `pair` int64 [2], the rows a < b it was
        found at, the first such pair at ties. Fewer than two centroids: +inf, pair -1, gradient 0.
        A centroid that is not finite: NaN, pair -1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    centroids = check_matrix(centroids, "centroids")
    check_values(centroids, "centroids")
    squared = check_flag(squared, "squared")
    if counts is not None:
        counts = check_integers(counts, "counts", centroids, "centroids")
    backend = _backend.of_call("min_centroid_distance", centroids)
    if backend == "reference":
        return reference.min_centroid_distance(centroids, counts, squared=squared)
    if counts is None:
        counts = torch.ones(centroids.shape[0], dtype=torch.int64, device=centroids.device)
    centroids = centroids.to(compute_dtype(centroids.dtype))
    return MinCentroidDistance(
        *MinCentroidDistanceFunction.apply(centroids, counts, squared, backend)
    )


class ClassCentroidsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, labels, groups, rows, ignore_index, backend):
        centroids, counts = _centroids_forward(
            features,
            groups.order,
            groups.offsets,
            groups.num_classes,
            rows,
            backend,
        )
        ctx.save_for_backward(features, labels, groups.segment, counts)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        ctx.mark_non_differentiable(counts)
        return centroids, counts

    @staticmethod
    def backward(ctx, grad_centroids, _):
        features, labels, segment, counts = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor) -> Tensor:
                return reference.class_centroids(
                    x, labels, max_classes=len(counts), ignore_index=ctx.ignore_index
                ).centroids

            grad = gradient_through_reference(again, features, grad_centroids)
        else:
            grad = _centroids_backward(grad_centroids, segment, counts, features.dtype, ctx.backend)
        return grad, None, None, None, None, None


class MinCentroidDistanceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, centroids, counts, squared, backend):
        distance, pair = _distance_forward(centroids, counts, squared, backend)
        ctx.save_for_backward(centroids, counts, distance, pair)
        ctx.squared, ctx.backend = squared, backend
        ctx.mark_non_differentiable(pair)
        return distance, pair

    @staticmethod
    def backward(ctx, grad_distance, _):
        centroids, counts, distance, pair = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor) -> Tensor:
                return reference.min_centroid_distance(x, counts, squared=ctx.squared).distance

            grad = gradient_through_reference(again, centroids, grad_distance)
        else:
            grad = _distance_backward(
                grad_distance,
                centroids,
                distance,
                pair,
                ctx.squared,
                ctx.backend,
            )
        return grad, None, None, None


def _centroids_fake(features, order, offsets, num_classes, rows, backend):
    return (
        features.new_empty(rows, features.shape[1], dtype=compute_dtype(features.dtype)),
        order.new_empty(rows),
    )


@operator(
    "class_centroids_forward(Tensor features, Tensor order, Tensor offsets, Tensor num_classes,"
    " SymInt rows, str backend) -> (Tensor, Tensor)",
    _centroids_fake,
)
def _centroids_forward(features, order, offsets, num_classes, rows, backend):
    features = features.contiguous()
    outputs = _centroids_fake(features, order, offsets, num_classes, rows, backend)
    _native.run(
        backend, features, "class_centroids_forward", features, order, offsets, num_classes,
        *outputs,
    )  # fmt: skip
    return outputs


def _centroids_backward_fake(grad_centroids, segment, counts, dtype, backend):
    return grad_centroids.new_empty(segment.shape[0], grad_centroids.shape[1], dtype=dtype)


@operator(
    "class_centroids_backward(Tensor grad_centroids, Tensor segment, Tensor counts,"
    " ScalarType dtype, str backend) -> Tensor",
    _centroids_backward_fake,
)
def _centroids_backward(grad_centroids, segment, counts, dtype, backend):
    grad_features = _centroids_backward_fake(grad_centroids, segment, counts, dtype, backend)
    _native.run(
        backend, grad_centroids, "class_centroids_backward", grad_centroids.contiguous(), segment,
        counts, grad_features,
    )  # fmt: skip
    return grad_features


def _distance_fake(centroids, counts, squared, backend):
    return centroids.new_empty(()), counts.new_empty(2)


@operator(
    "min_centroid_distance_forward(Tensor centroids, Tensor counts, bool squared, str backend)"
    " -> (Tensor, Tensor)",
    _distance_fake,
)
def _distance_forward(centroids, counts, squared, backend):
    outputs = _distance_fake(centroids, counts, squared, backend)
    workspace = _native.workspace(backend, centroids, "min_centroid_distance", centroids.shape[0])
    _native.run(
        backend, centroids, "min_centroid_distance_forward", centroids.contiguous(),
        counts.contiguous(), squared, *outputs, workspace,
    )  # fmt: skip
    return outputs


def _distance_backward_fake(grad_distance, centroids, distance, pair, squared, backend):
    return torch.empty_like(centroids, memory_format=torch.contiguous_format)


@operator(
    "min_centroid_distance_backward(Tensor grad_distance, Tensor centroids, Tensor distance,"
    " Tensor pair, bool squared, str backend) -> Tensor",
    _distance_backward_fake,
)
def _distance_backward(grad_distance, centroids, distance, pair, squared, backend):
    centroids = centroids.contiguous()
    grad_centroids = torch.empty_like(centroids)
    _native.run(
        backend, centroids, "min_centroid_distance_backward", grad_distance, centroids, distance,
        pair, squared, grad_centroids,
    )  # fmt: skip
    return grad_centroids
