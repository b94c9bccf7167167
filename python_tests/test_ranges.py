from __future__ import annotations

import math

import literal
import pytest
import torch
from conftest import CPU, EMULATED, KERNEL_PLACES
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    HALF,
    LAYOUTS,
    Batch,
    assert_close,
    batches,
    grid_batches,
    strided,
)

import facelt_ext
from facelt_ext import functional, reference


def expected_rows(batch: Batch, k: int) -> list[tuple[int, list[tuple[float, int, int]], int]]:
    x, labels = batch.features.double().numpy(), batch.labels.numpy()
    return [
        (label, literal.sorted_pairs(x, members)[:k], len(members))
        for label, members in literal.members_of(labels).items()
    ]


def assert_rows(result, batch: Batch, k: int, squared: bool, dtype: torch.dtype) -> None:
    rows = expected_rows(batch, k)
    assert result.classes.tolist() == [label for label, _, _ in rows]
    assert result.counts.tolist() == [count for _, _, count in rows]
    assert result.ranges.shape == (len(rows), k) and result.pairs.shape == (len(rows), k, 2)
    for row, (_, chosen, _) in enumerate(rows):
        missing = k - len(chosen)
        pairs = [[a, b] for _, a, b in chosen] + [[-1, -1]] * missing
        ranges = [d if squared else math.sqrt(d) for d, _, _ in chosen] + [0.0] * missing
        assert result.pairs[row].tolist() == pairs
        expected = torch.tensor(ranges, dtype=torch.float64)
        assert_close(result.ranges[row].detach(), expected, dtype)


@given(batch=grid_batches(), k=st.integers(1, 12), squared=st.booleans())
def test_reference_agrees_with_literal_loops(batch, k, squared):
    result = reference.class_ranges(batch.features, batch.labels, k, squared=squared)
    assert_rows(result, batch, k, squared, torch.float64)


@given(batch=grid_batches(), k=st.integers(1, 12), squared=st.booleans(), data=st.data())
def test_ties_go_to_the_first_pair_in_every_backend_and_dtype(place, batch, k, squared, data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, *HALF]))
    moved = batch.to(dtype, place.device)
    with place.run():
        result = functional.class_ranges(moved.features, moved.labels, k, squared=squared)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.ranges.dtype == compute
    assert_rows(result, batch, k, squared, compute)


