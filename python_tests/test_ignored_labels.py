"""Samples with the ignored label take no part in a batch loss, whatever their features are."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import CPU, EMULATED
from literal import IGNORED
from torch import Tensor, nn

import facelt_ext
from facelt_ext import _C, CLMLELoss, LMLELoss, RangeLoss, functional

# Six clusters of four samples, two for each of three classes.
CLUSTERS = torch.arange(6).repeat_interleave(4)
CLASSES = torch.arange(3).repeat_interleave(2)
LABELS = CLASSES[CLUSTERS]
WHOLE_CLUSTERS = (CLUSTERS != 1) & (CLUSTERS != 4)
# The third cluster has one sample left, the last two of two.
SINGLE_SAMPLES = torch.tensor([int(c) for c in "011111010001111100010110"]) > 0
RANGE = {"margin": 400.0, "alpha": 0.3, "beta": 0.07}
CLUSTER = {"between_margin": 0.9, "within_margin": 0.6}
MARGINS = (3.0, 4.0, 9.0)
# f(features, labels, clusters, ignore_index=-100)
Function = Callable[..., Tensor]


def cluster_margin(spread: int, weighted: bool, **fixed: object) -> Function:
    """Only each `spread`-th cluster has samples. Of many clusters the products are torch's."""

    def function(x: Tensor, labels: Tensor, clusters: Tensor, ignore_index: int | None = IGNORED):
        kept = labels != ignore_index
        index = torch.where(kept, spread * clusters, ignore_index)
        weight = torch.where(kept, 1.5 + clusters, torch.nan).to(x.device) if weighted else None
        classes = CLASSES.to(x.device).repeat_interleave(spread)
        return functional.cluster_margin_loss(
            x, index, classes, sample_weight=weight, ignore_index=ignore_index, **CLUSTER, **fixed
        )

    return function


def quintuplets(reduction: str) -> Function:
    def function(x: Tensor, labels: Tensor, clusters: Tensor, **options: int | None) -> Tensor:
        return functional.quintuplet_loss(
            x, labels, clusters, margins=MARGINS, reduction=reduction, **options
        )

    return function


def without_clusters(function: Callable[..., object], **fixed: object) -> Function:
    def call(x: Tensor, labels: Tensor, _: Tensor, **options: int | None) -> Tensor:
        result = function(x, labels, **fixed, **options)
        return result if isinstance(result, Tensor) else result[1]

    return call


def of_module(module: Callable[..., nn.Module], **fixed: object) -> Function:
    return without_clusters(lambda x, y, **options: module(**fixed, **options)(x, y))


FUNCTIONS = {
    "range_loss": without_clusters(functional.range_loss, **RANGE),
    "range_loss of distances": without_clusters(functional.range_loss, squared=False, **RANGE),
    "class_ranges": without_clusters(functional.class_ranges, k=3, max_classes=5),
    "class_ranges of more rows": without_clusters(functional.class_ranges, max_classes=40),
    "class_centroids": without_clusters(functional.class_centroids, max_classes=5),
    "quintuplet_loss, mean": quintuplets("mean"),
    "quintuplet_loss, none": quintuplets("none"),
    "cluster_margin_loss, mean": cluster_margin(1, False, normalize_centroids=True),
    "cluster_margin_loss, sum": cluster_margin(1, True, reduction="sum"),
    "cluster_margin_loss, none": cluster_margin(1, True, reduction="none"),
    "cluster_margin_loss, many": cluster_margin(8, True),
    "cluster_margin_loss, many, none": cluster_margin(8, True, reduction="none"),
}
MODULES = {
    "RangeLoss": of_module(RangeLoss, **RANGE),
    "CLMLELoss": of_module(CLMLELoss, **CLUSTER, samples_per_cluster=4),
    "CLMLELoss of samples": of_module(
        CLMLELoss, **CLUSTER, samples_per_cluster=4, cost_sensitive=False
    ),
    "LMLELoss": of_module(LMLELoss, margins=(1.0, 1.5, 2.0), samples_per_cluster=4),
}
ALL = FUNCTIONS | MODULES
# Modules take whole clusters only: single samples are compared with literal loops in their tests.
CASES = [pytest.param(name, WHOLE_CLUSTERS, id=f"{name}, clusters") for name in ALL] + [
    pytest.param(name, SINGLE_SAMPLES, id=f"{name}, samples") for name in FUNCTIONS
]
EVERY = pytest.mark.parametrize("name", ALL)


