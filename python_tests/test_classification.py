"""NearestClusterClassifier against literal loops over CLMLE's eq. 10."""

from __future__ import annotations

import builtins
import math
import pickle

import numpy as np
import pytest
import torch
from strategies import LAYOUTS, strided

from facelt_ext import classification
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex

SEARCHES = ["products", "kdtree", pytest.param("faiss", marks=pytest.mark.filterwarnings("ignore"))]


def clusters(seed: int, counts: dict[int, int], dimensions: int = 5) -> ClusterIndex:
    """Classes of so many clusters, of three samples each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label for label, count in counts.items() for _ in range(3 * count)])
    index = ClusterIndex(labels, cluster_size=3)
    index.refresh(torch.randn(len(labels), dimensions, generator=generator))
    return index


def points(seed: int, count: int, dimensions: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, dimensions, dtype=torch.float64, generator=generator)


COUNTS = {7: 3, -5: 1, 2: 4, 40: 1, 41: 2}


def literal_scores(index: ClusterIndex, f: np.ndarray, neighbors: int) -> dict[int, float]:
    """Eq. 10 for one feature, in plain sums of exponentials."""
    f = f / math.sqrt(sum(v * v for v in f))
    similarity = [sum(a * b for a, b in zip(f, c.tolist(), strict=True)) for c in index.centroids]
    nearest = sorted(range(len(similarity)), key=lambda m: (-similarity[m], m))[:neighbors]
    classes = {m: int(index.cluster_class[m]) for m in nearest}
    scores = {}
    for c in set(classes.values()):
        weakest = min(math.exp(similarity[m]) for m in nearest if classes[m] == c)
        others = sum(math.exp(similarity[m]) for m in nearest if classes[m] != c)
        scores[c] = math.log(weakest / others) if others else math.inf
    return scores


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("neighbors", [1, 2, 4, 11, 500])
def test_agrees_with_literal_loops(search, neighbors):
    index, x = clusters(0, COUNTS), points(1, 60)
    classifier = NearestClusterClassifier(neighbors, search=search).fit(index)
    assert classifier.classes.tolist() == sorted(COUNTS)
    scores, predicted = classifier.decision_function(x), classifier.predict(x)
    assert scores.dtype == torch.float64 and predicted.dtype == torch.int64
    for row, label, f in zip(scores, predicted.tolist(), x.numpy(), strict=True):
        expected = literal_scores(index, f, neighbors)
        assert label == max(sorted(expected), key=lambda c: expected[c])
        for c, score in zip(classifier.classes.tolist(), row.tolist(), strict=True):
            assert score == pytest.approx(expected.get(c, -math.inf), rel=1e-6, abs=1e-6)
    assert len(set(predicted.tolist())) > 2


def hand_made(centroids: list[list[float]], classes: list[int]) -> ClusterIndex:
    """Clusters of one sample each."""
    index = ClusterIndex(torch.tensor(classes), cluster_size=1)
    order = torch.tensor(classes).argsort(stable=True)
    index.refresh(torch.tensor(centroids))
    assert torch.equal(index.cluster_class, torch.tensor(classes)[order])
    return index


def test_the_weakest_cluster_of_a_class_counts():
    """Class 1 is nearest with one cluster and farther than class 2 with the other."""
    index = hand_made([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], [1, 1, 2])
    x = torch.tensor([[1.0, 0.0]])
    assert NearestClusterClassifier(3).fit(index).predict(x).tolist() == [2]
    assert NearestClusterClassifier(2).fit(index).predict(x).tolist() == [1]
    scores = NearestClusterClassifier(3).fit(index).decision_function(x)
    assert scores[0].tolist() == pytest.approx(
        [0 - 0.8, 0.8 - math.log(math.exp(1) + math.exp(0))], rel=1e-6
    )


def test_of_equal_ones_the_first_cluster_and_the_lowest_class():
    """Four equal clusters; one neighbor is the first of them, also among many."""
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    index = hand_made([[0.0, 1.0]] * 4, [9, 3, 5, 3])
    for neighbors in (1, 4):
        predicted = NearestClusterClassifier(neighbors).fit(index).predict(x)
        assert predicted.tolist() == [3, 3]
    many = hand_made([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3000, [8] * 3 + list(range(100, 3100)))
    scores = NearestClusterClassifier(1).fit(many).decision_function(x)
    assert scores.argmax(1).tolist() == [1, 0] and scores[0, 1] == math.inf


def test_a_class_that_is_alone_is_the_answer(any_place):
    index, x = clusters(2, {4: 5}), points(3, 6).to(any_place.device)
    classifier = NearestClusterClassifier(3).fit(index)
    assert classifier.predict(x).tolist() == [4] * 6
    assert classifier.decision_function(x).tolist() == [[math.inf]] * 6


@pytest.mark.parametrize("search", SEARCHES)
def test_chunks_change_nothing(search, monkeypatch):
    index, x = clusters(4, COUNTS), points(5, 50)
    classifier = NearestClusterClassifier(4, search=search).fit(index)
    expected = classifier.predict(x), classifier.decision_function(x)
    for chunk in (1, 100, 300):
        monkeypatch.setattr(classification, "CHUNK", chunk)
        assert torch.equal(classifier.predict(x), expected[0])
        torch.testing.assert_close(classifier.decision_function(x), expected[1])


@pytest.mark.parametrize("search", SEARCHES)
def test_classes_are_added(search):
    """As if all had been there from the start; a known class gains clusters."""
    first, second = clusters(6, {1: 2, 8: 3}), clusters(7, {8: 1, -3: 2, 5: 1})
    classifier = NearestClusterClassifier(6, search=search).fit(first).add(second)
    assert classifier.classes.tolist() == [-3, 1, 5, 8]
    assert classifier.cluster_class.tolist() == [1, 1, 8, 8, 8, -3, -3, 5, 8]
    x = points(8, 40)
    both = clusters(6, {1: 2, 8: 3})
    both.centroids = torch.cat([first.centroids, second.centroids])
    both.cluster_class = classifier.cluster_class
    scores = classifier.decision_function(x)
    for row, f in zip(scores, x.numpy(), strict=True):
        expected = literal_scores(both, f, 6)
        for c, score in zip(classifier.classes.tolist(), row.tolist(), strict=True):
            assert score == pytest.approx(expected.get(c, -math.inf), rel=1e-6, abs=1e-6)
    assert classifier.fit(first).classes.tolist() == [1, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts(any_place, dtype, layout):
    index, x = clusters(9, COUNTS), points(10, 30).to(dtype)
    classifier = NearestClusterClassifier(5).fit(index)
    expected = classifier.decision_function(x.double())
    moved = strided(x, layout).to(any_place.device)
    scores = classifier.decision_function(moved)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(classifier.predict(moved).cpu(), classifier.predict(x.double()))


def test_lengths_do_not_matter_and_none_are_nothing():
    classifier = NearestClusterClassifier(5).fit(clusters(11, COUNTS))
    x = points(12, 20)
    assert torch.equal(classifier.predict(x), classifier.predict(x * 1e200))
    assert classifier.predict(x[:0]).shape == (0,)
    assert classifier.decision_function(x[:0]).shape == (0, 5)
    assert classifier.decision_function(0 * x[:1]).isfinite().any()


@pytest.mark.parametrize("search", SEARCHES)
def test_it_is_pickled(search):
    x = points(13, 20)
    classifier = NearestClusterClassifier(5, search=search).fit(clusters(14, COUNTS))
    again = pickle.loads(pickle.dumps(classifier))
    assert torch.equal(again.decision_function(x), classifier.decision_function(x))
    assert repr(again) == (
        f"NearestClusterClassifier(num_neighbors=5, search={search!r}): 11 clusters, 5 classes"
    )


@pytest.mark.parametrize(("search", "package"), [("kdtree", "sklearn"), ("faiss", "faiss")])
def test_what_is_not_installed_is_named(search, package, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f'search="{search}" needs .*: pip install'):
        NearestClusterClassifier(search=search).fit(clusters(15, COUNTS))


FITTED = NearestClusterClassifier().fit(clusters(16, COUNTS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NearestClusterClassifier(0), ValueError, "num_neighbors: expected at least 1"),
        (lambda: NearestClusterClassifier(2.0), TypeError, "num_neighbors: expected an int"),
        (
            lambda: NearestClusterClassifier(search="best"),
            ValueError,
            "search: expected one of products, kdtree, faiss, got 'best'",
        ),
        (
            lambda: NearestClusterClassifier().fit(ClusterIndex(torch.arange(3))),
            ValueError,
            "clusters: expected ones that were refreshed",
        ),
        (
            lambda: NearestClusterClassifier().fit(torch.zeros(3, 2)),
            TypeError,
            "clusters: expected a ClusterIndex, got Tensor",
        ),
        (
            lambda: NearestClusterClassifier().add(clusters(0, COUNTS)),
            ValueError,
            "has no clusters yet: call fit before",
        ),
        (
            lambda: NearestClusterClassifier().predict(points(0, 3)),
            ValueError,
            "has no clusters yet: call fit before",
        ),
        (
            lambda: FITTED.add(clusters(0, COUNTS, 4)),
            ValueError,
            "clusters: expected centroids of 5 dimensions, .* got 4",
        ),
        (
            lambda: FITTED.predict(points(0, 3, 4)),
            ValueError,
            "features: expected 5 dimensions, as the centroids, got 4",
        ),
        (lambda: FITTED.predict(points(0, 3).long()), TypeError, "features: expected dtype"),
        (lambda: FITTED.decision_function(points(0, 3)[0]), ValueError, "features: .* shape"),
        (lambda: FITTED.predict(points(0, 3) / 0), ValueError, "features: expected finite"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
