"""Aggregate-and-Disperse's eqs. 6-8 as literal loops over NumPy float64, gradients by hand."""

from __future__ import annotations

import math

import numpy as np
from literal_softmax import dot

Array = np.ndarray


def members_of(super_class: Array, own: int) -> list[int]:
    return [i for i, s in enumerate(super_class.tolist()) if s == own]


def mean_row(weight: Array, members: list[int]) -> Array:
    """Eq. 7."""
    total = np.zeros(weight.shape[1])
    for i in members:
        total = total + weight[i]
    return total / len(members)


def super_class_mean(
    weight: Array, super_class: Array, count: int, upstream: Array
) -> tuple[Array, Array]:
    """The means, and the gradient of their sum, weighted with `upstream`, by the weight."""
    means, grad = np.zeros((count, weight.shape[1])), np.zeros_like(weight)
    for s in range(count):
        members = members_of(super_class, s)
        means[s] = mean_row(weight, members)
        for i in members:
            grad[i] += upstream[s] / len(members)
    return means, grad


def terms_of(
    feature: Array, head: Array, tail: Array, super_class: Array, label: int
) -> list[tuple[float, float, Array, list[int]]]:
    """The denominator's terms c * exp(z) of eq. 6, or of eq. 8 for a tail's sample.

    Of each: c, z, the row whose product with the feature z is, and the classes whose mean it is.
    """
    own = None if label < len(head) else super_class[label - len(head)]
    terms = [(1.0, dot(row, feature), row, [h]) for h, row in enumerate(head)]
    for i, s in enumerate(super_class.tolist()):
        members = [i] if s == own else members_of(super_class, s)
        row = mean_row(tail, members)
        # The members of an aggregated super class have the same term each, 1 / n of it.
        terms.append((1 / len(members), dot(row, feature), row, [len(head) + m for m in members]))
    return terms


def dispersion_softmax_loss(
    features: Array,
    head: Array,
    tail: Array,
    super_class: Array,
    labels: Array,
    upstream: Array,
    ignore_index: int,
) -> list[Array]:
    """The loss of each sample, and the gradients of their sum, weighted with `upstream`, by the
    features and the rows of the heads and of the tails."""
    losses, grad_x = np.zeros(len(features)), np.zeros_like(features)
    grad_w = np.zeros((len(head) + len(tail), features.shape[1]))
    for i, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        terms = terms_of(features[i], head, tail, super_class, label)
        own_row = head[label] if label < len(head) else tail[label - len(head)]
        own_logit = dot(own_row, features[i])
        largest = max(z for _, z, _, _ in terms)
        total = sum(c * math.exp(z - largest) for c, z, _, _ in terms)
        losses[i] = largest + math.log(total) - own_logit
        grad_x[i] -= upstream[i] * own_row
        grad_w[label] -= upstream[i] * features[i]
        for c, z, row, classes in terms:
            by_logit = upstream[i] * c * math.exp(z - largest) / total
            grad_x[i] += by_logit * row
            for k in classes:
                grad_w[k] += by_logit * features[i] / len(classes)
    return [losses, grad_x, grad_w[: len(head)], grad_w[len(head) :]]
