"""The operators of the dispersion softmax: torch.compile, tracing, strides, autocast."""

from __future__ import annotations

import pytest
import torch
from dispersion_cases import loss_of, random_case
from strategies import LAYOUTS, strided

import facelt_ext
from facelt_ext import _native, functional

OPS = torch.ops.facelt_ext


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(place, dtype, joint):
    case = random_case(0, 7, 4, 9, 3, 5).to(dtype, place.device)
    case.labels[2] = -100
    function = loss_of(case, joint=joint, reduction="mean")
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        inputs = [x.detach().clone().requires_grad_() for x in case.rows]
        with place.run():
            loss = run(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(2.5 * loss, inputs)])
    assert all(grad.any() for grad in results[0][1:])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_code_follows_shapes(place):
    case = random_case(1, 12, 4, 9, 3, 5).to(torch.float32, place.device)
    index = case.index()

    def loss(features, labels):
        return functional.dispersion_softmax_loss(features, case.head, case.tail, index, labels)

    compiled = torch.compile(loss, fullgraph=True)
    with place.run():
        for size in (12, 7, 9):
            x = case.features[:size].clone().requires_grad_()
            expected = loss(x, case.labels[:size])
            actual = compiled(x, case.labels[:size])
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                *(torch.autograd.grad(each, x)[0] for each in (actual, expected))
            )


def test_backward_runs_where_forward_ran(place, monkeypatch):
    ran, run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda b, *args: (ran.append(b), run(b, *args)))
    case = random_case(2, 7, 4, 9, 3, 5).to(torch.float32, place.device)
    inputs = [x.requires_grad_() for x in case.rows]
    with place.run():
        loss = loss_of(case, reduction="sum")(*inputs)
        means = functional.super_class_mean(inputs[2], case.index())
    forward = len(ran)
    with facelt_ext.use_backend("reference"):
        (loss + means.sum()).backward()
    # A dispersed gradient by features and by tails, two chunks, coefficients; the means' share.
    assert len(ran) > forward + 4 and set(ran) == {place.backend}


def test_any_tensor_may_be_strided(any_place):
    def wide(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    case = random_case(3, 7, 4, 9, 3, 5).to(torch.float64, any_place.device)
    results = []
    for layout in (torch.clone, wide):
        inputs = [x.detach().clone().requires_grad_() for x in case.rows]
        with any_place.run():
            losses = functional.dispersion_softmax_loss(
                *map(layout, inputs), layout(case.super_class), layout(case.labels),
                reduction="none",
            )  # fmt: skip
        grads = torch.autograd.grad(losses, inputs, layout(case.upstream))
        results.append([losses.detach(), *grads])
    # torch may multiply strided tensors, which the reference does not copy, in another order.
    slack = 1e-13 if any_place.backend == "reference" else 0
    torch.testing.assert_close(*results, rtol=slack, atol=slack)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_take_strided_tensors(place, layout):
    case = random_case(4, 6, 4, 9, 3, 5).to(torch.float32, place.device)
    index = case.index()
    members = (index.index, index.order, index.offsets)
    rows = [strided(x, layout) for x in case.rows]
    labels = case.labels.repeat_interleave(2)[::2]
    args = (*rows, labels, *members, -100, True, torch.float32, place.backend)
    torch.library.opcheck(OPS.dispersion_softmax_forward.default, args)
    state = OPS.dispersion_softmax_forward(*args)
    upstream = case.upstream.repeat_interleave(2)[::2]
    args = (upstream, *rows, labels, *members, *state, True, True, True)
    torch.library.opcheck(
        OPS.dispersion_softmax_backward.default, (*args, torch.float32, place.backend)
    )
    args = (rows[2], index.order, index.offsets, torch.float32, place.backend)
    torch.library.opcheck(OPS.super_class_mean_forward.default, args)
    args = (strided(case.tail[:3], layout), *members, place.backend)
    torch.library.opcheck(OPS.super_class_mean_backward.default, args)


def test_tracing_sees_the_operators(place):
    """What follows tensors through the dispatcher, as FakeTensorMode does, is not passed by."""
    index = functional.SuperClassIndex(torch.tensor([0, 1, 0])).to(place.device)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), place.run():
        inputs = [
            torch.zeros(rows, 3, device=place.device, requires_grad=True) for rows in (8, 5, 3)
        ]
        labels = torch.zeros(8, dtype=torch.int64, device=place.device)
        loss = functional.dispersion_softmax_loss(*inputs, index, labels)
        loss = loss + functional.super_class_mean(inputs[2], index).sum()
        grads = torch.autograd.grad(loss, inputs)
    for grad, tensor in zip(grads, inputs, strict=True):
        assert isinstance(grad, torch._subclasses.FakeTensor) and grad.shape == tensor.shape


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives_of_half_features(place, autocast):
    """Through the reference, which computes in float32, with autocast off."""
    case = random_case(5, 5, 3, 7, 3, 4).to(torch.float32, place.device)
    case.features = case.features.to(torch.bfloat16)
    inputs = [x.requires_grad_() for x in case.rows]
    with place.run(), torch.autocast(place.device, torch.bfloat16, enabled=autocast):
        loss = loss_of(case, reduction="mean")(*inputs)
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
    again = torch.autograd.grad(sum(g.float().square().sum() for g in grads), inputs)
    wide = [t.detach().double().cpu().requires_grad_() for t in inputs]
    with facelt_ext.use_backend("reference"):
        loss = loss_of(case.to(torch.float64), reduction="mean")(*wide)
    expected = torch.autograd.grad(loss, wide, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in expected), wide)
    for actual, true in zip([*grads, *again], [*expected, *twice], strict=True):
        assert (actual.detach().double().cpu() - true).norm() <= 0.02 * true.norm()
    # What is not rounded to the features' dtype shows that no product was made in it.
    for actual, true in zip(grads[1:], expected[1:], strict=True):
        assert (actual.detach().cpu() - true).norm() <= 1e-5 * true.norm()
