"""All batch samplers, each as a function that makes a small one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.data import Dataset

from facelt_ext import samplers
from facelt_ext.clusters import ClusterIndex
from facelt_ext.samplers import ClusterBatchSampler, PKSampler

LABELS = torch.arange(48) // 4
NUM_BATCHES = 5

Batches = list[list[int]]
Make = Callable[..., PKSampler | ClusterBatchSampler]


@functools.cache
def clusters() -> ClusterIndex:
    index = ClusterIndex(LABELS, cluster_size=2)
    index.refresh(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)))
    return index


def make_pk(**options: object) -> PKSampler:
    sizes = {"classes_per_batch": 3, "samples_per_class": 2}
    return PKSampler(LABELS, **sizes | {"num_batches": NUM_BATCHES, "seed": 1} | options)


def make_clustered(**options: object) -> ClusterBatchSampler:
    sizes = {"clusters_per_batch": 8, "samples_per_cluster": 2}
    options = sizes | {"num_batches": NUM_BATCHES, "seed": 1} | options
    return ClusterBatchSampler(clusters(), **options)


SAMPLERS: dict[str, Make] = {"PKSampler": make_pk, "ClusterBatchSampler": make_clustered}
assert set(SAMPLERS) == set(samplers.__all__)


def epoch_of(make: Make, epoch: int, replicas: int = 1, rank: int = 0) -> Batches:
    """The batches of an epoch, of a sampler that is told all of it and does nothing else."""
    sampler = make(num_replicas=replicas, rank=rank)
    sampler.set_epoch(epoch)
    return list(sampler)


class Numbers(Dataset):
    """Each sample is its own index."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}
