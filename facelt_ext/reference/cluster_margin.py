from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.margin_softmax import reduced, unit_rows
from facelt_ext.types import compute_dtype


def cluster_margin_loss(
    features: Tensor,
    cluster_index: Tensor,
    cluster_class: Tensor,
    *,
    between_margin: float,
    within_margin: float,
    sample_weight: Tensor | None = None,
    normalize_centroids: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = -100,
) -> Tensor:
    """See `facelt_ext.functional.cluster_margin_loss`."""
    losses, taking_part = sample_losses(
        features, cluster_index, cluster_class, between_margin, within_margin, normalize_centroids,
        ignore_index,
    )  # fmt: skip
    return reduced(weighted(losses, sample_weight, taking_part), taking_part, reduction)


def weighted(losses: Tensor, sample_weight: Tensor | None, taking_part: Tensor) -> Tensor:
    if sample_weight is None:
        return losses
    return torch.where(taking_part, sample_weight, 0).to(losses.dtype) * losses


def sample_losses(
    features: Tensor,
    cluster_index: Tensor,
    cluster_class: Tensor,
    between_margin: float,
    within_margin: float,
    normalize_centroids: bool,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Both hinges of eq. 9 for each sample, unweighted, [B]; and which samples take part, [B].

    A sample whose cluster_index is out of range is in no cluster; it and its gradient are NaN.
    """
    taking_part = torch.ones_like(cluster_index, dtype=torch.bool)
    if ignore_index is not None:
        taking_part = cluster_index != ignore_index
    features = torch.where(taking_part[:, None], features.to(compute_dtype(features.dtype)), 0)
    num_clusters = cluster_class.shape[0]
    valid = taking_part & (cluster_index >= 0) & (cluster_index < num_clusters)
    cluster_index = torch.where(valid, cluster_index, 0)
    counts = features.new_zeros(num_clusters).index_add(0, cluster_index, valid.to(features.dtype))
    sums = features.new_zeros(num_clusters, features.shape[1])
    sums = sums.index_add(0, cluster_index, torch.where(valid[:, None], features, 0))
    centroids = sums / counts.clamp(min=1)[:, None]
    if normalize_centroids:
        centroids = unit_rows(centroids)[0]
    similarity = features @ centroids.t()
    own = similarity.gather(1, cluster_index[:, None])[:, 0]
    same_class = cluster_class[cluster_index][:, None] == cluster_class
    clusters = torch.arange(num_clusters, device=features.device)
    others = (counts > 0) & (clusters != cluster_index[:, None])
    losses = hinge(similarity, own, others & ~same_class, between_margin)
    losses = losses + hinge(similarity, own, others & same_class, within_margin)
    # With no hinge at all, a feature that is not finite would go unnoticed.
    losses = torch.where(valid, losses + (own - own).detach(), 0)
    poison = torch.where(valid | ~taking_part, 0.0, torch.nan).to(features.dtype)
    return losses + (features * poison[:, None]).sum(1), taking_part


def hinge(similarity: Tensor, own: Tensor, chosen: Tensor, margin: float) -> Tensor:
    """[margin - own + log sum exp of the chosen similarities]_+, 0 where none is chosen."""
    any_chosen = chosen.any(1)
    terms = torch.where(chosen, similarity, -torch.inf)
    terms = torch.where(any_chosen[:, None], terms, 0)
    exceeding = margin - own + torch.logsumexp(terms, dim=1)
    return torch.where(any_chosen, torch.relu(exceeding), 0)