def features(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(LABELS), 7, generator=generator, dtype=torch.float64)
    return (0.7 * (x + CLUSTERS[:, None].eq(torch.arange(7)))).to(dtype)


def run(place, name: str, x: Tensor, *args: Tensor, **options: int | None) -> list[Tensor]:
    """The result, and its gradient by the features with upstream gradients that differ."""
    x = x.to(place.device, copy=True).requires_grad_()
    with place.run():
        value = ALL[name](x, *(t.to(place.device) for t in args), **options)
        upstream = 1 + torch.arange(value.numel(), device=x.device).view_as(value) % 3 / 2
        (grad,) = torch.autograd.grad(value, x, upstream.to(value.dtype))
    return [value.detach().cpu(), grad.cpu()]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limits = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-5)}
    atol, rtol = limits.get(dtype, (2e-2, 2e-2))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize(("name", "kept"), CASES)
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.float64, torch.nan), (torch.float32, torch.inf), (torch.bfloat16, torch.nan)],
)
def test_it_is_as_if_ignored_samples_had_not_come(any_place, name, kept, dtype, bad):
    x = features(dtype)
    x[~kept] = bad
    labels = torch.where(kept, LABELS, IGNORED)
    value, grad = run(any_place, name, x, labels, CLUSTERS)
    of_sample = value.shape == kept.shape
    # Each sample's upstream gradient as above.
    expected, expected_grad = run_kept(any_place, name, x, labels, kept, of_sample)
    assert value.any() and expected_grad.any()
    close(value[kept] if of_sample else value, expected, dtype)
    close(grad[kept], expected_grad, dtype)
    assert not grad[~kept].any()
    assert not of_sample or not value[~kept].any()


def run_kept(place, name, x, labels, kept, of_sample) -> list[Tensor]:
    x = x[kept].to(place.device).requires_grad_()
    with place.run():
        value = ALL[name](x, labels[kept].to(place.device), CLUSTERS[kept].to(place.device))
        upstream = torch.arange(len(kept))[kept] if of_sample else torch.arange(value.numel())
        upstream = (1 + upstream.view_as(value) % 3 / 2).to(x.device, value.dtype)
        (grad,) = torch.autograd.grad(value, x, upstream)
    return [value.detach().cpu(), grad.cpu()]


@EVERY
@pytest.mark.parametrize("bad", [0.5, torch.nan])
def test_of_no_sample_the_result_is_0(any_place, name, bad):
    labels = torch.full_like(LABELS, IGNORED)
    value, grad = run(any_place, name, torch.full_like(features(), bad), labels, CLUSTERS)
    assert not value.any() and not grad.any()


@EVERY
@pytest.mark.parametrize("ignored", [-1, 2**63 - 1, np.int64(55)])
def test_any_label_may_be_the_ignored_one(any_place, name, ignored):
    x = features()
    expected = run(any_place, name, x, torch.where(WHOLE_CLUSTERS, LABELS, IGNORED), CLUSTERS)
    labels = torch.where(WHOLE_CLUSTERS, LABELS, int(ignored))
    actual = run(any_place, name, x, labels, CLUSTERS, ignore_index=ignored)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("cluster_margin_loss")])
