"""k-means on matrix products, on CPU and GPU: what aggregation is made with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext import _backend, reference
from facelt_ext._autocast import without_autocast
from facelt_ext._balanced_assignment import BalancedAssignment
from facelt_ext._checks import check_count, check_data, check_flag, check_matrix, check_number
from facelt_ext._cluster_exchange import exchange
from facelt_ext._distances import Distances
from facelt_ext.functional.super_classes import segment_mean, sorted_members
from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype

# Candidates that the seeding draws at a time: few at first, where each seed changes much.
SEED_BLOCK = (8, 512)
# By which points are scaled at most: powers of 2 that the dtype holds, with room for products.
LARGEST_EXPONENT = {torch.float32: 120, torch.float64: 1000}

__all__ = ["Clustering", "kmeans"]


class Clustering(NamedTuple):
    """What k-means gives.

    centroids: [k, D] in x's dtype, float32 for halves: the mean of each cluster's members (its
        direction, if spherical).
    assignments: int64 [N], the cluster of each point, in [0, k); no cluster is empty.
    inertia: sum of the squared distances to the own centroid.
    iterations: how often the points were assigned.
    converged: whether the last iteration changed nothing, or too little to go on.
    """

    centroids: Tensor
    assignments: Tensor
    inertia: float
    iterations: int
    converged: bool


@without_autocast
def kmeans(
    x: Tensor,
    k: int,
    *,
    spherical: bool = False,
    balanced: bool = False,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: bool = False,
) -> Clustering:
    """Lloyd's k-means from k-means++ seeds (Arthur and Vassilvitskii 2007), with exchanges.

    Seeds may fall twice into one dense place and leave out another, which Lloyd's steps do not
    mend. Between them, pairs of near clusters are therefore merged and wide ones split, as long as
    the splits gain more than the merges lose.

    Args:
        x: [N, D], float64, float32, bfloat16 or float16, finite. Halves are reckoned in float32.
        k: the number of clusters, in [1, N].
        spherical: clusters of directions: rows and centroids have unit length. Zeros stay zeros.
        balanced: the sizes of clusters differ by at most one. Nothing is exchanged then.
        max_iterations: at least 1.
        tolerance: it ends when an iteration lessens the inertia by no more than this part of it.
        seed: a non-negative integer. The result depends on it and on nothing else that is random.
        progress: shows a bar (needs tqdm).

    Returns:
        A `Clustering`. Each centroid is what its members make it. They were assigned to the nearest
        (ties to the first) of the centroids before the last step, which are those returned if the
        assignments had stopped changing. A cluster to which no point was nearest has taken the one
        that was farthest from its own centroid and not alone there; so do clusters beyond the
        number of different points. The last step may have exchanged clusters: for a gain below the
        tolerance, or if `converged` is False.

        If balanced, their squared distances to the centroids before the last step add up to at most
        1 % more than the least sum that such sizes allow, but for rounding. This takes a few k x k
        matrices. Above 2,048 clusters it goes without them, and the sum may be larger.

        Points are compared by matrix products in x's dtype (float32 for halves), less their mean:
        in float32, distances below some 1e-3 of the data's extent are not told apart. The inertia
        is a sum of squared differences. Two runs on the same machine give the same bits, also
        under autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
        ImportError: progress without tqdm.
    """
    x = _check_points(x)
    k = check_count(k, "k")
    if k > len(x):
        raise ValueError(f"k: expected at most {len(x)}, the rows of x, got {k}")
    max_iterations = check_count(max_iterations, "max_iterations")
    tolerance = check_number(tolerance, "tolerance", torch.float64)
    if tolerance < 0:
        raise ValueError(f"tolerance: expected at least 0, got {tolerance}")
    seed = check_count(seed, "seed", minimum=0)
    spherical, balanced = check_flag(spherical, "spherical"), check_flag(balanced, "balanced")
    progress = check_flag(progress, "progress")
    x = x.to(compute_dtype(x.dtype)).contiguous()
    points, mean, scale = (unit_rows(x)[0], 0, 1) if spherical else _centered(x)
    engine = _Engine(points, k, spherical)
    balance = BalancedAssignment(engine, k) if balanced else None
    seeds, first = _seeds(engine, np.random.default_rng(seed))
    centroids, previous = engine.points[seeds], None
    inertia, converged, iterations, exchanging = torch.inf, False, 0, not balanced
    with _bar(max_iterations, progress) as bar:
        while not converged and iterations < max_iterations:
            if balance is not None:
                assignments, distances = _balanced(engine, balance, centroids, previous)
            else:
                # The seeding knows the first already.
                assignments, distances = first if iterations == 0 else engine.nearest(centroids)
                _fill_empty_clusters(assignments, distances, k)
            before, inertia = inertia, float(distances.sum(dtype=torch.float64))
            settled = before - inertia <= tolerance * before < torch.inf
            settled |= previous is not None and torch.equal(assignments, previous)
            if balance is None and (exchanging or settled):
                gain = exchange(engine, assignments, distances)
                exchanging = gain > tolerance * inertia
            converged = settled and not exchanging
            centroids, previous = engine.centroids(assignments), assignments
            iterations += 1
            bar(inertia / scale / scale)
    inertia = engine.inertia(centroids, assignments) / scale / scale
    return Clustering((centroids + mean) / scale, assignments, inertia, iterations, converged)


def _balanced(
    engine: _Engine, balance: BalancedAssignment, centroids: Tensor, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Those before are kept where the new ones, which need not be the best, are none better."""
    assignments = balance.assign(centroids)
    distances = engine.own(centroids, assignments)
    if previous is not None:
        kept = engine.own(centroids, previous)
        if kept.sum() <= distances.sum():
            return previous, kept
    return assignments, distances


