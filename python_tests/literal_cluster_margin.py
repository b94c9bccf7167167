"""CLMLE's eq. 9 as literal loops over NumPy float64, with its gradient written out by hand."""

from __future__ import annotations

import math

import numpy as np
from literal import IGNORED, Array, members_of


def cluster_margin_loss(
    x: Array,
    cluster_index: Array,
    cluster_class: Array,
    between_margin: float,
    within_margin: float,
    normalize: bool,
    upstream: Array,
) -> tuple[Array, Array, list[float]]:
    """The losses [B]; the gradient of their sum, weighted with the upstream gradient, by x; and
    what each hinge cuts off at 0."""
    members = members_of(cluster_index)
    means = {m: sum(x[i] for i in samples) / len(samples) for m, samples in members.items()}
    centroids = {m: unit(mean) if normalize else mean for m, mean in means.items()}
    losses, grad = np.zeros(len(x)), np.zeros_like(x)
    by_centroid = {m: np.zeros_like(mean) for m, mean in means.items()}
    exceedings = []
    for i, m in enumerate(cluster_index.tolist()):
        if m == IGNORED:
            continue
        others = [k for k in members if k != m]
        same = [k for k in others if cluster_class[k] == cluster_class[m]]
        different = [k for k in others if cluster_class[k] != cluster_class[m]]
        for margin, chosen in [(between_margin, different), (within_margin, same)]:
            if not chosen:
                continue
            logits = [float(np.dot(x[i], centroids[k])) for k in chosen]
            log_sum = log_sum_exp(logits)
            exceeding = margin - float(np.dot(x[i], centroids[m])) + log_sum
            exceedings.append(exceeding)
            if exceeding <= 0:
                continue
            losses[i] += exceeding
            grad[i] -= upstream[i] * centroids[m]
            by_centroid[m] -= upstream[i] * x[i]
            for k, logit in zip(chosen, logits, strict=True):
                share = math.exp(logit - log_sum)
                grad[i] += upstream[i] * share * centroids[k]
                by_centroid[k] += upstream[i] * share * x[i]
    for m, samples in members.items():
        by_mean = by_centroid[m]
        if normalize:
            by_mean = through_unit(by_mean, means[m])
        for i in samples:
            grad[i] += by_mean / len(samples)
    return losses, grad, exceedings


def log_sum_exp(logits: list[float]) -> float:
    largest = max(logits)
    return largest + math.log(sum(math.exp(logit - largest) for logit in logits))


def unit(mean: Array) -> Array:
    norm = math.sqrt(float(np.dot(mean, mean)))
    return mean / norm if norm > 0 else mean


def through_unit(by_unit: Array, mean: Array) -> Array:
    """The gradient by a mean, of the one by its unit vector."""
    norm = math.sqrt(float(np.dot(mean, mean)))
    if norm == 0:
        return np.zeros_like(mean)
    direction = mean / norm
    return (by_unit - float(np.dot(by_unit, direction)) * direction) / norm
