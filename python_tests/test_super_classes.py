"""The mean rows of super classes, and the index that says which rows they are."""

from __future__ import annotations

import io

import literal_dispersion
import pytest
import torch
from conftest import CPU
from dispersion_cases import assignment
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, LAYOUTS, TOLERANCE, assert_close, strided

import facelt_ext
from facelt_ext.functional import SuperClassIndex, super_class_mean
from facelt_ext.functional.super_classes import _mean_backward, segment_mean, sorted_members


def random_rows(seed: int, rows: int, count: int, dimensions: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, dimensions, dtype=torch.float64, generator=generator)
    upstream = torch.randn(count, dimensions, dtype=torch.float64, generator=generator)
    return weight, assignment(rows, count, generator), upstream


def mean_and_grad(place, weight, super_class, upstream, number=None):
    with place.run():
        leaf = weight.detach().to(place.device).requires_grad_()
        means = super_class_mean(leaf, super_class.to(place.device), number)
        (grad,) = torch.autograd.grad(means, leaf, upstream.to(means))
    return means.detach().cpu(), grad.cpu()


@given(data=st.data())
def test_means_and_gradients_are_the_literal_ones(any_place, data):
    rows = data.draw(st.sampled_from([1, 2, 7, 40]))
    count = data.draw(st.sampled_from(sorted({1, -(-rows // 3), rows})))
    # Numbers that a vector load takes at once, and that it does not.
    dimensions = data.draw(st.sampled_from([1, 3, 4, 8, 31, 33, 128, 132]))
    weight, index, upstream = random_rows(
        data.draw(st.integers(0, 2**32 - 1)), rows, count, dimensions
    )
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    weight, upstream = weight.to(dtype), upstream.to(dtype)
    expected = literal_dispersion.super_class_mean(
        weight.double().numpy(), index.numpy(), count, upstream.double().numpy()
    )
    prepared = SuperClassIndex(index) if data.draw(st.booleans()) else index
    laid_out = strided(weight, data.draw(st.sampled_from(LAYOUTS)))
    actual = mean_and_grad(any_place, laid_out, prepared, upstream)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, torch.from_numpy(e), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_rounded_once(any_place, dtype):
    weight, index, upstream = random_rows(0, 300, 3, 16)
    weight, upstream = weight.to(dtype), upstream.to(dtype)
    means, grad = mean_and_grad(any_place, weight, index, upstream)
    exact, exact_grad = literal_dispersion.super_class_mean(
        weight.double().numpy(), index.numpy(), 3, upstream.double().numpy()
    )
    for actual, expected in ((means, exact), (grad, exact_grad)):
        expected = torch.from_numpy(expected)
        assert actual.dtype == dtype
        off = (actual.double() - expected).abs()
        assert (off <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_means_in_a_half_type_of_float32_rows(place):
    weight, index, _ = random_rows(0, 30, 7, 9)
    prepared = SuperClassIndex(index).to(place.device)
    weight = weight.float().to(place.device)
    wide, half = (
        segment_mean(weight, prepared.order, prepared.offsets, dtype, place.backend)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16 and torch.equal(half, wide.to(torch.bfloat16))


@pytest.mark.parametrize(("count", "dimensions"), [(5_000, 100), (5_000, 101), (3, 128)])
def test_tables_larger_than_the_caches(count, dimensions):
    """From 32 MiB on the gradient's rows are written another way, unless they are not aligned."""
    weight, index, upstream = random_rows(0, 90_001, count, dimensions)
    weight, upstream = weight.float(), upstream.float()
    means, grad = mean_and_grad(CPU, weight, index, upstream)
    counts = torch.bincount(index)[:, None]
    assert torch.equal(grad, (upstream / counts)[index])
    sums = torch.zeros(count, dimensions, dtype=torch.float64)
    assert_close(means, sums.index_add_(0, index, weight.double()) / counts, torch.float32)


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (5, 5), (4, 1), (0, 0)])
def test_gradcheck(any_place, rows, count):
    weight, index, _ = random_rows(0, rows, count, 3)
    weight = weight.to(any_place.device).requires_grad_()
    prepared = SuperClassIndex(index).to(any_place.device)
    with any_place.run():
        assert torch.autograd.gradcheck(lambda w: super_class_mean(w, prepared), weight)
        assert torch.autograd.gradgradcheck(
            lambda w: super_class_mean(w, prepared).square(), weight
        )


def test_a_gradient_is_exactly_the_share_of_the_means(place):
    weight, index, upstream = random_rows(0, 60, 9, 37)
    upstream = upstream.float()
    _, grad = mean_and_grad(place, weight.float(), index, upstream)
    assert torch.equal(grad, (upstream / torch.bincount(index)[:, None])[index])


@pytest.mark.parametrize("prepared", [False, True])
def test_compiles_whole(place, prepared):
    weight, index, _ = random_rows(0, 12, 4, 5)
    weight = weight.float().to(place.device).requires_grad_()
    index = index.to(place.device)
    chosen = SuperClassIndex(index) if prepared else index

    def loss(w):
        return super_class_mean(w, chosen, 4).square().sum()

    with place.run():
        expected = loss(weight)
        actual = torch.compile(loss, fullgraph=True)(weight)
        assert_close(actual, expected, torch.float32)
        for a, e in zip(
            torch.autograd.grad(actual, weight), torch.autograd.grad(expected, weight), strict=True
        ):
            assert_close(a, e, torch.float32)


def test_what_no_check_catches_is_not_followed(place):
    """As the operators get it from a tensor on a GPU, which is not read there."""
    weight, _, upstream = random_rows(0, 7, 4, 35)
    weight, upstream = (t.float().to(place.device) for t in (weight, upstream))
    index = torch.tensor([0, -3, 2, 0, 4, 2**40, 2], device=place.device)
    members = sorted_members(index, 4, False)
    means = segment_mean(weight, *members, torch.float32, place.backend)
    grad = _mean_backward(upstream, index, *members, place.backend)
    assert_close(means[0], weight[[0, 3]].mean(0), torch.float32)
    assert_close(means[2], weight[[2, 6]].mean(0), torch.float32)
    assert means[[1, 3]].isnan().all(), "they have no members"
    assert grad[[1, 4, 5]].isnan().all(), "their numbers are out of range"
    assert torch.equal(grad[[0, 3]], (upstream[0] / 2).expand(2, -1))
    assert torch.equal(grad[[2, 6]], (upstream[2] / 2).expand(2, -1))


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_not_read():
    weight, upstream = torch.randn(4, 8, device="cuda").requires_grad_(), torch.randn(3, 8).cuda()
    index = torch.tensor([0, 0, 7, 2], device="cuda")
    means = super_class_mean(weight, index, 3)
    (grad,) = torch.autograd.grad(means, weight, upstream)
    assert means[1].isnan().all() and means[[0, 2]].isfinite().all()
    assert grad[2].isnan().all() and grad[[0, 1, 3]].isfinite().all()
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"super_class: .*\[0, 3\), got 7 at position 2"):
            super_class_mean(weight, index, 3)
    finally:
        facelt_ext.debug_checks(False)


def test_the_index_of_super_classes():
    index = SuperClassIndex(torch.tensor([1, 0, 1, 2, 0], dtype=torch.int16))
    assert index.index.tolist() == [1, 0, 1, 2, 0] and index.index.dtype == torch.int64
    assert index.order.tolist() == [1, 4, 0, 2, 3] and index.offsets.tolist() == [0, 2, 4, 5]
    assert index.counts().tolist() == [2, 2, 1] and index.num_super_classes == 3
    assert repr(index) == "SuperClassIndex(5 classes in 3 super classes)"
    empty = SuperClassIndex(torch.zeros(0, dtype=torch.int64))
    assert empty.num_super_classes == 0 and empty.offsets.tolist() == [0]


def test_the_index_is_a_copy():
    given = torch.tensor([0, 1, 1])
    index = SuperClassIndex(given)
    given[0] = 9
    assert index.index.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("super_class", "number", "error", "message"),
    [
        ([0, 1], None, TypeError, "super_class: expected a tensor, got list"),
        (torch.zeros(3), None, TypeError, "super_class: expected an integer dtype, got torch.fl"),
        (torch.zeros(3, 1).long(), None, ValueError, r"super_class: .*got \[3, 1\]"),
        (torch.tensor([0, 2, 0, 4]), None, ValueError, "each of the 5 .* none in 2 .* is 1"),
        (torch.tensor([0, -1]), None, ValueError, r"in \[0, 1\), got -1 at position 1"),
        (torch.tensor([0, 1, 2]), 2, ValueError, r"in \[0, 2\), got 2 at position 2"),
        (torch.tensor([0, 1]), 3, ValueError, "none in 1 .* is 2"),
        (torch.tensor([0, 1]), 0, ValueError, "num_super_classes: expected at least 1, got 0"),
        (torch.tensor([0, 1]), 2.0, TypeError, "num_super_classes: expected an int, got float"),
    ],
)
def test_wrong_assignments(super_class, number, error, message):
    with pytest.raises(error, match=message):
        SuperClassIndex(super_class, number)
    with pytest.raises(error, match=message):
        super_class_mean(torch.zeros(len(super_class), 2), super_class, number)


def test_wrong_arguments():
    weight, index = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(TypeError, match="weight: expected a tensor"):
        super_class_mean([[1.0]], index)
    with pytest.raises(TypeError, match="weight: expected dtype"):
        super_class_mean(weight.long(), index)
    with pytest.raises(ValueError, match="weight: expected shape"):
        super_class_mean(weight[0], index)
    for short in (index[:3], SuperClassIndex(index[:3])):
        with pytest.raises(ValueError, match=r"super_class: expected shape \[4\] on cpu"):
            super_class_mean(weight, short)
    with pytest.raises(ValueError, match="num_super_classes: expected 2, as super_class has, got"):
        super_class_mean(weight, SuperClassIndex(index), 3)
    assert super_class_mean(weight, SuperClassIndex(index), 2).shape == (2, 3)


def test_a_saved_index_is_sorted_and_checked_anew():
    index, other = (SuperClassIndex(torch.tensor(v)) for v in ([1, 0, 1, 2], [0, 1, 2, 2]))
    assert list(index.state_dict()) == ["index"]
    file = io.BytesIO()
    torch.save(index.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for name, buffer in index.named_buffers():
        assert torch.equal(getattr(other, name), buffer)
    with pytest.raises((ValueError, RuntimeError), match="super_class: expected a class in each"):
        other.load_state_dict({"index": torch.tensor([0, 0, 1, 1])})