def _check_points(x: Tensor) -> Tensor:
    x = check_matrix(check_data(x, "x"), "x")
    if not x.isfinite().all():
        raise ValueError("x: expected finite numbers, got NaN or infinity")
    return x


def _centered(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """scale * x less its mean, that mean, and a power of 2 with which squares stay in range.

    Far from the origin, |c|^2 - 2 x.c would cancel.
    """
    _, exponent = math.frexp(float(x.abs().amax()))
    most = LARGEST_EXPONENT[x.dtype]
    scale = 2.0 ** -min(max(exponent, -most), most)
    x = x * scale
    mean = x.mean(0)
    return x - mean, mean, scale


class _Engine(Distances):
    """The points, and what k clusters of them have for means."""

    def __init__(self, points: Tensor, k: int, spherical: bool) -> None:
        super().__init__(points, points.square().sum(1))
        self.k, self.spherical = k, spherical

    def means(self, assignments: Tensor, clusters: int) -> Tensor:
        """NaN for a cluster without points."""
        backend = _backend.current()
        if backend == "reference":
            return reference.super_class_mean(self.points, assignments, clusters)
        members = sorted_members(assignments, clusters, False)
        return segment_mean(self.points, *members, self.points.dtype, backend)

    def centroids(self, assignments: Tensor) -> Tensor:
        means = self.means(assignments, self.k)
        if not self.spherical:
            return means
        # What rounding leaves of opposite directions is none.
        rounding = torch.finfo(means.dtype).eps
        return torch.where(means.abs().amax(1, keepdim=True) <= rounding, 0, unit_rows(means)[0])

    def inertia(self, centroids: Tensor, assignments: Tensor) -> float:
        return float(self.own(centroids, assignments).sum())


def _seeds(engine: _Engine, rng: np.random.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The rows of k seeds, each drawn in proportion to its squared distance from those before it.

    A block of candidates is drawn by the distances of the last block. Distances only shrink, so
    accepting each candidate with the share that is left of its own draws exactly as one by one.
    Also the nearest seed of each point, and its squared distance.
    """
    count, k = len(engine), engine.k
    chosen = [int(rng.integers(count))]
    nearest, closest = _nearest_of(engine, chosen)
    while len(chosen) < k:
        cumulative = closest.cpu().numpy().astype(np.float64).cumsum()
        if cumulative[-1] == 0:
            rest = np.setdiff1d(np.arange(count), chosen)
            chosen += rng.choice(rest, k - len(chosen), replace=False).tolist()
            break
        least, most = SEED_BLOCK
        draws = cumulative[-1] * rng.random(min(max(len(chosen), least), most))
        candidates = np.searchsorted(cumulative, draws, side="right").clip(max=count - 1)
        accepted = _accepted(engine, closest, candidates, rng)[: k - len(chosen)]
        which, new = _nearest_of(engine, accepted)
        nearest = torch.where(new < closest, which + len(chosen), nearest)
        closest = torch.minimum(closest, new)
        chosen += accepted
    return torch.tensor(chosen, device=engine.device), (nearest, closest)


def _accepted(
    engine: _Engine, closest: Tensor, candidates: np.ndarray, rng: np.random.Generator
) -> list[int]:
    index = torch.from_numpy(candidates).to(engine.device)
    rows = engine.points[index].double()
    squares = rows.square().sum(1)
    between = (squares[:, None] + squares - 2 * rows @ rows.t()).clamp(min=0).cpu().numpy()
    current = closest[index].double().cpu().numpy()
    limits = current * rng.random(len(candidates))
    accepted = []
    for j, candidate in enumerate(candidates.tolist()):
        if limits[j] < current[j]:
            accepted.append(candidate)
            np.minimum(current, between[j], out=current)
    return accepted


def _nearest_of(engine: _Engine, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Which of the chosen points is nearest to each point, and its squared distance."""
    index = torch.tensor(chosen, device=engine.device)
    nearest, closest = engine.nearest(engine.points[index])
    # What rounding may leave of a distance of 0.
    closest[closest <= 8 * torch.finfo(closest.dtype).eps * engine.squares] = 0
    closest[index] = 0
    nearest[index] = torch.arange(len(chosen), device=engine.device)
    return nearest, closest


def _fill_empty_clusters(assignments: Tensor, distances: Tensor, k: int) -> None:
    """Each gets the point farthest from its centroid that leaves no other cluster empty."""
    counts = torch.bincount(assignments, minlength=k)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    sizes = counts.tolist()
    order = torch.argsort(distances, descending=True, stable=True)
    for point, own in zip(order.tolist(), assignments[order].tolist(), strict=True):
        if sizes[own] > 1:
            sizes[own] -= 1
            assignments[point] = empty.pop(0)
            distances[point] = 0
        if not empty:
            return


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """A function that counts an iteration and shows its inertia."""
    if not shown:
        yield lambda inertia: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: needs tqdm, `pip install facelt_ext[aggregation]`") from error
    with tqdm(total=total, desc="k-means", unit="iteration") as bar:

        def count(inertia: float) -> None:
            bar.set_postfix(inertia=f"{inertia:.6g}")
            bar.update()

        yield count
