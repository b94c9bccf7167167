from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from literal import IGNORED
from strategies import label_batches

from facelt_ext import reference
from facelt_ext.functional.groups import group_labels
from facelt_ext.types import Groups


@given(labels=label_batches(max_size=150))
def test_groups_agree_with_numpy(place, labels):
    assert_groups(group_labels(labels.to(place.device), IGNORED, place.backend), labels, IGNORED)


@given(labels=label_batches(max_size=150))
def test_the_reference_agrees_with_numpy(labels):
    assert_groups(reference.group_labels(labels), labels, IGNORED)


@pytest.mark.parametrize("ignored", [-(2**63), -7, 1, None])
def test_any_label_may_be_ignored_or_none(any_place, ignored):
    labels = torch.tensor([-7, 1, -(2**63), 1, -100, 5, 1, -(2**63), -7, 2**63 - 1])
    if any_place.backend == "reference":
        groups = reference.group_labels(labels, ignored)
    else:
        groups = group_labels(labels.to(any_place.device), ignored, any_place.backend)
    assert_groups(groups, labels, ignored)


def assert_groups(groups: Groups, labels: torch.Tensor, ignored: int | None) -> None:
    batch = len(labels)
    names = labels.numpy()
    last = np.zeros(batch, dtype=bool) if ignored is None else names == ignored
    classes, segment, counts = np.unique(names[~last], return_inverse=True, return_counts=True)
    expected = np.full(batch, -1)
    expected[~last] = segment
    kept = len(segment)
    starts = np.concatenate([np.cumsum(counts) - counts, np.full(batch + 1, kept)])[: batch + 1]
    assert groups.num_classes.tolist() == [len(classes)]
    assert groups.order.tolist() == np.lexsort((names, last)).tolist()
    assert groups.segment.tolist() == expected.tolist()
    assert groups.offsets.tolist() == starts.tolist()


def test_the_order_is_stable_for_large_batches(place):
    size = 190 if place.backend == "emulated" else 20000
    labels = torch.randint(-3, 3, (size,), generator=torch.Generator().manual_seed(0))
    groups = group_labels(labels.to(place.device), None, place.backend)
    assert torch.equal(groups.order.cpu(), torch.argsort(labels, stable=True))
