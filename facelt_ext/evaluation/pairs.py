"""Lists of pairs to verify: those of LFW and YTF, plain lists, and pairs drawn from labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from facelt_ext._checks import check_count, check_integer, check_path
from facelt_ext.evaluation._arrays import Array, integers, shuffled
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
    """Reads a list of pairs, in whichever of these forms its lines are:

    - LFW's pairs.txt: a first line with the numbers of folds and of pairs of each kind in a fold,
      then `name i j` for two images of one identity and `name i other j` for two identities.
      Image i of a name is `name/name_000i` and `extension`. With the number of pairs alone in the
      first line (pairsDevTest.txt), or none, there are no folds.
    - YTF's splits.txt: `fold, video, video, same`, after a line of titles; further columns count
      for nothing. `same` is 1 or 0.
    - `image image same`, with 1 or 0, between blanks, tabs or commas.

    Args:
        path: a text file in UTF-8; empty lines count for nothing.
        extension: of LFW's image files.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line, with its number, that has none of these forms; another number of pairs
            than the first line says; no pairs.
    """
    path = Path(check_path(path, "path"))
    if not isinstance(extension, str):
        raise TypeError(f"extension: expected a str, got {type(extension).__name__}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"path: expected a text file in UTF-8, got {path}: {error}") from error
    rows = [(number, _fields(line)) for number, line in enumerate(lines, 1) if line.strip()]
    header = rows.pop(0)[1] if rows and _is_header(rows[0][1]) else []
    pairs = [_pair(fields, extension, f"{path}, line {number}") for number, fields in rows]
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair, got none")
    first, second, same, folds = (list(part) for part in zip(*pairs, strict=True))
    if len(header) == 2 and all(field.isdecimal() for field in header):
        folds = _fold_numbers(*map(int, header), len(pairs), path)
    if len({fold is None for fold in folds}) > 1:
        raise ValueError(f"{path}: expected a fold in each line or in none")
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


def _fields(line: str) -> list[str]:
    separator = next((each for each in (",", "\t") if each in line), None)
    return [field.strip() for field in line.strip().split(separator)]


def _is_header(fields: list[str]) -> bool:
    """Numbers alone, or titles: three fields or more of which the last is no number."""
    if len(fields) <= 2:
        return all(field.isdecimal() for field in fields)
    return not fields[-1].isdecimal() and not fields[0].isdecimal()


def _pair(fields: list[str], extension: str, where: str) -> tuple[str, str, bool, int | None]:
    def image(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}{extension}"

    number = [field.isdecimal() for field in fields]
    if number == [False, True, True]:
        return image(fields[0], fields[1]), image(fields[0], fields[2]), True, None
    if number == [False, True, False, True]:
        return image(*fields[:2]), image(*fields[2:]), False, None
    if number == [False, False, True] and fields[2] in ("0", "1"):
        return fields[0], fields[1], fields[2] == "1", None
    if number[:4] == [True, False, False, True] and fields[3] in ("0", "1"):
        return fields[1], fields[2], fields[3] == "1", int(fields[0])
    raise ValueError(
        f"{where}: expected 'name i j', 'name i other j', 'image image 0|1' or "
        f"'fold, video, video, 0|1', got {' '.join(fields)!r}"
    )


def _fold_numbers(num_folds: int, per_kind: int, pairs: int, path: Path) -> list[int]:
    if num_folds * 2 * per_kind != pairs:
        raise ValueError(
            f"{path}: expected {num_folds} folds of 2 x {per_kind} pairs, as its first line says, "
            f"got {pairs} pairs"
        )
    return consecutive_folds(pairs, num_folds).tolist()