@given(batch=batches(), k=st.integers(1, 5), squared=st.booleans(), data=st.data())
def test_values_and_gradients_agree_with_the_reference(place, batch, k, squared, data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch = batch.to(dtype)
    assume(not literal.has_near_tie(batch.features.double().numpy(), batch.labels.numpy(), k, 1e-5))
    x = batch.features.to(torch.float64, copy=True).requires_grad_()
    expected = reference.class_ranges(x, batch.labels, k, squared=squared)
    upstream = torch.randn(
        expected.ranges.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64
    )
    expected.ranges.backward(upstream)

    y = strided(batch.features, layout).to(place.device).requires_grad_()
    with place.run():
        actual = functional.class_ranges(y, batch.labels.to(place.device), k, squared=squared)
    actual.ranges.backward(upstream.to(place.device, dtype))
    assert torch.equal(actual.pairs.cpu(), expected.pairs)
    scale = float(expected.ranges.detach().max()) if expected.ranges.numel() else 1.0
    assert_close(actual.ranges.detach(), expected.ranges.detach(), dtype, scale)
    assert_close(y.grad, x.grad, dtype, float(x.grad.abs().max()) if x.grad.numel() else 1.0)


@pytest.mark.parametrize("squared", [True, False])
def test_gradcheck(any_place, squared):
    x = torch.randn(9, 4, dtype=torch.float64, device=any_place.device, requires_grad=True)
    labels = torch.tensor([3, -1, 3, 3, -1, 8, 3, -1, 3], device=any_place.device)
    with any_place.run():

        def ranges(x):
            return functional.class_ranges(x, labels, 3, squared=squared).ranges

        assert torch.autograd.gradcheck(ranges, x)
        assert torch.autograd.gradgradcheck(ranges, x)


def test_gradient_at_distance_zero_is_zero(any_place):
    x = torch.ones(3, 2, dtype=torch.float64, device=any_place.device, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        result = functional.class_ranges(x, labels, 2, squared=False)
        (grad,) = torch.autograd.grad(result.ranges.sum(), x)
    assert result.ranges.tolist() == [[0, 0]]
    assert result.pairs.tolist() == [[[0, 1], [0, 2]]]
    assert torch.equal(grad, torch.zeros_like(grad))


def test_near_duplicates_do_not_cancel(any_place):
    # Through the Gram matrix |a|^2 + |b|^2 - 2ab these float32 distances would come out as 0.
    x = torch.full((3, 8), 1000.0, device=any_place.device)
    x[1, 0] += 2**-10
    x[2, 0] += 3 * 2**-10
    labels = torch.zeros(3, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        result = functional.class_ranges(x, labels, 3)
    assert result.ranges[0].tolist() == [9 * 2**-20, 4 * 2**-20, 2**-20]
    assert result.pairs[0].tolist() == [[0, 2], [1, 2], [0, 1]]


@pytest.mark.parametrize("extra", [0, 1, 9])
def test_max_classes_pads(any_place, extra):
    x = torch.randn(5, 3, device=any_place.device, requires_grad=True)
    labels = torch.tensor([4, 2, 4, 2, 9], device=any_place.device)
    with any_place.run():
        exact = functional.class_ranges(x, labels, 2)
        padded = functional.class_ranges(x, labels, 2, max_classes=3 + extra)
        (grad_exact,) = torch.autograd.grad((exact.ranges * 1.5).sum(), x)
        (grad_padded,) = torch.autograd.grad((padded.ranges * 1.5).sum(), x)
    assert torch.equal(padded.ranges[:3], exact.ranges)
    assert torch.equal(padded.pairs[:3], exact.pairs)
    assert padded.classes.tolist() == [2, 4, 9, *[0] * extra]
    assert padded.counts.tolist() == [2, 2, 1, *[0] * extra]
    assert padded.ranges[3:].abs().sum() == 0
    assert (padded.pairs[3:] == -1).all()
    assert torch.equal(grad_exact, grad_padded)


@pytest.mark.parametrize("name", ["class_ranges", "class_centroids"])
def test_max_classes_too_small(place, name):
    x = torch.randn(4, 3, device=place.device)
    labels = torch.arange(4, device=place.device)
    function = getattr(functional, name)
    with place.run():
        if place == CPU:
            with pytest.raises(ValueError, match="max_classes: 2 is too small for 4 classes"):
                function(x, labels, max_classes=2)
        else:
            assert function(x, labels, max_classes=2)[1].isnan().all()


@pytest.mark.emulation
@pytest.mark.parametrize("name", ["class_ranges", "class_centroids"])
def test_debug_checks(name):
    x, labels = torch.randn(4, 3), torch.arange(4)
    with EMULATED.run():
        facelt_ext.debug_checks(True)
        try:
            with pytest.raises(ValueError, match="max_classes: 2 is too small for 4 classes"):
                getattr(functional, name)(x, labels, max_classes=2)
        finally:
            facelt_ext.debug_checks(False)
        assert getattr(functional, name)(x, labels, max_classes=2)[1].isnan().all()


@pytest.mark.parametrize("name", ["class_ranges", "class_centroids"])
def test_max_classes_too_small_in_the_reference(name):
    with pytest.raises(ValueError, match="max_classes: 2 is too small for 4 classes"):
        getattr(reference, name)(torch.randn(4, 3), torch.arange(4), max_classes=2)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("place", [p for p in KERNEL_PLACES if p.id != "cpu"])
def test_gradients_without_a_row_are_nan(place, squared):
    x = torch.randn(8, 3, device=place.device, requires_grad=True)
    labels = torch.arange(8, device=place.device) // 2
    with place.run():
        ranges = functional.class_ranges(x, labels, squared=squared, max_classes=2).ranges
        (grad,) = torch.autograd.grad(ranges.sum(), x)
    assert grad.isnan().all()


def test_a_large_class_needs_many_tiles(place):
    # 8192 samples where the machine is fast enough, else as many as need a few rows of tiles.
    size = 100 if place.backend == "emulated" else 8192
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=generator)
    direction = torch.tensor([1.0, 0, 0, 0, 0, 0])
    x[size - 3] = 40 * direction
    x[7] = -41 * direction
    x[size // 2] = 43 * direction
    labels = torch.zeros(size, dtype=torch.int64)
    with place.run():
        result = functional.class_ranges(x.to(place.device), labels.to(place.device), 2)
    assert result.pairs[0].tolist() == [[7, size // 2], [7, size - 3]]
    assert result.ranges[0].tolist() == [84.0**2, 81.0**2]


def test_more_ranges_than_pairs(any_place):
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], device=any_place.device)
    labels = torch.tensor([0, 0, 0, 5], device=any_place.device)
    with any_place.run():
        result = functional.class_ranges(x, labels, 6)
    assert result.ranges.tolist() == [[9, 4, 1, 0, 0, 0], [0] * 6]
    assert result.pairs[0].tolist() == [[0, 2], [1, 2], [0, 1], *[[-1, -1]] * 3]
