"""The margin softmax's operators: shards of classes, torch.compile, tracing, autocast."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU
from softmax_cases import ARCFACE, COSFACE, FLAVOURS, MIXED, PLAIN, SPHEREFACE, random_case, truth
from strategies import assert_close

import facelt_ext
from facelt_ext import _native, functional

OPS = torch.ops.facelt_ext
DEFAULTS = {
    "scale": 64.0, "angular_multiplier": 1, "normalize_features": True, "normalize_weight": True,
}  # fmt: skip


def sharded(place, case, sizes, keep):
    """Losses, and both gradients, as ranks would compute them that hold some classes each."""
    case = case.to(case.features.dtype, place.device)
    dtype = case.features.dtype
    numbers = {**DEFAULTS, **case.options}
    margins = [m.to(place.device, dtype) for m in case.margins().values()]
    shards, first = [], 0
    for rows in case.weight.split(sizes):
        options = (*(numbers[name] for name in DEFAULTS), first, len(case.weight), -100)
        lse, *state = OPS.margin_softmax_forward(
            case.features, rows, case.labels, *margins, *options, keep, dtype, place.backend
        )
        shards.append((rows, options, lse, state))
        first += len(rows)
    lse = torch.stack([shard[2] for shard in shards]).logsumexp(0)
    target = sum(state[0][0] for _, _, _, state in shards)
    grad_x, grad_w = 0, []
    for rows, options, _, state in shards:
        own_x, own_w = OPS.margin_softmax_backward(
            case.upstream, case.features, rows, case.labels, lse, *state, *options, True, True,
            dtype, place.backend,
        )  # fmt: skip
        grad_x = grad_x + own_x
        grad_w.append(own_w)
    losses = torch.where(case.labels == -100, 0, lse - target)
    return [losses, grad_x, torch.cat(grad_w)]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("keep", [False, True])
def test_shards_of_classes_add_up(place, flavour, keep):
    case = random_case(0, 9, 10, 5, **FLAVOURS[flavour])
    case.labels[:] = torch.tensor([0, 9, 3, 4, -100, 5, 4, 0, 8])
    for actual, expected in zip(sharded(place, case, [4, 1, 5], keep), truth(case), strict=True):
        assert_close(actual, expected, torch.float64, 10)


def test_a_shard_whose_classes_are_all_far_away(place):
    """Its sums are of e^-2000 and less; what another shard's target is to it does not matter."""
    case = random_case(1, 4, 6, 3, **SPHEREFACE)
    case.features[:] = torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.2, 0.1], [1.0, 0, 0.3], [1.0, 0, 0]])
    case.features *= 2000
    case.weight[:, 0] = case.weight[:, 0].abs() * torch.tensor([-9.0, -9, -9, -7, -8, -9])
    case.labels[:] = torch.tensor([0, 5, 3, 1])
    expected = truth(case)
    for actual, wanted in zip(sharded(place, case, [2, 2, 2], False), expected, strict=True):
        assert_close(actual, wanted, torch.float64, 2000)


def test_a_label_of_another_shard_is_no_error(place):
    case = random_case(2, 3, 4, 5, **COSFACE).to(torch.float32, place.device)
    case.labels[:] = torch.tensor([3, 4, 11], device=place.device)
    zeros = torch.zeros(3, device=place.device)
    args = (case.features, case.weight, case.labels, zeros, zeros, 8.0, 1, True, True)
    rest = (-100, False, torch.float32, place.backend)
    lse, targets, *_ = OPS.margin_softmax_forward(*args, 4, 12, *rest)
    assert lse.isfinite().all() and targets[0, 1] != 0
    assert targets[:, 0].tolist() == targets[:, 2].tolist() == [0, 1, 0]
    if place == CPU:
        with pytest.raises(ValueError, match=r"labels: expected numbers in \[0, 11\) .* got 11 at"):
            OPS.margin_softmax_forward(*args, 4, 11, *rest)
    else:
        assert OPS.margin_softmax_forward(*args, 4, 11, *rest)[1][0].isnan().tolist() == [
            False, False, True,
        ]  # fmt: skip


def compiled_and_eager(place, function, case):
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        x, w = (t.detach().clone().requires_grad_() for t in (case.features, case.weight))
        with place.run():
            loss = run(x, w, case.labels)
            results.append([loss.detach(), *torch.autograd.grad(2.5 * loss, (x, w))])
    return results


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(MIXED, torch.float32), (SPHEREFACE, torch.bfloat16), (PLAIN, torch.float32)],
)
def test_compile_fullgraph(place, dtype, options):
    case = random_case(3, 7, 12, 5, **options).to(dtype, place.device)
    case.labels[2] = -100

    def loss(x, w, labels):
        return functional.margin_softmax_loss(x, w, labels, **options)

    eager, compiled = compiled_and_eager(place, loss, case)
    assert eager[1].any() and eager[2].any()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("kind", [torch.Tensor.flatten, lambda margin: margin[:7, None]])
