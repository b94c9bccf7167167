"""What the calls of `public_calls` are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from facelt_ext.aggregation import SuperClasses
from facelt_ext.clusters import ClusterIndex

Call = tuple[Callable[..., object], dict[str, object]]

# Batch, dimensions, classes, super classes, clusters.
B, D, N, S, M = 6, 4, 5, 2, 3


def features(rows: int = B, dimensions: int = D) -> Tensor:
    return torch.randn(rows, dimensions)


def crowded(rows: int, dimensions: int = D) -> Tensor:
    """Directions so near to each other that products of 16 bits do not tell them apart."""
    return 1 + 0.01 * torch.randn(rows, dimensions)


def labels(classes: int = N, count: int = B) -> Tensor:
    return torch.randint(0, classes, (count,))


def pairs_of_labels() -> Tensor:
    """Two of each class."""
    return torch.arange(8) // 2


def labels_of_clusters() -> Tensor:
    """Of one class with two clusters, and of others with one."""
    return torch.tensor([0, 0, 0, 1, 1, 2, 0, 3])


def super_classes() -> SuperClasses:
    """Of N classes, of which the first two are heads."""
    counts = torch.tensor([20, 15, 3, 2, 1])
    return SuperClasses(torch.arange(2), torch.arange(2, N), torch.tensor([0, 1, 0]), counts)


def refreshed() -> ClusterIndex:
    index = ClusterIndex(labels_of_clusters(), cluster_size=2)
    index.refresh(crowded(8))
    return index


def then(
    of: Callable[..., object], call: Callable[..., object], *names: str
) -> Callable[..., object]:
    """Makes something of the arguments and goes on with it; `names` are what that takes."""

    def run(**arguments: object) -> object:
        return call(of(**arguments))

    return also_naming(functools.update_wrapper(run, of), *names)


def also_naming(function: Callable[..., object], *names: str) -> Callable[..., object]:
    """Errors may name these beside the arguments."""
    function.also = names
    return function
