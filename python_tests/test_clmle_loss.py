"""CLMLELoss against literal loops over eqs. 8 and 9, and the bounds of its margins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from literal import IGNORED
from literal_cluster_margin import cluster_margin_loss, unit

from facelt_ext import CLMLELoss
from facelt_ext.losses.clmle import between_margin_max, within_margin_max

SIZE = 3
CLASSES = [5, -2, 5, 9, 5, -2]


def batch(seed: int = 0, dimensions: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(CLASSES).repeat_interleave(SIZE)
    x = 3 * torch.randn(len(labels), dimensions, dtype=torch.float64, generator=generator)
    return x, labels


def literal_weights(labels: torch.Tensor) -> np.ndarray:
    """Of the samples that take part; 0 for others."""
    kept = [name for name in labels.tolist() if name != IGNORED]
    weights = {name: len(kept) / (len(set(kept)) * kept.count(name)) for name in set(kept)}
    return np.array([weights.get(name, 0) for name in labels.tolist()])


# None; one, which is its cluster's first or not; all but one of a class; a cluster and one sample
# more; a class.
IGNORED_SAMPLES = [[], [4], [3], [1, 9, 10], [0, 1, 2, 7], [3, 4, 5, 15, 16, 17]]


@pytest.mark.parametrize("ignored", IGNORED_SAMPLES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cost_sensitive", [False, True])
def test_agrees_with_literal_loops(any_place, cost_sensitive, normalize, ignored):
    x, labels = batch()
    labels[ignored] = IGNORED
    kept = (labels != IGNORED).numpy()
    weights = literal_weights(labels) if cost_sensitive else kept.astype(float)
    units = np.array([unit(row) for row in x.numpy()])
    upstream = 1.7 * weights / kept.sum()
    clusters = np.where(kept, np.arange(len(labels)) // SIZE, IGNORED)
    losses, by_unit, _ = cluster_margin_loss(
        units, clusters, np.array(CLASSES), 0.6, 0.2, normalize, upstream
    )
    norms = np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    along = (by_unit * units).sum(1, keepdims=True)
    loss = CLMLELoss(
        0.6, 0.2, samples_per_cluster=SIZE, cost_sensitive=cost_sensitive,
        normalize_centroids=normalize,
    )  # fmt: skip
    moved = x.to(any_place.device).requires_grad_()
    with any_place.run():
        value = loss(moved, labels.to(any_place.device))
        value.backward(torch.tensor(1.7, dtype=torch.float64, device=any_place.device))
    assert math.isclose(value.item(), float((weights * losses).sum()) / kept.sum(), rel_tol=1e-9)
    assert not loss.sample_losses.requires_grad
    np.testing.assert_allclose(loss.sample_losses.cpu(), losses, rtol=1e-8, atol=1e-10)
    expected = (by_unit - along * units) / norms
    np.testing.assert_allclose(moved.grad.cpu(), expected, rtol=1e-8, atol=1e-10)
    assert np.count_nonzero(losses) > 0


@pytest.mark.parametrize("ignored", IGNORED_SAMPLES)
def test_every_class_weighs_alike(ignored):
    x, labels = batch()
    labels[ignored] = IGNORED
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    value = loss(x, labels).item()
    names = set(labels.tolist()) - {IGNORED}
    means = [loss.sample_losses[labels == name].mean().item() for name in names]
    assert math.isclose(value, sum(means) / len(means), rel_tol=1e-12)
    assert not loss.sample_losses[labels == IGNORED].any()


def test_the_class_of_a_cluster_is_that_of_its_first_sample_that_takes_part(any_place):
    """A later sample of another class, which a batch of whole clusters does not have, is counted
    with it."""
    x, labels = batch()
    labels[[0, 6]] = IGNORED
    mixed = labels.clone()
    mixed[[2, 8]] = 77
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    with any_place.run():
        expected, actual = (
            loss(x.to(any_place.device), y.to(any_place.device)) for y in (labels, mixed)
        )
    assert torch.equal(actual, expected)


def test_a_zero_feature_and_an_empty_batch(place):
    x, labels = batch()
    x[4] = 0
    x = x.to(place.device).requires_grad_()
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    with place.run():
        loss(x, labels.to(place.device)).backward()
        assert x.grad.isfinite().all()
        nothing = x.detach()[:0].requires_grad_()
        empty = loss(nothing, labels[:0].to(place.device))
        empty.backward()
    assert empty.item() == 0 and nothing.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(place, dtype):
    x, labels = batch()
    x = x.to(place.device, dtype)
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    with place.run():
        expected = loss(x.double(), labels.to(place.device))
        narrow = x.requires_grad_()
        value = loss(narrow, labels.to(place.device))
        value.backward()
    assert value.dtype == torch.float32 and narrow.grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_wrong_arguments():
    x, labels = batch()
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    with pytest.raises(
        ValueError, match="whole clusters of samples_per_cluster = 3 samples, got 17 rows"
    ):
        loss(x[1:], labels[1:])
    with pytest.raises(ValueError, match=r"labels: expected shape \[18\]"):
        loss(x, labels[1:])
    with pytest.raises(ValueError, match="samples_per_cluster"):
        CLMLELoss(0.6, 0.2, samples_per_cluster=0)
    with pytest.raises(TypeError, match="between_margin: expected a number, got str"):
        CLMLELoss("0.6", 0.2)


def test_compiles_whole():
    x, labels = batch()
    loss = CLMLELoss(0.6, 0.2, samples_per_cluster=SIZE)
    compiled = torch.compile(lambda f: loss(f, labels), fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = loss(a, labels), compiled(b)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(b.grad, a.grad)


def test_bounds_of_margins():
    assert math.isclose(between_margin_max(4), 1)
    assert between_margin_max(1) == between_margin_max(2) == 2
    assert math.isclose(within_margin_max(1, 4), 1)
    assert within_margin_max(9, 10) == within_margin_max(5, 10) == 2
    assert math.isclose(within_margin_max(1, 10**6), 2 * math.pi**2 * 1e-12, rel_tol=1e-3)
    with pytest.raises(ValueError, match="class_samples: expected at most samples = 4, got 5"):
        within_margin_max(5, 4)
    with pytest.raises(ValueError, match="num_classes"):
        between_margin_max(0)
