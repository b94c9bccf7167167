"""Points to clusters whose sizes differ by at most one, at nearly the least cost.

A transportation problem, solved by its dual: a price for each cluster, at which each point takes
the cheapest cluster and none is sought by more points than it holds. Newton steps on the smoothed
dual find the prices, then each cluster keeps the points that would lose most elsewhere, and what is
still more than `GAP` above the dual bound is lessened by moving points along negative cycles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext._distances import Distances, first_least

# Part of the cost by which an assignment may exceed the least one. Above LARGE clusters, whose
# pairs would take too long, it is not seen to.
GAP = 0.01
LARGE = 2048
# Points for each cluster by which prices are found where that is enough.
SAMPLE = 32
# The smoothing is halved from level to level until it is this part of the mean cost. It begins
# where prices change by no more than LONGEST times the smoothing in a step, except for the part
# CLIPPED of them, and RISE times as high where they do not.
SMOOTHING, LEVELS = 0.01, 24
LONGEST, CLIPPED, RISE = 3.0, 0.02, 4
# With a larger part of the points where there is no room, a level takes a second step.
SETTLED = 0.02
# A point this sure of its cluster tells nothing of how demand follows prices.
SURE = 0.999


class _Step(NamedTuple):
    """What a change of prices found before it.

    value: the smoothed dual.
    excess: part of the points that ask for a place where there is none.
    clipped: whether the prices wanted to change by more than the smoothing lets them.
    """

    value: float
    excess: float
    clipped: bool


class BalancedAssignment:
    """Assigns the same points again and again; prices are kept from one time to the next."""

    def __init__(self, distances: Distances, k: int) -> None:
        self.k = k
        self.size, self.extras = divmod(len(distances), k)
        self.all = distances
        # A sample of the points, until it turns out to be too small.
        self.asked = distances.every(max(len(distances) // (SAMPLE * k), 1))
        self.prices = torch.zeros(k, dtype=torch.float64, device=distances.device)
        self.smoothing = torch.inf

    def assign(self, centroids: Tensor) -> Tensor:
        """The cluster of each point, [N]: len(self.all) // k points in each, or one more."""
        assignments, cost, bound = self._rounded(centroids, self._find_prices(centroids))
        if self.k > LARGE or cost <= bound * (1 + GAP):
            return assignments
        if self.asked is not self.all:
            self.asked = self.all
            assignments, cost, bound = self._rounded(centroids, self._find_prices(centroids))
        _lessen_cost(self.all, centroids, assignments, self.prices, cost, bound)
        return assignments

    def _find_prices(self, centroids: Tensor) -> Tensor:
        """From those before, beginning with as much smoothing as it takes to leave them."""
        costs, widest = self.asked, _spread(self.asked, centroids) / 4
        # Equal points leave it at 0, which the next centroids may have no use for.
        smoothing = min(max(self.smoothing, widest / 2**LEVELS), widest)
        while smoothing < widest and self._step(costs, centroids, smoothing).clipped:
            smoothing = min(RISE * smoothing, widest)
        if smoothing == widest:
            self.prices.zero_()
        for _ in range(LEVELS if smoothing else 0):
            step = self._step(costs, centroids, smoothing)
            if step.excess > SETTLED:
                step = self._step(costs, centroids, smoothing)
            if smoothing * len(costs) <= SMOOTHING * step.value:
                break
            smoothing /= 2
        self.smoothing = smoothing
        return self.prices

    def _step(self, costs: Distances, centroids: Tensor, smoothing: float) -> _Step:
        newton = self.k <= LARGE
        room = len(costs) / self.k
        demand, shared, value = _demand(costs, centroids, self.prices, smoothing, newton)
        surplus = demand - room
        if newton:
            laplacian = shared.sum(1).diag() - shared
            laplacian.diagonal().add_(1e-3 * room)
            step = torch.linalg.solve(laplacian, surplus)
        else:
            step = (demand / room).clamp(min=1e-6).log()
        value -= room * float(self.prices.sum())
        self.prices += smoothing * step.clamp(-LONGEST, LONGEST)
        excess = float(surplus.clamp(min=0).sum()) / len(costs)
        clipped = float((step.abs() > LONGEST).double().mean())
        return _Step(value, excess, clipped > CLIPPED)

    def _rounded(self, centroids: Tensor, prices: Tensor) -> tuple[Tensor, float, float]:
        """An assignment that fits, its cost, and the dual bound of the cost of all that do."""
        device = self.all.device
        room = torch.full((self.k,), self.size, device=device)
        room[prices.argsort(descending=True, stable=True)[: self.extras]] += 1
        spent = float(prices @ room.double())
        assignments = torch.empty(len(self.all), dtype=torch.int64, device=device)
        waiting, bound = torch.arange(len(self.all), device=device), None
        while len(waiting):
            open_prices = torch.where(room > 0, prices, torch.inf)
            choice, cost, second = _best_two(self.all, centroids, open_prices, waiting)
            if bound is None:
                squares = self.all.squares.sum(dtype=torch.float64)
                bound = float(squares + cost.sum(dtype=torch.float64)) - spent
            # Those who would lose most come first in each cluster.
            order = (second - cost).argsort(descending=True, stable=True)
            order = order[choice[order].argsort(stable=True)]
            wanted = choice[order]
            first = torch.searchsorted(wanted, torch.arange(self.k, device=device))
            rank = torch.arange(len(order), device=device) - first[wanted]
            fits = rank < room[wanted]
            assignments[waiting[order[fits]]] = wanted[fits]
            room -= torch.bincount(wanted[fits], minlength=self.k)
            waiting = waiting[order[~fits].sort().values]
        return assignments, float(self.all.own(centroids, assignments).sum()), bound


