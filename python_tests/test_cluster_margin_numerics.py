"""The cluster margin loss's guarantees: half precision, determinism, what is not finite."""

from __future__ import annotations

import pytest
import torch
from cluster_cases import (
    Case,
    assert_losses_and_grad,
    losses_and_grad,
    random_case,
    run,
    torch_products_beyond,
    truth,
)
from conftest import CPU, EMULATED
from strategies import HALF, TOLERANCE

import facelt_ext
from facelt_ext import _C, reference


def textbook(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Eq. 9 with only the product in the half type; autograd does the rest."""
    members = torch.nn.functional.one_hot(case.cluster_index, len(case.cluster_class)).float()
    own, same = members.bool(), case.cluster_class[case.cluster_index][:, None]
    same = same == case.cluster_class

    def losses(x: torch.Tensor) -> torch.Tensor:
        centroids = (members / members.sum(0).clamp(min=1)).t() @ x.float()
        if case.normalize:
            centroids = torch.nn.functional.normalize(centroids)
        similarity = (x @ centroids.to(dtype).t()).float()
        result = 0
        for margin, chosen in [("between_margin", ~same), ("within_margin", same & ~own)]:
            chosen = chosen & members.any(0)
            log_sum = similarity.masked_fill(~chosen, -torch.inf).logsumexp(1)
            exceeding = case.options[margin] - similarity[own] + log_sum
            result = result + torch.where(chosen.any(1), exceeding.relu(), 0)
        return result

    return losses_and_grad(losses, case)


def rms(values: list[torch.Tensor]) -> float:
    return torch.cat([v.double().flatten() for v in values]).square().mean().sqrt().item()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clusters", [12, 40])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, dtype, clusters, normalize):
    """Both read the same half features. One ulp more would be granted, which none needs."""
    ours, theirs = [], []
    for seed in range(32):
        case = random_case(seed, 48, clusters, 20, 5, normalize_centroids=normalize)
        case.options |= {"between_margin": 0.9, "within_margin": 0.6}
        case.features, case.upstream[:] = case.features.to(dtype), 1.7
        expected, actual, plain = truth(case), run(place, case), textbook(case, dtype)
        assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
        ours.append([a.double() - e for a, e in zip(actual, expected, strict=True)])
        theirs.append([p.double() - e for p, e in zip(plain, expected, strict=True)])
    for of_ours, of_theirs in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert 0 < rms(of_ours) <= 1.1 * rms(of_theirs)


@pytest.mark.parametrize("dtype", HALF)
def test_the_reference_reckons_half_in_float32(dtype):
    case = random_case(0, 20, 6, 7)
    case.features = case.features.to(dtype)
    arguments = case.cluster_index, case.cluster_class
    narrow, wide = (
        reference.cluster_margin_loss(x, *arguments, reduction="none", **case.options)
        for x in (case.features, case.features.float())
    )
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


@pytest.mark.parametrize("clusters", [7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(place, dtype, clusters):
    case = random_case(1, 100, clusters, 33, normalize_centroids=True)
    case.features = case.features.to(dtype)
    first, second = (run(place, case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("normalize", [False, True])
def test_any_number_of_threads_gives_the_same_bits(normalize):
    """Of our kernels; torch's products have rules of their own."""
    case = random_case(2, 300, 70, 33, 9, normalize_centroids=normalize).to(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with torch_products_beyond(1000):
                results.append(run(CPU, case))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.emulation
@pytest.mark.parametrize("beyond", [0, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype, beyond):
    """What differs between orders is a missing barrier."""
    cases = [
        random_case(3, 40, clusters, 70, 3, normalize_centroids=normalize, between_margin=1.0)
        for clusters in (5, 70)
        for normalize in (False, True)
    ]
    for case in cases:
        case.features = case.features.to(dtype)

    def everything() -> list[torch.Tensor]:
        with torch_products_beyond(beyond):
            return [result for case in cases for result in run(EMULATED, case)]

    try:
        expected = everything()
        assert all(result.any() for result in expected)
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, everything(), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("clusters", [6, 40])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_similarities_do_not_overflow(any_place, dtype, clusters, scale):
    """exp of 1e4 is infinite, and exp of -1e4 is 0, in every dtype."""
    case = random_case(4, 30, clusters, 9)
    case.features *= scale
    case = case.to(dtype)
    actual = run(any_place, case)
    assert actual[0].max() > 2 * scale and actual[1].isfinite().all()
    # The dtype of truth is float64: nothing overflows there either.
    losses, grad = truth(case)
    size = scale * scale
    assert ((actual[0] - losses).abs() <= size * 100 * torch.finfo(dtype).eps).all()
    # Shares are off by roundings of the similarities, which have become large.
    off = (actual[1] - grad).abs().max() / grad.abs().max()
    assert off <= 100 * size * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beyond", [0, 1000])
def test_a_feature_that_is_not_finite_makes_the_loss_nan(any_place, bad, normalize, beyond):
    for position in [(0, 0), (29, 8), (13, 4)]:
        case = random_case(5, 30, 6, 9, normalize_centroids=normalize).to(torch.float32)
        case.features[position] = bad
        with torch_products_beyond(beyond):
            losses, grad = run(any_place, case)
            mean = run_mean(any_place, case)
        assert losses[position[0]].isnan() and mean.isnan()
        assert grad[position[0]].isnan().all()


def run_mean(place, case: Case) -> torch.Tensor:
    moved = case.to(None, place.device)
    with place.run():
        return facelt_ext.functional.cluster_margin_loss(
            moved.features, moved.cluster_index, moved.cluster_class, **moved.options
        ).cpu()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clusters", [1, 4, 40])
def test_also_where_no_hinge_has_clusters(any_place, bad, normalize, clusters):
    case = random_case(6, 4, clusters, 3, normalize_centroids=normalize).to(torch.float32)
    case.cluster_index[:] = clusters - 1
    case.features[2, 1] = bad
    losses, grad = run(any_place, case)
    assert losses[2].isnan() and run_mean(any_place, case).isnan()
    assert grad[2].isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_also_where_its_hinges_are_not_active(any_place, bad):
    margins = {"between_margin": -1e9, "within_margin": -1e9}
    case = random_case(7, 12, 3, 3, **margins).to(torch.float32)
    assert not run(any_place, case)[0].any()
    case.features[5, 0] = bad
    losses, _ = run(any_place, case)
    assert losses[5].isnan() and run_mean(any_place, case).isnan()


def test_zero_samples_weight_hides_no_nan(any_place):
    case = random_case(8, 12, 3, 3)
    case.features[5, 0] = torch.nan
    case.sample_weight = torch.ones(12)
    case.sample_weight[5] = 0
    assert run(any_place, case)[0][5].isnan()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_very_small_and_very_large_features_are_normalised(any_place, dtype):
    """Squares of their numbers leave the range of the dtype."""
    for factor in (2.0**-75, 2.0**70) if dtype == torch.float32 else (2.0**-600, 2.0**600):
        case = random_case(9, 20, 4, 6, normalize_centroids=True, between_margin=1e-3).to(dtype)
        case.upstream[:] = 1
        case.features[:] = case.features[0]
        case.features[::2, :3] *= -1
        case.features *= factor
        losses, grad = run(any_place, case)
        expected = truth(case)
        assert losses.isfinite().all() and grad.isfinite().all()
        if factor < 1:
            assert_losses_and_grad([losses, grad / 1], expected, case, dtype)
