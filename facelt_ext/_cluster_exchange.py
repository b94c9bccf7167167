"""Merging near clusters and splitting wide ones, at equal numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facelt_ext._distances import Distances, first_least

if TYPE_CHECKING:
    from facelt_ext.clustering import _Engine

# How often the halves of a cluster that may be split are made anew from their means.
HALVING_STEPS = 2
# Of a gain, in the precision of the means and parts of what the cluster takes off.
ROUNDING = 8


def exchange(engine: _Engine, assignments: Tensor, distances: Tensor) -> float:
    """Exchanges clusters in place; returns by how much that lessens the inertia.

    Args:
        engine: the points.
        assignments: int64 [N], no cluster of which is empty; written to.
        distances: [N], the squared distances to the own centroids.
    """
    if engine.k < 3:
        return 0.0
    worth, means, counts = worths(engine, assignments, engine.k)
    upper = _halves(engine, assignments, distances)
    halves, _, sizes = (
        each.view(engine.k, 2, -1) for each in worths(engine, 2 * assignments + upper, 2 * engine.k)
    )
    gains = halves.sum(1)[:, 0] - worth
    # Points that are equal, but for rounding, are not split.
    splits = (sizes > 0).all(1)[:, 0] & (gains > ROUNDING * torch.finfo(means.dtype).eps * worth)
    gains = torch.where(splits, gains, -torch.inf)
    partner = _nearest_other(means)
    together = (means * counts[:, None] + (means * counts[:, None])[partner]) / (
        counts + counts[partner]
    )[:, None]
    losses = worth + worth[partner] - _worth(engine, together, counts + counts[partner])
    emptied, kept, split, total = _chosen(gains.tolist(), losses.tolist(), partner.tolist())
    if emptied:
        emptied, kept, split = (
            torch.tensor(x, device=assignments.device) for x in (emptied, kept, split)
        )
        new = torch.arange(engine.k, device=assignments.device)
        new[emptied] = kept
        freed = torch.full_like(new, -1)
        freed[split] = emptied
        freed = freed[assignments]
        assignments.copy_(torch.where(upper & (freed >= 0), freed, new[assignments]))
    return total


def worths(engine: _Engine, assignments: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each cluster takes off the sum of squares, [clusters], its mean and its size."""
    means = engine.means(assignments, clusters)
    counts = torch.bincount(assignments, minlength=clusters)
    means = torch.where(counts[:, None] > 0, means, 0)
    return _worth(engine, means, counts), means, counts


def _worth(engine: _Engine, means: Tensor, counts: Tensor) -> Tensor:
    """Sum of |x|^2 - |x - c|^2: n |mean|^2, or 2 n |mean| - n for centroids of length 1."""
    squares = means.double().square().sum(1)
    return counts * (2 * squares.sqrt() if engine.spherical else squares)


def _halves(engine: _Engine, assignments: Tensor, distances: Tensor) -> Tensor:
    """Which points would go to the second half of their cluster, bool [N].

    The halves begin at the point farthest from the centroid and the one farthest from it.
    """
    first = _farthest(assignments, distances, engine.k)
    by_first = engine.own(engine.points[first], assignments)
    second = _farthest(assignments, by_first, engine.k)
    by_second = engine.own(engine.points[second], assignments)
    upper = by_second < by_first
    for _ in range(HALVING_STEPS):
        means = engine.means(2 * assignments + upper, 2 * engine.k).view(engine.k, 2, -1)
        if engine.spherical:
            means = torch.nn.functional.normalize(means, dim=2)
        lower_distances = engine.own(means[:, 0], assignments)
        upper_distances = engine.own(means[:, 1], assignments)
        # An empty half has NaN for a mean, and no point comes nearer to it.
        upper = torch.where(upper_distances.isnan(), upper, upper_distances < lower_distances)
    return upper


def _farthest(assignments: Tensor, distances: Tensor, clusters: int) -> Tensor:
    """The point with the largest distance in each cluster, [clusters]."""
    by_distance = torch.argsort(distances, stable=True)
    order = by_distance[torch.argsort(assignments[by_distance], stable=True)]
    ends = torch.bincount(assignments, minlength=clusters).cumsum(0)
    return order[ends - 1]


def _nearest_other(means: Tensor) -> Tensor:
    """The nearest other mean of each, [k]."""
    nearest = torch.empty(len(means), dtype=torch.int64, device=means.device)
    for part, products in Distances(means, means.square().sum(1)).chunks(means):
        rows = torch.arange(part.start, part.stop, device=means.device)
        products.scatter_(1, rows[:, None], torch.inf)
        nearest[part] = first_least(products)
    return nearest


def _chosen(
    gains: list[float], losses: list[float], partner: list[int]
) -> tuple[list[int], list[int], list[int], float]:
    """Clusters to empty, those that take their points, as many to split, and the gain of it all."""
    used = [False] * len(gains)
    by_gain = iter(sorted(range(len(gains)), key=lambda c: -gains[c]))
    emptied, kept, split, total = [], [], [], 0.0
    wide = next(by_gain)
    for near in sorted(range(len(losses)), key=lambda c: losses[c]):
        if used[near] or used[partner[near]]:
            continue
        while wide is not None and (used[wide] or wide in (near, partner[near])):
            wide = next(by_gain, None)
        if wide is None or gains[wide] <= losses[near]:
            break
        used[near] = used[partner[near]] = used[wide] = True
        emptied.append(near)
        kept.append(partner[near])
        split.append(wide)
        total += gains[wide] - losses[near]
    return emptied, kept, split, total
