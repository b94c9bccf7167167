"""CLMLE for many attributes at once: a head, an index of clusters and a loss for each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext import CLMLELoss
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex
from facelt_ext.functional import cluster_margin_loss
from facelt_ext.samplers import ClusterBatchSampler

from .model import inverse_frequency

CLUSTER_SIZE, CLUSTERS_PER_BATCH, SAMPLES_PER_CLUSTER = 15, 12, 4
MARGINS = {"between_margin": 0.3, "within_margin": 0.1}


class AttributeClusters:
    """The attributes take turns in drawing a batch from their clusters; all learn from it.

    The one that draws has a loss over whole clusters, whose hardest it draws again. To the others
    the batch is what it is: their clusters have some samples in it or none, and samples weigh by
    the inverse frequency of their attribute in it.

    Args:
        values: int64 ``[N, A]``, of the training images.
        seed: of clusters and batches.
    """

    def __init__(self, values: Tensor, seed: int) -> None:
        self.indices = [
            ClusterIndex(column, cluster_size=CLUSTER_SIZE, seed=seed) for column in values.T
        ]
        self.loss = CLMLELoss(**MARGINS, samples_per_cluster=SAMPLES_PER_CLUSTER)
        self.seed = seed

    def refresh(self, features: Tensor) -> None:
        """From the heads' features of all training images, ``[A, N, D]``."""
        for index, own in zip(self.indices, features, strict=True):
            index.refresh(own)

    def batches(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """The attribute that draws, and its samples."""
        samplers = [
            iter(
                ClusterBatchSampler(
                    index,
                    clusters_per_batch=min(CLUSTERS_PER_BATCH, index.num_clusters),
                    samples_per_cluster=SAMPLES_PER_CLUSTER,
                    num_batches=count,
                    seed=self.seed,
                )
            )
            for index in self.indices
        ]
        for step in range(count):
            drawing = step % len(samplers)
            yield drawing, torch.tensor(next(samplers[drawing]))

    def __call__(self, drawing: int, samples: Tensor, features: Tensor) -> Tensor:
        """The mean over the attributes of their losses, for features ``[A, B, D]``."""
        losses = []
        for attribute, (index, own) in enumerate(zip(self.indices, features, strict=True)):
            if attribute == drawing:
                losses.append(self.loss(own, index.labels[samples]))
                index.update_losses(samples, self.loss.sample_losses)
            else:
                present, cluster = index.assignments[samples].unique(return_inverse=True)
                losses.append(
                    cluster_margin_loss(
                        F.normalize(own),
                        cluster,
                        index.cluster_class[present],
                        sample_weight=inverse_frequency(index.labels[samples]),
                        **MARGINS,
                    )
                )
        return torch.stack(losses).mean()

    def predict(self, features: Tensor, neighbors: int) -> Tensor:
        """By the nearest clusters, of heads' features ``[A, N, D]``: 0 or 1 ``[N, A]``."""
        found = [
            NearestClusterClassifier(neighbors).fit(index).predict(own)
            for index, own in zip(self.indices, features, strict=True)
        ]
        return torch.stack(found, dim=1)
