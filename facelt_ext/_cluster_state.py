"""Checks of a state of clusters, before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import check_count, check_data, check_integer

# What float32 centroids of length 1 may miss of it.
ROUNDING = 1e-4


class ClusterState(NamedTuple):
    """What changes with a training: see `ClusterIndex`."""

    assignments: Tensor
    centroids: Tensor | None
    sample_losses: Tensor
    refreshes: int


def checked_state(
    state: Mapping[str, object],
    labels: Tensor,
    cluster_class: Tensor,
    settings: Mapping[str, int | None],
) -> ClusterState:
    """Copies on the CPU.

    Args:
        state: what is to be loaded.
        labels, cluster_class: those of the clusters that load it.
        settings: their cluster size, seed and ignored index.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict, got {type(state).__name__}")
    names = ("labels", *settings, *ClusterState._fields)
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"state: expected {', '.join(names)}, got no {', '.join(missing)}")
    for name, own in settings.items():
        found = state[name]
        if found is not None:
            found = check_integer(found, f"state[{name!r}]")
        if found != own:
            raise ValueError(f"state: expected {name} {own}, got {found}")
    if not torch.equal(_checked_tensor(state, "labels", torch.int64, labels.shape), labels):
        raise ValueError("state['labels']: expected the same labels, got others")
    refreshes = check_count(state["refreshes"], "state['refreshes']", minimum=0)
    return ClusterState(
        _checked_assignments(state, labels, cluster_class, settings["ignore_index"]),
        _checked_centroids(state, len(cluster_class), refreshes),
        _checked_losses(state, labels.shape),
        refreshes,
    )


def _checked_tensor(
    state: Mapping[str, object], name: str, dtype: torch.dtype, shape: torch.Size | None
) -> Tensor:
    value, name = state[name], f"state[{name!r}]"
    value = check_data(value, name)
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    return value.to("cpu", copy=True)


def _checked_assignments(
    state: Mapping[str, object], labels: Tensor, cluster_class: Tensor, ignore_index: int | None
) -> Tensor:
    name, clusters = "state['assignments']", len(cluster_class)
    assignments = _checked_tensor(state, "assignments", torch.int64, labels.shape)
    taking_part = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        taking_part = labels != ignore_index
    in_range = (assignments >= 0) & (assignments < clusters)
    right = torch.where(taking_part, in_range, assignments == -1)
    if not right.all():
        position = int((~right).nonzero()[0])
        wanted = (
            f"numbers in [0, {clusters})" if taking_part[position] else "-1 for an ignored sample"
        )
        raise ValueError(
            f"{name}: expected {wanted}, got {int(assignments[position])} at position {position}"
        )
    own = assignments[taking_part]
    if not torch.equal(cluster_class[own], labels[taking_part]):
        raise ValueError(f"{name}: expected each sample in a cluster of its class, got others")
    empty = own.bincount(minlength=clusters).eq(0)
    if empty.any():
        raise ValueError(
            f"{name}: expected samples in each of {clusters} clusters, got none in "
            f"{int(empty.nonzero()[0])}"
        )
    return assignments


def _checked_centroids(state: Mapping[str, object], clusters: int, refreshes: int) -> Tensor | None:
    name = "state['centroids']"
    if (state["centroids"] is None) != (refreshes == 0):
        wanted, got = ("None", "centroids") if refreshes == 0 else ("centroids", "None")
        raise ValueError(f"{name}: expected {wanted} after {refreshes} refreshes, got {got}")
    if refreshes == 0:
        return None
    centroids = _checked_tensor(state, "centroids", torch.float32, None)
    if centroids.ndim != 2 or len(centroids) != clusters or centroids.shape[1] == 0:
        raise ValueError(
            f"{name}: expected shape [{clusters}, dimensions >= 1], got {list(centroids.shape)}"
        )
    lengths = centroids.double().norm(dim=1)
    wrong = ~((lengths - 1).abs() <= ROUNDING) & (lengths != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected rows of length 1 or zeros, got length {float(lengths[row])} in row "
            f"{row}"
        )
    return centroids


def _checked_losses(state: Mapping[str, object], shape: torch.Size) -> Tensor:
    losses = _checked_tensor(state, "sample_losses", torch.float32, shape)
    wrong = losses.isnan() | (losses == -torch.inf)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"state['sample_losses']: expected finite losses, or inf of samples without one, got "
            f"{float(losses[position])} at position {position}"
        )
    return losses
