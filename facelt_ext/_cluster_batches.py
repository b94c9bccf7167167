from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from facelt_ext._autocast import without_autocast
from facelt_ext._checks import check_count, check_flag
from facelt_ext._sampling import EpochBatchSampler, check_batch_size
from facelt_ext.clusters import ClusterIndex


class ClusterBatchSampler(EpochBatchSampler):
    """Draws batches of a hard cluster with its nearest clusters (CLMLE, Huang et al., TPAMI 2020).

    A batch begins with a query cluster: that of the highest loss in a class drawn uniformly from
    all classes, where a cluster whose samples have had no loss yet comes first, and of equal ones
    the lower number. The nearest clusters by the product of centroids follow, nearest first; among
    them one at least of the same class and one of another, where there is such a cluster. (Of two
    clusters in a batch the second is of another class.)

    Losses and centroids are those that `clusters` has when a batch is drawn. A `DataLoader` with
    workers draws some batches ahead, and a loader of Accelerate one; a `DataLoader` without workers
    draws each batch when all losses before it are known.

    Each batch depends on `clusters`, `seed`, the epoch, its number in the epoch, and the rank.
    Ranks draw independently: two may take the same clusters. Epochs, ranks, resuming and frameworks
    are those of :class:`facelt_ext.samplers.PKSampler`: each iteration draws the next epoch,
    Lightning needs ``use_distributed_sampler=False``, Accelerate (``accelerate``) and Hugging Face
    Trainer take the loader as any other. No global random state is read or written.

    Args:
        clusters: the clusters, refreshed at least once before batches are drawn.
        clusters_per_batch: M, at least 2; the paper takes 12.
        samples_per_cluster: the samples of each cluster, distinct ones where it has as many;
            otherwise how often two of its samples occur differs by at most one.
        uniform_query: any cluster of the class may be the query, whatever its loss: the paper's
            ablation.
        num_batches: batches that an epoch yields on each replica. Default: as many as it takes for
            an epoch to draw about N samples.
        num_replicas, rank, seed: as in :class:`facelt_ext.samplers.PKSampler`.

    Yields:
        ``clusters_per_batch * samples_per_cluster`` indices of samples, cluster after cluster.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; fewer clusters than a batch
            takes; iterated as the ``sampler`` of a ``DataLoader`` with a ``batch_size``.
        RuntimeError: batches are drawn from clusters that were never refreshed.
    """

    def __init__(
        self,
        clusters: ClusterIndex,
        *,
        clusters_per_batch: int = 12,
        samples_per_cluster: int = 20,
        uniform_query: bool = False,
        num_batches: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(clusters, ClusterIndex):
            raise TypeError(f"clusters: expected a ClusterIndex, got {type(clusters).__name__}")
        self.clusters = clusters
        self.clusters_per_batch = check_count(clusters_per_batch, "clusters_per_batch", minimum=2)
        if self.clusters_per_batch > clusters.num_clusters:
            raise ValueError(
                f"clusters_per_batch: expected at most {clusters.num_clusters}, the clusters there "
                f"are, got {self.clusters_per_batch}"
            )
        self.samples_per_cluster = check_count(samples_per_cluster, "samples_per_cluster")
        check_batch_size("samples_per_cluster", self.clusters_per_batch, self.samples_per_cluster)
        self.uniform_query = check_flag(uniform_query, "uniform_query")
        super().__init__(
            int((clusters.assignments >= 0).sum()),
            self.clusters_per_batch * self.samples_per_cluster,
            num_batches=num_batches,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )

    def _steps(
        self, epoch: int, numbers: range, replicas: int, ranks: range
    ) -> Iterator[list[list[int]]]:
        for number in numbers:
            yield [
                self._batch(np.random.default_rng([self.seed, epoch, number, rank]))
                for rank in ranks
            ]

    @without_autocast
    def _batch(self, rng: np.random.Generator) -> list[int]:
        if self.clusters.centroids is None:
            raise RuntimeError(
                "clusters: expected clusters that were refreshed, got none; call "
                "ClusterIndex.refresh or refresh_from first"
            )
        query = self._query(rng)
        drawn = [self._samples(m, rng) for m in [query, *self._neighbours(query)]]
        return np.concatenate(drawn).tolist()

    def _query(self, rng: np.random.Generator) -> int:
        clusters = self.clusters
        label = int(clusters.classes[rng.integers(clusters.num_classes)])
        candidates = clusters.clusters_of(label)
        if self.uniform_query:
            return candidates[rng.integers(len(candidates))]
        return max(candidates, key=clusters.cluster_loss)

    def _neighbours(self, query: int) -> list[int]:
        similarity = self.clusters.centroids @ self.clusters.centroids[query]
        similarity[query] = -torch.inf
        same = self.clusters.cluster_class == self.clusters.cluster_class[query]
        different = ~same
        same[query] = False
        chosen = _largest(similarity, self.clusters_per_batch - 1)
        for wanted in (same, different):
            if wanted.any() and not wanted[chosen].any():
                chosen[-1] = int(similarity.masked_fill(~wanted, -torch.inf).argmax())
        return chosen

    def _samples(self, cluster: int, rng: np.random.Generator) -> np.ndarray:
        members = self.clusters.members(cluster).numpy()
        rounds, rest = divmod(self.samples_per_cluster, len(members))
        return np.concatenate([np.tile(members, rounds), rng.choice(members, rest, replace=False)])


def _largest(values: Tensor, count: int) -> list[int]:
    """Where the largest are, in descending order; of equal ones the first."""
    least = values.topk(count).values[-1]
    candidates = (values >= least).nonzero()[:, 0]
    order = values[candidates].argsort(descending=True, stable=True)
    return candidates[order[:count]].tolist()
