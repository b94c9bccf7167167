"""The dispersion softmax's guarantees: half precision, determinism, what is not finite, memory."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, EMULATED
from dispersion_cases import (
    Case,
    assert_losses_and_grads,
    literal_loss,
    loss_of,
    losses_and_grads,
    random_case,
    run,
    truth,
)
from softmax_cases import chunks_of, products_made, rms
from strategies import HALF, TOLERANCE, assert_close

import facelt_ext
from facelt_ext import _C, _native, functional
from facelt_ext.functional import _products


def faces(seed: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Case:
    """Samples of heads and of tails whose features lie around their classes' rows."""
    case = random_case(seed, 24, 12, 30, 8, 20)
    case.features += torch.cat([case.head, case.tail])[case.labels]
    case.upstream[:] = 1.7
    case.features = case.features.to(dtype)
    case.head, case.tail = case.head.to(weight_dtype), case.tail.to(weight_dtype)
    return case


def textbook(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Only the products are in the half type; autograd does the rest."""

    def losses(features, head, tail):
        sums = torch.zeros(8, 20).index_add(0, case.super_class, tail.float())
        means = sums / case.super_class.bincount()[:, None]
        by_head, by_tail, by_mean = (
            (features.to(dtype) @ rows.to(dtype).t()).float() for rows in (head, tail, means)
        )
        own = torch.cat([torch.full((12,), -1), case.super_class])[case.labels][:, None]
        members = torch.where(case.super_class == own, by_tail, -torch.inf)
        others = torch.where(torch.arange(8) == own, -torch.inf, by_mean)
        target = torch.cat([by_head, by_tail], 1).gather(1, case.labels[:, None])[:, 0]
        return torch.cat([by_head, members, others], 1).logsumexp(1) - target

    return losses_and_grads(losses, case)


@pytest.mark.parametrize("kind", ["half", "float32 weight", "autocast of float32"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("joint", [False, True])
def test_half_precision_is_as_good_as_the_textbook_form(place, kind, dtype, joint):
    """Both read the same inputs. One ulp more would be granted, which none needs."""
    ours, theirs = [], []
    autocast = kind.startswith("autocast")
    types = (torch.float32 if autocast else dtype, dtype if kind == "half" else torch.float32)
    for seed in range(32):
        case = faces(seed, *types)
        expected = truth(case)
        with torch.autocast(place.device, dtype, enabled=autocast):
            actual = run(place, case, joint=joint)
        assert [a.dtype for a in actual] == [torch.float32, types[0], types[1], types[1]]
        ours.append([a.double() - e for a, e in zip(actual, expected, strict=True)])
        plain = textbook(case, dtype)
        theirs.append([a.double() - e for a, e in zip(plain, expected, strict=True)])
    for mine, textbooks in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        # Not float32 in disguise either.
        assert 0.1 * rms(textbooks) <= rms(mine) <= 1.1 * rms(textbooks)


@pytest.mark.parametrize("features", HALF)
@pytest.mark.parametrize("autocast", HALF)
def test_autocast_decides_the_products_dtype(place, features, autocast, monkeypatch):
    case = faces(0, features, torch.float32)
    seen, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.add(a[0].dtype), mm(*a, **k))[1])
    with torch.autocast(place.device, autocast):
        actual = run(place, case)
    assert seen == {autocast}
    assert [a.dtype for a in actual] == [torch.float32, features, torch.float32, torch.float32]
    for a, e in zip(actual, truth(case), strict=True):
        assert rms([a.double() - e]) <= 0.1 * rms([e])


@pytest.mark.parametrize("forward", [None, *HALF])
@pytest.mark.parametrize("backward", HALF)
def test_backward_keeps_to_the_dtype_of_forward(place, forward, backward):
    """Also where somebody calls it under another autocast."""
    case = faces(0, torch.float32, torch.float32).to(torch.float32, place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    with place.run():
        with torch.autocast(place.device, forward, enabled=forward is not None):
            loss = loss_of(case, reduction="sum")(*inputs)
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        with torch.autocast(place.device, backward):
            actual = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_loss_has_scaled_gradients(place, dtype):
    """To the bit: a GradScaler's power of two goes past the half types."""
    case = faces(0, torch.float32, torch.float32).to(torch.float32)
    with torch.autocast(place.device, dtype, enabled=dtype != torch.float32):
        plain = run(place, case)
        case.upstream *= 65536
        scaled = run(place, case)
    for a, b in zip(scaled[1:], plain[1:], strict=True):
        assert a.isfinite().all() and torch.equal(a, 65536 * b)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_many_long_features_of_one_super_class_do_not_overflow(place, weight_dtype):
    """Their sum, by a head that is wrong for all of them, is beyond float16's largest number."""
    case = random_case(0, 200, 2, 6, 2, 8)
    case.labels[:] = 2
    case.features[:] = 0
    case.features[:, 0] = 400
    case.head[:, 0], case.tail[:, 0] = -0.01, 0.01
    case.upstream[:] = 1 / 200
    case.features = case.features.half()
    case.head, case.tail = case.head.to(weight_dtype), case.tail.to(weight_dtype)
    expected = truth(case)
    for a, e in zip(run(place, case)[1:], expected[1:], strict=True):
        assert a.isfinite().all() and rms([a.double() - e]) <= 0.02 * rms([e])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True])