def test_none_makes_every_label_a_class(any_place, name):
    x = features()
    # In either case the first in the order of classes.
    expected = run(any_place, name, x, torch.where(WHOLE_CLUSTERS, LABELS, -3), CLUSTERS)
    labels = torch.where(WHOLE_CLUSTERS, LABELS, IGNORED)
    actual = run(any_place, name, x, labels, CLUSTERS, ignore_index=None)
    assert all(map(torch.equal, actual, expected))
    assert not torch.equal(run(any_place, name, x, labels, CLUSTERS)[1], actual[1])


@pytest.mark.parametrize("ignored", [None, 5])
def test_other_numbers_of_no_cluster_are_refused_as_ever(any_place, ignored):
    index = CLUSTERS.clone()
    index[9] = IGNORED
    x = features().to(any_place.device)
    with any_place.run():

        def loss() -> Tensor:
            return functional.cluster_margin_loss(
                x, index.to(x.device), CLASSES.to(x.device), ignore_index=ignored, **CLUSTER
            )

        if any_place.backend == "reference" or any_place == CPU:
            with pytest.raises(ValueError, match="cluster_index: .* got -100 at position 9"):
                loss()
        else:
            assert loss().isnan()


def test_a_cluster_can_be_ignored_by_its_number(any_place):
    x = features().to(any_place.device)
    classes = CLASSES.to(x.device)
    with any_place.run():
        actual = functional.cluster_margin_loss(
            x, CLUSTERS.to(x.device), classes, ignore_index=2, **CLUSTER
        )
        index = torch.where(CLUSTERS == 2, IGNORED, CLUSTERS).to(x.device)
        expected = functional.cluster_margin_loss(x, index, classes, **CLUSTER)
    assert expected > 0 and torch.equal(actual, expected)


@pytest.mark.parametrize(("name", "kept"), CASES)
def test_gradcheck(any_place, name, kept):
    labels, clusters = torch.where(kept, LABELS, IGNORED), CLUSTERS
    chosen = torch.arange(len(LABELS)) % 4 < 2 if name in FUNCTIONS else LABELS >= 0
    x = features()[chosen][:, :3].to(any_place.device).requires_grad_()
    args = [t[chosen].to(any_place.device) for t in (labels, clusters)]
    with any_place.run():
        assert torch.autograd.gradcheck(lambda y: ALL[name](y, *args), x, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda y: ALL[name](y, *args), x, fast_mode=True)


@EVERY
def test_second_derivatives_do_not_see_ignored_samples(any_place, name):
    x = features().to(any_place.device)
    x[~WHOLE_CLUSTERS] = torch.nan
    x.requires_grad_()
    labels = torch.where(WHOLE_CLUSTERS, LABELS, IGNORED).to(x.device)
    with any_place.run():
        value = ALL[name](x, labels, CLUSTERS.to(x.device))
        (grad,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        assert not grad[~WHOLE_CLUSTERS].any() and grad.isfinite().all()
        (again,) = torch.autograd.grad(grad.square().sum(), x)
    assert not again[~WHOLE_CLUSTERS].any() and again.isfinite().all() and again.any()


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_another_sample_that_is_not_finite_is_still_seen(any_place, name, bad):
    x = features(torch.float32)
    x[13, 2] = bad
    value, grad = run(any_place, name, x, torch.where(WHOLE_CLUSTERS, LABELS, IGNORED), CLUSTERS)
    assert not value.isfinite().all()
    # The gradient by a mean does not depend on what it is the mean of.
    assert name == "class_centroids" or not grad[13].isfinite().all()
    assert not grad[~WHOLE_CLUSTERS].any()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("none")])
def test_what_an_ignored_sample_gets_from_above_goes_nowhere(any_place, name):
    x = features().to(any_place.device).requires_grad_()
    labels = torch.where(SINGLE_SAMPLES, LABELS, IGNORED).to(x.device)
    ones, nan = torch.ones(24, dtype=x.dtype), torch.tensor(torch.nan, dtype=x.dtype)
    with any_place.run():
        losses = ALL[name](x, labels, CLUSTERS.to(x.device))
        expected, actual = (
            torch.autograd.grad(losses, x, upstream.to(x.device), retain_graph=True)[0]
            for upstream in (ones, torch.where(SINGLE_SAMPLES, ones, nan))
        )
    assert torch.equal(actual, expected)


