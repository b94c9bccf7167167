from __future__ import annotations

import re
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    HALF,
    LAYOUTS,
    TOLERANCE,
    assert_close,
    batches,
    exact_batches,
    grid_batches,
    strided,
)

import facelt_ext
from facelt_ext import functional, reference

# Chosen so that neither term vanishes beside the other on the drawn features.
WEIGHTS = {"margin": 400.0, "alpha": 0.3, "beta": 0.07}


def literal_loss(features, labels, k, squared):
    return literal.range_loss(
        features.double().numpy(), labels.numpy(), k, squared=squared, **WEIGHTS
    )


@given(batch=grid_batches(), k=st.integers(1, 6), squared=st.booleans())
def test_reference_agrees_with_literal_loops(batch, k, squared):
    expected, expected_grad = literal_loss(batch.features, batch.labels, k, squared)
    x = batch.features.clone().requires_grad_()
    loss = reference.range_loss(x, batch.labels, k=k, squared=squared, **WEIGHTS)
    (1.7 * loss).backward()
    assert_close(
        loss.detach(), torch.tensor(expected, dtype=torch.float64), torch.float64, expected
    )
    assert_close(x.grad, torch.from_numpy(1.7 * expected_grad), torch.float64)


@given(batch=exact_batches(), k=st.integers(1, 6), squared=st.booleans(), data=st.data())
def test_kernels_agree_with_literal_loops_at_ties(place, batch, k, squared, data):
    dtype = data.draw(st.sampled_from([*TOLERANCE, *HALF]))
    expected, expected_grad = literal_loss(batch.features, batch.labels, k, squared)
    x = batch.features.to(place.device, dtype, copy=True).requires_grad_()
    with place.run():
        loss = functional.range_loss(
            x, batch.labels.to(place.device), k=k, squared=squared, **WEIGHTS
        )
    (1.7 * loss).backward()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == compute and x.grad.dtype == dtype
    assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), compute, expected)
    wanted = torch.from_numpy(1.7 * expected_grad)
    if dtype in HALF:
        # One rounding of the gradient; what it rounds may be off in float32's last digits.
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad.double().cpu(), wanted, atol=1e-4, rtol=ulp)
    else:
        assert_close(x.grad, wanted, dtype, 100)


