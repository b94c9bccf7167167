"""Range Loss as a user would write it in eager PyTorch; what ours is compared with.

Every form computes the same loss with k = 2 and the paper's weights. `loop` and `dense` take any
labels; the `pk` forms need P classes of K samples, in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from facelt_ext import functional, reference

K, MARGIN, ALPHA, BETA = 2, 2e4, 1e-5, 1e-4
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(x: Tensor, labels: Tensor) -> Tensor:
    return functional.range_loss(x, labels)


def plain_reference(x: Tensor, labels: Tensor) -> Tensor:
    return reference.range_loss(x, labels)


def joined(ranges: Tensor, nearest: Tensor) -> Tensor:
    intra = (ranges.shape[-1] / (1 / ranges).sum(-1)).sum()
    return ALPHA * intra + BETA * torch.relu(MARGIN - nearest)


def loop(x: Tensor, labels: Tensor) -> Tensor:
    """A loop over the classes with pdist, as public code for re-identification writes it."""
    intra, centroids = x.new_zeros(()), []
    for label in labels.unique():
        members = x[labels == label]
        centroids.append(members.mean(0))
        if len(members) > 1:
            distances = torch.pdist(members).square()
            ranges = distances.topk(min(K, len(distances))).values
            intra = intra + len(ranges) / (1 / ranges).sum()
    nearest = torch.pdist(torch.stack(centroids)).square().min()
    return ALPHA * intra + BETA * torch.relu(MARGIN - nearest)


def dense(x: Tensor, labels: Tensor) -> Tensor:
    """All B x B distances, masked; each class's largest are among its rows' largest."""
    order = labels.argsort(stable=True)
    x, labels = x[order], labels[order]
    same = (labels[:, None] == labels).triu(1)
    distances = torch.cdist(x, x).square().masked_fill(~same, -1)
    values, owners = distances.topk(K, dim=1).values.flatten(), labels.repeat_interleave(K)
    by_value = values.argsort(descending=True, stable=True)
    by_class = by_value[owners[by_value].argsort(stable=True)]
    values, owners = values[by_class], owners[by_class]
    _, segment, counts = torch.unique_consecutive(owners, return_inverse=True, return_counts=True)
    rank = torch.arange(len(owners), device=x.device) - (counts.cumsum(0) - counts)[segment]
    kept = (rank < K) & (values > 0)
    reciprocals = torch.where(kept, 1 / values.clamp(min=1e-30), 0)
    zeros = x.new_zeros(len(counts))
    sums = zeros.index_add(0, segment, reciprocals)
    numbers = zeros.index_add(0, segment, kept.to(x.dtype))
    intra = torch.where(numbers > 0, numbers / sums.clamp(min=1e-30), 0).sum()
    samples = counts // K
    means = x.new_zeros(len(counts), x.shape[1]).index_add(
        0, torch.arange(len(counts), device=x.device).repeat_interleave(samples), x
    )
    nearest = torch.pdist(means / samples[:, None]).square().min()
    return ALPHA * intra + BETA * torch.relu(MARGIN - nearest)


def pk_difference(x: Tensor, classes: int) -> Tensor:
    groups = x.view(classes, -1, x.shape[1])
    first, second = torch.triu_indices(groups.shape[1], groups.shape[1], 1, device=x.device)
    distances = (groups[:, first] - groups[:, second]).square().sum(-1)
    means = groups.mean(1)
    return joined(distances.topk(K).values, torch.pdist(means).square().min())


def pk_gram(x: Tensor, classes: int) -> Tensor:
    """The fastest form, through matrix products: near-duplicates cancel."""
    groups = x.view(classes, -1, x.shape[1])
    ranges = gram_distances(groups).triu(1).flatten(1).topk(K).values
    means = groups.mean(1)
    between = gram_distances(means[None])[0]
    apart = torch.ones_like(between, dtype=torch.bool).triu(1)
    return joined(ranges, between.masked_fill(~apart, torch.inf).min())


def gram_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(-1)
    return squares[:, :, None] + squares[:, None, :] - 2 * x @ x.transpose(1, 2)
