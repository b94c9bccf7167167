"""Verification: against cases worked by hand, loops, and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from facelt_ext import evaluation
from facelt_ext.evaluation import operating_points

# Ten impostor and four genuine scores: at FAR = 0.1 one impostor may pass, so the threshold is 0.8
# and the genuine 0.85 and 0.95 pass; at 0.05 none may, the threshold is 0.9 and 0.95 passes.
IMPOSTORS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
GENUINE = [0.95, 0.85, 0.8, 0.05]
SCORES = torch.tensor(IMPOSTORS + GENUINE)
SAME = torch.tensor([False] * 10 + [True] * 4)


def random_pairs(seed: int, size: int = 500, levels: int | None = None):
    generator = np.random.default_rng(seed)
    same = generator.random(size) < 0.3
    scores = generator.normal(size=size) + same
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return scores.astype(np.float32), same


def random_faces(seed: int, size: int = 60, identities: int = 12, dimensions: int = 5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (size,), generator=generator)
    centres = torch.randn(identities, dimensions, generator=generator)
    return centres[labels] + torch.randn(size, dimensions, generator=generator), labels


def test_tar_at_far_by_hand() -> None:
    points = evaluation.tar_at_far(SCORES, SAME, [0.1, 0.05, 0.0, 0.19, 0.2, 1.0])
    assert points.tar.tolist() == [0.5, 0.25, 0.25, 0.5, 0.75, 1.0]
    assert points.far.tolist() == [0.1, 0.0, 0.0, 0.1, 0.2, 1.0]
    expected = [0.8, 0.9, 0.9, 0.8, 0.7, -math.inf]
    assert points.threshold.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("far", [0.0, 0.003, 0.01, 0.29, 1.0])
def test_tar_at_far_is_the_best_point_of_scikit_learns_curve(
    far: float, levels: int | None
) -> None:
    scores, same = random_pairs(0, levels=levels)
    fars, tars, _ = roc_curve(same, scores, drop_intermediate=False)
    point = evaluation.tar_at_far(scores, same, far)
    assert point.tar.item() == pytest.approx(tars[fars <= far].max(), abs=1e-12)
    assert point.far.item() == pytest.approx(fars[fars <= far].max(), abs=1e-12)


def test_the_number_of_false_accepts_is_not_rounded_away() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    scores, same = torch.arange(101.0), torch.zeros(101, dtype=torch.bool)
    same[-1] = True
    assert evaluation.tar_at_far(scores, same, 0.29).threshold.item() == 70


def test_roc_and_its_area_are_scikit_learns() -> None:
    scores, same = random_pairs(1)
    curve = evaluation.roc(torch.from_numpy(scores), torch.from_numpy(same))
    expected = roc_curve(same, scores)
    for ours, theirs in zip(curve, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
    assert curve.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)


def test_equal_error_rate_by_hand() -> None:
    # Falsely rejected of 4: with the 0.7 as lowest accepted score 1, falsely accepted 3 of 10;
    # with the genuine 0.8 (and the impostor 0.8) 1 and 2 of 10. Between, FRR is 1 / 4.
    assert evaluation.roc(SCORES, SAME).equal_error_rate == pytest.approx(0.25)
    apart = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert evaluation.roc(apart, apart > 2).equal_error_rate == 0
    assert evaluation.roc(-apart, apart > 2).equal_error_rate == 1


def test_all_pairs_are_each_unordered_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = random_faces(2)
    units = nn.functional.normalize(features.double())
    expected = sorted(
        (float(units[i] @ units[j]), bool(labels[i] == labels[j]))
        for i in range(len(labels))
        for j in range(i)
    )
    for rows, columns in ((1024, 16384), (7, 11), (16, 8)):
        monkeypatch.setattr(operating_points, "BLOCK_ROWS", rows)
        monkeypatch.setattr(operating_points, "BLOCK_COLUMNS", columns)
        scores, same = evaluation.all_pairs(features.double() * 1e200, labels)
        found = sorted(zip(scores.tolist(), same.tolist(), strict=True))
        assert [each[1] for each in found] == [each[1] for each in expected]
        np.testing.assert_allclose(
            [each[0] for each in found], [each[0] for each in expected], atol=1e-12
        )


@pytest.mark.parametrize("far", [0.0, 0.01, 0.5, 1.0])
def test_kept_scores_give_the_points_of_all(far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_points, "BLOCK_ROWS", 7)
    monkeypatch.setattr(operating_points, "BLOCK_COLUMNS", 9)
    features, labels = random_faces(3)
    scores, same = evaluation.all_pairs(features, labels)
    expected = evaluation.tar_at_far(scores, same, [far, far / 2])
    found = evaluation.all_pairs_tar_at_far(features, labels, [far, far / 2])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_fold_accuracy_by_hand() -> None:
    # Threshold from fold 1 alone: 0.5 (all right) -> fold 0 has 0.55 wrongly accepted: 3 of 4.
    # From fold 0: best is between 0.55 and 0.7 -> fold 1 loses the genuine 0.6: 3 of 4.
    scores = torch.tensor([0.9, 0.7, 0.55, 0.1, 0.6, 0.8, 0.4, 0.3])
    same = torch.tensor([True, True, False, False, True, True, False, False])
    result = evaluation.fold_accuracy(scores, same, folds=2)
    assert result.accuracies.tolist() == [0.75, 0.75]
    assert result.thresholds.tolist() == pytest.approx([0.5, 0.625])
    assert (result.mean, result.std, result.standard_error) == (0.75, 0.0, 0.0)
    shuffled = torch.tensor([5, 0, 3, 6, 1, 4, 7, 2])
    folds = torch.tensor([-1, -1, -1, -1, 4, 4, 4, 4])
    again = evaluation.fold_accuracy(scores[shuffled], same[shuffled], folds[shuffled])
    assert torch.equal(again.accuracies, result.accuracies)


def test_std_is_the_samples() -> None:
    scores = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.1, 0.9])
    same = torch.tensor([True, False] * 3)
    result = evaluation.fold_accuracy(scores, same, folds=3)
    # Fold 2 is the other way round. Beside it no threshold is better than none for the other two:
    # +inf, the highest, accepts nothing, which is right for half. 1/2, 1/2 and 0: mean 1/3, squared
    # deviations 1/36 + 1/36 + 4/36, divided by 2: 1/12.
    assert result.thresholds.tolist() == pytest.approx([math.inf, math.inf, 0.5])
    assert result.mean == pytest.approx(1 / 3)
    assert result.std == pytest.approx(math.sqrt(1 / 12))
    assert result.standard_error == pytest.approx(1 / 6)


@pytest.mark.parametrize("levels", [None, 3])
def test_fold_accuracy_is_that_of_every_threshold_tried(levels: int | None) -> None:
    scores, same = random_pairs(4, size=103, levels=levels)
    result = evaluation.fold_accuracy(scores, same, folds=10)
    # scikit-learn's KFold, as the field's scripts have it, cuts 103 pairs as 11 + 11 + 11 + 7 x 10.
    edges = np.cumsum([0, 11, 11, 11, *[10] * 7])
    for fold, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        others = np.r_[0:start, stop:103]
        tried = [-np.inf, *scores[others]]
        best = max(np.mean((scores[others] > t) == same[others]) for t in tried)
        threshold = result.thresholds[fold].item()
        assert np.mean((scores[others] > threshold) == same[others]) == best
        inside = slice(start, stop)
        expected = np.mean((scores[inside] > threshold) == same[inside])
        assert result.accuracies[fold].item() == pytest.approx(expected)


def test_thresholds_lie_between_neighbouring_floats() -> None:
    low, high = 1.0, np.nextafter(1.0, 2.0)
    scores = torch.tensor([low, high, low, high], dtype=torch.float64)
    result = evaluation.fold_accuracy(scores, scores > 1, folds=2)
    assert result.mean == 1


def test_pair_scores_and_flip_sum() -> None:
    features = torch.tensor([[3.0, 4.0], [1e-30, 0.0], [0.0, 0.0], [-6.0, -8.0]])
    first, second = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 1])
    scores = evaluation.pair_scores(features, first, second)
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.0, -1.0, 1.0]))
    summed = evaluation.flip_sum(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]]))
    torch.testing.assert_close(summed, torch.tensor([[0.6, 0.8]]))


def test_mean_templates_weigh_every_frame_alike() -> None:
    frames = torch.tensor([[10.0, 0.0], [0.0, 0.1], [0.0, -3.0]])
    templates = evaluation.mean_templates(frames, torch.tensor([1, 1, 0]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(templates, torch.tensor([[0.0, -1.0], [half, half]]))
    with pytest.raises(ValueError, match="got none of 1"):
        evaluation.mean_templates(frames, torch.tensor([0, 0, 2]))


class Columns(nn.Module):
    """The means of an image's columns, and a dropout that must not be at work."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(images.mean(dim=(1, 2)))


