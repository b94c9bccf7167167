"""The quintuplet loss (LMLE, eqs. 4-5): every backend against literal loops, its edges, its
guarantees."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, EMULATED
from hypothesis import given
from hypothesis import strategies as st
from quintuplet_cases import (
    MARGINS,
    Case,
    assume_no_doubt,
    cases,
    literal_loss,
    loss_of,
    random_case,
    run,
)
from strategies import HALF, LAYOUTS, TOLERANCE, assert_close, strided

import facelt_ext
from facelt_ext import _C, functional

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@given(case=cases(), data=st.data())
def test_agrees_with_literal_loops(any_place, case, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    case = case.to(dtype)
    assume_no_doubt(case)
    losses, grad, *_ = literal_loss(case)
    before = case.features
    case.features = strided(case.features, data.draw(st.sampled_from(LAYOUTS)))
    actual = run(any_place, case)
    assert actual[0].dtype == dtype and actual[1].dtype == dtype
    assert torch.equal(case.features, before)
    size = max(1.0, float(before.double().square().sum(1).amax())) if len(before) else 1.0
    assert_close(actual[0], losses, dtype, size)
    assert_close(actual[1], grad, dtype, size * max(1.0, float(case.upstream.abs().sum())))


@given(case=cases(40, grid=True), data=st.data())
def test_of_equally_distant_ones_the_first_is_taken(any_place, case, data):
    """Also for what stands exactly at a hinge's edge, which has no gradient."""
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    losses, grad, *_ = literal_loss(case)
    actual = run(any_place, case.to(dtype))
    assert torch.equal(actual[0].double(), losses)
    assert_close(actual[1], grad, dtype, max(1.0, float(grad.abs().amax()) if len(grad) else 1.0))


def test_the_formula_by_hand(any_place):
    """Class 5 has clusters {0, 1} and {3}, class 8 has one cluster {7}; on a line."""
    case = random_case(0, 4, 1)
    case.features[:] = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    case.labels[:] = torch.tensor([5, 5, 5, 8])
    case.clusters[:] = torch.tensor([2, 2, 9, 2])
    case.margins = (10.0, 20.0, 50.0)
    losses, _ = run(any_place, case)
    assert losses.tolist() == [
        (10 + 1 - 9) + (20 + 9 - 9) + (50 + 9 - 49),
        (10 + 1 - 4) + (20 + 4 - 4) + (50 + 4 - 36),
        (20 + 4 - 9) + (50 + 9 - 16),
        0,
    ]
    with any_place.run():
        mean = loss_of(case.to(torch.float64, any_place.device), "mean")(
            case.features.to(any_place.device)
        )
    assert mean.item() == losses.sum().item() / 3


@pytest.mark.parametrize(
    ("labels", "clusters", "with_hinge"),
    [
        ([1] * 6, [0] * 6, 0),
        ([1] * 6, [0, 0, 1, 1, 2, 2], 6),
        ([1] * 6, [0, 1, 2, 3, 4, 5], 6),
        ([0, 1, 2, 3, 4, 5], [0] * 6, 0),
        ([0, 0, 0, 1, 1, 1], [0] * 6, 6),
        ([0, 0, 1, 2, 3, 4], [0] * 6, 2),
        ([3], [3], 0),
        ([], [], 0),
    ],
)
@REDUCTIONS
def test_batches_that_lack_something(any_place, labels, clusters, with_hinge, reduction):
    """One class and one cluster; clusters of one sample; one sample a class; one sample; none."""
    case = random_case(1, len(labels), 5, margins=(3.0, 2.0, 40.0))
    case.labels = torch.tensor(labels, dtype=torch.int64)
    case.clusters = torch.tensor(clusters, dtype=torch.int64)
    losses, _, hinges, _ = literal_loss(case)
    assert hinges.sum() == with_hinge
    moved = case.to(torch.float64, any_place.device)
    x = moved.features.requires_grad_()
    with any_place.run():
        value = loss_of(moved, reduction)(x)
        value.backward(torch.full_like(value, 1.3))
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(with_hinge, 1)}
    torch.testing.assert_close(value.detach().cpu(), expected[reduction])
    share = 1.3 / max(with_hinge, 1) if reduction == "mean" else 1.3
    case.upstream[:] = share
    torch.testing.assert_close(x.grad.cpu(), literal_loss(case)[1])