def _spread(costs: Distances, centroids: Tensor) -> float:
    """How far apart a point's least and largest cost are in the mean."""
    total = 0.0
    for _, chunk in costs.chunks(centroids):
        least, largest = chunk.aminmax(dim=1)
        total += float((largest - least).sum(dtype=torch.float64))
    return total / len(costs)


def _demand(
    costs: Distances, centroids: Tensor, prices: Tensor, smoothing: float, newton: bool
) -> tuple[Tensor, Tensor | None, float]:
    """What points ask for when each spreads itself over clusters by exp(-cost / smoothing).

    Returns the demand [k], how much of each pair of clusters the same points ask for [k, k] if
    `newton`, and the sum of the points' smoothed least costs.
    """
    k = len(centroids)
    demand = centroids.new_zeros(k)
    shared = centroids.new_zeros(k, k) if newton else None
    value = costs.squares.sum(dtype=torch.float64)
    for _, scores in costs.chunks(centroids, prices, scale=-1 / smoothing):
        largest = scores.amax(1, keepdim=True)
        # Products of what is left out here would be subnormal, which is slow.
        shares = scores.sub_(largest).clamp_(min=-40).exp_()
        total = shares.sum(1)
        value -= smoothing * (largest[:, 0] + total.log()).sum(dtype=torch.float64)
        demand += torch.mv(shares.t(), 1 / total)
        if shared is not None:
            some = total > 1 / SURE
            unsure = shares[some] / total[some, None]
            shared.addmm_(unsure.t(), unsure)
    return demand.double(), None if shared is None else shared.double(), float(value)


