from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from strategies import label_batches

from facelt_ext.functional.groups import group_labels


@given(labels=label_batches(max_size=150))
def test_groups_agree_with_numpy(place, labels):
    groups = group_labels(labels.to(place.device), place.backend)
    batch = len(labels)
    classes, segment, counts = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    starts = np.concatenate([np.cumsum(counts) - counts, np.full(batch + 1, batch)])[: batch + 1]
    assert groups.num_classes.tolist() == [len(classes)]
    assert groups.order.tolist() == np.argsort(labels.numpy(), kind="stable").tolist()
    assert groups.segment.tolist() == segment.tolist()
    assert groups.offsets.tolist() == starts.tolist()


def test_the_order_is_stable_for_large_batches(place):
    size = 190 if place.backend == "emulated" else 20000
    labels = torch.randint(-3, 3, (size,), generator=torch.Generator().manual_seed(0))
    groups = group_labels(labels.to(place.device), place.backend)
    assert torch.equal(groups.order.cpu(), torch.argsort(labels, stable=True))