def test_gradcheck(any_place):
    case = random_case(2, 12, 3, margins=(2.0, 3.0, 4.0)).to(torch.float64, any_place.device)
    x = case.features.requires_grad_()
    with any_place.run():
        for reduction in ("none", "mean"):
            assert loss_of(case, reduction)(x).any()
            assert torch.autograd.gradcheck(loss_of(case, reduction), x)
            assert torch.autograd.gradgradcheck(loss_of(case, reduction), x)


@pytest.mark.parametrize("dimensions", [1, 31, 33, 130])
@pytest.mark.parametrize("batch", [15, 16, 17, 31, 33, 64, 65, 150])
def test_as_many_samples_and_dimensions_as_a_tile_has(place, batch, dimensions):
    case = random_case(3, batch, dimensions, 4).to(torch.float32)
    losses, grad, *_ = literal_loss(case)
    actual = run(place, case)
    size = float(case.features.square().sum(1).amax())
    assert_close(actual[0], losses, torch.float32, size)
    assert_close(actual[1], grad, torch.float32, size * 4)


def textbook(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """The eager form: distances by a product in the half type, the rest in float32."""
    others = ~torch.eye(len(case.labels), dtype=torch.bool)
    same = case.labels[:, None] == case.labels
    cluster = same & (case.clusters[:, None] == case.clusters)
    x = case.features.clone().requires_grad_()
    squares = x.float().square().sum(1)
    distances = squares[:, None] + squares - 2 * (x.to(dtype) @ x.to(dtype).t()).float()
    found = [
        torch.where(cluster & others, distances, -torch.inf).amax(1),
        torch.where(same & ~cluster, distances, torch.inf).amin(1),
        torch.where(same & others, distances, -torch.inf).amax(1),
        torch.where(~same, distances, torch.inf).amin(1),
    ]
    losses = sum(
        torch.where(near.isfinite() & far.isfinite(), (margin + near - far).relu(), 0)
        for margin, near, far in zip(case.margins, found[:-1], found[1:], strict=True)
    )
    (grad,) = torch.autograd.grad(losses, x, case.upstream.float())
    return [losses.detach(), grad]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, dtype):
    ours, theirs = [], []
    for seed in range(32):
        case = random_case(seed, 40, 20, 4, margins=(6.0, 6.0, 30.0)).to(dtype)
        case.upstream[:] = 1.7
        expected = literal_loss(case)[:2]
        for errors, actual in [(ours, run(place, case)), (theirs, textbook(case, dtype))]:
            errors.append([a.double() - e for a, e in zip(actual, expected, strict=True)])
    for of_ours, of_theirs in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        off, allowed = (
            torch.cat([e.flatten() for e in errors]).square().mean().sqrt()
            for errors in (of_ours, of_theirs)
        )
        assert 0 < off <= 1.1 * allowed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@REDUCTIONS
