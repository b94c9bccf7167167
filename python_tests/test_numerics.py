"""The guarantees on numbers: half precision, determinism, values that are not finite."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, EMULATED
from strategies import HALF

from facelt_ext import _C, functional, reference

OPTIONS = {"k": 2, "margin": 400.0, "alpha": 0.3, "beta": 0.07}


def batch(seed: int, size: int = 60, dimensions: int = 19, classes: int = 7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dimensions, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, classes, (size,), generator=generator)


def value_and_grad(place, x, labels, **options):
    x = x.to(place.device, copy=True).requires_grad_()
    with place.run():
        loss = functional.range_loss(x, labels.to(place.device), **{**OPTIONS, **options})
    loss.backward(torch.tensor(1.7, dtype=loss.dtype, device=loss.device))
    return loss.detach().cpu(), x.grad.cpu()


def rms(values: list[torch.Tensor]) -> float:
    return torch.cat([v.double().flatten() for v in values]).square().mean().sqrt().item()


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, dtype, squared):
    """Both read the same half features; the textbook form is the formula in float32."""
    errors = {"value": [], "grad": [], "textbook value": [], "textbook grad": []}
    largest = {"value": 0.0, "grad": 0.0}
    for seed in range(32):
        x, labels = batch(seed)
        x = x.to(dtype)
        truth = x.double().requires_grad_()
        true_loss = reference.range_loss(truth, labels, squared=squared, **OPTIONS)
        (1.7 * true_loss).backward()
        plain = x.float().requires_grad_()
        plain_loss = reference.range_loss(plain, labels, squared=squared, **OPTIONS)
        (1.7 * plain_loss).backward()
        loss, grad = value_and_grad(place, x, labels, squared=squared)
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        errors["value"].append(loss.double() - true_loss.detach())
        errors["grad"].append(grad.double() - truth.grad)
        errors["textbook value"].append(plain_loss.detach().double() - true_loss.detach())
        errors["textbook grad"].append(plain.grad.to(dtype).double() - truth.grad)
        largest["value"] = max(largest["value"], true_loss.abs().item())
        largest["grad"] = max(largest["grad"], truth.grad.abs().max().item())
    float32_ulp = torch.finfo(torch.float32).eps * largest["value"]
    assert rms(errors["value"]) <= 1.1 * rms(errors["textbook value"]) + float32_ulp
    # No ulp is granted to the gradient: the rounding to half is in the textbook form as well.
    assert rms(errors["grad"]) <= 1.1 * rms(errors["textbook grad"])


@pytest.mark.parametrize("dtype", HALF)
def test_every_half_number_is_converted_as_torch_does(place, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[None].to(place.device).requires_grad_()
    with place.run():
        result = functional.class_centroids(x, torch.zeros(1, dtype=torch.int64, device=x.device))
    wide = x.detach().float()
    torch.testing.assert_close(result.centroids.detach(), wide, rtol=0, atol=0, equal_nan=True)

    # Each number, the middle to the next one, where rounding is to even, and what lies beside.
    following = wide.roll(-1, 1)
    middle = torch.where(following.isfinite(), wide / 2 + following / 2, 65520.0)
    infinity = torch.full_like(wide, torch.inf)
    nan = torch.full(wide.shape, 0x7FFFFFFF, dtype=torch.int32, device=x.device)
    values = [nan.view(torch.float32)]
    for v in (wide, middle):
        values += [v, torch.nextafter(v, infinity), torch.nextafter(v, -infinity)]
    for v in values:
        (grad,) = torch.autograd.grad(result.centroids, x, v, retain_graph=True)
        torch.testing.assert_close(grad, v.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_the_reference_reckons_half_in_float32(dtype):
    x, labels = batch(0)
    x = x.to(dtype)

    def everything(x):
        yield reference.range_loss(x, labels, **OPTIONS)
        yield reference.class_ranges(x, labels).ranges
        yield reference.class_centroids(x, labels).centroids
        yield reference.min_centroid_distance(x).distance

    for narrow, wide in zip(everything(x), everything(x.float()), strict=True):
        assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(place, dtype):
    x, labels = batch(3, size=150)
    x = x.to(dtype)
    first, second = (value_and_grad(place, x, labels) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_any_number_of_threads_gives_the_same_bits():
    x, labels = batch(4, size=700, dimensions=33, classes=150)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(value_and_grad(CPU, x.float(), labels, margin=1.0))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype):
    """What differs between orders is a missing barrier."""
    x, labels = batch(5, size=140, dimensions=37, classes=5)
    x = x.to(dtype)

    def everything():
        loss, grad = value_and_grad(EMULATED, x, labels)
        y = x.clone().requires_grad_()
        with EMULATED.run():
            ranges = functional.class_ranges(y, labels, 3, squared=False)
            centroids = functional.class_centroids(y, labels)
            distance = functional.min_centroid_distance(centroids.centroids)
            total = ranges.ranges.sum() + distance.distance
            (grad_of_parts,) = torch.autograd.grad(total, y)
            too_few = functional.class_ranges(x, labels, 2, max_classes=2).ranges
        return [loss, grad, *ranges, *centroids, *distance, grad_of_parts, too_few.isnan()]

    try:
        expected = everything()
        assert expected[-1].all()
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            for actual, wanted in zip(everything(), expected, strict=True):
                assert torch.equal(actual, wanted)
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (59, 18), (31, 7)])
def test_a_feature_that_is_not_finite_makes_the_loss_nan(any_place, bad, position):
    x, labels = batch(6)
    x[position] = bad
    loss, grad = value_and_grad(any_place, x.float(), labels)
    assert loss.isnan() and grad.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_also_where_its_class_has_no_pair_and_the_margin_is_passed(any_place, bad):
    # Neither term would see the single sample of class 1.
    x = torch.tensor([[0.0, 0.0], [bad, 1.0], [5.0, 5.0]])
    loss, grad = value_and_grad(any_place, x, torch.tensor([0, 1, 2]), margin=1e-9)
    assert loss.isnan() and grad.isnan().all()


def test_one_class_alone_that_is_not_finite(any_place):
    loss, _ = value_and_grad(any_place, torch.tensor([[torch.nan]]), torch.tensor([3]))
    assert loss.isnan()


def test_ranges_of_other_classes_stay_finite(any_place):
    x = torch.randn(6, 3, device=any_place.device)
    x[0, 0] = torch.nan
    labels = torch.tensor([0, 0, 0, 1, 1, 1], device=any_place.device)
    with any_place.run():
        result = functional.class_ranges(x, labels, 2)
    assert result.ranges[0].isnan().all() and result.ranges[1].isfinite().all()
    assert result.pairs[0].tolist() == [[0, 1], [0, 2]]


@pytest.mark.emulation
@pytest.mark.parametrize("size", [0, 1, 16, 150])
def test_at_most_six_launches(size):
    x, labels = batch(0, size=size)
    before = _C.emulated.launches()
    value_and_grad(EMULATED, x, labels)
    assert 0 < _C.emulated.launches() - before <= 6
