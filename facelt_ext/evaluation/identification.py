"""Search in a gallery: ranks, CMC, distractors, and open-set identification."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext._autocast import without_autocast
from facelt_ext._checks import check_count, check_tensor, zeros_of_size
from facelt_ext._rounding import tie_width
from facelt_ext.evaluation._arrays import Array, integers, rates, unit_features
from facelt_ext.evaluation._scores import (
    BLOCK_COLUMNS,
    Block,
    blocks,
    count_reaching,
    count_reaching_each,
    exact_cosines,
    raise_to_best,
)
from facelt_ext.evaluation.operating_points import accept_threshold


class OpenSetPoints(NamedTuple):
    """One entry for each rate that was asked for, float64 [F] on the CPU.

    Attributes:
        far: the share of unknown probes that are accepted: the highest no larger than asked.
        dir: the detection and identification rate there.
        threshold: probes that score **above** it are accepted. It lies above the score of the best
            unknown probe that is not, and all scores equal to it (see `identification_ranks`).
    """

    far: Tensor
    dir: Tensor
    threshold: Tensor


@without_autocast
def identification_ranks(
    gallery: Array,
    gallery_labels: Array,
    probes: Array,
    probe_labels: Array,
    distractors: Array | None = None,
) -> Tensor:
    """The rank of the right identity among all that a probe is compared with.

    The rank of a probe is one more than the number of images of other identities, distractors
    among them, that score at least as high as the best image of its own: of equal scores the right
    one comes last. Scores no further apart than 1e-6 (1e-12 if all features are float64) are equal.

    Args:
        gallery: [G, D], of any lengths; scores are cosines.
        gallery_labels: integers [G].
        probes: [P, D].
        probe_labels: integers [P], each of which is in the gallery.
        distractors: [M, D], images of nobody in the gallery or among the probes. They may lie on
            the CPU, or in a memory-mapped array, while the rest is on a GPU: a million are taken
            in blocks.

    Returns:
        int64 [P], from 1 on, on the probes' device.

    Raises:
        TypeError, ValueError: wrong types or shapes; features that are not finite; a probe whose
            identity is not in the gallery.
    """
    searched = _Gallery(gallery, gallery_labels, probes, probe_labels)
    if distractors is not None:
        nobody = _check_distractors(distractors, searched.probes)
        searched.tie = max(searched.tie, tie_width(nobody))
    if not searched.known.all():
        row = int((~searched.known).nonzero()[0])
        raise ValueError(
            f"probe_labels: expected identities of the gallery, got "
            f"{int(searched.probe_labels[row])} at position {row}"
        )
    mate = searched.best_scores(own=True)
    ranks = searched.ranks(mate)
    if distractors is not None:
        limits = mate - searched.tie
        for block in _distractor_blocks(searched.probes, distractors):
            ranks[block.part] += count_reaching(block, limits[block.part])
    return ranks


@without_autocast
def distractor_ranks(features: Array, labels: Array, distractors: Array) -> Tensor:
    """Ranks of all pairs of a probe and one mate among distractors, the protocol of MegaFace.

    Each image in turn is put, alone of its identity, into a gallery of the distractors, and each
    other image of the identity looks for it (Kemelmacher-Shlizerman et al., CVPR 2016). The rank is
    one more than the number of distractors that score at least as high, or equal as in
    `identification_ranks`. `cmc` of the result at 1 is MegaFace's rank-1.

    Args:
        features: [N, D], images of the probe set (of FaceScrub, for MegaFace).
        labels: integers [N]; identities of one image are in no pair.
        distractors: [M, D]; as of `identification_ranks`.

    Returns:
        int64 [R], of the sum of n (n - 1) ordered pairs, by probe, then by mate.

    Raises:
        TypeError, ValueError: wrong types or shapes; features that are not finite; no identity
            with two images.
    """
    features = unit_features(features, "features")
    labels = integers(labels, "labels", len(features), features)
    tie = tie_width(features, _check_distractors(distractors, features))
    order = labels.argsort(stable=True)
    sizes = labels.unique(return_counts=True)[1].cpu()
    if not (sizes > 1).any():
        raise ValueError("labels: expected an identity with at least two images, got none")
    probe, mate = [], []
    for members in order.split(sizes.tolist()):
        one, other = torch.meshgrid(members, members, indexing="ij")
        different = one != other
        probe.append(one[different])
        mate.append(other[different])
    probe, mate = torch.cat(probe), torch.cat(mate)
    order = (probe * len(labels) + mate).argsort()
    probe, mate = probe[order], mate[order]
    limits = exact_cosines(features, features, probe, mate) - tie
    return 1 + _count_reaching_pairs(features, probe, limits, distractors)


def cmc(ranks: Array, max_rank: int = 20) -> Tensor:
    """The cumulative match characteristic: the share of ranks of at most 1, 2, ..., `max_rank`.

    Args:
        ranks: integers [P], from 1 on, P at least 1.
        max_rank: at least 1.

    Returns:
        float64 [max_rank] on the CPU; entry k - 1 is the rank-k identification rate.
    """
    max_rank = check_count(max_rank, "max_rank")
    ranks = integers(ranks, "ranks").cpu()
    if len(ranks) == 0 or int(ranks.min()) < 1:
        raise ValueError(
            f"ranks: expected at least one, from 1 on, got {len(ranks)}"
            + (f", the least {int(ranks.min())}" if len(ranks) else "")
        )
    counts = zeros_of_size("max_rank", max_rank, dtype=torch.float64)
    found = ranks[ranks <= max_rank] - 1
    counts.index_add_(0, found, torch.ones_like(found, dtype=torch.float64))
    return counts.cumsum_(0).div_(len(ranks))


@without_autocast
def open_set_identification(
    gallery: Array,
    gallery_labels: Array,
    probes: Array,
    probe_labels: Array,
    far: float | Sequence[float] | Array = 0.01,
    rank: int = 1,
) -> OpenSetPoints:
    """Detection and identification rate (DIR) at a false accept rate.

    Probes whose identity is not in the gallery are unknown. The threshold is such that the best
    scores of at most `far` of them lie above it. DIR is the share of the known probes whose rank
    (see `identification_ranks`) is at most `rank` and whose right image scores above the threshold
    (Phillips et al. 2011; Liao et al., BLUFR, IJCB 2014).

    Args:
        gallery, gallery_labels, probes: as of `identification_ranks`.
        probe_labels: integers [P], known and unknown ones.
        far: in [0, 1], one or several.
        rank: at least 1.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; no known or no unknown probe.
    """
    wanted = rates(far, "far")
    rank = check_count(rank, "rank")
    everyone = _Gallery(gallery, gallery_labels, probes, probe_labels)
    known = int(everyone.known.sum())
    if known in (0, len(everyone.known)):
        raise ValueError(
            f"probe_labels: expected known and unknown identities, got {known} probe(s) of the "
            f"gallery's and {len(everyone.known) - known} of others"
        )
    searched, unknown = everyone.only(everyone.known), everyone.only(~everyone.known)
    mate = searched.best_scores(own=True)
    rightly = mate[searched.ranks(mate) <= rank]
    best = unknown.best_scores(own=False).sort(descending=True).values
    points = []
    for each in wanted:
        threshold = accept_threshold(best, len(best), each, everyone.tie)
        accepted = float((best > threshold).double().mean())
        points.append((accepted, int((rightly > threshold).sum()) / known, threshold))
    return OpenSetPoints(*torch.tensor(points, dtype=torch.float64, device="cpu").unbind(1))


class _Gallery:
    """Probes and a gallery, compared block by block; each method multiplies them once."""

    def __init__(
        self, gallery: Array, gallery_labels: Array, probes: Array, probe_labels: Array
    ) -> None:
        self.probes = unit_features(probes, "probes")
        gallery = unit_features(gallery, "gallery", self.probes.shape[1])
        self.tie = tie_width(self.probes, gallery)
        self.gallery = gallery.to(self.probes)
        self.labels = integers(gallery_labels, "gallery_labels", len(self.gallery), self.probes)
        self.probe_labels = integers(probe_labels, "probe_labels", len(self.probes), self.probes)
        if len(self.gallery) == 0 or len(self.probes) == 0:
            raise ValueError(
                f"gallery and probes: expected at least one image in each, got "
                f"{len(self.gallery)} and {len(self.probes)}"
            )
        self.known = torch.isin(self.probe_labels, self.labels)

    def only(self, some: Tensor) -> _Gallery:
        """With some of the probes, bool [P]."""
        part = copy.copy(self)
        part.probes, part.probe_labels, part.known = (
            each[some] for each in (self.probes, self.probe_labels, self.known)
        )
        return part

    def best_scores(self, own: bool) -> Tensor:
        """float64 [P], of images of the probe's identity (-inf where there is none), or of all."""
        best = self.probes.new_full((len(self.probes),), -torch.inf, dtype=torch.float64)
        for block in blocks(self.probes, self.gallery):
            raise_to_best(best, block, self._same(block) if own else None)
        return best

    def ranks(self, mate: Tensor) -> Tensor:
        """int64 [P], one more than the images of others that score at least `mate`."""
        ranks = torch.ones_like(mate, dtype=torch.int64)
        limits = mate - self.tie
        for block in blocks(self.probes, self.gallery):
            ranks[block.part] += count_reaching(block, limits[block.part], ~self._same(block))
        return ranks

    def _same(self, block: Block) -> Tensor:
        columns = slice(block.left, block.left + len(block.columns))
        return self.probe_labels[block.part, None] == self.labels[columns]


