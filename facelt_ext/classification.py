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
from facelt_ext._rounding import product_dtype, product_error, tie_width
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

    and the best one is the answer, the lower label of equal ones: those no further apart than 1e-6
    (1e-12 for float64 features). A class that is alone among the N scores +inf.

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
        best = [self._best(*chunk) for chunk in self._scores(features)]
        return self.classes.to(features.device)[torch.cat(best)]

    def _best(self, rows: Tensor, nearest: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        """The number of the class that scores highest; where several may, by exact products."""
        highest, place = scores.max(1, keepdim=True)
        best = classes.gather(1, place)
        close = scores >= highest - 4 * product_error(rows)
        doubtful = (close & (classes != best)).any(1)
        best = best[:, 0]
        if doubtful.any():
            rows, nearest, classes = (each[doubtful] for each in (rows, nearest, classes))
            centroids = self.centroids.to(rows.device)
            scores = _scores(_similarity(rows.double(), centroids, nearest), classes)
            tied = scores >= scores.amax(1, keepdim=True) - tie_width(rows)
            # Those that are not the best lie beyond all classes.
            best[doubtful] = torch.where(tied, classes, len(self.classes)).amin(1)
        return best

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
        for _, _, scores, classes in self._scores(features):
            result[first : first + len(scores)].scatter_(1, classes, scores.to(dtype))
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

    def _scores(self, features: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Chunk by chunk, unit rows, their nearest clusters, and of these the score and the number
        of the class."""
        units = unit_rows(features.to(compute_dtype(features.dtype)))[0]
        units = units.to(product_dtype(units))
        count = min(self.num_neighbors, len(self.cluster_class))
        centroids = self.centroids.to(units)
        class_number = self._class_number.to(units.device)
        largest = max(len(centroids), count * max(count, units.shape[1]))
        for rows in units.split(max(1, CHUNK // largest)):
            nearest = self._find(rows, count)
            classes = class_number[nearest]
            yield rows, nearest, _scores(_similarity(rows, centroids, nearest), classes), classes


def _content(clusters: ClusterIndex) -> tuple[Tensor, Tensor]:
    if not isinstance(clusters, ClusterIndex):
        raise TypeError(f"clusters: expected a ClusterIndex, got {type(clusters).__name__}")
    if clusters.centroids is None:
        raise ValueError("clusters: expected ones that were refreshed, got some without centroids")
    return clusters.centroids, clusters.cluster_class


def _similarity(rows: Tensor, centroids: Tensor, nearest: Tensor) -> Tensor:
    """[B, N], of each row with its nearest centroids."""
    return (centroids[nearest].to(rows) @ rows[:, :, None])[:, :, 0]


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
        # Which of several equal ones topk takes is left open, and rounding may part them.
        last = values[:, -1:]
        doubtful = (similarity >= last - 2 * product_error(units)).sum(1) > count
        if doubtful.any():
            similarity = units[doubtful].double() @ centroids.to(units.device).double().t()
            last = similarity.topk(count, dim=1).values[:, -1:]
            tie = tie_width(units)
            nearer = (similarity > last + tie).int() + (similarity >= last - tie)
            first = torch.arange(len(centroids), 0, -1, device=nearer.device)
            nearest[doubtful] = (nearer * len(centroids) + first).topk(count, dim=1).indices
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
