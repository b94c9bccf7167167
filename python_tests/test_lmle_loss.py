"""LMLELoss against literal loops over eqs. 4 and 5, in batches of whole clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import IGNORED
from literal_cluster_margin import unit
from literal_quintuplets import quintuplet_loss

from facelt_ext import LMLELoss

SIZE = 3
LABELS = torch.tensor([5, -2, 5, 9, 5, -2]).repeat_interleave(SIZE)
MARGINS = (0.4, 0.3, 1.2)


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(len(LABELS), 4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("ignored", [[], [4], [3], [0, 1, 2, 7], [3, 4, 5, 15, 16, 17]])
def test_agrees_with_literal_loops(any_place, ignored):
    x = features()
    labels = LABELS.clone()
    labels[ignored] = IGNORED
    kept = len(labels) - len(ignored)
    units = np.array([unit(row) for row in x.numpy()])
    clusters = np.arange(len(labels)) // SIZE
    upstream = np.full(len(labels), 1.7 / kept)
    losses, by_unit, with_hinge, _ = quintuplet_loss(
        units, labels.numpy(), clusters, MARGINS, upstream
    )
    assert with_hinge.sum() == kept and np.count_nonzero(losses) > 8
    norms = np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    along = (by_unit * units).sum(1, keepdims=True)
    moved = x.to(any_place.device).requires_grad_()
    with any_place.run():
        value = LMLELoss(MARGINS, samples_per_cluster=SIZE)(moved, labels.to(any_place.device))
        value.backward(torch.tensor(1.7, dtype=torch.float64, device=any_place.device))
    np.testing.assert_allclose(value.item(), losses.sum() / kept, rtol=1e-9)
    expected = (by_unit - along * units) / norms
    np.testing.assert_allclose(moved.grad.cpu(), expected, rtol=1e-8, atol=1e-10)


def test_a_zero_feature_and_an_empty_batch(any_place):
    x = features()
    x[4] = 0
    x = x.to(any_place.device).requires_grad_()
    loss = LMLELoss(MARGINS, samples_per_cluster=SIZE)
    with any_place.run():
        loss(x, LABELS.to(any_place.device)).backward()
        nothing = x.detach()[:0].requires_grad_()
        empty = loss(nothing, LABELS[:0].to(any_place.device))
        empty.backward()
    assert x.grad.isfinite().all() and empty.item() == 0 and nothing.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"margins": 0.3}, TypeError, "margins: expected three numbers, got float"),
        ({"margins": [0.3] * 4}, ValueError, "margins: expected three numbers, got 4"),
        ({"margins": (0, 0, "1")}, TypeError, r"margins\[2\]: expected a number, got str"),
        ({"samples_per_cluster": 0}, ValueError, "samples_per_cluster: expected at least 1"),
    ],
)
def test_wrong_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        LMLELoss(**{"margins": MARGINS, **arguments})


def test_a_batch_of_broken_clusters_is_refused():
    message = (
        "features: expected rows of whole clusters of samples_per_cluster = 3 samples, got 17 rows"
    )
    with pytest.raises(ValueError, match=message):
        LMLELoss(MARGINS, samples_per_cluster=3)(features()[:17], LABELS[:17])


def test_it_says_what_it_is():
    assert repr(LMLELoss(MARGINS)) == (
        "LMLELoss(margins=(0.4, 0.3, 1.2), samples_per_cluster=20, ignore_index=-100)"
    )