def test_compile_with_margins_that_are_tensors(place, kind):
    case = random_case(4, 7, 12, 5).to(torch.float32, place.device)
    margin = kind(torch.linspace(0, 0.6, 12, device=place.device))

    def loss(x, w, labels):
        return functional.margin_softmax_loss(
            x, w, labels, scale=8.0, cosine_margin=margin, angular_margin=margin
        )

    for a, b in zip(*compiled_and_eager(place, loss, case), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", ["CosFaceLoss", "ArcFaceLoss"])
def test_compiled_modules_follow_hyper_parameters_and_shapes(place, name):
    module = getattr(facelt_ext, name)(6, 5, device=place.device)
    compiled = torch.compile(module, fullgraph=True)
    case = random_case(5, 12, 6, 5).to(torch.float32, place.device)
    seen = set()
    with place.run():
        for margin, scale, size in [(0.3, 16.0, 12), (0.2, 8.0, 12), (0.2, 8.0, 7)]:
            module.margin, module.scale = margin, scale
            expected = module(case.features[:size], case.labels[:size])
            actual = compiled(case.features[:size], case.labels[:size])
            torch.testing.assert_close(actual, expected)
            grads = [torch.autograd.grad(loss, module.weight)[0] for loss in (actual, expected)]
            torch.testing.assert_close(*grads)
            seen.add(round(expected.item(), 3))
    assert len(seen) == 3


def test_backward_runs_where_forward_ran(place, monkeypatch):
    ran, run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda b, *args: (ran.append(b), run(b, *args)))
    case = random_case(6, 7, 12, 5, **ARCFACE).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run():
        loss = functional.margin_softmax_loss(x, case.weight, case.labels, **ARCFACE)
    forward = len(ran)
    with facelt_ext.use_backend("reference"):
        loss.backward()
    assert len(ran) == forward + 4 and set(ran) == {place.backend}


def test_any_tensor_may_be_strided(any_place):
    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    case = random_case(7, 7, 7, 5).to(torch.float64, any_place.device)
    margin = torch.rand(7, 1, dtype=torch.float64, device=any_place.device)
    results = []
    for layout in (torch.clone, strided):
        x, w = case.features.clone().requires_grad_(), case.weight.clone().requires_grad_()
        with any_place.run():
            losses = functional.margin_softmax_loss(
                layout(x), layout(w), layout(case.labels), scale=4.0, reduction="none",
                cosine_margin=layout(margin), angular_margin=layout(margin[:, 0]),
            )  # fmt: skip
        grads = torch.autograd.grad(losses, (x, w), layout(case.upstream))
        results.append([losses.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_operators_take_strided_tensors(place):
    case = random_case(8, 6, 8, 5, **COSFACE).to(torch.float32, place.device)
    x, w = case.features.t().contiguous().t(), case.weight.t().contiguous().t()
    margin = torch.rand(12, device=place.device)[::2]
    labels = case.labels.repeat_interleave(2)[::2]
    options = (8.0, 1, True, True, 0, 8, -100)
    args = (x, w, labels, margin, margin, *options, True, torch.float32, place.backend)
    torch.library.opcheck(OPS.margin_softmax_forward.default, args)
    state = OPS.margin_softmax_forward(*args)
    args = (margin, x, w, labels, *state, *options, True, True, torch.float32, place.backend)
    torch.library.opcheck(OPS.margin_softmax_backward.default, args)


def test_tracing_sees_the_operators(place):
    """What follows tensors through the dispatcher, as FakeTensorMode does, is not passed by."""
    with torch._subclasses.FakeTensorMode(), place.run():
        x = torch.zeros(8, 3, device=place.device, requires_grad=True)
        w = torch.zeros(5, 3, device=place.device, requires_grad=True)
        labels = torch.zeros(8, dtype=torch.int64, device=place.device)
        loss = functional.margin_softmax_loss(x, w, labels, **ARCFACE)
        grads = torch.autograd.grad(loss, (x, w))
    for grad, tensor in zip(grads, (x, w), strict=True):
        assert isinstance(grad, torch._subclasses.FakeTensor) and grad.shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaling(place, dtype):
    case = random_case(9, 8, 6, 5).to(torch.float32, place.device)
    layer = torch.nn.Linear(5, 5, device=place.device)
    head = facelt_ext.ArcFaceLoss(6, 5, device=place.device)
    with place.run(), torch.autocast(place.device, dtype):
        features = layer(case.features)
        loss = head(features, case.labels)
    assert features.dtype == dtype and loss.dtype == torch.float32
    # As torch.amp.GradScaler begins; float16 features have gradients up to 65504 only.
    (loss * (65536 if dtype == torch.bfloat16 else 256)).backward()
    for parameter in (layer.weight, head.weight):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("flavour", ["arcface", "sphereface"])
def test_second_derivatives_of_half_features(place, flavour, autocast):
    """Through the reference, which computes in float32, with autocast off."""
    case = random_case(10, 5, 6, 4, **FLAVOURS[flavour]).to(torch.float32, place.device)
    x = case.features.to(torch.bfloat16).requires_grad_()
    w = case.weight.requires_grad_()
    with place.run(), torch.autocast(place.device, torch.bfloat16, enabled=autocast):
        loss = functional.margin_softmax_loss(x, w, case.labels, **case.options)
        grads = torch.autograd.grad(loss, (x, w), create_graph=True)
    again = torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, w))
    wide = [t.detach().double().cpu().requires_grad_() for t in (x, w)]
    expected = torch.autograd.grad(
        functional.margin_softmax_loss(*wide, case.labels.cpu(), **case.options),
        wide,
        create_graph=True,
    )
    twice = torch.autograd.grad(sum(g.square().sum() for g in expected), wide)
    for actual, true in zip([*grads, *again], [*expected, *twice], strict=True):
        assert (actual.detach().double().cpu() - true).norm() <= 0.02 * true.norm()
