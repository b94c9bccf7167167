from __future__ import annotations

import literal
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import LAYOUTS, TOLERANCE, assert_close, batches, grid_batches, strided

from facelt_ext import functional, reference


@given(batch=batches(), data=st.data())
def test_centroids_agree_with_literal_loops(any_place, batch, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch = batch.to(dtype)
    x = strided(batch.features, layout).to(any_place.device).requires_grad_()
    with any_place.run():
        result = functional.class_centroids(x, batch.labels.to(any_place.device))
    upstream = torch.randn(result.centroids.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(result.centroids, x, upstream.to(any_place.device, dtype))

    expected = literal.centroids_of(batch.features.double().numpy(), batch.labels.numpy())
    members = literal.members_of(batch.labels.numpy())
    assert result.classes.tolist() == list(members)
    assert result.counts.tolist() == [len(m) for m in members.values()]
    assert not grad[batch.labels.to(any_place.device) == literal.IGNORED].any()
    for row, (centroid, m) in enumerate(zip(expected, members.values(), strict=True)):
        scale = float(batch.features.abs().max())
        assert_close(result.centroids[row].detach(), torch.from_numpy(centroid), dtype, scale)
        for i in m:
            assert_close(grad[i], upstream[row].double() / len(m), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dimensions", [31, 64, 128, 150, 300])
def test_rows_longer_than_any_vector(any_place, dimensions, dtype):
    generator = torch.Generator().manual_seed(dimensions)
    x = torch.randn(20, dimensions, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 4, (20,), generator=generator)
    with any_place.run():
        result = functional.class_centroids(x.to(any_place.device), labels.to(any_place.device))
    expected = literal.centroids_of(x.double().numpy(), labels.numpy())
    stacked = torch.stack([torch.from_numpy(centroid) for centroid in expected])
    assert_close(result.centroids, stacked, dtype, float(x.abs().max()))


@given(batch=grid_batches(), squared=st.booleans(), data=st.data())
def test_min_distance_agrees_with_literal_loops(any_place, batch, squared, data):
    """Integer centroids: equal distances are equal in every backend, and go to the first pair."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    counts = torch.randint(
        0, 3, (len(batch.features),), generator=torch.Generator().manual_seed(len(batch.labels))
    )
    x = batch.features.to(any_place.device, dtype, copy=True).requires_grad_()
    with any_place.run():
        result = functional.min_centroid_distance(x, counts.to(any_place.device), squared=squared)
    (grad,) = torch.autograd.grad(result.distance * 1.7, x)

    live = counts.nonzero()[:, 0].tolist()
    points = batch.features.numpy()
    nearest = literal.nearest_pair([points[i] for i in live])
    expected_grad = torch.zeros_like(batch.features)
    if nearest is None:
        assert result.distance == torch.inf and result.pair.tolist() == [-1, -1]
    else:
        d, a, b = nearest
        a, b = live[a], live[b]
        assert result.pair.tolist() == [a, b]
        distance = d if squared else d**0.5
        assert abs(result.distance.item() - distance) <= 1e-6 * distance
        if d > 0:
            toward = (batch.features[a] - batch.features[b]) * (2 if squared else 1 / distance)
            expected_grad[a], expected_grad[b] = 1.7 * toward, -1.7 * toward
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(grad.double().cpu(), expected_grad, atol=0, rtol=rtol)


@given(batch=batches(), data=st.data())
def test_min_distance_agrees_with_the_reference(place, batch, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    x = batch.features.to(dtype)
    labels = torch.arange(len(x))
    assume(not literal.has_near_tie(x.double().numpy(), labels.numpy(), 1, 1e-5))
    expected = reference.min_centroid_distance(x.double())
    with place.run():
        actual = functional.min_centroid_distance(x.to(place.device))
    assert torch.equal(actual.pair.cpu(), expected.pair)
    assert_close(actual.distance, expected.distance, dtype)


@pytest.mark.parametrize("squared", [True, False])
def test_gradcheck(any_place, squared):
    x = torch.randn(7, 3, dtype=torch.float64, device=any_place.device, requires_grad=True)
    labels = torch.tensor([1, 0, 1, 5, 5, 5, -2], device=any_place.device)
    counts = torch.tensor([1, 0, 2, 1, 3, 0, 1], device=any_place.device)
    with any_place.run():

        def centroids(x):
            return functional.class_centroids(x, labels, max_classes=6).centroids

        def distance(x):
            return functional.min_centroid_distance(x, counts, squared=squared).distance

        for function in (centroids, distance):
            assert torch.autograd.gradcheck(function, x)
            assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_centroid_that_is_not_finite_makes_the_distance_nan(any_place, bad):
    x = torch.randn(40, 3, device=any_place.device)
    x[33, 1] = bad
    counts = torch.ones(40, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        y = x.clone().requires_grad_()
        result = functional.min_centroid_distance(y)
        result.distance.backward()
        counts[33] = 0
        ignored = functional.min_centroid_distance(x, counts).distance
    assert result.distance.isnan() and result.pair.tolist() == [-1, -1]
    assert y.grad.isnan().all()
    assert ignored.isfinite()


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_centroids(any_place, rows):
    x = torch.randn(rows, 3, device=any_place.device, requires_grad=True)
    with any_place.run():
        result = functional.min_centroid_distance(x)
        (grad,) = torch.autograd.grad(result.distance, x)
    assert result.distance == torch.inf
    assert result.pair.tolist() == [-1, -1]
    assert torch.equal(grad, torch.zeros_like(grad))


def test_negative_counts_are_ignored(any_place):
    x = torch.tensor([[0.0], [1.0], [5.0]], device=any_place.device)
    counts = torch.tensor([-1, 1, 1], device=any_place.device)
    with any_place.run():
        assert functional.min_centroid_distance(x, counts).pair.tolist() == [1, 2]


def test_many_centroids_need_many_tiles(place):
    rows = 120 if place.backend == "emulated" else 3000
    x = 100 * torch.randn(rows, 5, generator=torch.Generator().manual_seed(0))
    x[rows - 1] = x[5] + 0.25
    with place.run():
        result = functional.min_centroid_distance(x.to(place.device))
    assert result.pair.tolist() == [5, rows - 1]


def test_rows_beyond_the_classes_are_empty(any_place):
    x = torch.randn(3, 2, device=any_place.device)
    labels = torch.tensor([7, -7, 7], device=any_place.device)
    with any_place.run():
        result = functional.class_centroids(x, labels, max_classes=5)
        nothing = functional.class_centroids(x[:0], labels[:0], max_classes=2)
    assert result.classes.tolist() == [-7, 7, 0, 0, 0]
    assert result.counts.tolist() == [1, 2, 0, 0, 0]
    assert result.centroids[2:].abs().sum() == 0
    assert nothing.counts.tolist() == [0, 0] and nothing.centroids.abs().sum() == 0
