"""The dispersion softmax: the reference against literal loops, every backend against the reference,
and what follows from the formula (Aggregate-and-Disperse, eqs. 6-8)."""

from __future__ import annotations

import math

import pytest
import torch
from dispersion_cases import (
    assert_losses_and_grads,
    cases,
    literal_loss,
    loss_of,
    losses_and_grads,
    random_case,
    run,
    truth,
)
from hypothesis import given
from hypothesis import strategies as st
from softmax_cases import chunks_of
from strategies import LAYOUTS, TOLERANCE, assert_close, strided
from torch.nn.functional import cross_entropy

from facelt_ext import functional

WANTED = [tuple(bool(bits >> i & 1) for i in range(3)) for bits in range(1, 8)]


@given(case=cases(8, 9))
def test_reference_agrees_with_literal_loops(case):
    assert_losses_and_grads(truth(case), literal_loss(case), case, torch.float64)


@given(case=cases(), data=st.data())
def test_kernels_agree_with_the_reference(place, case, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    options = {
        "joint": data.draw(st.booleans()),
        "prepared": data.draw(st.booleans()),
        "wanted": data.draw(st.sampled_from(WANTED)),
        "workspace": data.draw(st.sampled_from(["low", "high", "auto"])),
    }
    case = case.to(dtype)
    expected = truth(case)
    before = case.rows
    case.features, case.head, case.tail = map(strided, case.rows, layouts)
    with chunks_of(data.draw(st.sampled_from([None, 1, 5, 64]))):
        actual = run(place, case, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a is None or (a.dtype == dtype and a.shape == e.shape)
    assert all(map(torch.equal, case.rows, before))
    assert_losses_and_grads(actual, expected, case, dtype)


@pytest.mark.parametrize(
    ("heads", "tails", "count"), [(2, 5, 2), (0, 5, 2), (3, 0, 0), (1, 4, 1), (2, 3, 3), (0, 1, 1)]
)
@pytest.mark.parametrize("joint", [False, True])
def test_gradcheck(any_place, heads, tails, count, joint):
    case = random_case(0, 5, heads, tails, count, 3).to(torch.float64, any_place.device)
    case.labels[1] = case.labels[0]
    case.labels[3] = -100
    inputs = [x.requires_grad_() for x in case.rows]
    losses = loss_of(case, joint=joint)
    with any_place.run(), chunks_of(4):
        assert torch.autograd.gradcheck(losses, inputs)
        assert torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("workspace", ["low", "high"])
def test_only_some_inputs_want_a_gradient(any_place, wanted, workspace):
    case = random_case(1, 9, 3, 8, 3, 5)
    with chunks_of(4):
        actual = run(any_place, case, wanted=wanted, workspace=workspace)
    assert [a is not None for a in actual[1:]] == list(wanted)
    assert_losses_and_grads(actual, truth(case), case, torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 0, 3, 5, 8])
def test_reductions_leave_ignored_samples_out(any_place, reduction, ignored):
    """Also where the number of an ignored class is that of a super class after the heads (3 to 5)
    or of a tail (3 to 8)."""
    case = random_case(2, 9, 3, 6, 3, 4)
    case.ignored = ignored
    case.labels[:] = torch.tensor([1, ignored, 4, 7, 6, ignored, ignored, 2, 7])
    case.upstream[:] = 1.7 / (6 if reduction == "mean" else 1)
    losses, *expected = truth(case)
    case = case.to(torch.float64, any_place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    with any_place.run():
        loss = loss_of(case, reduction=reduction)(*inputs)
    assert loss.shape == ()
    assert_close(loss.detach(), losses.sum() / (6 if reduction == "mean" else 1), torch.float64)
    for actual, wanted in zip(torch.autograd.grad(1.7 * loss, inputs), expected, strict=True):
        assert_close(actual, wanted, torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [0, 3])
def test_nobody_takes_part(any_place, reduction, size):
    case = random_case(3, size, 4, 5, 2, 4).to(torch.float32, any_place.device)
    case.labels[:] = -100
    inputs = [x.requires_grad_() for x in case.rows]
    with any_place.run():
        loss = loss_of(case, reduction=reduction)(*inputs)
    loss.sum().backward()
    assert loss.shape == ((size,) if reduction == "none" else ()) and (loss == 0).all()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


def test_the_formula_by_hand(any_place):
    """Logits 1 and 2 of two heads; 3, 5 of a super class; 0, 1, 5 of another."""
    case = random_case(4, 4, 2, 5, 2, 1)
    case.features[:] = 1
    case.head[:] = torch.tensor([[1.0], [2.0]])
    case.tail[:] = torch.tensor([[0.0], [3.0], [1.0], [5.0], [5.0]])
    case.super_class[:] = torch.tensor([1, 0, 1, 0, 1])
    case.labels[:] = torch.tensor([1, 3, 5, 4])

    def of(own, *logits):
        return math.log(sum(map(math.exp, logits))) - own

    expected = [
        of(2, 1, 2, 4, 2),
        of(3, 1, 2, 3, 5, 2),
        of(5, 1, 2, 3, 5, 2),
        of(1, 1, 2, 4, 0, 1, 5),
    ]
    assert run(any_place, case)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("workspace", ["low", "high"])
def test_heads_and_tails_in_one_weight(place, wanted, workspace):
    """To the bit: only where the rows lie differs."""
    case = random_case(5, 12, 5, 13, 4, 6).to(torch.float32)
    case.labels[3] = -100
    with chunks_of(4):
        expected = run(place, case, wanted=wanted, workspace=workspace)
        actual = run(place, case, wanted=wanted, workspace=workspace, joint=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


@pytest.mark.parametrize("count", [1, 4, 30])
def test_the_gradient_of_one_weight_is_one_tensor(place, count):
    """What an optimizer gets of heads and tails that lie in one parameter."""
    case = random_case(6, 8, 5, 30, count, 7)
    _, _, by_head, by_tail = truth(case)
    case = case.to(torch.float64, place.device)
    weight = torch.cat([case.head, case.tail]).requires_grad_()
    with place.run():
        losses = functional.dispersion.dispersion_loss(
            case.features, weight, None, case.index(), case.labels, "none", -100, "auto"
        )
    losses.backward(case.upstream)
    assert_close(weight.grad, torch.cat([by_head, by_tail]), torch.float64)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_super_classes_of_one_member_are_plain_softmax(any_place, dtype):
    case = random_case(7, 15, 6, 11, 11, 5).to(dtype)
    case.labels[4] = -100

    def plain(features, head, tail):
        return cross_entropy(features @ torch.cat([head, tail]).t(), case.labels, reduction="none")

    with chunks_of(4):
        actual = run(any_place, case)
    assert_losses_and_grads(actual, losses_and_grads(plain, case), case, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_permuted_tails_have_permuted_gradients(any_place, dtype):
    case = random_case(8, 15, 4, 12, 5, 6).to(dtype)
    losses, by_x, by_head, by_tail = run(any_place, case)
    generator = torch.Generator().manual_seed(0)
    order, names = torch.randperm(12, generator=generator), torch.randperm(5, generator=generator)
    # Tail order[i] becomes tail i; super class s becomes names[s].
    case.tail, case.super_class = case.tail[order], names[case.super_class[order]]
    is_tail = case.labels >= 4
    case.labels[is_tail] = 4 + order.argsort()[case.labels[is_tail] - 4]
    expected = [losses, by_x, by_head, by_tail[order]]
    assert_losses_and_grads(run(any_place, case), expected, case, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_at_the_start_of_step_two_a_head_sees_step_one(any_place, dtype):
    """Every tail's row is its super class's, so that a head's sample has the loss of the classifier
    over heads and super classes."""
    case = random_case(9, 12, 6, 14, 4, 5).to(dtype)
    case.labels %= 6
    aggregated = case.tail[:4].clone()
    case.tail = aggregated[case.super_class]
    losses, by_x, by_head, by_tail = run(any_place, case)

    def step_one(features, head, rows):
        return cross_entropy(features @ torch.cat([head, rows]).t(), case.labels, reduction="none")

    case.tail = aggregated
    by_rows = torch.zeros(4, 5, dtype=dtype).index_add(0, case.super_class, by_tail)
    expected = losses_and_grads(step_one, case)
    assert_losses_and_grads([losses, by_x, by_head, by_rows], expected, case, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("joint", [False, True])
def test_tails_of_inactive_super_classes_get_their_share(place, dtype, joint):
    """To the bit that of their mean, divided by their number: the same loss is written with the
    mean in place of the members, whose super class it then is alone."""
    case = random_case(10, 14, 4, 21, 6, 9).to(dtype)
    active = torch.tensor([True, False, True, False, False, False])
    allowed = torch.cat([torch.arange(4), 4 + active[case.super_class].nonzero()[:, 0]])
    case.labels = allowed[case.labels % len(allowed)]
    assert (case.labels >= 4).any()
    index, kept = case.super_class, active[case.super_class]
    inactive = (~active).nonzero()[:, 0]
    with place.run():
        moved = case.to(None, place.device)
        means = functional.super_class_mean(moved.tail, moved.index()).cpu()
    with chunks_of(4):
        _, _, by_head, by_tail = run(place, case, joint=joint)
        # The members of active super classes stay; a mean follows for each of the others.
        own = case.labels >= 4
        case.labels[own] = 4 + (kept.cumsum(0) - 1)[case.labels[own] - 4]
        case.tail = torch.cat([case.tail[kept], means[inactive]])
        case.super_class = torch.cat([index[kept], inactive])
        _, _, same_head, by_row = run(place, case, joint=joint)
    by_member, by_mean = by_row[: -len(inactive)], by_row[-len(inactive) :]
    assert torch.equal(by_head, same_head) and torch.equal(by_tail[kept], by_member)
    for s, gradient in zip(inactive.tolist(), by_mean, strict=True):
        shares = by_tail[index == s]
        assert shares.any() and torch.equal(shares, (gradient / len(shares)).expand_as(shares))


def test_a_second_backward_gives_the_same(place):
    case = random_case(11, 9, 5, 13, 4, 5).to(torch.float32, place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    for workspace in ("low", "high"):
        with place.run(), chunks_of(4):
            loss = loss_of(case, workspace=workspace, reduction="sum")(*inputs)
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            second = torch.autograd.grad(loss, inputs)
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_integers_are_accepted(any_place, dtype):
    case = random_case(12, 9, 4, 7, 3, 4)
    expected = run(any_place, case)
    case.labels, case.super_class = case.labels.to(dtype), case.super_class.to(dtype)
    for prepared in (False, True):
        assert all(map(torch.equal, run(any_place, case, prepared=prepared), expected))


@pytest.mark.parametrize("workspace", ["low", "high", "auto"])
def test_more_classes_than_a_chunk_holds(place, workspace):
    """Of the sizes that the constants themselves give; and gradients that lie in kept memory."""
    small = place.backend == "emulated"
    sizes = (3, 300, 900, 250) if small else (64, 9_000, 30_000, 6_000)
    case = random_case(13, *sizes, 60, spread=0.3).to(torch.float32)
    expected = truth(case)
    with chunks_of(128 if small else None):
        actual = run(place, case, workspace=workspace)
    assert_losses_and_grads(actual, expected, case, torch.float32)


@pytest.mark.parametrize("members", [1, 2, 7, 32, 33, 70])
@pytest.mark.parametrize("dimensions", [1, 31, 32, 33, 130])
def test_as_many_members_and_dimensions_as_a_block_has_threads(place, members, dimensions):
    case = random_case(14, 5, 2, 2 * members, 2, dimensions, spread=0.3)
    case.super_class = torch.arange(2 * members) % 2
    case.labels[:] = torch.tensor([2, 0, 2 + members, 1 + 2 * members, 1])
    case = case.to(torch.float32)
    assert_losses_and_grads(run(place, case), truth(case), case, torch.float32)
