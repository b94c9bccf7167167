"""Accuracy by attribute, class and band, lists of pairs, and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from facelt_ext import evaluation


def test_balanced_accuracy_by_hand() -> None:
    # 1 of 2 positives and 2 of 2 negatives; then 1 of 1 and 0 of 3; then no positive.
    targets = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    predicted = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 1]])
    result = evaluation.balanced_accuracy(predicted, targets)
    assert result.per_attribute[:2].tolist() == [0.75, 0.5] and result.per_attribute[2].isnan()
    assert result.mean == 0.625


def test_balanced_accuracy_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    targets, predicted = generator.random((200, 5)) < 0.1, generator.random((200, 5)) < 0.3
    result = evaluation.balanced_accuracy(predicted, targets)
    expected = [balanced_accuracy_score(targets[:, i], predicted[:, i]) for i in range(5)]
    np.testing.assert_allclose(result.per_attribute, expected)
    assert result.mean == pytest.approx(np.mean(expected))
    single = evaluation.balanced_accuracy(torch.from_numpy(predicted[:, 0]), targets[:, 0])
    assert single.per_attribute.tolist() == pytest.approx(expected[:1])


def test_class_accuracy_is_recall() -> None:
    generator = np.random.default_rng(1)
    labels, predicted = generator.integers(0, 6, 100), generator.integers(0, 6, 100)
    found = evaluation.class_accuracy(predicted, labels, 7)
    expected = recall_score(labels, predicted, average=None, labels=np.arange(6))
    np.testing.assert_allclose(found[:6], expected)
    assert found[6].isnan()


def test_bands_by_hand() -> None:
    counts = torch.tensor([500, 101, 100, 20, 19, 1, 0])
    labels = torch.tensor([0, 1, 1, 2, 3, 3, 4, 5, 6])
    predicted = torch.tensor([0, 1, 0, 2, 3, 1, 0, 5, 6])
    bands = evaluation.accuracy_by_band(predicted, labels, counts)
    assert [tuple(band) for band in bands] == [
        (101, None, pytest.approx(2 / 3), 3, 2),
        (20, 100, pytest.approx(2 / 3), 3, 2),
        (1, 19, 0.5, 2, 2),
    ]
    (empty,) = evaluation.accuracy_by_band(predicted, labels, counts, minimums=[501])
    assert math.isnan(empty.accuracy) and (empty.images, empty.classes) == (0, 0)


def test_drawn_pairs() -> None:
    labels = torch.arange(30).repeat_interleave(torch.arange(30) % 4 + 1)
    pairs = evaluation.draw_pairs(labels, num_folds=5, pairs_per_fold=9, seed=1)
    assert torch.equal(labels[pairs.first] == labels[pairs.second], pairs.same)
    assert (pairs.first < pairs.second).all()
    seen: set[int] = set()
    for fold in range(5):
        inside = pairs.folds == fold
        own = set(labels[torch.cat([pairs.first[inside], pairs.second[inside]])].tolist())
        assert not own & seen
        seen |= own
        assert int(pairs.same[inside].sum()) * 2 == int(inside.sum()) > 0
    ends = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(ends) == len(pairs.same)
    again = evaluation.draw_pairs(labels, num_folds=5, pairs_per_fold=9, seed=1)
    assert torch.equal(again.first, pairs.first)
    many = evaluation.draw_pairs(torch.arange(50_000) // 5, num_folds=10)
    assert many.folds.bincount().tolist() == [600] * 10
    few = evaluation.draw_pairs(torch.tensor([0, 0, 1, 1, 2, 3]), num_folds=10)
    assert int(few.folds.max()) == 1


def test_pictures(tmp_path: Path) -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    curve = evaluation.roc(scores, torch.tensor([False, False, True, True]))
    axes = evaluation.plot_roc({"one": curve})
    assert axes.get_xlim() == (0.1, 1.0)
    assert evaluation.plot_roc({"one": curve}, lowest_far=0.3).get_xlim() == (0.3, 1.0)
    wide = evaluation.roc(-torch.arange(51.0), torch.arange(51) == 1)
    assert evaluation.plot_roc({"one": curve, "wide": wide}).get_xlim() == (1 / 50, 1.0)
    assert axes.get_xscale() == "log" and axes.get_legend_handles_labels()[1] == ["one"]
    # Up to FAR 1/2 half are accepted, from there on all.
    assert axes.lines[0].get_ydata().tolist() == curve.tar.tolist()
    rates = evaluation.plot_cmc({"one": torch.tensor([0.5, 0.75])}).lines[0]
    assert (list(rates.get_xdata()), list(rates.get_ydata())) == ([1, 2], [0.5, 0.75])
    accuracies = torch.tensor([0.0, 1.0, 0.5, math.nan, 0.25])
    sizes = evaluation.plot_class_size({"one": accuracies}, torch.tensor([2, 3, 1, 8, 9]))
    line = sizes.lines[0]
    assert list(line.get_xdata()) == [1.0, 2.5, 9.0]
    assert list(line.get_ydata()) == [0.5, 0.5, 0.25]
    sizes.figure.savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation.balanced_accuracy(torch.ones(2), torch.ones(2)), "predicted: .* dtype"),
        (lambda: evaluation.balanced_accuracy([1], [1]), "predicted: expected a tensor or a NumPy"),
        (
            lambda: evaluation.balanced_accuracy(torch.tensor([0]), torch.tensor([2])),
            "targets: expected 0 and 1 only",
        ),
        (
            lambda: evaluation.class_accuracy(torch.tensor([0]), torch.tensor([3]), 3),
            r"labels: expected numbers in \[0, 3\)",
        ),
        (
            lambda: evaluation.accuracy_by_band(*torch.zeros(3, 1).long(), minimums=(1, 5)),
            "minimums: expected one or more numbers, descending",
        ),
        (lambda: evaluation.draw_pairs(torch.tensor([0, 0, 1])), "got 2 and 1"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
