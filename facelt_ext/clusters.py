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

from facelt_ext._autocast import without_autocast
from facelt_ext._checks import (
    FLOATING,
    check_count,
    check_data,
    check_integer,
    check_integers,
    check_matrix,
    check_path,
)
from facelt_ext._cluster_state import checked_state
from facelt_ext._model_features import (
    Rows,
    batches_of,
    checked_features,
    chosen_device,
    evaluating,
)
from facelt_ext.clustering import kmeans
from facelt_ext.functional import super_class_mean
from facelt_ext.reference.margin_softmax import unit_rows

__all__ = ["ClusterIndex"]

_FORMAT = "facelt_ext.ClusterIndex"
_VERSION = 2
_SETTINGS = ("cluster_size", "seed", "ignore_index")


class ClusterIndex:
    """Which cluster each sample is in, and the loss that each sample had when it was last seen.

    A class of L_c samples has max(1, L_c // cluster_size) clusters, found by spherical k-means,
    whose sizes differ by at most one. They are numbered class after class: a refresh changes which
    samples they hold, but not how many there are, nor their classes.

    Args:
        labels: integers [N], the class of each sample.
        cluster_size: l, the samples that a cluster has at least, where its class has as many.
        seed: a non-negative integer, of k-means.
        ignore_index: the label of samples that are in no class and no cluster; None: every label
            is a class.

    Attributes:
        labels: int64 [N].
        classes: int64 [C], the labels there are without `ignore_index`, ascending.
        cluster_class: int64 [K], the label of each cluster.
        assignments: int64 [N], the cluster of each sample, -1 for ignored ones.
        centroids: float32 [K, D], the directions of the clusters' means; None before the first
            refresh, when the samples of a class are dealt out in their order.
        sample_losses: float32 [N], +inf for samples that have had none. A refresh keeps them.
        refreshes: how often it was refreshed.

    All are on the CPU and not to be written to.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        cluster_size: int = 200,
        seed: int = 0,
        ignore_index: int | None = -100,
    ) -> None:
        labels = check_integers(check_data(labels, "labels"), "labels")
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels: expected shape [N], N > 0, got {list(labels.shape)}")
        cluster_size = check_count(cluster_size, "cluster_size")
        seed = check_count(seed, "seed", minimum=0)
        if ignore_index is not None:
            ignore_index = check_integer(ignore_index, "ignore_index")
        self.labels = labels.to("cpu", copy=True)
        self.cluster_size, self.seed, self.ignore_index = cluster_size, seed, ignore_index
        order = self.labels.argsort(stable=True)
        if ignore_index is not None:
            order = order[self.labels[order] != ignore_index]
        if len(order) == 0:
            raise ValueError(f"labels: expected another label than the ignored {ignore_index}")
        # Samples that are in a class, class after class.
        self._by_class = order
        self.classes, self._class_sizes = self.labels[order].unique(return_counts=True)
        # Clusters of class c: [_first[c], _first[c + 1]).
        numbers = (self._class_sizes // cluster_size).clamp(min=1)
        self._first = torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])
        self.cluster_class = self.classes.repeat_interleave(numbers)
        self.centroids: Tensor | None = None
        self.sample_losses = torch.full_like(self.labels, torch.inf, dtype=torch.float32)
        self.refreshes = 0
        self._assign(self._dealt(numbers))

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
        cluster = check_integer(cluster, "cluster")
        if not 0 <= cluster < self.num_clusters:
            raise ValueError(
                f"cluster: expected a number in [0, {self.num_clusters}), got {cluster}"
            )
        # A copy: a view would be saved with all other clusters.
        return self._order[self._offsets[cluster] : self._offsets[cluster + 1]].clone()

    def clusters_of(self, label: int) -> range:
        """The clusters of a class."""
        if isinstance(label, Tensor) and label.ndim == 0:
            label = int(check_integers(check_data(label, "label"), "label"))
        label = check_integer(label, "label")
        found = (self.classes == label).nonzero()
        if len(found) == 0:
            raise ValueError(f"label: expected one of the {self.num_classes} classes, got {label}")
        return range(*self._first[int(found) : int(found) + 2].tolist())

    def cluster_loss(self, cluster: int) -> float:
        """The mean of the losses of those members that have had one; +inf if none has."""
        losses = self.sample_losses[self.members(cluster)]
        losses = losses[losses.isfinite()].double()
        return float(losses.mean()) if len(losses) else float("inf")

    @without_autocast
    def refresh(self, features: Tensor) -> None:
        """Clusters anew.

        Args:
            features: [N, D], finite in float32, in the order of the labels; of any lengths, on any
                device, where k-means then runs. Those of ignored samples may be anything.
        """
        features = check_matrix(check_data(features, "features"), "features")
        if len(features) != len(self.labels):
            raise ValueError(
                f"features: expected {len(self.labels)} rows, one for each label, "
                f"got {len(features)}"
            )
        features = features.float()
        assignments = self.assignments.to(features.device)
        wrong = ~features.isfinite().all(dim=1) & (assignments >= 0)
        if wrong.any():
            raise ValueError(
                f"features: expected finite numbers, got others in row {int(wrong.nonzero()[0])}"
            )
        units = unit_rows(features)[0]
        within_class = []
        for number, members in enumerate(self._by_class.split(self._class_sizes.tolist())):
            count = int(self._first[number + 1] - self._first[number])
            if count == 1:
                within_class.append(torch.zeros_like(members))
                continue
            rows = units[members.to(units.device)]
            found = kmeans(rows, count, spherical=True, balanced=True, seed=self._draw(number))
            within_class.append(found.assignments.cpu())
        self._assign(torch.cat(within_class))
        self.centroids = unit_rows(self._means(units))[0].cpu()
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
        device = chosen_device(model, device)
        features = Rows()
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(batches_of(loader, progress, "features")):
                rows, labels = checked_features(model, batch, device, number, self.ignore_index)
                first = len(features)
                if not torch.equal(labels, self.labels[first : first + len(labels)]):
                    raise ValueError(
                        f"loader: labels of batch {number}: expected those of samples {first} to "
                        f"{first + len(labels) - 1}, got others; is the loader shuffled?"
                    )
                features.append(rows.float(), f"model: features of batch {number}")
        if len(features) != len(self.labels):
            raise ValueError(f"loader: expected {len(self.labels)} samples, got {len(features)}")
        self.refresh(features.all())

    def update_losses(self, samples: Tensor, losses: Tensor) -> None:
        """Keeps the losses of a batch; waits for the device.

        Losses that are not finite, as in a step that a GradScaler skips, are left out: their
        samples keep the losses that they had. Those of ignored samples are left out too.

        Args:
            samples: integers [B] in [0, N). Of a sample that comes twice the last loss counts.
            losses: floating [B]: `CLMLELoss.sample_losses`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or range. `losses` is
                None before the first batch, and after batches that replicas of the loss have seen,
                as in DataParallel: these keep their `sample_losses` to themselves.
        """
        if losses is None:
            raise TypeError(
                "losses: expected a tensor, got None; sample_losses are there after a forward of "
                "the loss itself, and none come back from its replicas in DataParallel"
            )
        samples = check_integers(check_data(samples, "samples"), "samples")
        losses = check_data(losses, "losses")
        if losses.dtype not in FLOATING:
            raise TypeError(f"losses: expected a floating dtype, got {losses.dtype}")
        if samples.ndim != 1 or losses.shape != samples.shape:
            raise ValueError(
                f"losses: expected shape {list(samples.shape)}, one for each of samples [B], "
                f"got {list(losses.shape)}"
            )
        # In torch it is open which of two equal indices wins.
        samples, losses = samples.cpu().numpy(), losses.float().cpu().numpy()
        outside = (samples < 0) | (samples >= len(self.labels))
        if outside.any():
            raise ValueError(
                f"samples: expected numbers in [0, {len(self.labels)}), got {samples[outside][0]}"
            )
        taken = np.isfinite(losses) & (self.assignments.numpy()[samples] >= 0)
        self.sample_losses.numpy()[samples[taken]] = losses[taken]

    def state_dict(self) -> dict[str, object]:
        """All that `load_state_dict` needs to go on from here."""
        return {
            "labels": self.labels,
            **self._settings(),
            "assignments": self.assignments,
            "centroids": self.centroids,
            "sample_losses": self.sample_losses.clone(),
            "refreshes": self.refreshes,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from where `state_dict` was taken.

        Nothing is taken of a state that is refused.

        Raises:
            TypeError, ValueError: it is of other labels, another cluster size, seed or ignored
                index, or an entry is missing or of another dtype, shape or range.
        """
        found = checked_state(state, self.labels, self.cluster_class, self._settings())
        self._take(found.assignments)
        self.centroids, self.sample_losses = found.centroids, found.sample_losses
        self.refreshes = found.refreshes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it to a file that `load` reads."""
        content = {"format": _FORMAT, "version": _VERSION, **self.state_dict()}
        torch.save(content, check_path(path, "path"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterIndex:
        """Reads what `save` wrote; runs no code from the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no clusters, is damaged, or of another version.
        """
        name = check_path(path, "path")
        try:
            content = torch.load(name, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"path: expected a file of clusters, got {name}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"path: expected a file of clusters, got something else in {name}")
        version = content.pop("version", None)
        if version == 1:
            # Every label was a class.
            content["ignore_index"] = None
        elif version != _VERSION:
            raise ValueError(f"path: expected version {_VERSION}, got {version} in {name}")
        missing = [entry for entry in ("labels", *_SETTINGS) if entry not in content]
        if missing:
            raise ValueError(f"path: {name} is damaged: no {missing[0]}")
        try:
            index = cls(content["labels"], **{entry: content[entry] for entry in _SETTINGS})
            index.load_state_dict(content)
        except (TypeError, ValueError) as error:
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

    def _settings(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _dealt(self, numbers: Tensor) -> Tensor:
        """Class after class, its samples dealt out to its clusters in their order."""
        sizes = self._class_sizes
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(len(self._by_class), device="cpu") - starts.repeat_interleave(sizes)
        return place * numbers.repeat_interleave(sizes) // sizes.repeat_interleave(sizes)

    def _means(self, units: Tensor) -> Tensor:
        """Of each cluster; ignored samples have one of their own, which is left out."""
        clusters = self.num_clusters
        number = torch.where(self.assignments < 0, clusters, self.assignments)
        ignored = int(len(self._by_class) < len(self.labels))
        return super_class_mean(units, number.to(units.device), clusters + ignored)[:clusters]

    def _assign(self, within_class: Tensor) -> None:
        """From the cluster, counted within its class, of each sample that is in a class."""
        assignments = torch.full_like(self.labels, -1)
        first = self._first[:-1].repeat_interleave(self._class_sizes)
        assignments[self._by_class] = within_class + first
        self._take(assignments)

    def _take(self, assignments: Tensor) -> None:
        self.assignments = assignments
        own = assignments[self._by_class]
        self._order = self._by_class[own.argsort(stable=True)]
        self._offsets = [0, *own.bincount(minlength=self.num_clusters).cumsum(0).tolist()]
