"""The operators behind the functions: torch.library's own checks, torch.compile, autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU

import facelt_ext
from facelt_ext import _native, functional
from facelt_ext.functional.groups import group_labels
from facelt_ext.types import compute_dtype

OPS = torch.ops.facelt_ext
OPTIONS = {
    "k": 2, "margin": 400.0, "alpha": 0.3, "beta": 0.07, "squared": True, "ignore_index": 9
}  # fmt: skip


def inputs(device: str, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator).to(device, dtype)
    return x, torch.tensor([4, 4, -1, 4, 9, -1, 9, 9, 9, 4, 4, 70], device=device)


def samples(place, dtype: torch.dtype):
    """Each operator with arguments it is really called with."""
    x, labels = inputs(place.device, dtype)
    backend = place.backend
    yield OPS.group_labels, (labels, None, backend)
    order, segment, offsets, number = group_labels(labels, 9, backend)
    yield OPS.group_labels, (labels, 9, backend)

    ranges_args = (x, labels, order, offsets, number, 4, 2, True, backend)
    yield OPS.class_ranges_forward, ranges_args
    ranges, pairs = OPS.class_ranges_forward(*ranges_args)
    yield OPS.class_ranges_backward, (x, segment, pairs, ranges, backend)

    centroid_args = (x, order, offsets, number, 4, backend)
    yield OPS.class_centroids_forward, centroid_args
    centroids, counts = OPS.class_centroids_forward(*centroid_args)
    yield OPS.class_centroids_backward, (centroids, segment, counts, dtype, backend)

    yield OPS.min_centroid_distance_forward, (centroids, counts, True, backend)
    distance, pair = OPS.min_centroid_distance_forward(centroids, counts, True, backend)
    yield (
        OPS.min_centroid_distance_backward,
        (distance, centroids, distance, pair, True, backend),
    )

    loss_args = (x, labels, *OPTIONS.values(), backend)
    yield OPS.range_loss_forward, loss_args
    loss, *state = OPS.range_loss_forward(*loss_args)
    yield OPS.range_loss_backward, (loss, x, 2, *state, backend)

    for keep, weight_dtype in [(True, dtype), (False, torch.promote_types(dtype, torch.float32))]:
        yield from margin_softmax_samples(x, weight_dtype, keep, backend)

    yield from super_class_samples(x, labels % 12, backend)

    yield from unit_rows_samples(x, backend)
    yield from cluster_margin_samples(x, backend)
    yield from quintuplet_samples(x, labels, backend)

    for k in (2, 11):  # some of the others, and all
        yield OPS.inter_class_compactness, (x, labels % 12, k, 3.0, dtype, backend)


def unit_rows_samples(x: torch.Tensor, backend: str):
    x = x.to(compute_dtype(x.dtype))
    yield OPS.unit_rows_forward, (x, backend)
    units, inverse_norms = OPS.unit_rows_forward(x, backend)
    yield OPS.unit_rows_backward, (units, x, inverse_norms, x[:, 0] > 0, backend)


def cluster_margin_samples(x: torch.Tensor, backend: str):
    x = x.to(compute_dtype(x.dtype))
    cluster_index = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 3, 0, 1, 1], device=x.device)
    cluster_class = torch.tensor([7, 7, -2, 5, 5], device=x.device)
    for weight, reduction, ignored in [(x[:, 0].exp(), "mean", 2), (None, "none", None)]:
        options = (0.9, 0.3, True, reduction, ignored, backend)
        args = (x, cluster_index, cluster_class, weight, *options)
        yield OPS.cluster_margin_forward, args
        loss, _, *state = OPS.cluster_margin_forward(*args)
        yield OPS.cluster_margin_backward, (loss, x, cluster_index, *state, *options)


def quintuplet_samples(x: torch.Tensor, labels: torch.Tensor, backend: str):
    x = x.to(compute_dtype(x.dtype))
    for reduction, ignored in [("mean", 9), ("none", None)]:
        options = (2.0, 3.0, 4.0, reduction, ignored, backend)
        yield OPS.quintuplet_forward, (x, labels, labels.roll(1), *options)
        loss, *state = OPS.quintuplet_forward(x, labels, labels.roll(1), *options)
        yield OPS.quintuplet_backward, (loss, x, *state, *options)


def super_class_samples(x: torch.Tensor, labels: torch.Tensor, backend: str):
    """x holds the rows of tails, in super classes 0 to 3; labels are those of five samples."""
    index = torch.tensor([0, 3, 1, 0, 2, 2, 3, 1, 0, 0, 0, 1], device=x.device)
    yield OPS.super_class_members, (index, 4, True)
    members = OPS.super_class_members(index, 4, True)
    yield OPS.super_class_mean_forward, (x, *members, x.dtype, backend)
    means = OPS.super_class_mean_forward(x, *members, x.dtype, backend)
    yield OPS.super_class_mean_backward, (means, index, *members, backend)
    yield OPS.mapped_labels, (labels, index, -100, True)

    features, head = x[:5] / 3, x[5:8] / 2
    labels = torch.tensor([2, 14, 0, -100, 3], device=x.device)
    upstream = torch.full((5,), 0.7, dtype=compute_dtype(x.dtype), device=x.device)
    for rows, keep in [((head, x), True), ((torch.cat([head, x]), None), False)]:
        args = (features, *rows, labels, index, *members, -100, keep, x.dtype, backend)
        yield OPS.dispersion_softmax_forward, args
        state = OPS.dispersion_softmax_forward(*args)
        for wanted in [(True, True, True), (True, False, False), (False, True, False)]:
            args = (upstream, features, *rows, labels, index, *members, *state, *wanted)
            yield OPS.dispersion_softmax_backward, (*args, x.dtype, backend)


def margin_softmax_samples(x: torch.Tensor, weight_dtype: torch.dtype, keep: bool, backend: str):
    labels = torch.tensor([4, 4, 1, 0, 3, -100, 2, 2, 4, 4, 4, 0], device=x.device)
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(
        x.device, weight_dtype
    )
    margin = torch.full((12,), 0.3, dtype=compute_dtype(x.dtype), device=x.device)
    options = (8.0, 2, keep, True, 0, 6, -100)
    args = (x, weight, labels, margin, margin, *options, keep, x.dtype, backend)
    yield OPS.margin_softmax_forward, args
    lse, *state = OPS.margin_softmax_forward(*args)
    for wanted in [(True, True), (True, False), (False, True)]:
        args = (margin, x, weight, labels, lse, *state, *options, *wanted, x.dtype, backend)
        yield OPS.margin_softmax_backward, args


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(place, dtype):
    seen = set()
    for operator, args in samples(place, dtype):
        torch.library.opcheck(operator.default, args)
        seen.add(operator.__name__)
    registered = {name for name in dir(OPS) if hasattr(getattr(OPS, name), "default")}
    assert registered <= seen


# Those that torch.export leaves in a program.
WITH_GRADIENT = ("range_loss_forward", "quintuplet_forward")


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_an_operator_of_exported_programs_has_the_gradient_of_its_function(place, name):
    x, labels = torch.randn(12, 4, device=place.device), torch.arange(12, device=place.device) // 3
    calls = {
        "range_loss_forward": (
            lambda x: functional.range_loss(x, labels, margin=30.0, alpha=1.0, beta=0.5),
            (labels, 2, 30.0, 1.0, 0.5, True, -100, place.backend),
        ),
        "quintuplet_forward": (
            lambda x: functional.quintuplet_loss(x, labels // 2, labels, margins=(0.1, 0.2, 0.3)),
            (labels // 2, labels, 0.1, 0.2, 0.3, "mean", -100, place.backend),
        ),
    }
    function, arguments = calls[name]
    features = [x.clone().requires_grad_() for _ in range(2)]
    with place.run():
        (2.5 * function(features[0])).backward()
    loss, *state = getattr(OPS, name)(features[1], *arguments)
    (2.5 * loss).backward()
    assert features[0].grad.any() and torch.equal(features[0].grad, features[1].grad)
    assert not any(each.requires_grad for each in state)


def test_an_operator_refuses_inputs_that_require_a_gradient(place):
    for operator, args in samples(place, torch.float32):
        if operator.__name__ in WITH_GRADIENT:
            continue
        floating = [
            i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()
        ]
        for i in floating:
            wanting = [a.clone().requires_grad_() if j == i else a for j, a in enumerate(args)]
            with pytest.raises(RuntimeError, match=f"{operator.__name__} has no derivative"):
                operator(*wanting)
            with torch.no_grad():
                operator(*wanting)


def compiled_and_eager(place, function, x, *args):
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        y = x.clone().requires_grad_()
        with place.run():
            out = run(y, *args)
        (2.5 * out).backward()
        results.append((out.detach(), y.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["range_loss", "module", "ranges", "centroids"])
def test_compile_fullgraph(place, name, dtype):
    module = facelt_ext.RangeLoss(margin=400.0, alpha=0.3, beta=0.07)

    def ranges(x, labels):
        return functional.class_ranges(x, labels, 3, max_classes=6).ranges.sum()

    def centroids(x, labels):
        means = functional.class_centroids(x, labels, max_classes=6)
        return functional.min_centroid_distance(means.centroids, means.counts).distance

    functions = {
        "range_loss": lambda x, labels: functional.range_loss(x, labels, **OPTIONS),
        "module": module,
        "ranges": ranges,
        "centroids": centroids,
    }
    x, labels = inputs(place.device, dtype)
    (loss, grad), (compiled_loss, compiled_grad) = compiled_and_eager(
        place, functions[name], x, labels
    )
    assert grad.abs().sum() > 0
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grad, grad)


def test_compile_follows_changed_hyper_parameters_and_shapes(place):
    module = facelt_ext.RangeLoss(margin=400.0, alpha=0.3, beta=0.07)
    compiled = torch.compile(module, fullgraph=True)
    x, labels = inputs(place.device)
    with place.run():
        for margin, size in [(400.0, 12), (300.0, 12), (200.0, 10), (100.0, 7)]:
            module.margin = margin
            torch.testing.assert_close(
                compiled(x[:size], labels[:size]), module(x[:size], labels[:size])
            )


def test_backward_runs_where_forward_ran(place, monkeypatch):
    ran, run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda b, *args: (ran.append(b), run(b, *args)))
    x, labels = inputs(place.device)
    x.requires_grad_()
    with place.run():
        total = functional.range_loss(x, labels, **OPTIONS)
        total = total + functional.class_ranges(x, labels).ranges.sum()
        centroids = functional.class_centroids(x, labels).centroids
        total = total + functional.min_centroid_distance(centroids).distance
    forward = len(ran)
    with facelt_ext.use_backend("reference"):
        total.backward()
    assert len(ran) == forward + 4 and set(ran) == {place.backend}


def test_any_tensor_may_be_strided(any_place):
    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    x, labels = inputs(any_place.device, torch.float64)
    upstream = torch.randn(5, 3, dtype=torch.float64, device=any_place.device)
    results = []
    for layout in (torch.clone, strided):
        y = x.clone().requires_grad_()
        with any_place.run():
            ranges = functional.class_ranges(y, layout(labels), 3).ranges
            means = functional.class_centroids(y, layout(labels)).centroids
            nearest = functional.min_centroid_distance(layout(x), layout((labels > 0).long()))
            distance = functional.min_centroid_distance(layout(y), layout(labels.abs())).distance
            loss = functional.range_loss(y, layout(labels), **OPTIONS)
        up = layout(upstream[: len(ranges)])
        wide = layout(torch.ones_like(means) * upstream[: len(means), :1])
        (grad,) = torch.autograd.grad((ranges, means, loss, distance), y, (up, wide, None, None))
        results.append([ranges, means, nearest.distance, distance, loss, grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck_of_a_transposed_input(place):
    x, labels = inputs(place.device)
    x = x.t().contiguous().t()
    loss, *state = OPS.range_loss_forward(x, labels, *OPTIONS.values(), place.backend)
    args = (loss, x, 2, *state, place.backend)
    torch.library.opcheck(OPS.range_loss_backward.default, args)


@pytest.mark.parametrize("name", ["class_ranges", "class_centroids"])
def test_max_classes_too_small_when_compiled(place, name):
    @torch.compile(fullgraph=True)
    def run(x, labels):
        return getattr(functional, name)(x, labels, max_classes=2)[1]

    x = torch.randn(8, 3, device=place.device, requires_grad=True)
    labels = torch.arange(8, device=place.device) // 2
    with place.run():
        if place == CPU:
            with pytest.raises(ValueError, match="max_classes: 2 is too small for 4 classes"):
                run(x, labels)
        else:
            assert run(x, labels).isnan().all()


def test_no_ranges_are_refused_by_the_operators_too(place):
    x, labels = inputs(place.device)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        OPS.range_loss_forward(x, labels, 0, 1.0, 1.0, 1.0, True, None, place.backend)
    groups = group_labels(labels, None, place.backend)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        OPS.class_ranges_forward(
            x, labels, groups.order, groups.offsets, groups.num_classes, 4, 0, True, place.backend
        )


def test_tracing_sees_the_operators(place):
    """What follows tensors through the dispatcher, as FakeTensorMode does, is not passed by."""
    with torch._subclasses.FakeTensorMode(), place.run():
        x = torch.zeros(8, 3, device=place.device, requires_grad=True)
        loss = functional.range_loss(x, torch.zeros(8, dtype=torch.int64, device=place.device))
        (grad,) = torch.autograd.grad(loss, x)
    assert isinstance(grad, torch._subclasses.FakeTensor) and grad.shape == x.shape


def test_autocast_and_grad_scaling(place):
    x, labels = inputs(place.device)
    layer = torch.nn.Linear(5, 6, device=place.device)
    with place.run(), torch.autocast(place.device, torch.bfloat16):
        features = layer(x)
        loss = functional.range_loss(features, labels, **OPTIONS)
    assert features.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (loss * 1024).backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0


def test_no_gradient_wanted(place):
    x, labels = inputs(place.device)
    with place.run(), torch.no_grad():
        assert not functional.range_loss(x, labels, **OPTIONS).requires_grad
    with place.run():
        assert not functional.range_loss(x, labels, **OPTIONS).requires_grad
