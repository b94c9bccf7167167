"""Squared distances of many points to centroids, by matrix products, chunk after chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a chunk, on the CPU so few that it stays in the caches. As each chunk of points reads all
# centroids, it has FEW_ROWS at least, unless that took more than the second number.
CHUNK_BYTES = {"cpu": (4 << 20, 32 << 20), "cuda": (256 << 20, 256 << 20)}
FEW_ROWS = 1024


class Distances:
    """Those of the points [N, D], whose squared norms are `squares` [N]."""

    def __init__(self, points: Tensor, squares: Tensor) -> None:
        self.points, self.squares = points, squares
        self.device = points.device

    def __len__(self) -> int:
        return len(self.points)

    def every(self, stride: int) -> Distances:
        """Those of every so many points."""
        return Distances(self.points[::stride].contiguous(), self.squares[::stride].contiguous())

    def parts(self, count: int, columns: int) -> Iterator[slice]:
        """Slices of `count` rows, of so many that a chunk with `columns` is not too large."""
        row = columns * self.points.element_size()
        usual, most = CHUNK_BYTES["cuda" if self.points.is_cuda else "cpu"]
        size = max(usual // row, min(FEW_ROWS, most // row), 1)
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def chunks(
        self,
        centroids: Tensor,
        prices: Tensor | None = None,
        rows: Tensor | None = None,
        scale: float = 1.0,
    ) -> Iterator[tuple[slice, Tensor]]:
        """A part of the points, or of `rows` of them, and scale * (distance - square + price).

        The second, [points, k], holds until the next chunk.
        """
        bias = centroids.square().sum(1)
        if prices is not None:
            bias = bias + prices
        bias = (scale * bias).to(self.points.dtype)
        factor = (-2 * scale * centroids).t()
        scratch = None
        for part in self.parts(len(self) if rows is None else len(rows), len(centroids)):
            chunk = self.points[part] if rows is None else self.points[rows[part]]
            if scratch is None:
                scratch = bias.new_empty(len(chunk), len(centroids))
            yield part, torch.addmm(bias, chunk, factor, out=scratch[: len(chunk)])

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each point, [N], and the squared distance to it."""
        assignments = torch.empty(len(self), dtype=torch.int64, device=self.device)
        distances = torch.empty_like(self.squares)
        for part, costs in self.chunks(centroids):
            assignments[part] = first_least(costs)
            distances[part] = costs.gather(1, assignments[part, None])[:, 0]
        return assignments, distances.add_(self.squares).clamp_(min=0)

    def between(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Squared distances of rows to as many targets, or to one, from differences, float64."""
        return (self.points[rows] - targets).square_().sum(1, dtype=torch.float64)

    def own(self, centroids: Tensor, assignments: Tensor) -> Tensor:
        """Squared distances of points to the centroids they are assigned to, float64 [N]."""
        rows = torch.arange(len(self), device=self.device)
        # A row of differences is there in the points' dtype and twice in float64.
        parts = self.parts(len(self), 5 * self.points.shape[1])
        return torch.cat([self.between(rows[p], centroids[assignments[p]]) for p in parts])


def first_least(rows: Tensor) -> Tensor:
    """The place of each row's least number; NumPy finds it several times as fast on the CPU."""
    if rows.is_cuda:
        return rows.argmin(1)
    return torch.from_numpy(rows.numpy().argmin(1))
