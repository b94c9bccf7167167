"""Identification, open sets and BLUFR: against cases worked by hand and loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from test_evaluation_verification import random_faces

from facelt_ext import evaluation
from facelt_ext.evaluation import _scores, identification


def at(*degrees: float) -> torch.Tensor:
    """Directions in the plane: their cosines are those of the angles between them."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(params=[None, (3, 5)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the usual size, and some that cut everything up."""
    if request.param is not None:
        rows, columns = request.param
        monkeypatch.setattr(_scores, "BLOCK_ROWS", rows)
        monkeypatch.setattr(_scores, "BLOCK_COLUMNS", columns)
        monkeypatch.setattr(identification, "BLOCK_COLUMNS", columns)


def test_ranks_by_hand() -> None:
    gallery, labels = at(0, 30, 60, 90), torch.tensor([7, 8, 7, 9])
    # 10: nearest is 0 of 7. 40 of 7: 60 is 20 away, 30 of 8 is 10 away. 85 of 8: behind 90 and 60.
    probes, wanted = at(10, 40, 85), torch.tensor([7, 7, 8])
    ranks = evaluation.identification_ranks(gallery, labels, probes, wanted)
    assert ranks.tolist() == [1, 2, 3]
    # Distractors at 12 and 41: the first is nearer to 10 than 0, both nearer to 40 than 60 is; for
    # 85 only 41 is nearer than 30.
    ranks = evaluation.identification_ranks(gallery, labels, probes, wanted, at(12, 41))
    assert ranks.tolist() == [2, 3, 4]
    rates = evaluation.cmc(ranks, max_rank=4)
    assert rates.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert evaluation.cmc(ranks, max_rank=2).tolist() == pytest.approx([0, 1 / 3])


def test_of_equal_scores_the_right_one_comes_last() -> None:
    gallery = at(0, 0, 0)
    ranks = evaluation.identification_ranks(gallery, torch.arange(3), at(0), torch.tensor([1]))
    assert ranks.tolist() == [3]


def test_one_image_an_identity_is_top_k_accuracy(blocks: None) -> None:
    features, labels = random_faces(0)
    gallery, names = (
        torch.randn(12, 5, generator=torch.Generator().manual_seed(9)),
        torch.arange(12),
    )
    ranks = evaluation.identification_ranks(gallery, names, features, labels)
    scores = np.stack(
        [[float(torch.cosine_similarity(f, g, 0)) for g in gallery] for f in features]
    )
    for k, rate in enumerate(evaluation.cmc(ranks, 11).tolist(), 1):
        expected = top_k_accuracy_score(labels.numpy(), scores, k=k, labels=names.numpy())
        assert rate == pytest.approx(expected)


def test_ranks_are_those_of_a_loop(blocks: None) -> None:
    (gallery, names), (probes, labels) = random_faces(1), random_faces(2, size=40)
    distractors = random_faces(3)[0]
    assert set(labels.tolist()) <= set(names.tolist())
    found = evaluation.identification_ranks(gallery, names, probes, labels, distractors)
    cosine = torch.nn.functional.cosine_similarity
    for probe, label, rank in zip(probes, labels, found, strict=True):
        scores = cosine(probe[None], gallery)
        best = scores[names == label].max()
        others = torch.cat([scores[names != label], cosine(probe[None], distractors)])
        assert rank == 1 + (others > best).sum()


def test_distractor_ranks_by_hand() -> None:
    # Identity 4 at 0, 20 and 50; distractors at 10, 35 and 80; 5 has one image and no pair.
    features, labels = at(0, 170, 20, 50), torch.tensor([4, 5, 4, 4])
    ranks = evaluation.distractor_ranks(features, labels, at(10, 35, 80))
    # From 0: 20 (behind 10), 50 (behind 10, 35). From 20: 0 (behind 10 and 35), 50 (the same).
    # From 50: 0 (behind 35, 10, 80), 20 (behind 35; 80 is as far).
    assert ranks[:5].tolist() == [2, 3, 3, 3, 4] and ranks[5] in (2, 3)


