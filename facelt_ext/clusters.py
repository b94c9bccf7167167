"""Clusters of equal size within the classes of a data set (CLMLE, Huang et al., TPAMI 2020).

clusters = ClusterIndex(labels, cluster_size=200)
clusters.refresh_from(model, loader)
clusters.update_losses(samples, loss.sample_losses)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from facelt_ext._checks import check_count, check_integers, check_matrix
from facelt_ext._model_features import checked_features, device_of, evaluating, with_bar
from facelt_ext.clustering import kmeans
from facelt_ext.functional import super_class_mean
from facelt_ext.reference.margin_softmax import unit_rows

__all__ = ["ClusterIndex"]

_FORMAT = "facelt_ext.ClusterIndex"
_VERSION = 1


class ClusterIndex:
    """Which cluster each sample is in, and the loss that each sample had when it was last seen.

    A class of L_c samples has max(1, L_c // cluster_size) clusters, found by spherical k-means,
    whose sizes differ by at most one. They are numbered class after class: a refresh changes which
    samples they hold, but not how many there are, nor their classes.

    Args:
        labels: integers [N], the class of each sample.
        cluster_size: l, the samples that a cluster has at least, where its class has as many.
        seed: a non-negative integer, of k-means.

    Attributes:
        labels: int64 [N].
        classes: int64 [C], the labels there are, ascending.
        cluster_class: int64 [K], the label of each cluster.
        assignments: int64 [N], the cluster of each sample.
        centroids: float32 [K, D], the directions of the clusters' means; None before the first
            refresh, when the samples of a class are dealt out in their order.
        sample_losses: float32 [N], +inf for samples that have had none. A refresh keeps them.
        refreshes: how often it was refreshed.

    All are on the CPU and not to be written to.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """

    def __init__(self, labels: Tensor, *, cluster_size: int = 200, seed: int = 0) -> None:
        labels = check_integers(labels, "labels")
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels: expected shape [N], N > 0, got {list(labels.shape)}")
        cluster_size = check_count(cluster_size, "cluster_size")
        seed = check_count(seed, "seed", minimum=0)
        self.labels = labels.detach().to("cpu", torch.int64, copy=True)
        self.cluster_size, self.seed = cluster_size, seed
        self.classes, self._class_of, counts = self.labels.unique(
            return_inverse=True, return_counts=True
        )
        self._members_of_class = self._class_of.argsort(stable=True).split(counts.tolist())
        # Clusters of class c: [_first[c], _first[c + 1]).
        numbers = (counts // cluster_size).clamp(min=1)
        self._first = torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])
        self.cluster_class = self.classes.repeat_interleave(numbers)
        dealt = [
            torch.arange(len(members)) * int(number) // len(members)
            for members, number in zip(self._members_of_class, numbers, strict=True)
        ]
        self.centroids: Tensor | None = None
        self.sample_losses = torch.full((len(self.labels),), torch.inf)
        self.refreshes = 0
        self._assign(dealt)

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.cluster_class)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def members(self, cluster: int) -> Tensor:
        """The samples of a cluster, int64, ascending."""
        cluster = check_count(cluster, "cluster", minimum=0)
        if cluster >= self.num_clusters:
            raise ValueError(
                f"cluster: expected a number in [0, {self.num_clusters}), got {cluster}"
            )
        return self._order[self._offsets[cluster] : self._offsets[cluster + 1]]

    def clusters_of(self, label: int) -> range:
        """The clusters of a class."""
        found = (self.classes == label).nonzero()
        if len(found) == 0:
            raise ValueError(f"label: expected one of the {self.num_classes} classes, got {label}")
        return range(*self._first[int(found) : int(found) + 2].tolist())

    def cluster_loss(self, cluster: int) -> float:
        """The mean of the losses of those members that have had one; +inf if none has."""
        losses = self.sample_losses[self.members(cluster)]
        losses = losses[losses.isfinite()].double()
        return float(losses.mean()) if len(losses) else float("inf")

    def refresh(self, features: Tensor) -> None:
        """Clusters anew.

        Args:
            features: [N, D], finite, in the order of the labels; of any lengths, on any device,
                where k-means then runs.
        """
        features = check_matrix(features, "features")
        if len(features) != len(self.labels):
            raise ValueError(
                f"features: expected {len(self.labels)} rows, one for each label, "
                f"got {len(features)}"
            )
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        units = unit_rows(features.detach().float())[0]
        within_class = []
        for number, members in enumerate(self._members_of_class):
            count = int(self._first[number + 1] - self._first[number])
            if count == 1:
                within_class.append(torch.zeros_like(members))
                continue
            rows = units[members.to(units.device)]
            found = kmeans(rows, count, spherical=True, balanced=True, seed=self._draw(number))
            within_class.append(found.assignments.cpu())
        self._assign(within_class)
        means = super_class_mean(units, self.assignments.to(units.device), self.num_clusters)
        self.centroids = unit_rows(means)[0].cpu()
        self.refreshes += 1

    def refresh_from(
        self,
        model: Callable[[Tensor], Tensor],
        loader: Iterable[Sequence[Tensor]],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        """Clusters anew by the features that a model has now.

        Args:
            model, device, progress: as in `facelt_ext.aggregation.class_means`.
            loader: yields tuples or lists that begin with inputs and labels, all N samples in the
                order of the labels, not shuffled.

        Raises:
            ImportError: `progress` without tqdm.
            TypeError, ValueError: a batch is not as above; labels come in another order.
        """
        device = device_of(model) if device is None else torch.device(device)
        features, first = [], 0
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(with_bar(loader, "features") if progress else loader):
                rows, labels = checked_features(model, batch, device, number)
                if not torch.equal(labels, self.labels[first : first + len(labels)]):
                    raise ValueError(
                        f"labels of batch {number}: expected those of samples {first} to "
                        f"{first + len(labels) - 1}, got others; is the loader shuffled?"
                    )
                features.append(rows.float())
                first += len(labels)
        if first != len(self.labels):
            raise ValueError(f"loader: expected {len(self.labels)} samples, got {first}")
        self.refresh(torch.cat(features))

    def update_losses(self, samples: Tensor, losses: Tensor) -> None:
        """Takes down the losses of a batch; waits for the device.

        Args:
            samples: integers [B] in [0, N). Of a sample that comes twice the last loss counts.
            losses: [B], finite: `CLMLELoss.sample_losses`.
        """
        samples = check_integers(samples, "samples")
        if samples.ndim != 1 or losses.shape != samples.shape:
            raise ValueError(
                f"losses: expected shape {list(samples.shape)}, one for each of samples [B], "
                f"got {list(losses.shape)}"
            )
        samples, losses = samples.cpu(), losses.detach().float().cpu()
        outside = (samples < 0) | (samples >= len(self.labels))
        if outside.any():
            raise ValueError(
                f"samples: expected numbers in [0, {len(self.labels)}), "
                f"got {int(samples[outside][0])}"
            )
        if not losses.isfinite().all():
            raise ValueError("losses: expected finite numbers, got NaN or infinity")
        # torch leaves open which of two equal indices wins.
        self.sample_losses.numpy()[samples.numpy()] = losses.numpy()

    def state_dict(self) -> dict[str, object]:
        """All that `load_state_dict` needs to go on from here."""
        return {
            "labels": self.labels,
            "cluster_size": self.cluster_size,
            "seed": self.seed,
            "assignments": self.assignments,
            "centroids": self.centroids,
            "sample_losses": self.sample_losses.clone(),
            "refreshes": self.refreshes,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: it is of other labels, another cluster size or seed, or damaged.
        """
        for name in ("cluster_size", "seed"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"state: expected {name} {getattr(self, name)}, got {state.get(name)}"
                )
        labels = state.get("labels")
        if not isinstance(labels, Tensor) or not torch.equal(labels, self.labels):
            raise ValueError("state: expected the same labels, got others")
        assignments, losses = state["assignments"], state["sample_losses"]
        shapes = [list(assignments.shape), list(losses.shape)]
        in_range = (assignments >= 0) & (assignments < self.num_clusters)
        if shapes != [list(labels.shape)] * 2 or not in_range.all():
            raise ValueError("state: expected a cluster and a loss of each sample, got others")
        if not torch.equal(self.cluster_class[assignments], labels):
            raise ValueError("state: expected each sample in a cluster of its class, got others")
        if assignments.bincount(minlength=self.num_clusters).eq(0).any():
            raise ValueError("state: expected samples in each cluster, got none in one")
        centroids = state["centroids"]
        if centroids is not None and (centroids.ndim != 2 or len(centroids) != self.num_clusters):
            raise ValueError(f"state: expected {self.num_clusters} centroids, got others")
        self._take(assignments.clone())
        self.centroids = None if centroids is None else centroids.clone()
        self.sample_losses = losses.clone()
        self.refreshes = int(state["refreshes"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it to a file that `load` reads."""
        torch.save({"format": _FORMAT, "version": _VERSION, **self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterIndex:
        """Reads what `save` wrote; runs no code from the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no clusters, is damaged, or of another version.
        """
        name = os.fspath(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"path: expected a file of clusters, got {name}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"path: expected a file of clusters, got something else in {name}")
        if (version := content.pop("version", None)) != _VERSION:
            raise ValueError(f"path: expected version {_VERSION}, got {version} in {name}")
        try:
            index = cls(
                content["labels"], cluster_size=content["cluster_size"], seed=content["seed"]
            )
            index.load_state_dict(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {name} is damaged: {error}") from error
        return index

    def __repr__(self) -> str:
        return (
            f"ClusterIndex({len(self.labels)} samples, {self.num_classes} classes, "
            f"{self.num_clusters} clusters)"
        )

    def _draw(self, number: int) -> int:
        """The seed of a class in this refresh."""
        sequence = np.random.SeedSequence([self.seed, self.refreshes, number])
        return int(sequence.generate_state(1)[0])

    def _assign(self, within_class: list[Tensor]) -> None:
        assignments = torch.empty_like(self.labels)
        for members, own, first in zip(
            self._members_of_class, within_class, self._first[:-1].tolist(), strict=True
        ):
            assignments[members] = own + first
        self._take(assignments)

    def _take(self, assignments: Tensor) -> None:
        self.assignments = assignments
        self._order = assignments.argsort(stable=True)
        counts = assignments.bincount(minlength=self.num_clusters)
        self._offsets = [0, *counts.cumsum(0).tolist()]
