"""Verification and identification figures of L2-normalised features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_curve
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

FALSE_ACCEPT_RATE = 0.01
MAX_FOLDS = 10
NUM_GALLERIES = 10


@dataclass(frozen=True)
class Pairs:
    """All unordered pairs of a set of faces: cosine ``scores``, and which are the ``same``."""

    scores: np.ndarray
    same: np.ndarray


def all_pairs(features: Tensor, labels: Tensor) -> Pairs:
    """Pairs of ``features`` ``[N, D]`` (L2-normalised) with identities ``labels`` ``[N]``."""
    first, second = np.triu_indices(len(labels), k=1)
    scores = (features @ features.T).numpy()[first, second]
    names = labels.numpy()
    return Pairs(scores, names[first] == names[second])


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float = FALSE_ACCEPT_RATE) -> float:
    """Largest share of genuine scores accepted while at most ``far`` of the impostors are."""
    return float((genuine >= accept_threshold(impostor, far)).mean())


def accept_threshold(impostor: np.ndarray, far: float = FALSE_ACCEPT_RATE) -> float:
    """Lowest score above which at most ``far`` of the impostor scores lie.

    A pair is accepted if its score is at least the threshold.
    """
    allowed = int(np.floor(far * len(impostor)))
    highest_first = np.sort(impostor)[::-1]
    return (
        float(np.nextafter(highest_first[allowed], np.inf)) if allowed < len(impostor) else -np.inf
    )


def verification_accuracy(pairs: Pairs, seed: int = 0) -> float:
    """Mean accuracy over ten folds of as many impostor as genuine pairs.

    The impostors are drawn by ``seed``. The threshold for a fold is the one with the highest
    accuracy on the other folds, as in the protocol of LFW; the folds divide the pairs, not the
    identities. There are fewer folds where there are fewer than ten genuine pairs.
    """
    generator = np.random.default_rng(seed)
    genuine, impostor = np.flatnonzero(pairs.same), np.flatnonzero(~pairs.same)
    size = min(len(genuine), len(impostor))
    chosen = np.concatenate(
        [generator.choice(indices, size, replace=False) for indices in (genuine, impostor)]
    )
    scores, same = pairs.scores[chosen], pairs.same[chosen]
    folds = StratifiedKFold(min(MAX_FOLDS, size), shuffle=True, random_state=seed)
    accuracies = []
    for others, fold in folds.split(scores, same):
        threshold = best_threshold(scores[others], same[others])
        accuracies.append(np.mean((scores[fold] >= threshold) == same[fold]))
    return float(np.mean(accuracies))


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The score that, as a threshold, tells genuine from impostor pairs most often."""
    false_accepts, true_accepts, thresholds = roc_curve(same, scores, drop_intermediate=False)
    correct = true_accepts * same.sum() - false_accepts * (~same).sum()
    return float(thresholds[np.argmax(correct)])


def rank1_single_gallery(features: Tensor, labels: Tensor) -> float:
    """Share of probes whose best match, of one gallery image per identity, is of their identity.

    Averaged over ten galleries: the g-th takes image g (modulo their number) of each identity.
    All other images of identities with at least two images are probes.
    """
    scores, names = (features @ features.T).numpy(), labels.numpy()
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    hits = []
    for gallery_number in range(NUM_GALLERIES):
        gallery = np.array([own[gallery_number % len(own)] for own in members])
        probes = np.setdiff1d(np.arange(len(names)), gallery)
        best = gallery[scores[np.ix_(probes, gallery)].argmax(axis=1)]
        hits.append(np.mean(names[best] == names[probes]))
    return float(np.mean(hits))


def unseen_figures(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Open-set figures over the faces of identities that were not trained on."""
    pairs = all_pairs(features, labels)
    return {
        "accuracy": verification_accuracy(pairs),
        "tar": tar_at_far(pairs.scores[pairs.same], pairs.scores[~pairs.same]),
        "rank1": rank1_single_gallery(features, labels),
    }


def heldout_figures(
    scores: np.ndarray, labels: np.ndarray, is_head: np.ndarray
) -> dict[str, float | None]:
    """Closed-set figures over held-out images of the training identities.

    Args:
        scores: ``[N, T]``, cosine of each held-out image and the template of each identity.
        labels: ``[N]``, identity of each held-out image.
        is_head: bool ``[T]``.

    Returns:
        Rank-1 and TAR of head and of tail identities; None where there is no such image. The
        threshold of the TAR is the one that accepts 1 % of all impostor scores.
    """
    own = np.arange(scores.shape[1]) == labels[:, None]
    threshold = accept_threshold(scores[~own])
    figures: dict[str, float | None] = {}
    for group, members in (("head", is_head[labels]), ("tail", ~is_head[labels])):
        found = scores[members].argmax(axis=1) == labels[members]
        accepted = scores[own & members[:, None]] >= threshold
        figures[f"rank1_{group}"] = float(found.mean()) if len(found) else None
        figures[f"tar_{group}"] = float(accepted.mean()) if len(accepted) else None
    return figures
