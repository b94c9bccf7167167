from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from facelt_ext._checks import check_count, check_flag, check_ignore_index, check_number
from facelt_ext.functional.cluster_margin import cluster_margin_losses
from facelt_ext.losses._arguments import check_indices_tuple, is_step
from facelt_ext.losses._cluster_batch import ClusterBatch, checked_cluster_batch

# In place of an ignored sample's cluster; any number that is no cluster's.
NO_CLUSTER = -100


def between_margin_max(num_classes: int) -> float:
    """1 - cos(2 pi / C), the bound on CLMLE's between_margin for a data set of C classes.

    Args:
        num_classes: C, at least 1. With two classes the bound is 2, its largest.
    """
    num_classes = check_count(num_classes, "num_classes")
    return 1 - math.cos(min(2 * math.pi / num_classes, math.pi))


def within_margin_max(class_samples: int, samples: int) -> float:
    """1 - cos(min(2 pi L_c / L, pi)), the bound on CLMLE's within_margin.

    Args:
        class_samples: L_c, the samples of the class.
        samples: L, those of the data set, at least L_c.
    """
    class_samples = check_count(class_samples, "class_samples")
    samples = check_count(samples, "samples")
    if class_samples > samples:
        raise ValueError(
            f"class_samples: expected at most samples = {samples}, got {class_samples}"
        )
    return 1 - math.cos(min(2 * math.pi * class_samples / samples, math.pi))


class CLMLELoss(nn.Module):
    """Cluster-based large margin local embedding (CLMLE, Huang et al., TPAMI 2020, eqs. 8-9).

    Takes batches of M clusters, one after another, with `samples_per_cluster` samples of one class
    each; the paper takes M = 12 clusters of 20 samples. Features are divided by their norms, then
    it is `facelt_ext.functional.cluster_margin_loss`, weighted by class: a sample whose class has
    n_c of the batch's B samples counts B / (C_b n_c), where C_b is the number of its classes.

    Args:
        between_margin: a1, to clusters of other classes; see `between_margin_max`.
        within_margin: a2, to clusters of the same class; see `within_margin_max`.
        samples_per_cluster: samples of each cluster in a batch.
        cost_sensitive: whether classes count alike; otherwise samples do.
        normalize_centroids: divides centroids by their norms.
        ignore_index: samples with this label take no part, and their gradient is 0; a cluster may
            hold some of them, or be made of them. B and n_c do not count them. None: every label is
            a class.

    Attributes:
        sample_losses: [B], the unweighted losses of the last batch, without a gradient, 0 for
            ignored samples; None before the first, and in what DataParallel wraps, whose copies are
            thrown away; those of activation checkpointing are of the first run. All arguments may
            be changed between steps.
    """

    def __init__(
        self,
        between_margin: float,
        within_margin: float,
        *,
        samples_per_cluster: int = 20,
        cost_sensitive: bool = True,
        normalize_centroids: bool = False,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.between_margin = check_number(between_margin, "between_margin", torch.float32)
        self.within_margin = check_number(within_margin, "within_margin", torch.float32)
        self.samples_per_cluster = check_count(samples_per_cluster, "samples_per_cluster")
        self.cost_sensitive = check_flag(cost_sensitive, "cost_sensitive")
        self.normalize_centroids = check_flag(normalize_centroids, "normalize_centroids")
        self.ignore_index = check_ignore_index(ignore_index)
        self.sample_losses: Tensor | None = None

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss, [].

        A zero feature stays zero. The label of a cluster is that of its first sample that is not
        ignored.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; B is no
                multiple of `samples_per_cluster`.
        """
        check_indices_tuple(indices_tuple)
        batch = checked_cluster_batch(features, labels, self.samples_per_cluster, self.ignore_index)
        cluster_class = self._cluster_classes(batch)
        cost_sensitive = check_flag(self.cost_sensitive, "cost_sensitive")
        loss, losses = cluster_margin_losses(
            batch.units,
            torch.where(batch.taking_part, batch.cluster_index, NO_CLUSTER),
            cluster_class,
            between_margin=self.between_margin,
            within_margin=self.within_margin,
            sample_weight=self._weights(cluster_class, batch) if cost_sensitive else None,
            normalize_centroids=self.normalize_centroids,
            reduction="sum" if cost_sensitive else "mean",
            ignore_index=NO_CLUSTER,
        )
        if is_step():
            self.sample_losses = losses
        return loss

    def _cluster_classes(self, batch: ClusterBatch) -> Tensor:
        """The label of each cluster's first sample that takes part."""
        shape = (-1, self.samples_per_cluster)
        first = batch.taking_part.unflatten(0, shape).max(1).indices
        return batch.labels.unflatten(0, shape).gather(1, first[:, None])[:, 0]

    def _weights(self, cluster_class: Tensor, batch: ClusterBatch) -> Tensor:
        """Of each sample, divided by B: the mean becomes a sum. No sizes are read: on CUDA that
        would wait for the device."""
        taking_part = batch.taking_part.unflatten(0, (-1, self.samples_per_cluster))
        sizes = taking_part.sum(1, dtype=batch.units.dtype)
        same_class = cluster_class[:, None] == cluster_class
        # At least 1: a cluster that is ignored has no class.
        samples = torch.where(same_class, sizes, 0).sum(1).clamp(min=1)
        classes = (sizes / samples).sum()
        return (1 / (classes * samples)).repeat_interleave(self.samples_per_cluster)

    def extra_repr(self) -> str:
        return (
            f"between_margin={self.between_margin}, within_margin={self.within_margin}, "
            f"samples_per_cluster={self.samples_per_cluster}, "
            f"cost_sensitive={self.cost_sensitive}, "
            f"normalize_centroids={self.normalize_centroids}, ignore_index={self.ignore_index}"
        )
