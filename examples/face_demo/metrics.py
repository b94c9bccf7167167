"""Verification and identification figures of L2-normalised features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from facelt_ext import evaluation

FALSE_ACCEPT_RATE = 0.01
MAX_FOLDS = 10
NUM_GALLERIES = 10


@dataclass(frozen=True)
class Pairs:
    """All unordered pairs of a set of faces: cosine ``scores``, and which are the ``same``."""

    scores: np.ndarray
    same: np.ndarray


def all_pairs(features: Tensor, labels: Tensor) -> Pairs:
    """Pairs of ``features`` ``[N, D]`` with identities ``labels`` ``[N]``."""
    scores, same = evaluation.all_pairs(features, labels)
    return Pairs(scores.numpy(), same.numpy())


def verification_accuracy(pairs: Pairs, seed: int = 0) -> float:
    """Mean accuracy over ten folds of as many impostor as genuine pairs.

    The impostors and the order of all pairs are drawn by ``seed``; the folds divide the pairs, not
    the identities. There are fewer folds where there are fewer than ten genuine pairs.
    """
    generator = np.random.default_rng(seed)
    genuine, impostor = np.flatnonzero(pairs.same), np.flatnonzero(~pairs.same)
    size = min(len(genuine), len(impostor))
    chosen = np.concatenate(
        [generator.choice(indices, size, replace=False) for indices in (genuine, impostor)]
    )
    folds = np.tile(np.arange(size) % min(MAX_FOLDS, size), 2)
    return evaluation.fold_accuracy(pairs.scores[chosen], pairs.same[chosen], folds).mean


def rank1_single_gallery(features: Tensor, labels: Tensor) -> float:
    """Share of probes whose best match, of one gallery image per identity, is of their identity.

    Averaged over ten galleries: the g-th takes image g (modulo their number) of each identity.
    All other images of identities with at least two images are probes.
    """
    members = [(labels == name).nonzero()[:, 0] for name in labels.unique()]
    hits = []
    for number in range(NUM_GALLERIES):
        gallery = torch.stack([own[number % len(own)] for own in members])
        probes = torch.ones(len(labels), dtype=torch.bool)
        probes[gallery] = False
        ranks = evaluation.identification_ranks(
            features[gallery], labels[gallery], features[probes], labels[probes]
        )
        hits.append(evaluation.cmc(ranks, 1).item())
    return float(np.mean(hits))


def unseen_figures(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Open-set figures over the faces of identities that were not trained on."""
    pairs = all_pairs(features, labels)
    return {
        "accuracy": verification_accuracy(pairs),
        "tar": evaluation.tar_at_far(pairs.scores, pairs.same, FALSE_ACCEPT_RATE).tar.item(),
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
    if len(labels) == 0:
        return dict.fromkeys(("rank1_head", "tar_head", "rank1_tail", "tar_tail"))
    own = np.arange(scores.shape[1]) == labels[:, None]
    point = evaluation.tar_at_far(scores.ravel(), own.ravel(), FALSE_ACCEPT_RATE)
    figures: dict[str, float | None] = {}
    for group, members in (("head", is_head[labels]), ("tail", ~is_head[labels])):
        found = scores[members].argmax(axis=1) == labels[members]
        accepted = scores[own & members[:, None]] > point.threshold.item()
        figures[f"rank1_{group}"] = float(found.mean()) if len(found) else None
        figures[f"tar_{group}"] = float(accepted.mean()) if len(accepted) else None
    return figures
