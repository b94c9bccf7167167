"""k-means of fewer different points than clusters: no cluster is empty, no centroid is NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import facelt_ext
from facelt_ext.aggregation import aggregate
from facelt_ext.clustering import kmeans


def _few(different: int, offset: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda x: (x[:different] + offset)[torch.arange(len(x)) * 7 % different]


# Made of rows of a standard normal distribution.
POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all equal": _few(1),
    "all zeros": torch.zeros_like,
    "three": _few(3),
    "five, far away": _few(5, 1000.0),
    "five, huge": lambda x: 1e30 * _few(5)(x),
    "five, tiny": lambda x: 1e-30 * _few(5)(x),
    "of three directions": lambda x: _few(3)(x) * (1 + torch.arange(len(x)) % 10)[:, None],
    "opposite": lambda x: x[:1] * (1 - 2 * (torch.arange(len(x)) % 2))[:, None],
    "half of them zeros": lambda x: x * (torch.arange(len(x)) % 2)[:, None],
    "half of them one point": lambda x: torch.cat([x[: len(x) // 2], x[:1].expand_as(x)])[: len(x)],
    "all different": lambda x: x,
}
# points, clusters, dimensions
SIZES = [(50, 10, 8), (24, 24, 3), (7, 6, 1), (90, 20, 16), (1, 1, 2)]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", POINTS)
def test_no_cluster_is_empty(kind: str, balanced: bool, spherical: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (points, k, dimensions) in enumerate(SIZES):
        x = POINTS[kind](torch.randn(points, dimensions, generator=generator))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            rows = x.to(dtype)
            for seed in range(1 + (dtype == torch.float32)):
                found = kmeans(
                    rows, k, balanced=balanced, spherical=spherical, seed=2 * number + seed
                )
                sizes = found.assignments.bincount(minlength=k)
                assert len(sizes) == k and sizes.min() > 0
                assert found.centroids.isfinite().all() and found.inertia >= 0
                assert found.converged
                if balanced:
                    assert sizes.max() - sizes.min() <= 1
                _check_means(rows, found.centroids, found.assignments, spherical)


def _check_means(x: Tensor, centroids: Tensor, assignments: Tensor, spherical: bool) -> None:
    x = x.double()
    if spherical:
        x = torch.nn.functional.normalize(x, eps=1e-300)
    means = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, assignments, x)
    means /= assignments.bincount()[:, None]
    lengths = means.norm(dim=1, keepdim=True)
    if spherical:
        # What opposite directions leave has none.
        means = torch.where(lengths > 1e-5, means / lengths, centroids.double())
    tolerance = 1e-5 * float(x.abs().amax())
    torch.testing.assert_close(centroids.double(), means, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("spherical", [False, True])
def test_each_different_point_has_a_cluster(spherical: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(10):
        x = torch.randn(4, 8, generator=generator)[torch.randint(4, (60,), generator=generator)]
        with facelt_ext.use_backend(backend):
            found = kmeans(x, 9, spherical=spherical, seed=seed)
        assert found.assignments.unique().tolist() == list(range(9))
        for cluster in range(9):
            members = x[found.assignments == cluster]
            assert (members == members[0]).all()
        assert found.inertia < 1e-9


@pytest.mark.parametrize("spherical", [False, True])
def test_super_classes_of_equal_means(spherical: bool) -> None:
    means = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))[torch.arange(40) % 2]
    counts = torch.tensor([20] * 4 + [5] * 24 + [2] * 12)
    for seed in range(10):
        found = aggregate(means, counts, num_super_classes=(24, 5), spherical=spherical, seed=seed)
        sizes = found.super_class.bincount()
        assert len(sizes) == 29 and sizes.min() > 0
