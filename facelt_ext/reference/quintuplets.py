from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.groups import taking_part
from facelt_ext.types import compute_dtype


def quintuplet_loss(
    features: Tensor,
    labels: Tensor,
    cluster_index: Tensor,
    *,
    margins: tuple[float, float, float],
    reduction: str = "mean",
    ignore_index: int | None = -100,
) -> Tensor:
    """See `facelt_ext.functional.quintuplet_loss`."""
    batch, samples = len(features), taking_part(labels, ignore_index)
    features = features[samples].to(compute_dtype(features.dtype))
    neighbors = quintuplets(features.detach(), labels[samples], cluster_index[samples])
    losses, with_hinges = features.new_zeros(len(features)), features.new_zeros(len(features))
    # Unlike that of an index, the gradient of index_select is the same in each run.
    distances = [
        (features - features.index_select(0, other.clamp(min=0))).square().sum(1)
        for other in neighbors.T
    ]
    for h, margin in enumerate(margins):
        has_both = (neighbors[:, h] >= 0) & (neighbors[:, h + 1] >= 0)
        hinge = torch.relu(margin + distances[h] - distances[h + 1])
        losses = losses + torch.where(has_both, hinge, 0)
        with_hinges = torch.where(has_both, 1, with_hinges)
    # Each anchor is compared with all samples, so one that is not finite is everyone's.
    poison = torch.where(features.isfinite().all(), 0.0, torch.nan).to(features.dtype)
    losses = torch.where(poison.isnan(), features.sum() * poison, losses)
    if reduction == "none":
        return losses.new_zeros(batch).index_copy(0, samples, losses)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / with_hinges.sum().clamp(min=1)


def quintuplets(features: Tensor, labels: Tensor, cluster_index: Tensor) -> Tensor:
    """Of each anchor the farthest of its cluster, the nearest of its class in another cluster, the
    farthest of its class, the nearest of another class: [B, 4], -1 where there is none."""
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    same_class = labels[:, None] == labels
    same_cluster = same_class & (cluster_index[:, None] == cluster_index)
    rows = [
        torch.stack(
            [
                _first(-distances, same_cluster[i] & others[i]),
                _first(distances, same_class[i] & ~same_cluster[i]),
                _first(-distances, same_class[i] & others[i]),
                _first(distances, ~same_class[i]),
            ]
        )
        for i, anchor in enumerate(features)
        for distances in [(features - anchor).square().sum(1)]
    ]
    return torch.stack(rows) if rows else labels.new_zeros(0, 4)


def _first(key: Tensor, chosen: Tensor) -> Tensor:
    """The chosen sample of the smallest key, the first of equal ones; -1 if none is chosen."""
    order = torch.sort(torch.where(chosen, key, torch.inf), stable=True).indices
    order = order[chosen[order]]
    return order[0] if len(order) else order.new_tensor(-1)
