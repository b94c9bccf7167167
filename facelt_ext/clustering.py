"""k-means on matrix products, on CPU and GPU: what aggregation is made with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext import _backend, reference
from facelt_ext._checks import check_count, check_integer, check_matrix, check_number
from facelt_ext._cluster_exchange import exchange
from facelt_ext.functional.super_classes import segment_mean, sorted_members
from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype

# Bytes of the products of a chunk of points with all centroids.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Candidates that the seeding draws at a time.
SEED_BLOCK = 256


class Clustering(NamedTuple):
    """What k-means gives.

    centroids: [k, D], the mean of each cluster's members (its direction, if spherical).
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


def kmeans(
    x: Tensor,
    k: int,
    *,
    spherical: bool = False,
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
        max_iterations: at least 1.
        tolerance: it ends when an iteration lessens the inertia by no more than this part of it.
        seed: a non-negative integer. The result depends on it and on nothing else that is random.
        progress: shows a bar (needs tqdm).

    Returns:
        A `Clustering`. The points were assigned to the nearest of the centroids before the last
        step, ties to the first; a cluster that nobody is nearest to gets the point that is farthest
        from its own centroid.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """
    check_matrix(x, "x")
    check_count(k, "k")
    check_count(max_iterations, "max_iterations")
    check_number(tolerance, "tolerance", torch.float64)
    check_integer(seed, "seed")
    if k > len(x):
        raise ValueError(f"k: expected at most {len(x)}, the rows of x, got {k}")
    if tolerance < 0 or seed < 0:
        name, value = ("tolerance", tolerance) if tolerance < 0 else ("seed", seed)
        raise ValueError(f"{name}: expected at least 0, got {value}")
    if not x.isfinite().all():
        raise ValueError("x: expected finite numbers, got NaN or infinity")
    x = x.detach().to(compute_dtype(x.dtype)).contiguous()
    # Far from the origin, |c|^2 - 2 x.c would cancel.
    points = unit_rows(x)[0] if spherical else x - x.mean(0)
    engine = _Engine(points, k, spherical)
    centroids = points[_seeds(engine, np.random.default_rng(seed))]
    inertia, converged, previous, iterations = torch.inf, False, None, 0
    exchanging = True
    with _bar(max_iterations, progress) as bar:
        while not converged and iterations < max_iterations:
            assignments, distances = engine.nearest(centroids)
            _fill_empty_clusters(assignments, distances, k)
            before, inertia = inertia, float(distances.sum(dtype=torch.float64))
            settled = before - inertia <= tolerance * before < torch.inf
            settled |= previous is not None and torch.equal(assignments, previous)
            if exchanging or settled:
                gain = exchange(engine, assignments, distances)
                exchanging = gain > tolerance * inertia
            converged = settled and not exchanging
            centroids, previous = engine.centroids(assignments), assignments
            iterations += 1
            bar(inertia)
    inertia = engine.inertia(centroids, assignments)
    if not spherical:
        centroids = centroids + x.mean(0)
    return Clustering(centroids, assignments, inertia, iterations, converged)


class _Engine:
    """Points and the chunks in which all of them meet centroids."""

    def __init__(self, points: Tensor, k: int, spherical: bool) -> None:
        self.points, self.k, self.spherical = points, k, spherical
        self.squares = points.square().sum(1)
        # What rounding may leave of a distance of 0.
        self.negligible = 8 * torch.finfo(points.dtype).eps * self.squares

    def chunks(self, rows: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Parts of `rows` rows, each with memory for `columns` numbers a row."""
        kind = "cuda" if self.points.is_cuda else "cpu"
        size = max(CHUNK_BYTES[kind] // (columns * self.points.element_size()), 1)
        scratch = self.points.new_empty(min(size, rows), columns)
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            yield part, scratch[: part.stop - part.start]

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each point, [N], and the squared distance to it."""
        halves = centroids.square().sum(1) / 2
        assignments = torch.empty(len(self.points), dtype=torch.int64, device=centroids.device)
        scores = torch.empty_like(self.squares)
        for part, products in self.chunks(len(self.points), len(centroids)):
            torch.addmm(halves, self.points[part], centroids.t(), alpha=-1, out=products)
            torch.min(products, 1, out=(scores[part], assignments[part]))
        return assignments, (self.squares + 2 * scores).clamp_(min=0)

    def means(self, assignments: Tensor, clusters: int) -> Tensor:
        """NaN for a cluster without points."""
        backend = _backend.current()
        if backend == "reference":
            return reference.super_class_mean(self.points, assignments, clusters)
        members = sorted_members(assignments, clusters, False)
        return segment_mean(self.points, *members, self.points.dtype, backend)

    def centroids(self, assignments: Tensor) -> Tensor:
        means = self.means(assignments, self.k)
        return unit_rows(means)[0] if self.spherical else means

    def distances_to_own(self, centroids: Tensor, assignments: Tensor) -> Tensor:
        """The squared distance of each point to the centroid it belongs to, [N]."""
        distances = torch.empty_like(self.squares)
        for part, rows in self.chunks(*self.points.shape):
            torch.sub(self.points[part], centroids[assignments[part]], out=rows)
            torch.sum(rows.square_(), 1, out=distances[part])
        return distances

    def inertia(self, centroids: Tensor, assignments: Tensor) -> float:
        return float(self.distances_to_own(centroids, assignments).sum(dtype=torch.float64))


def _seeds(engine: _Engine, rng: np.random.Generator) -> Tensor:
    """The rows of k seeds, each drawn in proportion to its squared distance from those before it.

    A block of candidates is drawn by the distances of the last block. Distances only shrink, so
    accepting each candidate with the share that is left of its own draws exactly as one by one.
    """
    points, k = engine.points, engine.k
    chosen = [int(rng.integers(len(points)))]
    closest = _distances_to(engine, chosen, None)
    while len(chosen) < k:
        cumulative = closest.cpu().numpy().astype(np.float64).cumsum()
        if cumulative[-1] == 0:
            rest = np.setdiff1d(np.arange(len(points)), chosen)
            chosen += rng.choice(rest, k - len(chosen), replace=False).tolist()
            break
        draws = cumulative[-1] * rng.random(SEED_BLOCK)
        candidates = np.searchsorted(cumulative, draws, side="right").clip(max=len(points) - 1)
        accepted = _accepted(engine, closest, candidates, rng)[: k - len(chosen)]
        chosen += accepted
        closest = _distances_to(engine, accepted, closest)
    return torch.tensor(chosen, device=points.device)


def _accepted(
    engine: _Engine, closest: Tensor, candidates: np.ndarray, rng: np.random.Generator
) -> list[int]:
    index = torch.from_numpy(candidates).to(closest.device)
    rows = engine.points[index]
    stale = closest[index].cpu().numpy()
    between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    between = between.square_().cpu().numpy()
    limits = stale * rng.random(len(candidates))
    current, accepted = stale.copy(), []
    for j, candidate in enumerate(candidates.tolist()):
        if limits[j] < current[j]:
            accepted.append(candidate)
            np.minimum(current, between[j], out=current)
    return accepted


def _distances_to(engine: _Engine, chosen: list[int], closest: Tensor | None) -> Tensor:
    """The squared distance of each point to the nearest of the chosen ones, or `closest`."""
    index = torch.tensor(chosen, device=engine.points.device)
    distances = engine.nearest(engine.points[index])[1]
    distances[distances <= engine.negligible] = 0
    distances[index] = 0
    return distances if closest is None else torch.minimum(closest, distances)


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
def _bar(total: int, shown: bool):
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
