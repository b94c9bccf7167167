"""Verification of pairs in folds (LFW, YTF), and what leads to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext import functional
from facelt_ext._autocast import without_autocast
from facelt_ext._checks import check_count, check_flag, check_matrix
from facelt_ext._model_features import (
    Rows,
    batches_of,
    checked_features,
    chosen_device,
    evaluating,
)
from facelt_ext.evaluation._arrays import (
    Array,
    as_tensor,
    indices,
    integers,
    scored_pairs,
    unit_features,
)
from facelt_ext.evaluation._scores import exact_cosines


class FoldAccuracy(NamedTuple):
    """The accuracy of verification over folds.

    Attributes:
        mean: of the folds' accuracies, in [0, 1].
        std: their sample standard deviation (dividing by K - 1).
        accuracies: float64 [K].
        thresholds: float64 [K]; pairs that score **above** were taken for the same identity.
    """

    mean: float
    std: float
    accuracies: Tensor
    thresholds: Tensor

    @property
    def standard_error(self) -> float:
        """Of the mean: std / sqrt(K), which LFW's tables show."""
        return self.std / math.sqrt(len(self.accuracies))


def embed(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[Sequence[Tensor]],
    *,
    flip: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """The features of all samples of a loader, of length 1, and their labels, on the CPU.

    Args:
        model, device, progress: as in `facelt_ext.aggregation.class_means`.
        loader: yields tuples or lists that begin with images and labels.
        flip: whether the features of the images and of their mirror images (along the last
            dimension) are added up, before their length is made 1.

    Returns:
        features [N, D] and labels int64 [N].

    Raises:
        ImportError: `progress` without tqdm.
        TypeError, ValueError: a batch is not as above; the loader yields nothing.
    """
    device, flip = chosen_device(model, device), check_flag(flip, "flip")
    features, labels = Rows(), Rows()
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches_of(loader, progress, "features")):
            rows, names = checked_features(model, batch, device, number)
            if flip:
                mirrored = (batch[0].flip(-1), *batch[1:])
                # A copy: the model may write its next features where these are.
                rows = flip_sum(rows.clone(), checked_features(model, mirrored, device, number)[0])
            features.append(rows, f"model: features of batch {number}")
            labels.append(names, "")
    found = features.all()
    if found is None:
        raise ValueError("loader: expected at least one batch, got none")
    return unit_features(found, "features"), labels.all().clone()


@without_autocast
def flip_sum(features: Array, mirrored: Array) -> Tensor:
    """The sum of the features of images and of their mirror images, made of length 1.

    Args:
        features, mirrored: [N, D], as they leave the model.
    """
    features = check_matrix(as_tensor(features, "features"), "features")
    mirrored = check_matrix(as_tensor(mirrored, "mirrored"), "mirrored").to(features.device)
    if mirrored.shape != features.shape:
        raise ValueError(
            f"mirrored: expected shape {list(features.shape)}, that of features, "
            f"got {list(mirrored.shape)}"
        )
    return unit_features(features + mirrored, "features + mirrored")


@without_autocast
def mean_templates(features: Array, template: Array, num_templates: int | None = None) -> Tensor:
    """One feature for each video or other set of images: the mean of theirs.

    Every image's feature is made of length 1, then their mean is (as for YTF).

    Args:
        features: [N, D].
        template: integers [N] in [0, T), the set that each belongs to.
        num_templates: T; by default one more than the highest in `template`.

    Returns:
        [T, D].

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; a set without images.
    """
    features = unit_features(features, "features")
    template = integers(template, "template", len(features), features)
    if len(template) == 0:
        raise ValueError("template: expected at least one image, got none")
    if num_templates is None:
        num_templates = int(template.max()) + 1
    else:
        num_templates = check_count(num_templates, "num_templates")
    template = indices(template, "template", num_templates, features)
    if num_templates > len(template):
        raise ValueError(
            f"template: expected images of each of {num_templates} sets, got {len(template)} in all"
        )
    means = functional.class_centroids(features, template, max_classes=num_templates)
    if (means.counts == 0).any():
        present = torch.zeros(num_templates, dtype=torch.bool, device=template.device)
        present[template] = True
        raise ValueError(
            f"template: expected images of each of {num_templates} sets, got none of "
            f"{int((~present).nonzero()[0])}"
        )
    return unit_features(means.centroids, "features")


