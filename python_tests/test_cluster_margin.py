"""The cluster margin loss (CLMLE, eq. 9): the reference against literal loops, every backend
against the reference, and what follows from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from cluster_cases import (
    assert_losses_and_grad,
    assume_no_doubt,
    cases,
    literal_loss,
    loss_of,
    random_case,
    run,
    torch_products_beyond,
    truth,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, LAYOUTS, TOLERANCE, assert_close, strided

from facelt_ext import functional

SUMS_OVER_BOTH = pytest.mark.parametrize("beyond", [0, 1000])


@given(case=cases(20, 12))
def test_reference_agrees_with_literal_loops(case):
    assume_no_doubt(case)
    assert_losses_and_grad(truth(case), literal_loss(case)[:2], case, torch.float64)


@given(case=cases(), data=st.data())
def test_kernels_agree_with_the_reference(place, case, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    case = case.to(dtype)
    assume_no_doubt(case)
    expected = truth(case)
    before = case.features
    case.features = strided(case.features, data.draw(st.sampled_from(LAYOUTS)))
    with torch_products_beyond(data.draw(st.sampled_from([None, 0, 1000]))):
        actual = run(place, case)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
    assert torch.equal(case.features, before)
    assert_losses_and_grad(actual, expected, case, dtype)


@pytest.mark.parametrize("normalize", [False, True])
@SUMS_OVER_BOTH
def test_gradcheck(any_place, beyond, normalize):
    case = random_case(0, 7, 4, 3, normalize_centroids=normalize).to(
        torch.float64, any_place.device
    )
    case.cluster_class[:] = torch.tensor([0, 0, 1, 1])
    case.options |= {"between_margin": 1.2, "within_margin": 0.9}
    x = case.features.requires_grad_()
    assert truth(case.to(None))[0].count_nonzero() > 4
    with any_place.run(), torch_products_beyond(beyond):
        assert torch.autograd.gradcheck(loss_of(case), x)
        assert torch.autograd.gradgradcheck(loss_of(case), x)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 31, 32, 33, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("dimensions", [1, 31, 33, 65, 130])
def test_as_many_clusters_and_dimensions_as_a_block_has_threads(
    place, clusters, dimensions, normalize
):
    """By either way to the products."""
    case = random_case(1, 9, clusters, dimensions, 2, normalize_centroids=normalize)
    # The last cluster has samples, and the one before none.
    case.cluster_index[:] = torch.where(
        case.cluster_index == max(clusters - 2, 0), clusters - 1, case.cluster_index
    )
    case.cluster_index[-2:] = clusters - 1
    case.options |= {"between_margin": 2.5, "within_margin": 2.5}
    case = case.to(torch.float32)
    expected = truth(case)
    for beyond in (0, 1000):
        with torch_products_beyond(beyond):
            assert_losses_and_grad(run(place, case), expected, case, torch.float32)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch", [1, 63, 64, 65, 128, 129, 200])
@pytest.mark.parametrize("dimensions", [15, 150])
def test_batches_of_several_chunks(place, batch, dimensions, normalize):
    """A chunk has at most 64 samples, whose sums the CPU adds up."""
    case = random_case(16, batch, 7, dimensions, normalize_centroids=normalize)
    case.options |= {"between_margin": 2.5, "within_margin": 2.5}
    case = case.to(torch.float32)
    assert_losses_and_grad(run(place, case), truth(case), case, torch.float32)


def test_the_formula_by_hand(any_place):
    """One dimension; clusters of means 2 (class 5), 1 (5), 3 (8), nothing (8), -1 (8)."""
    case = random_case(2, 6, 5, 1, between_margin=0.5, within_margin=-0.5)
    case.features[:] = torch.tensor([[1.0], [3.0], [1.0], [3.0], [-2.0], [0.0]])
    case.cluster_index[:] = torch.tensor([0, 0, 1, 2, 4, 4])
    case.cluster_class[:] = torch.tensor([5, 5, 8, 8, 8])

    def hinge(margin, own, *others):
        return max(margin - own + math.log(sum(map(math.exp, others))), 0)

    expected = [
        hinge(0.5, 2, 3, -1) + hinge(-0.5, 2, 1),
        hinge(0.5, 6, 9, -3) + hinge(-0.5, 6, 3),
        hinge(0.5, 1, 3, -1) + hinge(-0.5, 1, 2),
        hinge(0.5, 9, 6, 3) + hinge(-0.5, 9, -3),
        hinge(0.5, 2, -4, -2) + hinge(-0.5, 2, -6),
        hinge(0.5, 0, 0, 0) + hinge(-0.5, 0, 0),
    ]
    assert run(any_place, case)[0].tolist() == pytest.approx(expected)
    assert expected[2] > hinge(0.5, 1, 3, -1) > 0 == expected[4]


@pytest.mark.parametrize(("between", "within", "classes"), [(2.0, 9.0, [1, 2]), (9.0, 2.0, [3, 3])])
@SUMS_OVER_BOTH
def test_at_its_edge_a_hinge_has_no_gradient(any_place, between, within, classes, beyond):
    """Of f = 2, own mean 2 and another mean 1, margin 2 leaves exactly 0."""
    case = random_case(3, 2, 2, 1, between_margin=between, within_margin=within)
    case.features[:] = torch.tensor([[2.0], [1.0]])
    case.cluster_index[:] = torch.arange(2)
    case.cluster_class[:] = torch.tensor(classes)
    case.upstream[:] = torch.tensor([1.7, 0.0])
    with torch_products_beyond(beyond):
        losses, grad = run(any_place, case)
    assert losses.tolist() == [0, 3] and not grad.any()


@pytest.mark.parametrize("normalize", [False, True])
@SUMS_OVER_BOTH
def test_hinges_without_clusters_are_0(any_place, normalize, beyond):
    options = {"between_margin": 50.0, "within_margin": 50.0, "normalize_centroids": normalize}
    with torch_products_beyond(beyond):
        # One cluster; one among empty ones; and none of them.
        for clusters, used in [(1, 0), (4, 0), (4, 3), (40, 17)]:
            case = random_case(4, 5, clusters, 3, **options)
            case.cluster_index[:] = used
            losses, grad = run(any_place, case)
            assert losses.tolist() == [0] * 5 and not grad.any()
        # Only the hinge between classes, and only that within.
        for classes in ([1, 2, 3], [4, 4, 4]):
            case = random_case(5, 8, 3, 3, **options)
            case.cluster_class[:] = torch.tensor(classes)
            losses, grad = run(any_place, case)
            assert (losses > 45).all() and (losses < 55).all() and grad.any()
            assert_losses_and_grad([losses, grad], truth(case), case, torch.float64)


@pytest.mark.parametrize("clusters", [0, 1, 5, 40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_samples(any_place, reduction, clusters):
    x = torch.empty(0, 3, device=any_place.device, requires_grad=True)
    index = torch.empty(0, dtype=torch.int64, device=any_place.device)
    classes = torch.arange(clusters, device=any_place.device)
    with any_place.run():
        loss = functional.cluster_margin_loss(
            x, index, classes, between_margin=1.0, within_margin=1.0, reduction=reduction
        )
    loss.sum().backward()
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@SUMS_OVER_BOTH
def test_empty_clusters_change_nothing(any_place, dtype, beyond):
    case = random_case(6, 30, 5, 7, 2, normalize_centroids=True).to(dtype)
    case.options |= {"between_margin": 1.5, "within_margin": 1.5}
    with torch_products_beyond(beyond):
        expected = run(any_place, case)
        places = torch.tensor([7, 1, 4, 10, 2])
        classes = torch.tensor([0, 1, -1, -1]).repeat(3)
        classes[places] = case.cluster_class
        case.cluster_index, case.cluster_class = places[case.cluster_index], classes
        actual = run(any_place, case)
    assert expected[0].any()
    assert_losses_and_grad(actual, expected, case, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_mean_of_zeros_stays(any_place, dtype):
    """Its similarity to all is 0, and nothing flows through it."""
    case = random_case(7, 8, 3, 4, normalize_centroids=True, between_margin=1.5).to(dtype)
    case.cluster_index[:] = torch.arange(8) % 3
    case.cluster_class[:] = torch.arange(3)
    case.features[3], case.features[6] = -case.features[0], 0
    expected = truth(case)
    losses, grad = run(any_place, case)
    assert losses[6] > 1.5 and losses[6] == pytest.approx(1.5 + math.log(2))
    assert_losses_and_grad([losses, grad], expected, case, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float64, torch.float32, *HALF])
def test_reductions(any_place, reduction, weight_dtype):
    """The mean is over the samples, whatever their weights."""
    case = random_case(8, 12, 5, 4, between_margin=1.0)
    count = 12 if reduction == "mean" else 1
    if weight_dtype is not None:
        case.sample_weight = torch.arange(12, dtype=torch.float64) / 4
    case.upstream[:] = 1.7 / count
    losses, expected = truth(case)
    case = case.to(torch.float64, any_place.device)
    if weight_dtype is not None:
        case.sample_weight = case.sample_weight.to(weight_dtype)
    x = case.features.requires_grad_()
    with any_place.run():
        loss = loss_of(case, reduction=reduction)(x)
    assert loss.shape == () and loss.dtype == torch.float64
    assert_close(loss.detach(), losses.sum() / count, torch.float64)
    assert_close(torch.autograd.grad(1.7 * loss, x)[0], expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_integers_are_accepted(any_place, dtype):
    case = random_case(9, 9, 4, 5)
    case.cluster_class += 1
    expected = run(any_place, case)
    case.cluster_index, case.cluster_class = (
        case.cluster_index.to(dtype),
        case.cluster_class.to(dtype),
    )
    assert all(map(torch.equal, run(any_place, case), expected))


@pytest.mark.parametrize("clusters", [5, 40])
def test_any_tensor_may_be_strided(any_place, clusters):
    def spread(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    case = random_case(10, 12, clusters, 5, normalize_centroids=True)
    case.sample_weight = torch.rand(12, dtype=torch.float64)
    expected = run(any_place, case)
    for name in ("features", "cluster_index", "cluster_class", "upstream", "sample_weight"):
        setattr(case, name, spread(getattr(case, name)))
        assert not getattr(case, name).is_contiguous()
    with any_place.run():
        moved = case.to(None, any_place.device)
        # An upstream gradient that is expanded has stride 0.
        x = moved.features.requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(moved)(x), x, spread(moved.upstream))
        ones = torch.autograd.grad(loss_of(moved)(x).sum(), x)[0]
        case.upstream = torch.ones(12, dtype=torch.float64)
    assert torch.equal(grad.cpu(), expected[1])
    assert torch.equal(ones.cpu(), run(any_place, case)[1])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("clusters", [6, 40])
def test_the_order_of_samples_and_clusters_is_of_no_matter(any_place, dtype, clusters):
    case = random_case(11, 40, clusters, 6, between_margin=1.0).to(dtype)
    losses, grad = run(any_place, case)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=generator)
    names = torch.randperm(clusters, generator=generator)
    case.features, case.upstream = case.features[order], case.upstream[order]
    case.cluster_index = names[case.cluster_index[order]]
    case.cluster_class = case.cluster_class[names.argsort()]
    expected = [losses[order], grad[order]]
    assert_losses_and_grad(run(any_place, case), expected, case, dtype)


def test_a_step_along_the_gradient_draws_clusters_apart(any_place):
    """Samples come closer to their own centroid than to any other."""
    case = random_case(12, 24, 6, 8, 2, between_margin=1.0, within_margin=0.6)
    case.cluster_index[:] = torch.arange(24) % 6
    case.upstream[:] = 1 / 24
    first = run(any_place, case)[0].mean()
    for _ in range(60):
        case.features -= run(any_place, case)[1]
        case.features = torch.nn.functional.normalize(case.features)
    centroids = torch.stack([case.features[m::6].mean(0) for m in range(6)])
    nearest = (case.features @ centroids.t()).argmax(1)
    assert run(any_place, case)[0].mean() < 0.6 * first
    assert torch.equal(nearest, case.cluster_index)
