"""LMLE's eqs. 4 and 5 as literal loops over NumPy float64, with the gradient by hand."""

from __future__ import annotations

import numpy as np
from literal import IGNORED, Array, squared_distance


def quintuplet(x: Array, labels: Array, clusters: Array, anchor: int) -> list[int | None]:
    """p+, p-, p-- and n of an anchor, the first in the batch of equally distant ones."""
    others = [j for j in range(len(x)) if j != anchor and labels[j] != IGNORED]
    distance = {j: squared_distance(x[anchor], x[j]) for j in others}
    same_class = [j for j in distance if labels[j] == labels[anchor]]
    same_cluster = [j for j in same_class if clusters[j] == clusters[anchor]]
    other_cluster = [j for j in same_class if clusters[j] != clusters[anchor]]
    other_class = [j for j in distance if labels[j] != labels[anchor]]
    farthest, nearest = max, min
    return [
        choose(found, key=lambda j: distance[j]) if found else None
        for choose, found in [
            (farthest, same_cluster),
            (nearest, other_cluster),
            (farthest, same_class),
            (nearest, other_class),
        ]
    ]


def quintuplet_loss(
    x: Array, labels: Array, clusters: Array, margins: tuple[float, float, float], upstream: Array
) -> tuple[Array, Array, Array, list[float]]:
    """The anchors' losses [B]; the gradient of their sum, weighted by the upstream gradient, by x;
    whether each has a hinge; and what each hinge cuts off at 0."""
    losses, grad = np.zeros(len(x)), np.zeros_like(x)
    with_hinge, exceedings = np.zeros(len(x), dtype=bool), []
    for i in range(len(x)):
        if labels[i] == IGNORED:
            continue
        found = quintuplet(x, labels, clusters, i)
        for margin, near, far in zip(margins, found[:-1], found[1:], strict=True):
            if near is None or far is None:
                continue
            with_hinge[i] = True
            exceeding = margin + squared_distance(x[i], x[near]) - squared_distance(x[i], x[far])
            exceedings.append(exceeding)
            if exceeding <= 0:
                continue
            losses[i] += exceeding
            for sign, j in [(1, near), (-1, far)]:
                grad[i] += sign * upstream[i] * 2 * (x[i] - x[j])
                grad[j] -= sign * upstream[i] * 2 * (x[i] - x[j])
    return losses, grad, with_hinge, exceedings
