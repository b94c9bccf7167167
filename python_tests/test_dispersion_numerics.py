"""The dispersion softmax's guarantees: half precision, determinism, what is not finite, memory."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, EMULATED
from dispersion_cases import Case, assert_losses_and_grads, loss_of, random_case, run, truth
from softmax_cases import chunks_of
from strategies import HALF
from test_margin_softmax_numerics import rms

from facelt_ext import _C, functional


def faces(seed: int, batch: int = 24) -> Case:
    """Features around their classes' rows, in super classes of a few tails, each met twice."""
    case = random_case(seed, batch, 20, 30, 9, 16)
    rows = torch.cat([case.head, case.tail])
    case.features = 2 * rows[case.labels] + case.features
    case.upstream[:] = 1.7
    return case


def textbook(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Only the products, and the means that go into them, are in the half type."""
    inputs = [t.clone().requires_grad_() for t in case.rows]
    x, head, tail = inputs
    counts = torch.bincount(case.super_class)
    sums = torch.zeros(len(counts), tail.shape[1]).index_add(0, case.super_class, tail.float())
    means = sums / counts[:, None]
    by_head, by_mean, by_tail = (
        (x.to(dtype) @ rows.to(dtype).t()).float() for rows in (head, means, tail)
    )
    heads = len(head)
    own = torch.cat([torch.full((heads,), -1), case.super_class])[case.labels][:, None]
    dispersed = torch.where(case.super_class == own, by_tail, -torch.inf)
    aggregated = torch.where(torch.arange(len(counts)) == own, -torch.inf, by_mean)
    lse = torch.logsumexp(torch.cat([by_head, dispersed, aggregated], 1), 1)
    target = torch.cat([by_head, by_tail], 1).gather(1, case.labels[:, None])[:, 0]
    losses = lse - target
    return [losses.detach(), *torch.autograd.grad(losses, inputs, case.upstream.float())]


@pytest.mark.parametrize("kind", ["half", "float32 weight", "autocast of float32"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, kind, dtype):
    ours, theirs = [], []
    autocast = kind.startswith("autocast")
    for seed in range(32):
        case = faces(seed)
        weight = dtype if kind == "half" else torch.float32
        case.features = case.features.to(torch.float32 if autocast else dtype)
        case.head, case.tail = case.head.to(weight), case.tail.to(weight)
        expected = truth(case)
        with torch.autocast(place.device, dtype, enabled=autocast):
            actual = run(place, case)
        assert [a.dtype for a in actual] == [torch.float32, *(t.dtype for t in case.rows)]
        plain = textbook(case, dtype)
        ours.append([a.double() - e for a, e in zip(actual, expected, strict=True)])
        theirs.append([a.double() - e for a, e in zip(plain, expected, strict=True)])
    for mine, textbooks in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert 0 < rms(mine) <= 1.1 * rms(textbooks)


def dispersed_kernels(place, case: Case, threads: int | None = None) -> list[torch.Tensor]:
    """What the kernels give around matrix products that stay the same."""
    case = case.to(torch.float32, place.device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad(), place.run():
            means = functional.super_class_mean(case.tail, case.index())
        return [means, *run(place, case, workspace="low")]
    finally:
        torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    case = random_case(0, 30, 6, 40, 7, 19)
    mm, addmm = torch.mm, torch.Tensor.addmm_

    def single(function):
        def run_single(*args, **options):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return function(*args, **options)
            finally:
                torch.set_num_threads(threads)

        return run_single

    monkeypatch.setattr(torch, "mm", single(mm))
    monkeypatch.setattr(torch.Tensor, "addmm_", single(addmm))
    one = dispersed_kernels(CPU, case, 1)
    for threads in (2, 3):
        assert all(map(torch.equal, one, dispersed_kernels(CPU, case, threads)))


@pytest.mark.emulation
@pytest.mark.parametrize("schedule", [("reverse", 0), ("random", 1), ("random", 2)])
def test_any_order_of_blocks_and_threads_gives_the_same_bits(schedule):
    case = random_case(0, 13, 4, 23, 5, 35)
    expected = dispersed_kernels(EMULATED, case)
    _C.emulated.set_schedule(*schedule)
    try:
        assert all(map(torch.equal, expected, dispersed_kernels(EMULATED, case)))
    finally:
        _C.emulated.set_schedule("forward")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("workspace", ["low", "high"])
def test_a_feature_that_is_not_finite_spoils_its_sample_alone(any_place, bad, workspace):
    case = random_case(0, 8, 5, 9, 3, 6)
    case.labels = torch.tensor([0, 5, 13, 2, 7, 6, 11, 8])
    clean = run(any_place, case, workspace=workspace)[0]
    for spoilt in (0, 1):  # of a head, of a tail
        case.features[spoilt, 2] = bad
        losses, grad, *_ = run(any_place, case, workspace=workspace)
        others = torch.arange(8) > spoilt
        assert losses[: spoilt + 1].isnan().all() and torch.equal(losses[others], clean[others])
        assert grad[: spoilt + 1].isnan().any(1).all() and grad[others].isfinite().all()


def test_a_row_that_is_nan_is_seen(any_place):
    """A tail's row spoils its super class's mean, which everybody sees."""
    case = random_case(0, 8, 5, 9, 3, 6)
    case.tail[4, 1] = torch.nan
    assert run(any_place, case)[0].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_ignored_may_hold_anything(any_place, bad):
    case = random_case(0, 8, 5, 9, 3, 6)
    case.labels[[2, 5]] = -100
    clean = run(any_place, case)
    case.features[[2, 5]] = bad
    losses, grad_features, grad_head, grad_tail = run(any_place, case)
    assert (losses[[2, 5]] == 0).all() and (grad_features[[2, 5]] == 0).all()
    for actual, expected in zip((losses, grad_features, grad_head, grad_tail), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_logits_of_any_size(any_place, scale):
    """Where one term outweighs all others by far, among the members or outside of them."""
    case = random_case(1, 30, 5, 9, 3, 6, spread=scale)
    rows = torch.cat([case.head, case.tail])
    case.features[:15] = scale * rows[case.labels[:15]]
    case.features[15:20] = scale * case.tail[:5]
    for dtype in (torch.float64, torch.float32):
        typed = case.to(dtype)
        assert_losses_and_grads(run(any_place, typed), truth(typed), typed, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_half_types_keep_in_range(any_place, dtype):
    """Upstream gradients as a loss scaler makes them, and small ones."""
    for upstream in (2e3, 1e-2):
        case = random_case(3, 24, 20, 30, 9, 16, spread=0.5)
        case.upstream[:] = upstream
        case.features, case.head, case.tail = (t.to(dtype) for t in case.rows)
        _, *grads = run(any_place, case)
        _, *expected = truth(case)
        for grad, value in zip(grads, expected, strict=True):
            assert rms([grad.double() - value]) < 0.02 * rms([value])


@pytest.mark.parametrize(("workspace", "kept"), [("low", 0), ("high", 6 * 8)])
def test_only_high_keeps_products(place, workspace, kept):
    case = random_case(2, 6, 5, 9, 3, 6).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run():
        loss = loss_of(case, workspace=workspace)(x, case.head, case.tail)
    saved = loss.grad_fn.next_functions or [(loss.grad_fn, 0)]
    function = loss.grad_fn if hasattr(loss.grad_fn, "saved_tensors") else saved[0][0]
    assert function.saved_tensors[-1].numel() == kept


def test_no_tensor_of_the_batch_times_all_classes(place, monkeypatch):
    """Neither B times all classes, nor, with chunks, B times heads and super classes."""
    case = random_case(2, 6, 50, 90, 30, 5)
    shapes, mm = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: (shapes.append(k["out"].shape), mm(*a, **k))[1]
    )
    with chunks_of(16):
        run(place, case, workspace="low")
    assert max(shape.numel() for shape in shapes) <= max(6 * 16, 16 * 5)
    assert len(shapes) == 3 * (4 + 2)
