"""Classification by the nearest clusters (CLMLE, Huang et al., TPAMI 2020, eq. 10).

classifier = NearestClusterClassifier().fit(clusters)
labels = classifier.predict(features)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from facelt_ext._autocast import without_autocast
from facelt_ext._checks import check_choice, check_count, check_data, check_matrix
from facelt_ext.clusters import ClusterIndex
from facelt_ext.reference.margin_softmax import unit_rows
from facelt_ext.types import compute_dtype

__all__ = ["NearestClusterClassifier"]

# Numbers that a step of the search or of the scores may take beside its results.
CHUNK = 1 << 23


class NearestClusterClassifier:
    """k-nearest-cluster classification.

    Among the N clusters whose centroids mu are nearest to a feature f, each class c there scores

        log( min over its clusters m of exp(f.mu_m) / sum over the others' k of exp(f.mu_k) )

    and the best one is the answer, the lower label of equal ones. A class that is alone among the
    N scores +inf.

    Args:
        num_neighbors: N, at least 1; the paper searches 20, 30, ..., 200. Of fewer clusters all are
            taken.
        search: how clusters are found. "products" multiplies with all centroids, in chunks, where
            the features are; of equally near clusters it takes the first. "faiss" is as fast, and
            "kdtree" (scikit-learn) slower, from 64 dimensions on; both search on the CPU and take
            any of equally near clusters.

    Attributes:
        classes: int64 [C], the labels, ascending.
        cluster_class: int64 [K], the label of each cluster.
        centroids: float32 [K, D], of length 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
        ImportError: what `search` needs is not installed.
    """

    def __init__(self, num_neighbors: int = 20, *, search: str = "products") -> None:
        num_neighbors = check_count(num_neighbors, "num_neighbors")
        search = check_choice(search, "search", tuple(_SEARCHES))
        self.num_neighbors, self.search = num_neighbors, search
        self.classes = torch.empty(0, dtype=torch.int64, device="cpu")
        self.cluster_class = torch.empty_like(self.classes)
        self.centroids = torch.empty(0, 0, dtype=torch.float32, device="cpu")
        self._find: Callable[[Tensor, int], Tensor] | None = None

    def fit(self, clusters: ClusterIndex) -> NearestClusterClassifier:
        """Takes these clusters and forgets those before. Returns itself.

        Raises:
            ValueError: they have not been refreshed yet, and so have no centroids.
        """
        centroids, cluster_class = _content(clusters)
        return self._take(centroids, cluster_class)

    def add(self, clusters: ClusterIndex) -> NearestClusterClassifier:
        """Takes clusters beside those that are there: new classes, or more of known ones.

        Raises:
            ValueError: they have not been refreshed yet; their features have other dimensions.
        """
        centroids, cluster_class = _content(clusters)
        self._check_fitted()
        if centroids.shape[1] != self.centroids.shape[1]:
            raise ValueError(
                f"clusters: expected centroids of {self.centroids.shape[1]} dimensions, as those "
                f"that are there, got {centroids.shape[1]}"
            )
        return self._take(
            torch.cat([self.centroids, centroids]), torch.cat([self.cluster_class, cluster_class])
        )

    @without_autocast
    def predict(self, features: Tensor) -> Tensor:
        """The class of each feature.

        Args:
            features: [B, D], finite, of any lengths, on any device.

        Returns:
            int64 [B], on the device of the features.
        """
        features = self._checked(features)
        # Of equal scores the lowest class; those that are not the best lie beyond all classes.
        best = [
            torch.where(scores == scores.amax(1, keepdim=True), classes, len(self.classes)).amin(1)
            for scores, classes in self._scores(features)
        ]
        return self.classes.to(features.device)[torch.cat(best)]

    @without_autocast
    def decision_function(self, features: Tensor) -> Tensor:
        """The scores of all classes.

        Args:
            features: as of `predict`.

        Returns:
            [B, C], in the order of `classes`, float64 for float64 features, float32 otherwise; -inf
            for classes without a cluster among the nearest.
        """
        features = self._checked(features)
        dtype = compute_dtype(features.dtype)
        result = torch.full(
            (len(features), len(self.classes)), -torch.inf, dtype=dtype, device=features.device
        )
        first = 0
        for scores, classes in self._scores(features):
            result[first : first + len(scores)].scatter_(1, classes, scores)
            first += len(scores)
        return result

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_find": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if len(self.cluster_class) > 0:
            self._find = _SEARCHES[self.search](self.centroids)

    def __repr__(self) -> str:
        return (
            f"NearestClusterClassifier(num_neighbors={self.num_neighbors}, "
            f"search={self.search!r}): {len(self.cluster_class)} clusters, "
            f"{len(self.classes)} classes"
        )

    def _take(self, centroids: Tensor, cluster_class: Tensor) -> NearestClusterClassifier:
        self.centroids, self.cluster_class = centroids, cluster_class
        self.classes, self._class_number = cluster_class.unique(return_inverse=True)
        self._find = _SEARCHES[self.search](centroids)
        return self

    def _check_fitted(self) -> None:
        if len(self.cluster_class) == 0:
            raise ValueError("the classifier has no clusters yet: call fit before")

    def _checked(self, features: Tensor) -> Tensor:
        self._check_fitted()
        features = check_matrix(check_data(features, "features"), "features")
        if features.shape[1] != self.centroids.shape[1]:
            raise ValueError(
                f"features: expected {self.centroids.shape[1]} dimensions, as the centroids, "
                f"got {features.shape[1]}"
            )
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        return features

    def _scores(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk by chunk, of each nearest cluster the score and the number of its class."""
        units = unit_rows(features.to(compute_dtype(features.dtype)))[0]
        count = min(self.num_neighbors, len(self.cluster_class))
        centroids = self.centroids.to(units)
        class_number = self._class_number.to(units.device)
        largest = max(len(centroids), count * max(count, units.shape[1]))
        for rows in units.split(max(1, CHUNK // largest)):
            nearest = self._find(rows, count)
            similarity = (centroids[nearest] @ rows[:, :, None])[:, :, 0]
            classes = class_number[nearest]
            yield _scores(similarity, classes), classes


def _content(clusters: ClusterIndex) -> tuple[Tensor, Tensor]:
    if not isinstance(clusters, ClusterIndex):
        raise TypeError(f"clusters: expected a ClusterIndex, got {type(clusters).__name__}")
    if clusters.centroids is None:
        raise ValueError("clusters: expected ones that were refreshed, got some without centroids")
    return clusters.centroids, clusters.cluster_class


def _scores(similarity: Tensor, classes: Tensor) -> Tensor:
    """Of each of N clusters the score of its class; both are [B, N]."""
    same = classes[:, :, None] == classes[:, None, :]
    terms = similarity[:, None, :].expand(same.shape)
    weakest = torch.where(same, terms, torch.inf).amin(2)
    return weakest - torch.where(same, -torch.inf, terms).logsumexp(2)


def _products(centroids: Tensor) -> Callable[[Tensor, int], Tensor]:
    def find(units: Tensor, count: int) -> Tensor:
        similarity = units @ centroids.to(units).t()
        values, nearest = similarity.topk(count, dim=1)
        # Which of several equal ones topk takes is left open.
        doubtful = (similarity >= values[:, -1:]).sum(1) > count
        if doubtful.any():
            order = similarity[doubtful].sort(dim=1, descending=True, stable=True).indices
            nearest[doubtful] = order[:, :count]
        return nearest

    return find


def _kdtree(centroids: Tensor) -> Callable[[Tensor, int], Tensor]:
    try:
        from sklearn.neighbors import KDTree
    except ImportError as error:
        raise ImportError('search="kdtree" needs scikit-learn: pip install scikit-learn') from error
    tree = KDTree(centroids.numpy())

    def find(units: Tensor, count: int) -> Tensor:
        nearest = tree.query(units.cpu().numpy(), k=count, return_distance=False)
        return torch.from_numpy(nearest).to(units.device)

    return find


def _faiss(centroids: Tensor) -> Callable[[Tensor, int], Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError('search="faiss" needs faiss: pip install faiss-cpu') from error
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids.numpy())

    def find(units: Tensor, count: int) -> Tensor:
        return torch.from_numpy(index.search(units.float().cpu().numpy(), count)[1]).to(
            units.device
        )

    return find


_SEARCHES = {"products": _products, "kdtree": _kdtree, "faiss": _faiss}