def test_runs_workspaces_and_threads_give_the_same_bits(place, dtype, joint, monkeypatch):
    """Only our kernels are told other numbers of threads: what torch.mm does is its own."""
    case = random_case(1, 40, 30, 70, 20, 13).to(dtype)
    case.labels[::7] = -100
    with chunks_of(16):
        expected = run(place, case, workspace="low", joint=joint)
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for workspace in ("low", "high"):
                actual = run(place, case, workspace=workspace, joint=joint)
                assert all(map(torch.equal, actual, expected))


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype):
    """What differs between orders is a missing barrier."""
    case = random_case(2, 9, 6, 60, 4, 37).to(dtype)

    def results():
        with chunks_of(8):
            return run(EMULATED, case)

    try:
        expected = results()
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, results(), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("label", [0, 3, 5, 9])
@pytest.mark.parametrize("position", [(0, 0), (3, 5)])
def test_a_feature_that_is_not_finite(any_place, bad, label, position):
    """A sample of a head or of a tail; others of its super class are not touched."""
    case = random_case(3, 6, 4, 7, 3, 6).to(torch.float32)
    case.labels[:] = torch.tensor([0, 4, 5, 6, 7, 8])
    case.labels[position[0]] = label
    expected = truth(case)
    case.features[position] = bad
    with chunks_of(4):
        losses, by_x, *_ = run(any_place, case)
    others = torch.arange(6) != position[0]
    assert losses[~others].isnan().all() and by_x[~others].isnan().all()
    assert_close(losses[others], expected[0][others], torch.float32, 10)
    assert_close(by_x[others], expected[1][others], torch.float32, 10)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("signs", [[1, 1], [1, -1], [-1, 1], [-1, -1]])
@pytest.mark.parametrize("label", [0, 1, 2, 3, 4])
def test_infinite_logits_of_either_sign(any_place, bad, signs, label):
    """One number is a feature: logits are infinite, and none is NaN."""
    case = random_case(4, 1, 2, 3, 2, 1).to(torch.float32)
    case.head[:, 0] = torch.tensor(signs)
    case.tail[:, 0] = torch.tensor([1.0, -2.0, 3.0])
    case.super_class[:] = torch.tensor([0, 0, 1])
    case.features[:], case.labels[:] = bad, label
    losses, by_x, *_ = run(any_place, case)
    assert losses.isnan().all() and by_x.isnan().all()


@pytest.mark.parametrize("rows", ["head", "tail"])
@pytest.mark.parametrize("row", [0, 6])
def test_a_row_of_nan_is_in_everyones_normalizer(any_place, rows, row):
    case = random_case(5, 5, 7, 7, 3, 6).to(torch.float32)
    getattr(case, rows)[row, 3] = torch.nan
    with chunks_of(4):
        assert run(any_place, case)[0].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ignored", [2, 5])
