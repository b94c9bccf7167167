"""The margin softmax: the reference against literal loops, every backend against the reference."""

from __future__ import annotations

import literal_softmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from softmax_cases import (
    FLAVOURS,
    Case,
    assert_losses_and_grads,
    cases,
    chunks_of,
    losses_and_grads,
    random_case,
    run,
    truth,
)
from strategies import LAYOUTS, TOLERANCE, assert_close, strided

from facelt_ext import functional, reference


def literal_loss(case: Case) -> list[torch.Tensor]:
    names = ("angular_multiplier", "normalize_features", "normalize_weight", "ignore_index")
    defaults = dict(zip(names, (1, True, True, -100), strict=True))
    options = {**defaults, "scale": 64.0, **case.options}
    options.update({name: margin.numpy() for name, margin in case.margins().items()})
    results = literal_softmax.margin_softmax_loss(
        case.features.numpy(), case.weight.numpy(), case.labels.numpy(), case.upstream.numpy(),
        **options,
    )  # fmt: skip
    return [torch.from_numpy(result) for result in results]


@given(case=st.one_of(cases(8, 9, grid=True), cases(8, 9)))
def test_reference_agrees_with_literal_loops(case):
    actual = losses_and_grads(reference.margin_softmax_loss, case)
    assert_losses_and_grads(actual, literal_loss(case), case, torch.float64)


@given(case=st.one_of(cases(), cases(grid=True)), data=st.data())
def test_kernels_agree_with_the_reference(place, case, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    workspace = data.draw(st.sampled_from(["low", "high", "auto"]))
    case = case.to(dtype)
    expected = truth(case)
    case.features, case.weight = map(strided, (case.features, case.weight), layouts)
    before = [case.features.clone(), case.weight.clone()]
    with chunks_of(data.draw(st.sampled_from([None, 1, 5, 64]))):
        actual = run(place, case, workspace=workspace)
    assert [a.dtype for a in actual] == [dtype] * 3
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert torch.equal(case.features, before[0]) and torch.equal(case.weight, before[1])
    assert_losses_and_grads(actual, expected, case.to(torch.float64), dtype)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("classes", [1, 2, 9])
def test_gradcheck(any_place, flavour, classes):
    case = random_case(3, 4, classes, 3, **FLAVOURS[flavour]).to(torch.float64, any_place.device)
    case.labels[1] = case.labels[0]
    case.labels[3] = -100
    inputs = (case.features.requires_grad_(), case.weight.requires_grad_())
    with any_place.run(), chunks_of(4):

        def losses(x, w):
            return functional.margin_softmax_loss(
                x, w, case.labels, reduction="none", **case.options
            )

        assert torch.autograd.gradcheck(losses, inputs)
        assert torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("wanting", [0, 1])
@pytest.mark.parametrize("workspace", ["low", "high"])
def test_only_one_input_wants_a_gradient(any_place, wanting, workspace):
    case = random_case(0, 6, 11, 5, scale=8.0, angular_margin=0.3).to(
        torch.float64, any_place.device
    )
    inputs = [case.features, case.weight]
    inputs[wanting].requires_grad_()
    with any_place.run(), chunks_of(4):
        losses = functional.margin_softmax_loss(
            *inputs, case.labels, reduction="none", workspace=workspace, **case.options
        )
        losses.backward(case.upstream)
    assert inputs[1 - wanting].grad is None
    assert_close(
        inputs[wanting].grad, truth(case.to(torch.float64, "cpu"))[1 + wanting], torch.float64
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 0, 3])
def test_reductions_leave_ignored_samples_out(any_place, reduction, ignored):
    case = random_case(1, 8, 5, 4, scale=4.0, cosine_margin=0.2, ignore_index=ignored)
    case.labels[:] = torch.tensor([1, ignored, 2, 4, 1, ignored, ignored, 2])
    case.upstream[:] = 1.7 / (5 if reduction == "mean" else 1)
    losses, *expected = truth(case)
    case = case.to(torch.float64, any_place.device)
    x, w = case.features.requires_grad_(), case.weight.requires_grad_()
    with any_place.run():
        loss = functional.margin_softmax_loss(
            x, w, case.labels, reduction=reduction, **case.options
        )
    assert loss.shape == ()
    assert_close(loss.detach(), losses.sum() / (5 if reduction == "mean" else 1), torch.float64)
    for actual, wanted in zip(torch.autograd.grad(1.7 * loss, (x, w)), expected, strict=True):
        assert_close(actual, wanted, torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_nobody_takes_part(any_place, reduction, size, normalize):
    x = torch.randn(size, 4, device=any_place.device, requires_grad=True)
    w = torch.randn(6, 4, device=any_place.device, requires_grad=True)
    labels = torch.full((size,), -100, device=any_place.device)
    with any_place.run():
        loss = functional.margin_softmax_loss(
            x,
            w,
            labels,
            reduction=reduction,
            normalize_features=normalize,
            normalize_weight=normalize,
        )
    loss.sum().backward()
    assert loss.shape == ((size,) if reduction == "none" else ()) and (loss == 0).all()
    assert x.grad.shape == (size, 4) and not x.grad.any() and not w.grad.any()


def test_the_formula_by_hand(any_place):
    # Angles of 60 degrees and 90 degrees from the feature, whose norm is 2.
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64, device=any_place.device)
    w = torch.tensor([[0.5, 0.75**0.5], [0.0, 3.0]], dtype=torch.float64, device=any_place.device)

    def loss(**options):
        y = torch.zeros(1, dtype=torch.int64, device=any_place.device)
        with any_place.run():
            return functional.margin_softmax_loss(x, w, y, **options).item()

    def of(target, other=0.0):
        return torch.tensor([target, other]).double().logsumexp(0).item() - target

    third = torch.pi / 3
    assert loss(scale=3.0) == pytest.approx(of(1.5))
    assert loss(scale=3.0, cosine_margin=0.25) == pytest.approx(of(0.75))
    assert loss(scale=3.0, angular_margin=third) == pytest.approx(of(-1.5))
    # cos(pi + pi/6) beyond pi: -cos - 2.
    assert loss(scale=3.0, angular_margin=third * 2.5) == pytest.approx(of(3 * (0.75**0.5 - 2)))
    assert loss(scale=3.0, angular_multiplier=2) == pytest.approx(of(-1.5))
    assert loss(scale=3.0, angular_multiplier=4) == pytest.approx(of(3 * (0.5 - 2)))
    assert loss(scale=3.0, normalize_features=False) == pytest.approx(of(3.0))
    plain = {"normalize_features": False, "normalize_weight": False}
    assert loss(scale=1.0, **plain) == pytest.approx(of(1.0))