@pytest.mark.filterwarnings("error")
def test_distractors_in_a_file(tmp_path: Path) -> None:
    features, labels = random_faces(4, size=30)
    distractors = random_faces(5, size=23)[0].numpy()
    np.save(tmp_path / "distractors.npy", distractors)
    mapped = np.load(tmp_path / "distractors.npy", mmap_mode="r")
    found = evaluation.distractor_ranks(features, labels, mapped)
    assert torch.equal(found, evaluation.distractor_ranks(features, labels, distractors))
    backwards = evaluation.distractor_ranks(features, labels, mapped[::-1])
    assert torch.equal(found, backwards)


def test_distractors_of_an_equal_score_come_first() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    ranks = evaluation.distractor_ranks(features, torch.tensor([0, 0, 0, 1]), features[3:])
    # At 0 and 1 the distractor is as near as the mate; at 2 everything is at a right angle.
    assert ranks.tolist() == [2, 2, 2, 2, 2, 2]


def test_distractor_ranks_are_those_of_a_loop(blocks: None) -> None:
    features, labels = random_faces(4, size=30)
    distractors = random_faces(5, size=23)[0].numpy()
    found = evaluation.distractor_ranks(features.numpy(), labels.numpy(), distractors).tolist()
    cosine = torch.nn.functional.cosine_similarity
    expected = [
        1
        + int(
            (
                cosine(f[None], torch.from_numpy(distractors)) > torch.cosine_similarity(f, g, 0)
            ).sum()
        )
        for i, f in enumerate(features)
        for j, g in enumerate(features)
        if i != j and labels[i] == labels[j]
    ]
    assert found == expected


def test_open_set_by_hand() -> None:
    gallery, names = at(0, 90), torch.tensor([1, 2])
    # Known: 10, 20 and 40 off, and 60 off, so that the wrong one is nearer.
    # Unknown: 15, 30, 40 and 45 off.
    probes = at(10, 70, 60, -40, -15, 120, 130, 45)
    labels = torch.tensor([1, 2, 1, 1, 3, 3, 4, 5])
    points = evaluation.open_set_identification(
        gallery, names, probes, labels, far=[0.0, 0.25, 0.5, 0.6, 1.0]
    )
    assert points.far.tolist() == [0.0, 0.25, 0.5, 0.5, 1.0]
    assert points.dir.tolist() == [0.25, 0.5, 0.5, 0.5, 0.75]
    expected = [math.cos(math.radians(each)) for each in (15, 30, 40, 40)]
    assert points.threshold.tolist() == pytest.approx([*expected, -math.inf])
    second = evaluation.open_set_identification(gallery, names, probes, labels, far=1.0, rank=2)
    assert second.dir.tolist() == [1.0]


def test_open_set_is_that_of_a_loop(blocks: None) -> None:
    (gallery, names), (probes, labels) = random_faces(6, identities=8), random_faces(7)
    cosines = torch.nn.functional.normalize(probes) @ torch.nn.functional.normalize(gallery).T
    known = torch.isin(labels, names)
    alarms = sorted(cosines[~known].amax(1).tolist(), reverse=True)
    for far in (0.0, 0.1, 0.37):
        point = evaluation.open_set_identification(gallery, names, probes, labels, far)
        threshold = alarms[math.floor(far * len(alarms))]
        right = sum(
            names[row.argmax()] == label and row.max() > threshold
            for row, label in zip(cosines[known], labels[known], strict=True)
        )
        assert point.dir.item() == pytest.approx(int(right) / int(known.sum()))


def test_blufr_is_mean_less_deviation_of_its_trials() -> None:
    # Trial 1: pairs 0-10 (same), others apart: VR 1; the unknown at 180 scores low, DIR 1.
    # Trial 2: the same pair at 0 and 100, with an impostor at 1 nearer: VR 0; DIR 0.
    features, labels = at(0, 10, 180, 100, 1), torch.tensor([0, 0, 1, 0, 2])
    first = evaluation.Trial(torch.tensor([0, 1, 2]), torch.tensor([0]), torch.tensor([1, 2]))
    second = evaluation.Trial(torch.tensor([0, 3, 4]), torch.tensor([0]), torch.tensor([3, 4]))
    result = evaluation.blufr(features, labels, [first, second])
    assert result.verification.tolist() == [1.0, 0.0]
    assert result.identification.tolist() == [1.0, 0.0]
    # Mean 0.5, sample standard deviation sqrt(0.25 + 0.25).
    assert result.verification_rate == pytest.approx(0.5 - math.sqrt(0.5))
    assert result.detection_identification_rate == pytest.approx(0.5 - math.sqrt(0.5))
    mixed = evaluation.blufr(features, labels, [first, first._replace(test=second.test)])
    assert mixed.verification_rate < 0 < mixed.detection_identification_rate == 1


