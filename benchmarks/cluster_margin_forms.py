"""CLMLE's loss as a user would write it in eager PyTorch; what ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext import functional, reference

BETWEEN_MARGIN, WITHIN_MARGIN = 0.9, 0.3
MARGINS = {"between_margin": BETWEEN_MARGIN, "within_margin": WITHIN_MARGIN}


def ours(x: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    return functional.cluster_margin_loss(x, index, classes, **MARGINS)


def plain_reference(x: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    return reference.cluster_margin_loss(x, index, classes, **MARGINS)


def one_hot(x: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    """Centroids by a product with the assignment."""
    members = F.one_hot(index, len(classes)).to(x.dtype)
    return hinges(x, (members.t() @ x) / members.sum(0)[:, None], index, classes)


def index_add(x: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    sums = x.new_zeros(len(classes), x.shape[1]).index_add(0, index, x)
    counts = torch.bincount(index, minlength=len(classes))
    return hinges(x, sums / counts[:, None], index, classes)


def equal_clusters(x: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    """Of clusters that have as many samples each, one after another."""
    return hinges(x, x.view(len(classes), -1, x.shape[1]).mean(1), index, classes)


def hinges(x: Tensor, centroids: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    similarity = x @ centroids.t()
    own = similarity.gather(1, index[:, None])[:, 0]
    same = classes[index][:, None] == classes
    itself = index[:, None] == torch.arange(len(classes), device=x.device)
    between = similarity.masked_fill(same, -torch.inf).logsumexp(1)
    within = similarity.masked_fill(~same | itself, -torch.inf).logsumexp(1)
    losses = torch.relu(BETWEEN_MARGIN - own + between) + torch.relu(WITHIN_MARGIN - own + within)
    return losses.mean()