def _check_distractors(distractors: Array, features: Tensor) -> Tensor:
    """All but their numbers: those are looked at block by block. None of them, as unit features."""
    some = distractors
    if isinstance(some, Tensor):
        some = check_tensor(some, "distractors")
    if isinstance(some, np.ndarray | Tensor) and some.ndim == 2:
        some = some[:0]
    return unit_features(some, "distractors", features.shape[1])


def _distractor_blocks(features: Tensor, distractors: Array) -> Iterator[Block]:
    """As `blocks`, of distractors that need not fit where the features are."""
    for first in range(0, len(distractors), BLOCK_COLUMNS):
        some = unit_features(
            distractors[first : first + BLOCK_COLUMNS], "distractors", features.shape[1]
        )
        yield from blocks(features, some.to(features))


def _count_reaching_pairs(
    features: Tensor, probe: Tensor, limits: Tensor, distractors: Array
) -> Tensor:
    """int64 [R]: of the probe of each pair, the distractors that score at least its limit.

    Args:
        probe: int64 [R], ascending.
        limits: float64 [R].
    """
    probes, row, sizes = probe.unique(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    column = torch.arange(len(probe), device=probe.device) - starts[row]
    table = limits.new_full((len(probes), int(sizes.max())), torch.inf)
    table[row, column] = limits
    table, place = table.sort(dim=1)
    counts = torch.zeros_like(table, dtype=torch.int64)
    for block in _distractor_blocks(features[probes], distractors):
        counts[block.part] += count_reaching_each(block, table[block.part])
    return torch.empty_like(counts).scatter_(1, place, counts)[row, column]