def test_the_benchmarks_own_file(tmp_path: Path) -> None:
    from scipy.io import savemat

    def cells(*values: object) -> np.ndarray:
        array = np.empty((len(values), 1), dtype=object)
        array[:, 0] = values
        return array

    content = {
        "imageList": cells("a.jpg", "b.jpg", "c.jpg"),
        "labels": np.array([[1.0], [1.0], [2.0]]),
        "testIndex": cells(np.array([[1], [2], [3]], np.uint16), np.array([[2], [3]], np.uint16)),
        "galIndex": cells(np.array([[1]], np.uint16), np.array([[2]], np.uint16)),
        "probIndex": cells(np.array([[2], [3]], np.uint16), np.array([[3]], np.uint16)),
    }
    savemat(tmp_path / "config.mat", content)
    images, labels, trials = evaluation.read_blufr(tmp_path / "config.mat")
    assert images == ["a.jpg", "b.jpg", "c.jpg"] and labels.tolist() == [1, 1, 2]
    assert [[part.tolist() for part in trial] for trial in trials] == [
        [[0, 1, 2], [0], [1, 2]],
        [[1, 2], [1], [2]],
    ]
    savemat(tmp_path / "less.mat", {"labels": content["labels"]})
    with pytest.raises(ValueError, match="no imageList"):
        evaluation.read_blufr(tmp_path / "less.mat")


def test_random_trials() -> None:
    labels = random_faces(8, size=200, identities=40)[1]
    trials = evaluation.random_trials(labels, num_trials=4, seed=3)
    assert len(trials) == 4 and not torch.equal(trials[0].gallery, trials[1].gallery)
    for trial in trials:
        assert len(labels[trial.gallery].unique()) == len(trial.gallery) == 20
        assert sorted(trial.gallery.tolist() + trial.probes.tolist()) == list(range(200))
    again = evaluation.random_trials(labels, num_trials=4, seed=3)
    assert all(torch.equal(a.gallery, b.gallery) for a, b in zip(trials, again, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluation.identification_ranks(
                at(0), torch.tensor([1]), at(0, 1), torch.tensor([1, 5])
            ),
            "probe_labels: expected identities of the gallery, got 5 at position 1",
        ),
        (
            lambda: evaluation.identification_ranks(
                at(0), torch.tensor([1]), torch.eye(3), torch.arange(3)
            ),
            "gallery: expected 3 dimensions, got 2",
        ),
        (
            lambda: evaluation.distractor_ranks(at(0, 1), torch.arange(2), at(5)),
            "labels: expected an identity with at least two images",
        ),
        (
            lambda: evaluation.distractor_ranks(at(0)[:0], torch.arange(0), at(5)),
            "labels: expected an identity with at least two images",
        ),
        (
            lambda: evaluation.distractor_ranks(at(0, 1), torch.zeros(2).int(), torch.eye(3)),
            "distractors: expected 2 dimensions, got 3",
        ),
        (lambda: evaluation.cmc(torch.tensor([1, 0])), "ranks: .* got 2, the least 0"),
        (
            lambda: evaluation.open_set_identification(
                at(0), torch.tensor([1]), at(0), torch.tensor([1])
            ),
            "got 1 probe.* and 0 of others",
        ),
        (lambda: evaluation.blufr(at(0), torch.tensor([1]), []), "trials: expected at least two"),
        (lambda: evaluation.random_trials(torch.arange(4)), "got 4 and 0"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.gpu
def test_ranks_on_a_gpu_are_those_of_the_cpu() -> None:
    (gallery, names), (probes, labels) = random_faces(1), random_faces(2, size=40)
    distractors = random_faces(3)[0].double()
    arrays = gallery.double(), names, probes.double(), labels
    expected = evaluation.identification_ranks(*arrays, distractors)
    found = evaluation.identification_ranks(*(each.cuda() for each in arrays), distractors)
    assert torch.equal(found.cpu(), expected)
    several = evaluation.distractor_ranks(*(each.cuda() for each in arrays[2:]), distractors)
    assert torch.equal(several.cpu(), evaluation.distractor_ranks(*arrays[2:], distractors))
