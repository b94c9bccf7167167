"""Balanced k-means: sizes that differ by at most one, at nearly the least cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from facelt_ext import _balanced_assignment, _distances
from facelt_ext._balanced_assignment import BalancedAssignment
from facelt_ext._distances import Distances
from facelt_ext.clustering import kmeans

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gaussian(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def mixture(count: int, dimensions: int, centers: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(centers, dimensions, generator=generator))
    which = torch.randint(centers, (count,), generator=generator)
    return means[which] + noise * torch.randn(count, dimensions, generator=generator)


def heavy_tailed(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return gaussian(count, dimensions, seed).exp().square()


def duplicates(count: int, dimensions: int, seed: int = 0) -> Tensor:
    """On a grid of few places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, min(dimensions, 3)), generator=generator).float()


def tails(count: int, dimensions: int, seed: int = 0) -> Tensor:
    """Most points in a dense middle, the others far around it."""
    x = gaussian(count, dimensions, seed)
    x[: count * 9 // 10] *= 0.01
    return x


KINDS = [gaussian, heavy_tailed, duplicates, tails]


def least_cost(points: np.ndarray, centroids: np.ndarray) -> float:
    """Of all assignments of sizes q and q + 1: each place of a cluster is a column.

    Only one place of each may stay free: those who would leave it so are rows that cost nothing.
    """
    count, k = len(points), len(centroids)
    size, extras = divmod(count, k)
    costs = np.square(points[:, None] - centroids).sum(2)
    places = np.repeat(costs, size + (extras > 0), axis=1)
    if extras:
        last = np.tile([False] * size + [True], k)
        free = np.where(last, 0, 1e6 * (1 + costs.max()))
        places = np.concatenate([places, np.tile(free, (k - extras, 1))])
    return places[linear_sum_assignment(places)].sum()


@settings(max_examples=100)
@given(st.data())
def test_balanced_assignment_is_within_1_percent_of_the_least_cost(data):
    count = data.draw(st.integers(1, 200))
    k, seed = data.draw(st.integers(1, min(count, 40))), data.draw(st.integers(0, 99))
    points = data.draw(st.sampled_from(KINDS))(count, data.draw(st.integers(1, 12)), seed)
    points = points.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    points = points - points.mean(0)
    shape = gaussian(k, points.shape[1], seed + 1).to(points.dtype)
    centroids = data.draw(st.sampled_from([points[:k].clone(), shape]))
    balance = BalancedAssignment(Distances(points, points.square().sum(1)), k)
    # The second time begins with the prices of the first.
    for centers in (centroids, centroids + 0.1 * shape):
        assignments = balance.assign(centers)
        sizes = assignments.bincount(minlength=k)
        assert sizes.max() - sizes.min() <= 1
        cost = (points - centers[assignments]).double().square().sum().item()
        least = least_cost(points.double().numpy(), centers.double().numpy())
        # Rounding of products is all that there is where the least cost is 0.
        rounding = torch.finfo(points.dtype).eps * 16 * points.square().sum().item()
        assert least - rounding <= cost * (1 + 1e-6) and cost <= 1.01 * least + rounding


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_balanced_assignment_by_its_dual_bound(device):
    points = mixture(20_000, 16, 60, 0.1)
    points = (points - points.mean(0)).to(device)
    centroids = points[torch.randperm(20_000, generator=torch.Generator().manual_seed(1))[:100]]
    balance = BalancedAssignment(Distances(points, points.square().sum(1)), 100)
    assignments = balance.assign(centroids)
    assert (assignments.bincount(minlength=100) == 200).all()
    costs = torch.cdist(points.double(), centroids.double()).square()
    bound = (costs + balance.prices).amin(1).sum() - 200 * balance.prices.sum()
    cost = costs.gather(1, assignments[:, None]).sum()
    assert bound <= cost <= 1.011 * bound
    assert cost > costs.amin(1).sum() * 1.05  # it was not balanced anyway


def test_more_clusters_than_pairs_of_which_are_looked_at(monkeypatch):
    monkeypatch.setattr(_balanced_assignment, "LARGE", 10)
    x = mixture(1000, 16, 40, 0.1)
    few, many = kmeans(x, 10, balanced=True), kmeans(x, 40, balanced=True)
    assert (few.assignments.bincount() == 100).all()
    assert (many.assignments.bincount() == 25).all()
    assert many.inertia < 0.8 * few.inertia


def test_which_clusters_have_one_more_is_chosen_by_cost():
    """Greedy prices are told wrong: only the node of the last places can mend what follows."""
    points = torch.tensor([[-0.1], [0.0], [0.1], [9.9], [10.1]])
    centroids = torch.tensor([[0.0], [10.0]])
    distances = Distances(points, points.square().sum(1))
    assignments = torch.tensor([0, 0, 1, 1, 1])
    prices = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cost = distances.own(centroids, assignments).sum().item()
    _balanced_assignment._lessen_cost(distances, centroids, assignments, prices, cost, 0.04)
    assert assignments.tolist() == [0, 0, 0, 1, 1]


def test_negative_cycles_are_found_and_only_they():
    weights = np.full((5, 5), np.inf)  # target by source
    weights[1, 0], weights[2, 1], weights[0, 2] = 1, 1, -1.5
    weights[4, 3], weights[3, 4] = 1, 1
    assert _balanced_assignment._negative_cycles(weights, 1e-9) == []
    weights[0, 2] = -2.5
    (cycle,) = _balanced_assignment._negative_cycles(weights, 1e-9)
    first = cycle.index(0)
    assert cycle[first:] + cycle[:first] == [0, 1, 2]


@settings(max_examples=60)
@given(st.data())
def test_what_holds_of_every_result(data):
    count = data.draw(st.integers(1, 120))
    k, seed = data.draw(st.integers(1, count)), data.draw(st.integers(0, 99))
    x = data.draw(st.sampled_from(KINDS))(count, data.draw(st.integers(1, 12)), seed)
    x = x.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    spherical = data.draw(st.booleans())
    steps = data.draw(st.sampled_from([1, 2, 100]))
    found = kmeans(x, k, balanced=True, spherical=spherical, max_iterations=steps)
    sizes = found.assignments.bincount(minlength=k)
    assert len(sizes) == k and sizes.max() - sizes.min() <= 1
    rows = F.normalize(x.double()) if spherical else x.double()
    means = torch.stack([rows[found.assignments == cluster].mean(0) for cluster in range(k)])
    if spherical:
        norms = means.norm(dim=1, keepdim=True)
        means = torch.where(norms < 1e-6, 0, F.normalize(means))
    size = max(rows.abs().amax().item(), 1)
    torch.testing.assert_close(found.centroids.double(), means, atol=2e-5 * size, rtol=1e-4)
    inertia = (rows - means[found.assignments]).square().sum().item()
    assert found.inertia == pytest.approx(inertia, rel=1e-4, abs=1e-8 * count * size**2)
    assert 1 <= found.iterations <= steps


def test_steps_lessen_the_inertia_until_nothing_changes():
    x = mixture(2000, 16, 40, 0.1)
    results = [kmeans(x, 30, balanced=True, max_iterations=n, tolerance=0) for n in (1, 3, 200)]
    inertias = [found.inertia for found in results]
    assert inertias == sorted(inertias, reverse=True) and inertias[2] < 0.98 * inertias[0]
    assert [found.converged for found in results] == [False, False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_the_seed_decides_and_nothing_else(device):
    x = mixture(3000, 24, 60, 0.1).to(device)
    state = torch.get_rng_state()
    first, second, other = (kmeans(x, 50, balanced=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments, second.assignments)
    assert not torch.equal(first.assignments, other.assignments)


def test_chunks_change_nothing(monkeypatch):
    x = mixture(700, 8, 30, 0.2).double()
    whole = kmeans(x, 20, balanced=True)
    monkeypatch.setattr(_distances, "CHUNK_BYTES", {"cpu": (1, 20 * 8 * 13)})
    parts = kmeans(x, 20, balanced=True)
    assert torch.equal(whole.assignments, parts.assignments)
