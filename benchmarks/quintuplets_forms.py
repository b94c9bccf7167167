"""LMLE's loss as a user would write it in eager PyTorch; what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import functional

MARGINS = (0.5, 0.5, 2.5)


def ours(x: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    return functional.quintuplet_loss(x, labels, clusters, margins=MARGINS)


def gram(x: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    """Distances by a matrix product, which loses near-duplicates."""
    squares = x.square().sum(1)
    distances = squares[:, None] + squares - 2 * (x @ x.t())
    return over_all_distances(distances, labels, clusters)


def cdist(x: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    return over_all_distances(torch.cdist(x, x).square(), labels, clusters)


def over_all_distances(distances: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    farthest, nearest = candidates(distances, labels, clusters)
    (p_plus, p_minus_minus), (p_minus, n) = farthest.amax(2), nearest.amin(2)
    return triple_hinge(p_plus, p_minus, p_minus_minus, n)


def mined_first(x: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    """Distances without a gradient choose, those to the chosen are made again with one."""
    with torch.no_grad():
        squares = x.square().sum(1)
        distances = squares[:, None] + squares - 2 * (x @ x.t())
        farthest, nearest = candidates(distances, labels, clusters)
        (p_plus, p_minus_minus), (p_minus, n) = farthest.argmax(2), nearest.argmin(2)
    neighbors = (p_plus, p_minus, p_minus_minus, n)
    return triple_hinge(*((x - x[other]).square().sum(1) for other in neighbors))


def candidates(distances: Tensor, labels: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """The distances that p+ and p-- are among, -inf elsewhere; that p- and n are, inf elsewhere."""
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    cluster = same & (clusters[:, None] == clusters)
    farthest = [cluster & others, same & others]
    nearest = [same & ~cluster, ~same]
    return (
        torch.stack([distances.masked_fill(~chosen, -torch.inf) for chosen in farthest]),
        torch.stack([distances.masked_fill(~chosen, torch.inf) for chosen in nearest]),
    )


def triple_hinge(p_plus: Tensor, p_minus: Tensor, p_minus_minus: Tensor, n: Tensor) -> Tensor:
    g1, g2, g3 = MARGINS
    losses = torch.relu(g1 + p_plus - p_minus) + torch.relu(g2 + p_minus - p_minus_minus)
    return (losses + torch.relu(g3 + p_minus_minus - n)).mean()