@pytest.mark.parametrize("flip", [False, True])
def test_embed(flip: bool) -> None:
    images, labels = torch.rand(5, 1, 3, 4), torch.tensor([3, 1, 2, 2, 0])
    batches = [(images[:3], labels[:3], "more"), (images[3:], labels[3:], "more")]
    model = Columns()
    features, found = evaluation.embed(model, batches, flip=flip, progress=False)
    expected = images.mean(dim=(1, 2))
    if flip:
        expected = expected + expected.flip(1)
    torch.testing.assert_close(features, nn.functional.normalize(expected))
    assert torch.equal(found, labels) and model.dropout.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation.tar_at_far(SCORES, SAME, 1.5), r"far: expected rates in \[0, 1\]"),
        (lambda: evaluation.tar_at_far(SCORES, SAME, []), "far: expected at least one"),
        (lambda: evaluation.tar_at_far(SCORES, SAME[1:], 0.1), r"same: expected shape \[14\]"),
        (lambda: evaluation.tar_at_far(SCORES, SAME.int(), 0.1), "same: expected dtype bool"),
        (lambda: evaluation.tar_at_far(SCORES / 0, SAME, 0.1), "scores: expected numbers, got NaN"),
        (lambda: evaluation.roc(SCORES, SAME | True), "got 14 and 0"),
        (lambda: evaluation.fold_accuracy(SCORES, SAME, 15), "at most one for each of 14"),
        (lambda: evaluation.fold_accuracy(SCORES, SAME, SAME.long()), "outside of fold 0"),
        (lambda: evaluation.fold_accuracy(SCORES, SAME, SAME.long() * 0), "got one"),
        (lambda: evaluation.all_pairs(torch.eye(2) / 0, SAME[:2].int()), "features: .* row 0"),
        (lambda: evaluation.all_pairs_tar_at_far(torch.eye(2), torch.arange(2), 0.1), "0 and 1"),
        (
            lambda: evaluation.pair_scores(torch.eye(2), torch.tensor([0]), torch.tensor([2])),
            r"second: expected numbers in \[0, 2\), got 2 at position 0",
        ),
        (lambda: evaluation.embed(Columns(), [], progress=False), "loader: expected at least one"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.gpu
def test_points_on_a_gpu_are_those_of_the_cpu() -> None:
    features, labels = random_faces(5)
    expected = evaluation.all_pairs_tar_at_far(features.double(), labels, [0.01, 0.1])
    found = evaluation.all_pairs_tar_at_far(features.double().cuda(), labels, [0.01, 0.1])
    torch.testing.assert_close(found.tar, expected.tar)
    torch.testing.assert_close(found.threshold, expected.threshold)
