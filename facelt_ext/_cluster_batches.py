from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from facelt_ext._sampling import checked_integer, distributed_defaults
from facelt_ext.clusters import ClusterIndex


class ClusterBatchSampler(Sampler[list[int]]):
    """Draws batches of a hard cluster with its nearest clusters (CLMLE, Huang et al., TPAMI 2020).

    A batch begins with a query cluster: that of the highest loss in a class drawn uniformly from
    all classes, where a cluster whose samples have had no loss yet comes first, and of equal ones
    the lower number. The nearest clusters by the product of centroids follow, nearest first; among
    them one at least of the same class and one of another, where there is such a cluster. (Of two
    clusters in a batch the second is of another class.)

    Losses and centroids are those that `clusters` has when a batch is drawn. A `DataLoader` with
    workers draws some batches ahead; without workers each batch knows all losses before it.

    Each batch depends on `clusters`, `seed`, the epoch, its number in the epoch, and the rank. Call
    :meth:`set_epoch` before each epoch, as with ``torch.utils.data.DistributedSampler``. Ranks draw
    apart from each other: two may take the same clusters. No global random state is read or
    written.

    Args:
        clusters: the clusters, refreshed at least once before batches are drawn.
        clusters_per_batch: M, at least 2; the paper takes 12.
        samples_per_cluster: the samples of each cluster, distinct ones where it has as many;
            otherwise how often two of its samples come differs by at most one.
        uniform_query: any cluster of the class may be the query, whatever its loss: the paper's
            ablation.
        num_batches: batches that an epoch yields on each replica. Default: as many as it takes for
            an epoch to draw about N samples.
        num_replicas, rank, seed: as in :class:`facelt_ext.samplers.PKSampler`.

    Yields:
        ``clusters_per_batch * samples_per_cluster`` indices of samples, cluster after cluster.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; fewer clusters than a batch
            takes.
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
            raise TypeError(f"clusters must be a ClusterIndex, got {type(clusters).__name__}")
        default_replicas, default_rank = distributed_defaults()
        self.clusters = clusters
        self.clusters_per_batch = checked_integer(
            "clusters_per_batch", clusters_per_batch, minimum=2
        )
        if clusters_per_batch > clusters.num_clusters:
            raise ValueError(
                f"clusters_per_batch must be at most the {clusters.num_clusters} clusters there "
                f"are, got {clusters_per_batch}"
            )
        self.samples_per_cluster = checked_integer(
            "samples_per_cluster", samples_per_cluster, minimum=1
        )
        self.uniform_query = uniform_query
        self.num_replicas = checked_integer(
            "num_replicas", default_replicas if num_replicas is None else num_replicas, minimum=1
        )
        self.rank = checked_integer("rank", default_rank if rank is None else rank, minimum=0)
        if self.rank >= self.num_replicas:
            raise ValueError(
                f"rank must be in [0, num_replicas) = [0, {self.num_replicas}), got {self.rank}"
            )
        self.seed = checked_integer("seed", seed, minimum=0)
        if num_batches is None:
            step = self.num_replicas * self.clusters_per_batch * self.samples_per_cluster
            num_batches = -(-len(clusters.labels) // step)
        self.num_batches = checked_integer("num_batches", num_batches, minimum=1)
        self.epoch = 0
        self._drawn = self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration draws.

        An epoch that `load_state_dict` has brought back goes on where it was, another begins.
        """
        epoch = checked_integer("epoch", epoch, minimum=0)
        if epoch != self.epoch:
            self.epoch, self._drawn, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been drawn."""
        return {"epoch": self.epoch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on after the batches that had been drawn.

        That a training goes on as if it had not stopped, `clusters` must be as they were too.
        """
        epoch = checked_integer("epoch", state["epoch"], minimum=0)
        drawn = checked_integer("drawn", state["drawn"], minimum=0)
        self.epoch, self._drawn, self._start = epoch, drawn, drawn

    def __len__(self) -> int:
        """Batches of a whole epoch; the same on every rank."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        for number in range(start, self.num_batches):
            self._drawn = number + 1
            yield self._batch(np.random.default_rng([self.seed, self.epoch, number, self.rank]))
        self._drawn = 0

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