@given(batch=batches(), k=st.integers(1, 6), squared=st.booleans(), data=st.data())
def test_kernels_agree_with_the_reference(place, batch, k, squared, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    margin = data.draw(st.sampled_from([1e-3, 400.0, 2e4]))
    upstream = data.draw(st.sampled_from([-3.0, 0.37]))
    batch = batch.to(dtype)
    wide = batch.features.to(torch.float64, copy=True)
    assume(not literal.has_near_tie(wide.numpy(), batch.labels.numpy(), k, 1e-5))
    options = {**WEIGHTS, "margin": margin, "k": k, "squared": squared}
    expected = reference.range_loss(wide.requires_grad_(), batch.labels, **options)
    (upstream * expected).backward()

    x = strided(batch.features, layout).to(place.device).requires_grad_()
    before = x.detach().clone()
    with place.run():
        loss = functional.range_loss(x, batch.labels.to(place.device), **options)
    (upstream * loss).backward()
    assert loss.dtype == dtype and loss.shape == ()
    assert x.grad.dtype == dtype and x.grad.shape == x.shape
    assert torch.equal(x.detach(), before)
    terms = float(expected.detach().abs()) + options["beta"] * margin
    assert_close(loss.detach(), expected.detach(), dtype, terms)
    assert_close(x.grad, wide.grad, dtype, float(wide.grad.abs().max()) if wide.numel() else 1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("squared", [True, False])
def test_gradcheck(any_place, k, squared):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(10, 3, dtype=torch.float64, generator=generator).to(any_place.device)
    x.requires_grad_()
    labels = torch.tensor([3, -1, 3, 3, -1, 8, 3, -1, 3, 40], device=any_place.device)
    with any_place.run():

        def loss(x):
            return functional.range_loss(x, labels, k=k, squared=squared, **WEIGHTS)

        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)


# What public implementations of Range Loss get wrong, a test each.


def loss_and_grad(place, features, labels, **options):
    x = torch.as_tensor(features, dtype=torch.float64).to(place.device, copy=True).requires_grad_()
    labels = torch.as_tensor(labels).to(place.device)
    with place.run():
        loss = functional.range_loss(x, labels, **{**WEIGHTS, **options})
    (grad,) = torch.autograd.grad(loss, x)
    return loss.item(), grad.cpu()


def test_a_class_with_two_samples_and_k_2_keeps_its_full_gradient(any_place):
    # One pair only: the harmonic mean is that pair's distance, 25, and its gradient 2 (a - b).
    loss, grad = loss_and_grad(any_place, [[0.0, 0.0], [3.0, 4.0]], [5, 5], k=2, alpha=1.0)
    assert loss == pytest.approx(25.0)
    assert grad.tolist() == [[-6.0, -8.0], [6.0, 8.0]]


def test_one_class_in_the_batch_has_no_inter_term(any_place):
    with_margin, _ = loss_and_grad(any_place, [[0.0], [3.0]], [1, 1], margin=1e6)
    assert with_margin == pytest.approx(WEIGHTS["alpha"] * 9)


def test_the_harmonic_mean_is_k_over_the_sum_of_reciprocals(any_place):
    # k / sum(D) would fall as ranges grow.
    near, _ = loss_and_grad(any_place, [[0.0], [1.0], [2.0]], [1, 1, 1])
    far, grad = loss_and_grad(any_place, [[0.0], [1.0], [4.0]], [1, 1, 1])
    assert near == pytest.approx(WEIGHTS["alpha"] * 2 / (1 / 4 + 1 / 1))
    assert far == pytest.approx(WEIGHTS["alpha"] * 2 / (1 / 16 + 1 / 9))
    assert grad[2] > 0 and grad[0] < 0


def test_classes_are_pushed_apart(any_place):
    # Against the misprinted eq. 7: class 0 lies left, so a descent step must move it further left.
    _, grad = loss_and_grad(any_place, [[0.0], [2.0]], [0, 1])
    assert grad[0] > 0 > grad[1]


def test_shuffled_labels_give_the_same_loss(any_place):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(24) % 5
    order = torch.randperm(24, generator=generator)
    loss, grad = loss_and_grad(any_place, x, labels)
    shuffled, shuffled_grad = loss_and_grad(any_place, x[order], labels[order])
    assert shuffled == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(shuffled_grad, grad[order])


def test_unsorted_labels_with_gaps_and_negative_ones(any_place):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = torch.tensor([0, 1, 2, 3] * 3)
    odd = torch.tensor([-(2**63), -5, 17, 2**63 - 1])[plain]
    assert loss_and_grad(any_place, x, odd)[0] == loss_and_grad(any_place, x, plain)[0]


def test_k_beyond_the_pairs_takes_the_pairs_there_are(any_place):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    all_pairs, grad = loss_and_grad(any_place, x, labels, k=6)
    for k in (7, 10**12):
        more, more_grad = loss_and_grad(any_place, x, labels, k=k)
        assert more == pytest.approx(all_pairs, rel=1e-12)
        torch.testing.assert_close(more_grad, grad)


@pytest.mark.parametrize("squared", [True, False])
def test_duplicate_images(any_place, squared):
    # The class of duplicates has a range of 0: its term and gradient are 0, the other's are not.
    x = [[1.0, 1.0]] * 3 + [[0.0, 0.0], [0.0, 2.0]]
    loss, grad = loss_and_grad(any_place, x, [0, 0, 0, 1, 1], k=3, squared=squared, beta=0.0)
    assert loss == pytest.approx(WEIGHTS["alpha"] * (4 if squared else 2))
    assert grad[:3].abs().sum() == 0 and grad[3:].abs().sum() > 0


def test_one_image_of_one_person(any_place):
    loss, grad = loss_and_grad(any_place, [[1.0, 2.0]], [0])
    assert loss == 0 and grad.tolist() == [[0, 0]]


def test_an_empty_batch_is_zero(any_place):
    x = torch.zeros(0, 4, device=any_place.device, requires_grad=True)
    with any_place.run():
        loss = functional.range_loss(x, torch.zeros(0, dtype=torch.int64, device=any_place.device))
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 4)