def _best_two(
    costs: Distances, centroids: Tensor, prices: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the rows the best cluster, its cost with price, and that of the second."""
    choice = torch.empty_like(rows)
    cost, second = (centroids.new_empty(len(rows)) for _ in range(2))
    for part, chunk in costs.chunks(centroids, prices, rows):
        choice[part] = first_least(chunk)
        cost[part] = chunk.gather(1, choice[part, None])[:, 0]
        chunk.scatter_(1, choice[part, None], torch.inf)
        second[part] = chunk.amin(1)
    return choice, cost, second


def _lessen_cost(
    costs: Distances,
    centroids: Tensor,
    assignments: Tensor,
    prices: Tensor,
    cost: float,
    bound: float,
) -> None:
    """Moves points until the cost is within GAP of the bound, or the least there is."""
    moves = None
    while cost > bound * (1 + GAP):
        if moves is None:
            moves = _Moves(costs, centroids, assignments, prices)
        gain = moves.make()
        if gain <= 0:
            return
        cost -= gain


class _Moves:
    """The graph of clusters, in which an edge is the cheapest move of a point to another cluster.

    Where some clusters have one point more than the others, a last node holds these places: to move
    there is to take one, to move from there to give it up. Weights are with prices, which change no
    cycle's sum and leave few of them negative.
    """

    def __init__(
        self, costs: Distances, centroids: Tensor, assignments: Tensor, prices: Tensor
    ) -> None:
        self.costs, self.centroids, self.assignments = costs, centroids, assignments
        self.k = len(centroids)
        self.size, self.extras = divmod(len(assignments), self.k)
        self.prices = prices.cpu().numpy()
        sorted_prices = np.sort(self.prices)[::-1]
        self.place_price = sorted_prices[max(self.extras - 1, 0)]
        # Target by source: a row holds all that leads to a node.
        self.weights = np.full((self.k + 1, self.k + 1), np.inf)
        self._sort()
        self._weigh(torch.arange(self.k, device=assignments.device))

    def make(self) -> float:
        """Moves points along negative cycles; how much that gains."""
        moved, targets = [], []
        for cycle in _negative_cycles(self.weights, self._rounding()):
            for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
                if self.k not in (source, target):
                    moved.append(self._cheapest(source, target))
                    targets.append(target)
        if not moved:
            return 0.0
        device = self.assignments.device
        points, targets = torch.tensor(moved, device=device), torch.tensor(targets, device=device)
        sources = self.assignments[points]
        before = self.costs.between(points, self.centroids[sources])
        gain = float((before - self.costs.between(points, self.centroids[targets])).sum())
        if gain > 0:
            self.assignments[points] = targets
            self._sort()
            self._weigh(torch.cat([sources, targets]).unique())
        return gain

    def _rounding(self) -> float:
        return 16 * torch.finfo(self.centroids.dtype).eps * float(self.costs.squares.amax())

    def _sort(self) -> None:
        """The members of each cluster, [k, size + 1]; the smaller ones' first member twice."""
        order = self.assignments.argsort(stable=True)
        numbers = torch.arange(self.k, device=order.device)
        first = torch.searchsorted(self.assignments[order], numbers)
        self.counts = torch.bincount(self.assignments, minlength=self.k)
        column = torch.arange(self.size + 1, device=order.device)
        column = torch.where(column < self.counts[:, None], column, 0)
        self.members = order[first[:, None] + column]

    def _weigh(self, clusters: Tensor) -> None:
        width = self.size + 1
        for part in self.costs.parts(len(clusters), 2 * width * self.k):
            some = clusters[part]
            rows = self.members[some].flatten()
            chunks = self.costs.chunks(self.centroids, rows=rows)
            costs = torch.cat([chunk.clone() for _, chunk in chunks])
            costs -= costs.gather(1, self.assignments[rows, None])
            least = costs.view(len(some), width, self.k).amin(1).double().cpu().numpy()
            some = some.cpu().numpy()
            self.weights[: self.k, some] = (least + self.prices - self.prices[some, None]).T
        np.fill_diagonal(self.weights, np.inf)
        if self.extras:
            larger = (self.counts > self.size).cpu().numpy()
            surplus = self.prices - self.place_price
            self.weights[self.k, : self.k] = np.where(larger, np.inf, -surplus)
            self.weights[: self.k, self.k] = np.where(larger, surplus, np.inf)

    def _cheapest(self, source: int, target: int) -> int:
        members = self.members[source]
        more = self.costs.between(members, self.centroids[target])
        more -= self.costs.between(members, self.centroids[source])
        return int(members[more.argmin()])


def _negative_cycles(weights: np.ndarray, rounding: float) -> list[list[int]]:
    """Disjoint cycles of a negative sum (Bellman and Ford); none if there is none."""
    nodes = np.arange(len(weights))
    distance = np.zeros(len(weights))
    before = np.full(len(weights), -1)
    for _ in range(len(weights)):
        through = weights + distance
        nearest = through.argmin(1)
        shorter = through[nodes, nearest]
        better = shorter < distance - rounding
        if not better.any():
            return []
        distance[better], before[better] = shorter[better], nearest[better]
        cycles = _cycles(before.tolist())
        if cycles:
            return cycles
    return []


def _cycles(before: list[int]) -> list[list[int]]:
    """The cycles of a graph in which each node has one predecessor or none, -1."""
    seen_from = [-1] * len(before)
    cycles = []
    for start in range(len(before)):
        node = start
        while node >= 0 and seen_from[node] < 0:
            seen_from[node] = start
            node = before[node]
        if node >= 0 and seen_from[node] == start:
            cycle, first = [node], node
            while before[node] != first:
                node = before[node]
                cycle.append(node)
            cycles.append(cycle[::-1])
    return cycles