def test_ignored_samples_may_hold_anything(any_place, bad, dtype, ignored):
    """Also where the ignored label is a tail's, to whose super class other samples belong."""
    case = random_case(6, 6, 3, 6, 2, 5).to(dtype)
    case.ignored = ignored
    case.super_class[:] = torch.tensor([0, 1, 0, 0, 1, 1])
    case.labels[:] = torch.tensor([ignored, 3, 6, ignored, 0, 6])
    case.upstream[:] = 1
    expected = run(any_place, case)
    case.features[::3] = bad
    actual = run(any_place, case)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) and a.isfinite().all()
    assert not actual[0][::3].any() and not actual[1][::3].any()
    # The reduced loss too.
    moved = case.to(dtype, any_place.device)
    with any_place.run():
        loss = loss_of(moved, reduction="mean")(*moved.rows)
    torch.testing.assert_close(loss.cpu(), actual[0].sum() / 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("label", [1, 4])
def test_a_sample_whose_loss_nobody_uses_may_hold_anything(place, bad, label):
    """As with losses[losses.isfinite()].sum(): it takes no part in the gradients."""
    case = random_case(7, 6, 3, 6, 2, 4).to(torch.float32)
    case.labels[:] = torch.tensor([0, 3, label, 4, 5, 8])
    case.upstream[2] = 0
    expected = run(place, case)
    case.features[2] = bad
    actual = run(place, case)
    assert actual[0][2].isnan() and not actual[1][2].any()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(a, e) and a.isfinite().all()


@pytest.mark.parametrize("label", [-1, 9, 2**62, -(2**63)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("joint", [False, True])
def test_a_label_out_of_range(any_place, label, reduction, joint):
    case = random_case(7, 6, 3, 6, 2, 4).to(torch.float32)
    case.labels[:] = torch.tensor([0, 3, -100, 4, 5, 8])
    case.upstream[:] = 1.0 if reduction == "none" else 1 / 6
    _, _, *expected = run(any_place, case, joint=joint)
    case.labels[2] = label
    wanted = rf"labels: expected numbers in \[0, 9\) or -100, got {label} at position 2"
    if any_place.backend == "reference" or any_place == CPU:
        with pytest.raises(ValueError, match=wanted):
            run(any_place, case, joint=joint)
        return
    moved = case.to(None, any_place.device)
    inputs = [x.requires_grad_() for x in moved.rows]
    with any_place.run():
        loss = loss_of(moved, joint=joint, reduction=reduction)(*inputs)
        ones = torch.ones_like(loss)
        grads = torch.autograd.grad(loss, inputs, ones, retain_graph=True)
        again = torch.autograd.grad(loss, inputs, ones, create_graph=True)
        twice = torch.autograd.grad(again[1].square().sum(), inputs)
    others = torch.arange(6) != 2
    if reduction == "none":
        assert loss[2].isnan() and loss[others].isfinite().all()
    else:
        assert loss.isnan()
    assert grads[0][2].isnan().all() and grads[0][others].isfinite().all()
    for grad, unaffected in zip(grads[1:], expected, strict=True):
        assert torch.equal(grad.cpu(), unaffected)
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a.detach(), b, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert all(t[others].isfinite().all() if t is twice[0] else t.isfinite().all() for t in twice)
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(ValueError, match=wanted):
            run(any_place, case, joint=joint)
    finally:
        facelt_ext.debug_checks(False)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_large_logits(any_place, dtype):
    case = random_case(8, 12, 6, 20, 5, 9, spread=100.0).to(dtype)
    assert (truth(case)[0] > 500).any()
    assert_losses_and_grads(run(any_place, case), truth(case), case, dtype)


@pytest.mark.parametrize("along", ["members", "head", "other super class"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_one_part_of_the_normalizer_is_larger_than_all_others(any_place, along, dtype):
    """By e^1000 and more; the members' mean is no larger than the others."""
    case = random_case(9, 4, 2, 6, 2, 3)
    case.super_class[:] = torch.tensor([0, 0, 0, 0, 1, 1])
    case.labels[:] = torch.tensor([2, 3, 4, 0])
    case.features[:, 0] = 30
    case.head[:, 0] = case.tail[:, 0] = 0.1
    if along == "members":
        case.tail[:4, 0] = torch.tensor([40.0, -40.0, 41.0, -41.0])
    elif along == "head":
        case.head[1, 0] = 40
    else:
        case.tail[4:, 0] = torch.tensor([35.0, 45.0])
    case = case.to(dtype)
    expected = literal_loss(case.to(torch.float64))
    assert expected[0].max() > 1000
    with chunks_of(1):
        assert_losses_and_grads(run(any_place, case), expected, case, dtype)


@pytest.mark.parametrize("label", [1, 3, 4, 5])
def test_logits_below_all_numbers(any_place, label):
    """Those of a head, and of the first member, and so of a mean: their terms are 0."""
    case = random_case(9, 1, 2, 4, 2, 1).to(torch.float32)
    case.head[:, 0] = torch.tensor([-1e30, 1e-18])
    case.tail[:, 0] = torch.tensor([-1e30, 2e-18, -1e-18, 3e-18])
    case.super_class[:] = torch.tensor([0, 0, 0, 1])
    case.features[:], case.labels[:] = 1e18, label
    with chunks_of(1):
        actual = run(any_place, case)
    for a, e in zip(actual, truth(case), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6 * e.abs().max().item())


@pytest.mark.parametrize(("workspace", "kept"), [("low", 0), ("high", 6 * 10), ("auto", 6 * 10)])
def test_what_is_kept_and_what_is_multiplied_again(place, workspace, kept, monkeypatch):
    """Of 5 heads and 30 tails in 5 super classes: 10 products a sample."""
    made = products_made(monkeypatch)
    case = random_case(10, 6, 5, 30, 5, 3).to(torch.float32, place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    logits = [(6, 4), (6, 1), (6, 4), (6, 1)]
    with place.run(), chunks_of(4):
        loss = loss_of(case, workspace=workspace, reduction="sum")(*inputs)
        assert made == logits
        state = loss.grad_fn.next_functions[0][0].saved_tensors
        own = {x.data_ptr() for x in inputs}
        sizes = [t.numel() for t in state if t is not None and t.data_ptr() not in own]
        assert state[-1].numel() == kept and sorted(sizes)[-2 if kept else -1] < 6 * 10
        made.clear()
        loss.backward()
        again = [shape for shape in made if shape in logits]
        assert again == ([] if kept else logits)
        assert sorted(shape for shape in made if shape[1] == 3) == [(1, 3), (1, 3), (4, 3), (4, 3)]


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_without_a_gradient_nothing_is_kept(place, how, monkeypatch):
    kept, forward = [], functional.dispersion.forward

    def watched(*args):
        results = forward(*args)
        kept.append(results[-1].numel())
        return results

    monkeypatch.setattr(functional.dispersion, "forward", watched)
    case = random_case(11, 6, 5, 30, 5, 4).to(torch.float32, place.device)
    inputs = [x.requires_grad_(how == "no_grad") for x in case.rows]
    with place.run(), torch.set_grad_enabled(how != "no_grad"):
        loss = loss_of(case, workspace="high")(*inputs)
    assert not loss.requires_grad and kept == [0]


def test_auto_keeps_what_the_budget_allows(place, monkeypatch):
    case = random_case(12, 6, 5, 30, 5, 4).to(torch.float32, place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    for budget, kept in [(6 * 10 * 4, 60), (6 * 10 * 4 - 1, 0)]:
        monkeypatch.setitem(_products.KEPT_BYTES, place.device, budget)
        with place.run():
            loss = loss_of(case, reduction="sum")(*inputs)
        assert loss.grad_fn.next_functions[0][0].saved_tensors[-1].numel() == kept


def test_kernels_of_a_step(place, monkeypatch):
    """Those for the dispersed super classes run once each, and only where their gradient goes."""
    ran, native_run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda *a: (ran.append(a[2]), native_run(*a))[1])
    case = random_case(13, 6, 5, 30, 5, 4).to(torch.float32)

    def counts(wanted):
        ran.clear()
        with chunks_of(4):
            run(place, case, wanted=wanted)
        names = ("targets", "feature_gradient", "tail_gradient")
        return [ran.count(f"dispersion_{name}") for name in names]

    assert counts((True, True, True)) == [1, 1, 2]
    assert counts((True, False, False)) == [1, 1, 0]
    assert counts((False, True, False)) == [1, 0, 0]
    assert counts((False, False, True)) == [1, 0, 2]


@pytest.mark.parametrize("dimensions", [128, 129])
def test_tails_larger_than_the_caches(dimensions):
    """Their gradient is written past them, where rows are aligned."""
    case = random_case(14, 12, 20, 70_000, 900, dimensions, spread=0.1).to(torch.float32)
    assert case.tail.nbytes > 32 << 20
    assert_losses_and_grads(run(CPU, case), truth(case), case, torch.float32)