def test_all_classes_single(any_place):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, expected_grad = literal_loss(x, torch.arange(6), 2, True)
    loss, grad = loss_and_grad(any_place, x, torch.arange(6))
    assert loss == pytest.approx(expected)
    torch.testing.assert_close(grad, torch.from_numpy(expected_grad))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_integer_labels_are_accepted(any_place, dtype):
    x = torch.randn(4, 3)
    labels = [3, 5, 3, 5]
    expected = loss_and_grad(any_place, x, labels)[0]
    assert loss_and_grad(any_place, x, torch.tensor(labels, dtype=dtype))[0] == expected


def test_the_hinge_is_closed_at_the_margin(any_place):
    # Distance 4 exactly at the margin: loss 0 and gradient 0.
    loss, grad = loss_and_grad(any_place, [[0.0], [2.0]], [0, 1], margin=4.0)
    assert loss == 0 and grad.abs().sum() == 0


def test_equal_centroids_of_uneven_classes_have_distance_zero(any_place):
    # 41 * (1 / 41) is not 1 in float32, 49 * (1 / 49) is not 1 in float64.
    for dtype, n in ((torch.float32, 41), (torch.float64, 49)):
        x = torch.ones(n + 1, 2, dtype=dtype, device=any_place.device, requires_grad=True)
        labels = (torch.arange(n + 1, device=any_place.device) == n).long()
        with any_place.run():
            loss = functional.range_loss(x, labels, squared=False, margin=1.0, alpha=1.0, beta=1.0)
        loss.backward()
        assert loss == 1 and x.grad.abs().sum() == 0


def test_tiny_ranges_do_not_overflow(any_place):
    # 1 / D is infinite in float32 for the subnormal D of these samples.
    x = torch.tensor([[0.0], [2e-20], [1e-20]], device=any_place.device, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        loss = functional.range_loss(x, labels, alpha=1.0)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("size", [4096, 8192])
def test_zipf_labels(place, size):
    size = 192 if place.backend == "emulated" else size
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 1001)
    labels = torch.from_numpy(rng.choice(1000, size, p=weights / weights.sum()))
    x = torch.from_numpy(rng.standard_normal((size, 16)).astype(np.float32))
    expected = reference.range_loss(x.double(), labels, **WEIGHTS)
    with place.run():
        loss = functional.range_loss(x.to(place.device), labels.to(place.device), **WEIGHTS)
    torch.testing.assert_close(loss.cpu().double(), expected, atol=1e-6, rtol=1e-5)


def test_module_is_the_function(any_place):
    x = torch.randn(8, 3, device=any_place.device)
    labels = torch.arange(8, device=any_place.device) // 2
    module = facelt_ext.RangeLoss(k=1, margin=3.0, alpha=0.1, beta=0.2, squared=False)
    with any_place.run():
        expected = functional.range_loss(
            x, labels, k=1, margin=3.0, alpha=0.1, beta=0.2, squared=False
        )
        assert module(x, labels) == expected
        module.alpha = 0.0
        assert module(x, labels) != expected
    assert repr(module) == (
        "RangeLoss(k=1, margin=3.0, alpha=0.0, beta=0.2, squared=False, ignore_index=-100)"
    )


def test_paper_defaults():
    assert repr(facelt_ext.RangeLoss()) == (
        "RangeLoss(k=2, margin=20000.0, alpha=1e-05, beta=0.0001, squared=True, ignore_index=-100)"
    )


def test_the_readme_says_what_it_is_equivalent_to():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"it is equivalent to\n\n```python\n(.*?)```", readme, re.DOTALL).group(1)
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 5, 5, 5, 5, 0, 7])
    names = {"torch": torch, "features": features, "labels": labels, **WEIGHTS}
    exec(code, names)
    assert_close(functional.range_loss(features, labels, **WEIGHTS), names["loss"], torch.float64)
