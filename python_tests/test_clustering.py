"""k-means: what it guarantees, and how good it is beside scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import facelt_ext
from facelt_ext import _distances, clustering
from facelt_ext.clustering import kmeans


def mixture(seed: int, points: int, dimensions: int, centers: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(centers, dimensions, generator=generator)
    own = torch.randint(centers, (points,), generator=generator)
    return means[own] + spread * torch.randn(points, dimensions, generator=generator)


def inertia_of(x: torch.Tensor, centroids: torch.Tensor, assignments: torch.Tensor) -> float:
    return (x.double() - centroids.double()[assignments]).square().sum().item()


@pytest.mark.parametrize(
    ("points", "dimensions", "k", "spread"),
    [(600, 8, 20, 0.3), (1500, 16, 150, 0.5), (800, 3, 40, 1.0), (300, 1, 5, 1.0)],
)
def test_as_good_as_scikit_learn(points, dimensions, k, spread):
    ours, theirs = [], []
    for seed in range(6):
        x = mixture(seed, points, dimensions, k, spread)
        ours.append(kmeans(x, k, seed=seed, tolerance=0.0).inertia)
        peer = KMeans(k, init="k-means++", n_init=1, random_state=seed, tol=0).fit(x.numpy())
        theirs.append(peer.inertia_)
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_it_returns_holds_together(dtype, spherical, backend):
    x = (mixture(0, 400, 6, 12, 0.4) + 30 * (not spherical)).to(dtype)
    with facelt_ext.use_backend(backend):
        found = kmeans(x, 25, spherical=spherical)
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.centroids.dtype == wide.dtype and found.centroids.shape == (25, 6)
    if spherical:
        wide = torch.nn.functional.normalize(wide)
    assert torch.bincount(found.assignments, minlength=25).min() > 0
    for cluster in range(25):
        mean = wide[found.assignments == cluster].double().mean(0)
        if spherical:
            mean = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(found.centroids[cluster].double(), mean, atol=1e-4, rtol=1e-5)
    assert found.inertia == pytest.approx(
        inertia_of(wide, found.centroids, found.assignments), rel=1e-3
    )
    assert found.converged and 1 < found.iterations <= 100


def test_at_the_end_everyone_is_nearest_to_its_own_centroid():
    x = mixture(1, 500, 5, 10, 0.5)
    found = kmeans(x, 30, tolerance=0.0)
    distances = torch.cdist(x.double(), found.centroids.double())
    own = distances.gather(1, found.assignments[:, None])[:, 0]
    assert found.converged and (own <= distances.amin(1) + 1e-5).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_an_exchange_gains_what_it_says(spherical):
    x = mixture(10, 400, 5, 12, 0.3).double()
    if spherical:
        x = torch.nn.functional.normalize(x)
    engine = clustering._Engine(x, 25, spherical)
    generator = torch.Generator().manual_seed(0)
    assignments = engine.nearest(x[torch.randperm(400, generator=generator)[:25]])[0]
    before = engine.inertia(engine.centroids(assignments), assignments)
    distances = engine.own(engine.centroids(assignments), assignments)
    gain = clustering.exchange(engine, assignments, distances)
    after = engine.inertia(engine.centroids(assignments), assignments)
    assert torch.bincount(assignments, minlength=25).min() > 0
    assert gain > 0.05 * before and before - after == pytest.approx(gain)


def test_planted_clusters_are_found():
    x = mixture(2, 700, 12, 15, 0.02)
    found = kmeans(x, 15, seed=3)
    truth = KMeans(15, n_init=10, random_state=0).fit_predict(x.numpy())
    pairs = {(a, b) for a, b in zip(found.assignments.tolist(), truth.tolist(), strict=True)}
    assert len(pairs) == 15


def test_the_seed_decides_and_nothing_else():
    x = mixture(3, 300, 4, 9, 0.6)
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    first, second = kmeans(x, 20, seed=5), kmeans(x, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments, second.assignments)
    assert not torch.equal(kmeans(x, 20, seed=6).assignments, first.assignments)


@pytest.mark.parametrize("block", [1, 6])
def test_seeds_are_drawn_by_the_squared_distance(monkeypatch, block):
    """Three seeds, against the probabilities of k-means++ themselves, also within a block."""
    monkeypatch.setattr(clustering, "SEED_BLOCK", (block, block))
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    squares = (x - x.t()).square().double().numpy()
    engine, rng, draws = clustering._Engine(x, 3, False), np.random.default_rng(0), 3000
    counts = np.zeros((4, 4, 4))
    for _ in range(draws):
        counts[tuple(clustering._seeds(engine, rng)[0].tolist())] += 1
    for first, second, third in np.ndindex(4, 4, 4):
        closest = np.minimum(squares[first], squares[second])
        odds = squares[first, second] / squares[first].sum() / 4
        odds *= closest[third] / closest.sum()
        spread = np.sqrt(draws * odds * (1 - odds))
        assert abs(counts[first, second, third] - draws * odds) <= 4.5 * spread


def test_later_seeds_of_a_block_know_the_earlier_ones():
    """Far groups of equal points: no group is drawn twice before each was drawn once."""
    x = torch.arange(60.0).repeat_interleave(20)[:, None] * 100
    engine = clustering._Engine(x, 60, False)
    for seed in range(20):
        chosen, (nearest, closest) = clustering._seeds(engine, np.random.default_rng(seed))
        assert len(x[chosen].unique()) == 60
        assert torch.equal(x[chosen][nearest], x) and (closest == 0).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_duplicates_leave_no_cluster_empty(spherical):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(6, 1)
    for k in (1, 2, 3, 7, 12):
        found = kmeans(x, k, spherical=spherical)
        assert torch.bincount(found.assignments, minlength=k).min() > 0
        assert found.inertia == pytest.approx(0 if k > 1 else inertia_of(
            x, found.centroids, found.assignments
        ), abs=1e-5)  # fmt: skip


def test_as_many_clusters_as_points():
    x = mixture(4, 50, 3, 50, 1.0)
    found = kmeans(x, 50)
    assert found.inertia < 1e-9 and found.assignments.sort().values.tolist() == list(range(50))


def test_one_cluster_is_the_mean():
    x = mixture(5, 40, 3, 4, 1.0) + 1000
    found = kmeans(x, 1)
    torch.testing.assert_close(found.centroids[0], x.double().mean(0).float())
    assert (found.assignments == 0).all()


def test_far_from_the_origin():
    """Where |c|^2 - 2 x.c would cancel."""
    x = mixture(6, 400, 4, 8, 0.05)
    near, far = kmeans(x, 8).inertia, kmeans(x + 5000, 8).inertia
    assert far == pytest.approx(near, rel=0.05)


def test_zeros_stay_zeros_on_the_sphere():
    x = torch.cat([torch.zeros(3, 2), torch.eye(2).repeat(4, 1)])
    found = kmeans(x, 3, spherical=True)
    assert found.assignments[:3].unique().numel() == 1
    assert (found.centroids[found.assignments[0]] == 0).all()
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_directions_that_cancel_have_no_mean():
    x = torch.tensor([[3.0, 0.1], [-3.0, -0.1]]).repeat(5, 1)
    assert (kmeans(x, 1, spherical=True).centroids == 0).all()


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**70])
def test_squares_out_of_range(factor):
    x = mixture(11, 300, 8, 10, 0.1)
    found, expected = kmeans(x * factor, 10), kmeans(x, 10)
    assert torch.equal(found.assignments, expected.assignments)
    assert torch.equal(found.centroids, expected.centroids * factor)
    assert found.inertia == pytest.approx(expected.inertia * factor**2)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("factor", [2.0**-900, 2.0**900])
def test_squares_out_of_the_range_of_float64(factor, balanced):
    x = mixture(11, 100, 4, 5, 0.1).double()
    found, expected = (kmeans(each, 5, balanced=balanced) for each in (x * factor, x))
    assert torch.equal(found.assignments, expected.assignments)
    assert torch.equal(found.centroids, expected.centroids * factor)
    assert found.inertia == (math.inf if factor > 1 else 0)


def test_an_empty_cluster_gets_the_farthest_point_that_can_be_spared():
    assignments = torch.tensor([0, 0, 0, 3, 4, 4])
    distances = torch.tensor([1.0, 5.0, 2.0, 9.0, 4.0, 3.0])
    clustering._fill_empty_clusters(assignments, distances, 5)
    assert assignments.tolist() == [0, 1, 0, 3, 2, 4]


@pytest.mark.parametrize("balanced", [False, True])
def test_autocast_gradients_and_strides_change_nothing(balanced):
    x = mixture(12, 400, 16, 10, 0.5)
    before, expected = x.clone(), kmeans(x, 10, balanced=balanced)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [kmeans(x.clone().requires_grad_(), 10, balanced=balanced)]
    results.append(kmeans(x.t().contiguous().t(), 10, balanced=balanced))
    assert torch.equal(x, before)
    for found in results:
        assert torch.equal(found.assignments, expected.assignments)
        assert torch.equal(found.centroids, expected.centroids)
        assert not found.centroids.requires_grad


def test_no_chunk_is_larger_than_its_budget():
    points = torch.empty(100_000, 4)
    for k in (1, 400, 7200, 100_000):
        parts = list(_distances.Distances(points, points[:, 0]).parts(len(points), k))
        assert sum(part.stop - part.start for part in parts) == len(points)
        assert max(part.stop - part.start for part in parts) * k * 4 <= 32 << 20


def test_chunks_change_nothing(monkeypatch):
    x = mixture(7, 300, 4, 9, 0.5).double()
    expected = kmeans(x, 20)
    monkeypatch.setattr(_distances, "CHUNK_BYTES", {"cpu": (1, 7 * 20 * 8)})
    found = kmeans(x, 20)
    assert torch.equal(found.assignments, expected.assignments)
    assert found.inertia == pytest.approx(expected.inertia)


def test_iterations_end_where_they_are_told_to(capsys):
    x = mixture(8, 500, 4, 30, 1.0)
    short = kmeans(x, 30, max_iterations=2, tolerance=0.0)
    assert short.iterations == 2 and not short.converged
    coarse, fine = kmeans(x, 30, tolerance=0.05), kmeans(x, 30, tolerance=0.0, progress=True)
    assert coarse.converged and coarse.iterations < fine.iterations
    assert short.inertia >= coarse.inertia >= fine.inertia
    assert "k-means" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("spherical", [False, True])
def test_on_a_gpu(spherical):
    x = mixture(9, 5000, 16, 40, 0.5)
    first, second = (kmeans(x.cuda(), 300, spherical=spherical) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    expected = kmeans(x, 300, spherical=spherical).inertia
    assert first.inertia == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(3)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(3, 2).long()}, TypeError, "x: expected dtype"),
        ({"x": torch.tensor([[0.0], [torch.nan]])}, ValueError, "x: expected finite numbers"),
        ({"x": torch.tensor([[0.0], [torch.inf]])}, ValueError, "x: expected finite numbers"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 6}, ValueError, "k: expected at most 5, the rows of x, got 6"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1, got 0"),
        ({"tolerance": -0.1}, ValueError, "tolerance: expected at least 0, got -0.1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
    ],
)
def test_wrong_arguments(changes, error, message):
    given = {"x": torch.randn(5, 2), "k": 2, **changes}
    with pytest.raises(error, match=message):
        kmeans(given.pop("x"), given.pop("k"), **given)
