"""Rates of accepted pairs: TAR at FAR, ROC, area and equal error rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext._autocast import without_autocast
from facelt_ext.evaluation._arrays import Array, integers, rates, scored_pairs, unit_features
from facelt_ext.evaluation._scores import BLOCK_COLUMNS, BLOCK_ROWS, parts, product


class OperatingPoints(NamedTuple):
    """One entry for each rate that was asked for, float64 [F] on the CPU.

    Attributes:
        far: the false accept rate that is reached: the highest that is no larger than asked.
        tar: the true accept rate there (the verification rate).
        threshold: pairs that score **above** it are accepted.
    """

    far: Tensor
    tar: Tensor
    threshold: Tensor


class ROC(NamedTuple):
    """The receiver operating characteristic, float64 [T], both rates ascending.

    Attributes:
        far: share of the pairs of different identities that score at least `threshold`.
        tar: share of the pairs of the same identity that do.
        threshold: descending; the first is +inf, at which no pair is accepted.
    """

    far: Tensor
    tar: Tensor
    threshold: Tensor

    @property
    def auc(self) -> float:
        """The area below the curve, by trapezoids."""
        return float(torch.trapezoid(self.tar, self.far))

    @property
    def equal_error_rate(self) -> float:
        """Where the curve, straight between its points, has FAR = 1 - TAR."""
        surplus = self.far + self.tar - 1
        end = int((surplus >= 0).nonzero()[0])
        step = surplus[end] - surplus[end - 1]
        back = surplus[end] / step
        return float(self.far[end] - back * (self.far[end] - self.far[end - 1]))


def tar_at_far(scores: Array, same: Array, far: float | Sequence[float] | Array) -> OperatingPoints:
    """True accept rate at a false accept rate: the verification rate of a list of pairs.

    Of the N pairs of different identities at most floor(far * N) may be accepted. The threshold is
    the highest score of those that must not be, and what scores above it is accepted; so of equal
    scores all are accepted or none.

    Args:
        scores: [P], floating; higher for the same identity.
        same: bool [P], True for pairs of the same identity.
        far: in [0, 1], one or several.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape or range; NaN; pairs of one kind only.
    """
    wanted = rates(far, "far")
    scores, same = scored_pairs(scores, same)
    genuine, impostor = scores[same], scores[~same]
    kept = min(len(impostor), 1 + max(allowed_accepts(each, len(impostor)) for each in wanted))
    return operating_points(genuine, impostor.topk(kept).values, len(impostor), wanted)


@without_autocast
def all_pairs_tar_at_far(
    features: Array, labels: Array, far: float | Sequence[float] | Array
) -> OperatingPoints:
    """`tar_at_far` over all unordered pairs of samples, in blocks.

    Of the pairs of different identities only the floor(far * N) + 1 that score highest are kept, so
    that 10,000 images, 50 million pairs, take some hundreds of MiB.

    Args:
        features: [N, D], of any lengths; scores are cosines.
        labels: integers [N].
        far: in [0, 1], one or several.

    Raises:
        TypeError, ValueError: as `tar_at_far`; features that are not finite.
    """
    wanted = rates(far, "far")
    features = unit_features(features, "features")
    labels = integers(labels, "labels", len(features), features)
    sizes = labels.unique(return_counts=True)[1]
    pairs = len(labels) * (len(labels) - 1) // 2
    impostors = pairs - int((sizes * (sizes - 1) // 2).sum())
    if impostors in (0, pairs):
        raise ValueError(
            f"labels: expected pairs of the same and of different identities, got "
            f"{pairs - impostors} and {impostors}"
        )
    kept = min(impostors, 1 + max(allowed_accepts(each, impostors) for each in wanted))
    genuine, hardest = [], features.new_empty(0)
    for scores, same, once in _upper_blocks(features, labels):
        genuine.append(scores[same & once])
        others = once & ~same
        if len(hardest) == kept:
            others &= scores > hardest[-1]
        hardest = torch.cat([hardest, scores[others]])
        hardest = hardest.topk(min(kept, len(hardest))).values
    return operating_points(torch.cat(genuine), hardest, impostors, wanted)


@without_autocast
def all_pairs(features: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Cosines of all unordered pairs of samples, and which are of the same identity.

    Args:
        features: [N, D].
        labels: integers [N].

    Returns:
        scores [N (N - 1) / 2], as of `pair_scores`, in blocks rather than row by row, and same,
        bool, on the device of the features.
    """
    features = unit_features(features, "features")
    labels = integers(labels, "labels", len(features), features)
    found = [(scores[once], same[once]) for scores, same, once in _upper_blocks(features, labels)]
    if not found:
        return features.new_empty(0), torch.empty(0, dtype=torch.bool, device=features.device)
    scores, same = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(same)


def roc(scores: Array, same: Array) -> ROC:
    """The ROC curve of scikit-learn, without points on straight lines.

    Args:
        scores: [P], floating, finite; higher for the same identity.
        same: bool [P].

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: as `tar_at_far`.
    """
    try:
        from sklearn.metrics import roc_curve
    except ImportError as error:
        raise ImportError(
            "the ROC curve needs scikit-learn; pip install 'facelt_ext[evaluation]'"
        ) from error
    scores, same = scored_pairs(scores, same)
    if scores.isinf().any():
        position = int(scores.isinf().nonzero()[0])
        raise ValueError(
            f"scores: expected finite numbers, got {float(scores[position])} at position {position}"
        )
    curve = roc_curve(same.cpu().numpy(), scores.to(torch.float64).cpu().numpy())
    return ROC(*(torch.from_numpy(np.ascontiguousarray(each, np.float64)) for each in curve))


def operating_points(
    genuine: Tensor, hardest: Tensor, impostors: int, wanted: Sequence[float]
) -> OperatingPoints:
    """From the highest impostor scores, descending, and the number of all of them."""
    thresholds = [accept_threshold(hardest, impostors, each) for each in wanted]
    points = [
        (float((hardest > t).sum()) / impostors, float((genuine > t).double().mean()), t)
        for t in thresholds
    ]
    return OperatingPoints(*torch.tensor(points, dtype=torch.float64, device="cpu").unbind(1))


def accept_threshold(hardest: Tensor, impostors: int, far: float, tie: float = 0.0) -> float:
    """Above it lie at most `far` of the impostors, and nothing equal to one that lies below it.

    Args:
        tie: scores that are no further apart are equal.
    """
    allowed = allowed_accepts(far, impostors)
    return float(hardest[allowed]) + tie if allowed < impostors else -np.inf


def allowed_accepts(far: float, impostors: int) -> int:
    """The largest k with k / impostors <= far, free of the rounding of the product."""
    allowed = int(far * impostors)
    return allowed + 1 if (allowed + 1) / impostors <= far else allowed


def _upper_blocks(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Block by block, scores, sameness, and a mask that has each pair once."""
    split = parts(features)
    for top in range(0, len(features), BLOCK_ROWS):
        rows = [part[top : top + BLOCK_ROWS] for part in split]
        for left in range(top, len(features), BLOCK_COLUMNS):
            columns = [part[left : left + BLOCK_COLUMNS] for part in split]
            scores = product(rows, columns).to(features.dtype)
            same = labels[top : top + BLOCK_ROWS, None] == labels[left : left + BLOCK_COLUMNS]
            once = torch.ones_like(same).triu(top - left + 1)
            yield scores, same, once