@without_autocast
def pair_scores(features: Array, first: Array, second: Array) -> Tensor:
    """The cosine of the two features of each pair, in chunks.

    Args:
        features: [N, D], of any lengths; a feature of zeros scores 0 with all.
        first, second: integers [P] in [0, N).

    Returns:
        [P] in [-1, 1], float64 for float64 features and float32 otherwise, on the features' device.
        Pairs of copies have the same bits, here and in `all_pairs`.
    """
    features = unit_features(features, "features")
    first = indices(first, "first", len(features), features)
    second = indices(second, "second", len(features), features)
    if len(first) != len(second):
        raise ValueError(f"second: expected {len(first)} numbers, as in first, got {len(second)}")
    return exact_cosines(features, features, first, second).to(features.dtype)


def fold_accuracy(scores: Array, same: Array, folds: int | Array = 10) -> FoldAccuracy:
    """Verification accuracy in folds, the protocol of LFW and YTF.

    For each fold, the threshold is the one with the highest accuracy on all other folds, and the
    accuracy is that of this threshold on the fold. Thresholds lie half way between neighbouring
    scores, or beyond all; of equally good ones the highest is taken.

    LFW (Huang et al. 2007, view 2, image-restricted or unrestricted): 10 folds of 300 pairs of the
    same and 300 of different identities, in the order of pairs.txt. YTF (Wolf et al. 2011): 10
    folds of 250 and 250 pairs of videos, see `mean_templates`.

    Args:
        scores: [P], floating; higher for the same identity.
        same: bool [P].
        folds: the fold of each pair, integers [P]; or a number K >= 2 of folds, consecutive runs of
            the pairs, of which the first P mod K are one longer.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; NaN; other folds of one kind only.
    """
    scores, same = scored_pairs(scores, same)
    scores, same = scores.double().cpu(), same.cpu()
    folds = _fold_of_each(folds, scores)
    accuracies, thresholds = [], []
    for fold in folds.unique():
        inside = folds == fold
        genuine = int(same[~inside].sum())
        if genuine in (0, int((~inside).sum())):
            raise ValueError(
                f"folds: expected pairs of both kinds outside of fold {int(fold)}, got {genuine} "
                f"of the same identity among {int((~inside).sum())}"
            )
        threshold = best_threshold(scores[~inside], same[~inside])
        accuracies.append(((scores[inside] > threshold) == same[inside]).double().mean())
        thresholds.append(threshold)
    found = torch.stack(accuracies)
    return FoldAccuracy(
        float(found.mean()),
        float(found.std()),
        found,
        torch.tensor(thresholds, dtype=torch.float64, device="cpu"),
    )


def consecutive_folds(pairs: int, folds: int) -> Tensor:
    """int64 [pairs], the number of the run that each is in; the first ones may be one longer."""
    runs = torch.arange(pairs, device="cpu").tensor_split(folds)
    return torch.cat([torch.full_like(run, number) for number, run in enumerate(runs)])


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold, half way between scores, above which most pairs are told rightly."""
    values, number = scores.unique(return_inverse=True)
    gain = torch.zeros_like(values, dtype=torch.int64)
    gain.index_add_(0, number, 2 * same.long() - 1)
    # Entry i: what accepting the i highest values brings over accepting none.
    gain = torch.cat([gain.new_zeros(1), gain.flip(0).cumsum(0)])
    accepted = int(gain.argmax())
    if accepted == 0:
        return math.inf
    if accepted == len(values):
        return -math.inf
    above, below = float(values[-accepted]), float(values[-accepted - 1])
    middle = below + (above - below) / 2
    return middle if middle < above else below


def _fold_of_each(folds: int | Array, scores: Tensor) -> Tensor:
    if not isinstance(folds, np.ndarray | Tensor):
        folds = check_count(folds, "folds", minimum=2)
        if folds > len(scores):
            raise ValueError(
                f"folds: expected at most one for each of {len(scores)} pairs, got {folds}"
            )
        return consecutive_folds(len(scores), folds)
    folds = integers(folds, "folds", len(scores)).cpu()
    if len(folds.unique()) < 2:
        raise ValueError("folds: expected at least two different folds, got one")
    return folds
