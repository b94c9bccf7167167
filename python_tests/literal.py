"""The papers' formulas as literal loops over NumPy float64: the truth the reference is tested with.

Gradients are written out by hand, from the formulas, not differentiated by a library.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

Array = np.ndarray
# Samples with this label take no part.
IGNORED = -100


def members_of(labels: Array) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        if label != IGNORED:
            members.setdefault(label, []).append(i)
    return dict(sorted(members.items()))


def squared_distance(a: Array, b: Array) -> float:
    total = 0.0
    for u, v in zip(a.tolist(), b.tolist(), strict=True):
        total += (u - v) ** 2
    return total


def sorted_pairs(x: Array, members: list[int]) -> list[tuple[float, int, int]]:
    """All pairs (squared distance, a, b), largest first, ties in batch order."""
    pairs = [(squared_distance(x[a], x[b]), a, b) for a, b in combinations(members, 2)]
    return sorted(pairs, key=lambda pair: -pair[0])


def centroids_of(x: Array, labels: Array) -> list[Array]:
    return [sum(x[i] for i in m) / len(m) for m in members_of(labels).values()]


def nearest_pair(points: list[Array]) -> tuple[float, int, int] | None:
    best = None
    for a, b in combinations(range(len(points)), 2):
        d = squared_distance(points[a], points[b])
        if best is None or d < best[0]:
            best = (d, a, b)
    return best


def range_loss(
    x: Array,
    labels: Array,
    k: int,
    margin: float,
    alpha: float,
    beta: float,
    squared: bool,
) -> tuple[float, Array]:
    """The loss (eqs. 1-4) and its gradient by x (eqs. 5-7, with the signs that eq. 3 implies)."""
    loss, grad = 0.0, np.zeros_like(x)
    for members in members_of(labels).values():
        value, slope = class_term(x, members, k, squared)
        loss += alpha * value
        grad += alpha * slope
    value, slope = inter_term(x, labels, margin, squared)
    return loss + beta * value, grad + beta * slope


def class_term(x: Array, members: list[int], k: int, squared: bool) -> tuple[float, Array]:
    grad = np.zeros_like(x)
    chosen = sorted_pairs(x, members)[:k]
    if not chosen or chosen[-1][0] == 0:
        return 0.0, grad
    ranges = [d if squared else d**0.5 for d, _, _ in chosen]
    reciprocals = sum(1 / r for r in ranges)
    for r, (_, a, b) in zip(ranges, chosen, strict=True):
        by_range = len(chosen) / (r * reciprocals) ** 2
        by_a = by_range * (2 * (x[a] - x[b]) if squared else (x[a] - x[b]) / r)
        grad[a] += by_a
        grad[b] -= by_a
    return len(chosen) / reciprocals, grad


def inter_term(x: Array, labels: Array, margin: float, squared: bool) -> tuple[float, Array]:
    grad = np.zeros_like(x)
    classes = list(members_of(labels).values())
    centroids = centroids_of(x, labels)
    nearest = nearest_pair(centroids)
    if nearest is None:
        return 0.0, grad
    d, q, r = nearest
    distance = d if squared else d**0.5
    if distance >= margin:
        return 0.0, grad
    if d > 0:
        toward = (centroids[q] - centroids[r]) * (2 if squared else 1 / distance)
        for i in classes[q]:
            grad[i] -= toward / len(classes[q])
        for i in classes[r]:
            grad[i] += toward / len(classes[r])
    return margin - distance, grad


def has_near_tie(x: Array, labels: Array, k: int, tolerance: float) -> bool:
    """Whether rounding of the size of `tolerance` could change which pairs are selected."""
    for members in members_of(labels).values():
        largest = [d for d, _, _ in sorted_pairs(x, members)[: k + 1]]
        if any(a - b <= tolerance * a for a, b in zip(largest, largest[1:], strict=False)):
            return True
    centers = sorted(squared_distance(a, b) for a, b in combinations(centroids_of(x, labels), 2))
    scale = float(np.max(x * x, initial=0.0)) * x.shape[1]
    return len(centers) > 1 and centers[1] - centers[0] <= tolerance * max(centers[1], scale)