@EVERY
def test_compiled_whole_whoever_is_ignored(place, name):
    compiled = torch.compile(ALL[name], fullgraph=True, backend="aot_eager")
    x = features(torch.float32).to(place.device)
    x[0] = torch.nan
    clusters = CLUSTERS.to(x.device)
    with place.run():
        for kept in (WHOLE_CLUSTERS, CLUSTERS % 3 > 0, CLUSTERS > 2):
            kept = kept.to(x.device) & (clusters > 0)
            labels = torch.where(kept, LABELS.to(x.device), IGNORED)
            results = []
            for function in (ALL[name], compiled):
                y = x.clone().requires_grad_()
                value = function(y, labels, clusters)
                results.append([value.detach(), *torch.autograd.grad(value.sum(), y)])
            for actual, expected in zip(*results, strict=True):
                assert expected.isfinite().all() and expected.any()
                torch.testing.assert_close(actual, expected)


@pytest.mark.emulation
@EVERY
def test_emulated_threads_in_any_order_give_the_same_bits(name):
    """With as many launches as where nobody is ignored."""
    x = features(torch.float32).repeat(2, 5)
    args = torch.where(SINGLE_SAMPLES, LABELS, IGNORED).repeat(2), CLUSTERS.repeat(2)
    if name in MODULES:
        x, args = x[:24], (args[0][:24], args[1][:24])
    before = _C.emulated.launches()
    plain = run(EMULATED, name, x.nan_to_num(), args[0].clamp(min=0), args[1])
    middle = _C.emulated.launches()
    expected = run(EMULATED, name, x, *args)
    assert _C.emulated.launches() - middle == middle - before
    assert not torch.equal(plain[1], expected[1])
    try:
        for schedule, seed in [("reverse", 0), ("random", 1)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, run(EMULATED, name, x, *args), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@EVERY
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("1", TypeError, "ignore_index: expected an int, got str"),
        (1.0, TypeError, "ignore_index: expected an int, got float"),
        (True, TypeError, "ignore_index: expected an int, got bool"),
        (2**63, ValueError, "ignore_index: expected an integer of 64 bits"),
    ],
)
def test_what_is_no_label_is_refused(name, value, error, message):
    if name.startswith("cluster_margin_loss"):

        def call() -> Tensor:
            return functional.cluster_margin_loss(
                features(), CLUSTERS, CLASSES, ignore_index=value, **CLUSTER
            )
    else:

        def call() -> Tensor:
            return ALL[name](features(), LABELS, CLUSTERS, ignore_index=value)

    with pytest.raises(error, match=message):
        call()


def takers_of_labels() -> list[object]:
    """What is public and has labels, or clusters in place of them, but for heads."""
    functions = [getattr(functional, name) for name in functional.__all__]
    modules = [getattr(facelt_ext, name) for name in facelt_ext.__all__]
    modules = [m for m in modules if inspect.isclass(m) and issubclass(m, nn.Module)]
    takers = [f for f in functions if parameters(f) & {"labels", "cluster_index"}]
    takers += [m for m in modules if "labels" in parameters(m.forward) and not hasattr(m, "logits")]
    return takers


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("taker", takers_of_labels(), ids=lambda taker: taker.__name__)
def test_whatever_takes_labels_can_ignore_one(taker):
    assert inspect.signature(taker).parameters["ignore_index"].default == IGNORED
    of_heads = {"margin_softmax_loss", "dispersion_softmax_loss"}
    tested = {name.split(" ")[0].rstrip(",") for name in ALL}
    assert taker.__name__ in tested | of_heads