def test_a_feature_that_is_not_finite_makes_all_of_it_nan(any_place, bad, reduction):
    for batch in (1, 6, 40):
        case = random_case(4, batch, 7, margins=(-1e9, -1e9, -1e9))
        case.features[batch // 2, 3] = bad
        case = case.to(torch.float32, any_place.device)
        x = case.features.requires_grad_()
        with any_place.run():
            value = loss_of(case, reduction)(x)
            value.sum().backward()
        assert value.isnan().all() and x.grad.isnan().all()


def test_equal_samples_have_distance_0(any_place):
    """Far from the origin, where squares less products would cancel."""
    case = random_case(5, 6, 3, margins=(0.25, 0.5, 1.0)).to(torch.float32)
    case.features[:] = case.features[0] + 1000
    case.labels[:] = torch.tensor([0, 0, 0, 0, 1, 1])
    case.clusters[:] = torch.tensor([0, 0, 1, 1, 0, 0])
    losses, grad = run(any_place, case)
    assert losses.tolist() == [1.75] * 4 + [1.0] * 2 and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(place, dtype):
    case = random_case(6, 150, 33, 9).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3, 7):
            torch.set_num_threads(threads if place == CPU else before)
            results.append(run(place, case))
    finally:
        torch.set_num_threads(before)
    assert results[0][1].any()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype):
    """What differs between orders is a missing barrier."""
    batch = [random_case(7, size, 40, 4).to(dtype) for size in (5, 40, 70)]

    def everything() -> list[torch.Tensor]:
        results = [result for case in batch for result in run(EMULATED, case)]
        with facelt_ext.use_backend("emulated"):
            return [*results, *(loss_of(case, "mean")(case.features) for case in batch)]

    try:
        expected = everything()
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, everything(), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.emulation
def test_launches():
    case = random_case(8, 30, 9, margins=(3.0, 3.0, 9.0)).to(torch.float32)
    x = case.features.requires_grad_()
    with facelt_ext.use_backend("emulated"):
        before = _C.emulated.launches()
        loss = loss_of(case, "mean")(x)
        forward = _C.emulated.launches()
        loss.backward()
        backward = _C.emulated.launches()
    assert (forward - before, backward - forward) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(place, dtype):
    case = random_case(9, 14, 5, margins=(2.0, 3.0, 4.0)).to(dtype, place.device)
    results = []
    for function in (loss_of(case, "mean"), torch.compile(loss_of(case, "mean"), fullgraph=True)):
        x = case.features.clone().requires_grad_()
        with place.run():
            value = function(x)
            results.append([value.detach(), *torch.autograd.grad(2.5 * value, x)])
    assert results[0][1].any()
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_second_backward_gives_the_same(place):
    case = random_case(10, 20, 5, margins=(2.0, 3.0, 4.0)).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run():
        loss = loss_of(case, "mean")(x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)


def test_autocast_changes_nothing(place):
    case = random_case(11, 20, 9).to(torch.bfloat16)
    expected = run(place, case)
    with torch.autocast(place.device, torch.bfloat16):
        actual = run(place, case)
    assert actual[0].dtype == torch.float32 and all(map(torch.equal, actual, expected))


X, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": X.long()}, TypeError, "features: expected dtype float64, .* torch.int64"),
        ({"features": X[0]}, ValueError, r"features: expected shape .* got \[3\]"),
        ({"labels": X[:, 0]}, TypeError, "labels: expected an integer dtype"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \[4\], .* got \[3\]"),
        ({"cluster_index": [0]}, TypeError, "cluster_index: expected a tensor, got list"),
        ({"cluster_index": LABELS[:3]}, ValueError, r"cluster_index: .* \[4\], .* got \[3\]"),
        ({"cluster_index": LABELS.to("meta")}, ValueError, "cluster_index: .* got meta"),
        ({"margins": 0.3}, TypeError, "margins: expected three numbers, got float"),
        ({"margins": (0.3, 0.2)}, ValueError, "margins: expected three numbers, got 2"),
        ({"margins": (0, "1", 0)}, TypeError, r"margins\[1\]: expected a number, got str"),
        ({"margins": (0, 0, torch.nan)}, ValueError, r"margins\[2\]: .* finite .* got nan"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of none, sum, mean, got 'max'"),
    ],
)
def test_wrong_arguments(any_place, changed, error, message):
    arguments = {"features": X, "labels": LABELS, "cluster_index": LABELS, "margins": MARGINS}
    with any_place.run(), pytest.raises(error, match=message):
        functional.quintuplet_loss(**{**arguments, **changed})


def test_what_a_raw_operator_is_given_is_not_followed(place):
    """Numbers of neighbors that are no samples."""
    case = random_case(12, 6, 3).to(torch.float32, place.device)
    options = (*case.margins, "sum", None, place.backend)
    operators = torch.ops.facelt_ext
    _, neighbors, state = operators.quintuplet_forward(
        case.features, case.labels, case.clusters, *options
    )
    wrong = torch.full_like(neighbors, 2**40)
    wrong[1::2] = -(2**40)
    upstream = torch.ones((), device=place.device)
    grad = operators.quintuplet_backward(upstream, case.features, wrong, state, *options)
    assert not grad.any()
