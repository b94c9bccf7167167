"""Lists of pairs to verify: those of LFW and YTF, plain lists, and pairs drawn from labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import check_count, check_integer, check_path
from facelt_ext.evaluation._arrays import Array, integers, shuffled
from facelt_ext.evaluation._pair_lists import read_list
from facelt_ext.evaluation.verification import consecutive_folds

# Images of a fold, all pairs of which are looked at.
ENOUGH_IMAGES = 2000


class PairList(NamedTuple):
    """Pairs of images, or of videos, by name.

    Attributes:
        first: P names.
        second: P names.
        same: bool [P].
        folds: int64 [P] from 0 on; None where the list has no folds.
    """

    first: list[str]
    second: list[str]
    same: Tensor
    folds: Tensor | None


class IndexPairs(NamedTuple):
    """Pairs of samples: first, second int64 [P], same bool [P], folds int64 [P] from 0 on."""

    first: Tensor
    second: Tensor
    same: Tensor
    folds: Tensor


def read_pairs(path: str | os.PathLike, extension: str = ".jpg") -> PairList:
    """Reads a list of pairs, in whichever of these forms all of its lines are:

    - LFW's pairs.txt: a first line with the numbers of folds and of pairs of each kind in a fold,
      then `name i j` for two images of one identity and `name i other j` for two identities.
      Image i of a name is `name/name_000i` and `extension`. With the number of pairs alone in the
      first line (pairsDevTest.txt), or none, there are no folds.
    - YTF's splits.txt: `fold, video, video, same`; further columns count for nothing. `same` is 1
      or 0.
    - `image image same`, with 1 or 0.
    - CALFW's and CPLFW's: `image number` in two lines for each pair, with the same number, which is
      0 for different identities. There are no folds.

    Fields lie between tabs, so that names may hold blanks and commas, else between commas, as in
    csv files, or blanks: in all lines alike. There may be a first line of titles. Names may be
    numbers. Empty lines, blanks around fields and empty last columns count for nothing.

    Args:
        path: a text file in UTF-8, with a byte order mark or without.
        extension: of LFW's image files, with its dot; or nothing.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file, its line and what is wanted, where a line has another form than those
            before it; another number of pairs than the first line says; no pairs; another encoding.
    """
    path = Path(check_path(path, "path"))
    if not isinstance(extension, str):
        raise TypeError(f"extension: expected a str, got {type(extension).__name__}")
    if extension and not extension.startswith("."):
        raise ValueError(f"extension: expected it to begin with a dot, got {extension!r}")
    header, pairs = read_list(path, extension)
    first, second, same, folds = (list(part) for part in zip(*pairs, strict=True))
    if len(header) == 2:
        folds = _fold_numbers(*header, len(pairs), path)
    same = torch.tensor(same, device="cpu")
    if folds[0] is None:
        return PairList(first, second, same, None)
    folds = torch.tensor(folds, device="cpu").unique(return_inverse=True)[1]
    return PairList(first, second, same, folds)


def draw_pairs(
    labels: Array, num_folds: int = 10, pairs_per_fold: int = 300, seed: int = 0
) -> IndexPairs:
    """Pairs in the manner of LFW for images of one's own.

    The identities are dealt out to the folds at random, so that no identity is in two folds. Each
    fold has as many pairs of the same as of different identities, all different: `pairs_per_fold`
    of each, or as many as there are. Of more than 2,000 images in a fold only those of the first
    identities that have as many take part.

    Args:
        labels: integers [N].
        num_folds: at least 2; there are fewer where identities are too few, two for each fold.
        pairs_per_fold: at least 1.
        seed: of all draws.

    Raises:
        ValueError: fewer than four identities of which two have two images.
    """
    num_folds = check_count(num_folds, "num_folds", minimum=2)
    pairs_per_fold = check_count(pairs_per_fold, "pairs_per_fold")
    labels = integers(labels, "labels").cpu()
    generator = torch.Generator("cpu").manual_seed(check_integer(seed, "seed"))
    identities, sizes = labels.unique(return_counts=True)
    several, single = identities[sizes > 1], identities[sizes == 1]
    num_folds = min(num_folds, len(identities) // 2, len(several))
    if num_folds < 2:
        raise ValueError(
            f"labels: expected four identities or more, at least two of them with two images, got "
            f"{len(identities)} and {len(several)}"
        )
    dealt = torch.cat([part[shuffled(len(part), generator)] for part in (several, single)])
    found = []
    for fold in range(num_folds):
        members = torch.isin(labels, _some(dealt[fold::num_folds], identities, sizes))
        members = members.nonzero().flatten()
        first, second = torch.combinations(torch.arange(len(members), device="cpu")).unbind(1)
        same = labels[members[first]] == labels[members[second]]
        size = min(pairs_per_fold, int(same.sum()), int((~same).sum()))
        for kind in (same, ~same):
            candidates = kind.nonzero().flatten()
            chosen = candidates[shuffled(len(candidates), generator)[:size]]
            ends = members[first[chosen]], members[second[chosen]]
            found.append((*ends, same[chosen], torch.full_like(chosen, fold)))
    return IndexPairs(*(torch.cat(part) for part in zip(*found, strict=True)))


def _some(dealt: Tensor, identities: Tensor, sizes: Tensor) -> Tensor:
    """The first two identities, and as many of the others as it takes to have enough images."""
    own = sizes[torch.searchsorted(identities, dealt.contiguous())]
    needed = own.cumsum(0) - own < ENOUGH_IMAGES
    needed[:2] = True
    return dealt[needed]


def _fold_numbers(num_folds: int, per_kind: int, pairs: int, path: Path) -> list[int]:
    if num_folds * 2 * per_kind != pairs:
        raise ValueError(
            f"{path}: expected {num_folds} folds of 2 x {per_kind} pairs, as its first line says, "
            f"got {pairs} pairs"
        )
    return consecutive_folds(pairs, num_folds).tolist()
