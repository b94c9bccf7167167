"""The batches of a phase."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from face_demo.errors import DataError
from torch import Tensor
from torch.utils.data import DistributedSampler

from facelt_ext.clusters import ClusterIndex
from facelt_ext.samplers import ClusterBatchSampler, PKSampler


class RandomBatches:
    """Batches of random images, each image once in an epoch; the last few make no batch."""

    def __init__(self, size: int, batch_size: int, ranks: int, rank: int, seed: int) -> None:
        self.batch_size = max(1, min(batch_size, size // ranks))
        self._samples = DistributedSampler(
            range(size), ranks, rank, shuffle=True, seed=seed, drop_last=size >= ranks
        )

    def set_epoch(self, epoch: int) -> None:
        self._samples.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._samples) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.tensor(list(self._samples))
        for batch in order[: len(self) * self.batch_size].view(len(self), self.batch_size):
            yield batch.tolist()


Batches = RandomBatches | PKSampler | ClusterBatchSampler


def make_batches(
    settings: dict[str, int], labels: Tensor, ranks: int, rank: int, seed: int
) -> tuple[Batches, ClusterIndex | None]:
    """The sampler of a phase, and its clusters if it has any.

    A batch has no more identities or clusters than there are.

    Args:
        settings: of `Phase.batches`.
        labels: int64 ``[N]`` of the images that the phase sees.

    Raises:
        DataError: the images make no batch; a setting is out of range.
    """
    for name, value in settings.items():
        if value < 1:
            raise DataError(f"--set {name}: expected at least 1, got {value}")
    try:
        batches, clusters = _batches(settings, labels, ranks, rank, seed)
    except (TypeError, ValueError) as error:
        raise DataError(f"--set {error}") from error
    if len(batches) == 0:
        raise DataError(f"{len(labels)} images make no batch")
    return batches, clusters


def _batches(
    settings: dict[str, int], labels: Tensor, ranks: int, rank: int, seed: int
) -> tuple[Batches, ClusterIndex | None]:
    options = {"num_replicas": ranks, "rank": rank, "seed": seed}
    if "batch_size" in settings:
        return RandomBatches(len(labels), settings["batch_size"], ranks, rank, seed), None
    if "classes_per_batch" in settings:
        classes = min(settings["classes_per_batch"], len(labels.unique()) // ranks)
        if classes < 1:
            raise DataError(f"{len(labels.unique())} identities are too few for {ranks} processes")
        return PKSampler(labels, classes, settings["samples_per_class"], **options), None
    clusters = ClusterIndex(labels, cluster_size=settings["cluster_size"], seed=seed)
    sampler = ClusterBatchSampler(
        clusters,
        clusters_per_batch=min(settings["clusters_per_batch"], clusters.num_clusters),
        samples_per_cluster=settings["samples_per_cluster"],
        **options,
    )
    return sampler, clusters


def images_per_batch(batches: Batches) -> int:
    if isinstance(batches, PKSampler):
        return batches.classes_per_batch * batches.samples_per_class
    if isinstance(batches, ClusterBatchSampler):
        return batches.clusters_per_batch * batches.samples_per_cluster
    return batches.batch_size


def refresh_epochs(settings: dict[str, int], batches: int) -> int:
    """Epochs after which clusters are found anew."""
    return max(1, math.ceil(settings["refresh"] / batches - 0.5))
