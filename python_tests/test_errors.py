"""Wrong arguments are named, with what came and what was wanted."""

from __future__ import annotations

import pytest
import torch

from facelt_ext import functional

X = torch.randn(4, 3)
Y = torch.tensor([0, 0, 1, 1])


def margin_softmax_loss(features, labels):
    return functional.margin_softmax_loss(features, torch.randn(2, 3), labels)


WITH_FEATURES = [
    functional.range_loss, functional.class_ranges, functional.class_centroids, margin_softmax_loss,
]  # fmt: skip
FEATURES = [
    (X.tolist(), TypeError, "features: expected a tensor, got list"),
    (X.long(), TypeError, "features: expected dtype float64, .* got torch.int64"),
    (X.to(torch.complex64), TypeError, "features: expected dtype .* got torch.complex64"),
    (X[0], ValueError, r"features: expected shape \[rows, dimensions >= 1\], got \[3\]"),
    (X[None], ValueError, r"features: .* got \[1, 4, 3\]"),
    (X[:, :0], ValueError, r"features: .* got \[4, 0\]"),
]
LABELS = [
    (Y.tolist(), TypeError, "labels: expected a tensor, got list"),
    (Y.float(), TypeError, "labels: expected an integer dtype, got torch.float32"),
    (Y.bool(), TypeError, "labels: expected an integer dtype, got torch.bool"),
    (Y[:3], ValueError, r"labels: expected shape \[4\], .* got \[3\]"),
    (Y[:, None], ValueError, r"labels: expected shape \[4\], .* got \[4, 1\]"),
    (Y.to("meta"), ValueError, "labels: expected device cpu, where features is, got meta"),
]


@pytest.mark.parametrize("function", WITH_FEATURES)
@pytest.mark.parametrize(("features", "error", "message"), FEATURES)
def test_features(any_place, function, features, error, message):
    with any_place.run(), pytest.raises(error, match=message):
        function(features, Y)


@pytest.mark.parametrize("function", WITH_FEATURES)
@pytest.mark.parametrize(("labels", "error", "message"), LABELS)
def test_labels(any_place, function, labels, error, message):
    with any_place.run(), pytest.raises(error, match=message):
        function(X, labels)


@pytest.mark.parametrize("function", [functional.range_loss, functional.class_ranges])
@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k: expected at least 1, got 0"),
        (-3, ValueError, "k: expected at least 1, got -3"),
        (1.5, TypeError, "k: expected an int, got float"),
        (True, TypeError, "k: expected an int, got bool"),
    ],
)
def test_k(any_place, function, k, error, message):
    with any_place.run(), pytest.raises(error, match=message):
        function(X, Y, k=k)


@pytest.mark.parametrize("name", ["margin", "alpha", "beta"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.nan, ValueError, "expected a number that is finite in torch.float32, got nan"),
        (torch.inf, ValueError, "expected a number that is finite in torch.float32, got inf"),
        (-1e39, ValueError, "expected a number that is finite in torch.float32, got -1e.39"),
        ("1", TypeError, "expected a number, got str"),
        (True, TypeError, "expected a number, got bool"),
    ],
)
def test_numbers(any_place, name, value, error, message):
    with any_place.run(), pytest.raises(error, match=f"{name}: {message}"):
        functional.range_loss(X, Y, **{name: value})


@pytest.mark.parametrize("function", [functional.class_ranges, functional.class_centroids])
def test_max_classes(any_place, function):
    with any_place.run():
        with pytest.raises(ValueError, match="max_classes: expected at least 0, got -1"):
            function(X, Y, max_classes=-1)
        with pytest.raises(TypeError, match="max_classes: expected an int, got float"):
            function(X, Y, max_classes=2.0)


def test_centroids_and_counts(any_place):
    with any_place.run():
        with pytest.raises(TypeError, match="centroids: expected dtype"):
            functional.min_centroid_distance(Y[:, None])
        with pytest.raises(ValueError, match=r"counts: expected shape \[4\], .* got \[2\]"):
            functional.min_centroid_distance(X, Y[:2])
        with pytest.raises(TypeError, match="counts: expected an integer dtype"):
            functional.min_centroid_distance(X, X[:, 0])