@pytest.mark.parametrize("multiplier", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_features_along_or_against_their_class(
    any_place, multiplier, margin, sign, normalize, dtype
):
    """|cos(theta)| = 1, where an angular margin's derivative is the largest there is."""
    case = random_case(
        5, 3, 3, 6, scale=2.0, angular_multiplier=multiplier, angular_margin=margin,
        normalize_features=normalize,
    ).to(dtype)  # fmt: skip
    case.labels[:] = torch.arange(3)
    case.features = sign * torch.tensor([[1.0], [0.25], [3.0]], dtype=dtype) * case.weight
    wide = case.to(torch.float64)
    assert_losses_and_grads(run(any_place, case), literal_loss(wide), wide, dtype)


@pytest.mark.parametrize("sine", [1e-6, 5e-5, 2e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("multiplier", "margin"), [(1, 0.5), (3, 0.5), (3, 0.0), (4, 0.0)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_features_almost_along_or_against_their_class(
    any_place, sine, sign, multiplier, margin, dtype
):
    """Where the derivative is kept at what it is at a sine of 1e-4, and where it is not yet; and on
    this side of k pi, where psi would go on another way."""
    case = random_case(
        5, 3, 3, 6, scale=2.0, angular_multiplier=multiplier, angular_margin=margin
    ).to(dtype)  # fmt: skip
    case.labels[:] = torch.arange(3)
    case.features = sign * case.weight + sine * case.features
    wide = case.to(torch.float64)
    assert_losses_and_grads(run(any_place, case), literal_loss(wide), wide, dtype)


@pytest.mark.parametrize("size", [1e20, 1e-21, 1e15, 1e-15])
@pytest.mark.parametrize("which", ["features", "weight", "both"])
@pytest.mark.parametrize("flavour", ["cosface", "arcface", "normalized sphereface"])
def test_very_large_and_very_small_rows(any_place, size, which, flavour):
    """Their squares, and products, leave float32; the angles do not care."""
    case = random_case(6, 5, 7, 4, **FLAVOURS[flavour]).to(torch.float32)
    case.features *= size if which != "weight" else 1
    case.weight *= size if which != "features" else 1
    expected = truth(case)
    actual = run(any_place, case)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5 * e.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rows_of_zeros(any_place, flavour):
    case = random_case(7, 4, 5, 3, **FLAVOURS[flavour])
    case.labels[:] = torch.tensor([0, 1, 2, 1])
    case.features[0] = 0
    case.weight[1] = 0
    actual = run(any_place, case)
    assert_losses_and_grads(actual, literal_loss(case), case, torch.float64)
    if case.options.get("normalize_weight", True):
        assert not actual[1][0].any() and not actual[2][1].any()


@pytest.mark.parametrize("workspace", ["low", "high"])
def test_a_second_backward_gives_the_same(place, workspace):
    case = random_case(8, 6, 13, 5, **FLAVOURS["combined"]).to(torch.float32, place.device)
    inputs = (case.features.requires_grad_(), case.weight.requires_grad_())
    with place.run(), chunks_of(4):
        loss = functional.margin_softmax_loss(
            *inputs, case.labels, workspace=workspace, **case.options
        )
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_integer_labels_are_accepted(any_place, dtype):
    case = random_case(9, 6, 8, 4, **FLAVOURS["cosface"])
    expected = run(any_place, case)
    case.labels = case.labels.to(dtype)
    assert all(map(torch.equal, run(any_place, case), expected))


@pytest.mark.parametrize("workspace", ["low", "high", "auto"])
def test_more_classes_than_a_chunk_holds(place, workspace):
    """Of the sizes that the constants themselves give; and its gradient lies in kept memory."""
    batch, classes = (2, 1500) if place.backend == "emulated" else (64, 20_000)
    case = random_case(10, batch, classes, 60, scale=16.0, cosine_margin=0.3).to(torch.float32)
    expected = truth(case)
    with chunks_of(640 if place.backend == "emulated" else None):
        actual = run(place, case, workspace=workspace)
    assert_losses_and_grads(actual, expected, case.to(torch.float64), torch.float32)
