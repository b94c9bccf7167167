"""BLUFR: verification and open-set identification at low false accept rates, in trials."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facelt_ext._autocast import without_autocast
from facelt_ext._checks import check_count, check_integer, check_path
from facelt_ext.evaluation._arrays import (
    Array,
    indices,
    integers,
    rate,
    shuffled,
    unit_features,
)
from facelt_ext.evaluation.identification import open_set_identification
from facelt_ext.evaluation.operating_points import all_pairs_tar_at_far

# Of `random_trials`: a thousand times as many as the benchmark has.
MOST_TRIALS = 10_000
# That float64 tells apart.
LARGEST_WHOLE = 2**53


class Trial(NamedTuple):
    """One trial of BLUFR: which images it compares.

    Attributes:
        test: integers [T], all unordered pairs of which are verified.
        gallery: integers [G].
        probes: integers [P]; those whose identity is not in the gallery are unknown.
    """

    test: Tensor
    gallery: Tensor
    probes: Tensor


class BLUFR(NamedTuple):
    """The rates of each trial, float64 [trials], at the false accept rates that were asked for.

    The benchmark's figures are the means less the sample standard deviations over the trials.
    """

    verification: Tensor
    identification: Tensor

    @property
    def verification_rate(self) -> float:
        """Mean - standard deviation of the verification rates."""
        return float(self.verification.mean() - self.verification.std())

    @property
    def detection_identification_rate(self) -> float:
        """Mean - standard deviation of the DIR."""
        return float(self.identification.mean() - self.identification.std())


@without_autocast
def blufr(
    features: Array,
    labels: Array,
    trials: Sequence[Trial],
    verification_far: float = 1e-3,
    identification_far: float = 1e-2,
) -> BLUFR:
    """The Benchmark of Large-scale Unconstrained Face Recognition (Liao et al., IJCB 2014).

    In each of ten trials: the verification rate over all pairs of the test images at FAR = 0.1 %,
    and the rank-1 DIR of the probes in the gallery at FAR = 1 %. Thresholds are those of
    `all_pairs_tar_at_far` and `open_set_identification`; the benchmark's own code rounds the number
    of false accepts to the nearest instead of down, and so may allow one more.

    Args:
        features: [N, D], of any lengths, of all images in the order of the list.
        labels: integers [N].
        trials: two or more, from `read_blufr` or `random_trials`.
        verification_far, identification_far: in [0, 1].

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; fewer than two trials; a trial without
            pairs or probes of both kinds.
    """
    features = unit_features(features, "features")
    labels = integers(labels, "labels", len(features), features)
    verification_far = rate(verification_far, "verification_far")
    identification_far = rate(identification_far, "identification_far")
    if not isinstance(trials, tuple | list):
        raise TypeError(f"trials: expected a list of Trial, got {type(trials).__name__}")
    if len(trials) < 2:
        raise ValueError(f"trials: expected at least two, got {len(trials)}")
    found = []
    for number, trial in enumerate(trials):
        test, gallery, probes = _checked_trial(trial, f"trials[{number}]", features)
        try:
            verified = all_pairs_tar_at_far(features[test], labels[test], verification_far)
            identified = open_set_identification(
                features[gallery],
                labels[gallery],
                features[probes],
                labels[probes],
                identification_far,
            )
        except ValueError as error:
            raise ValueError(f"trials[{number}]: {error}") from error
        found.append((float(verified.tar[0]), float(identified.dir[0])))
    return BLUFR(*torch.tensor(found, dtype=torch.float64, device="cpu").unbind(1))


def _checked_trial(trial: Trial, name: str, features: Tensor) -> Trial:
    if not isinstance(trial, Trial):
        raise TypeError(f"{name}: expected a Trial, got {type(trial).__name__}")
    return Trial(
        *(
            indices(value, f"{name}.{field}", len(features), features)
            for field, value in trial._asdict().items()
        )
    )


def read_blufr(path: str | os.PathLike) -> tuple[list[str], Tensor, list[Trial]]:
    """The list of images, their labels and the trials of a `blufr_*_config.mat`.

    Args:
        path: the file that comes with the benchmark (imageList, labels, testIndex, galIndex,
            probIndex; its indices begin with 1).

    Raises:
        ImportError: scipy is not installed.
        OSError: the file cannot be read.
        ValueError: it is no such file, or damaged: what is missing or wrong, by name.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            "reading the trials needs scipy; pip install 'facelt_ext[evaluation]'"
        ) from error
    with open(check_path(path, "path"), "rb") as file:
        try:
            content = loadmat(file)
        except Exception as error:  # Damaged files raise all kinds.
            raise ValueError(
                f"path: expected MATLAB's file of the trials, got {path}: {error!r}"
            ) from error
    wanted = ("imageList", "labels", "testIndex", "galIndex", "probIndex")
    missing = [name for name in wanted if name not in content]
    if missing:
        raise ValueError(f"{path}: expected the variables {', '.join(wanted)}; no {missing[0]}")
    images = [_name(each, f"{path}: imageList") for each in content["imageList"].flat]
    labels = _whole(content["labels"], f"{path}: labels")
    if len(labels) != len(images):
        raise ValueError(
            f"{path}: labels: expected {len(images)}, one for each of imageList, got {len(labels)}"
        )
    parts = [
        [
            _positions(each, f"{path}: {name}[{number}]", len(images))
            for number, each in enumerate(content[name].flat)
        ]
        for name in wanted[2:]
    ]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"{path}: expected as many trials in testIndex, galIndex and probIndex, "
            f"got {', '.join(str(len(part)) for part in parts)}"
        )
    return images, labels, [Trial(*each) for each in zip(*parts, strict=True)]


def _name(cell: object, where: str) -> str:
    if isinstance(cell, str):
        return str(cell)
    if not isinstance(cell, np.ndarray) or cell.dtype.kind != "U" or cell.size != 1:
        raise ValueError(f"{where}: expected a name in each cell, got {cell!r}")
    return str(cell.item())


def _whole(values: object, where: str) -> Tensor:
    """int64 [n], of an array of whole numbers, which MATLAB may keep as floating ones."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise ValueError(f"{where}: expected numbers, got {values!r}")
    values = values.flatten()
    whole = np.abs(values) <= LARGEST_WHOLE
    whole &= np.where(whole, values, 0) % 1 == 0
    if not whole.all():
        raise ValueError(f"{where}: expected whole numbers, got {values[~whole][0]}")
    return torch.from_numpy(values.astype(np.int64))


def _positions(values: object, where: str, count: int) -> Tensor:
    """int64 [n] in [0, count), of numbers from 1 on."""
    found = _whole(values, where) - 1
    wrong = (found < 0) | (found >= count)
    if wrong.any():
        raise ValueError(
            f"{where}: expected numbers in [1, {count}], those of imageList, "
            f"got {int(found[wrong][0]) + 1}"
        )
    return found


def random_trials(labels: Array, num_trials: int = 10, seed: int = 0) -> list[Trial]:
    """Trials in the manner of BLUFR for images of one's own, none of which was trained on.

    All images are verified. Of half of the identities with two images or more, drawn for each
    trial, one image is in the gallery and all others are probes; all images of the other
    identities are unknown probes.

    Args:
        labels: integers [N].
        num_trials: in [2, 10000].
        seed: of all draws.

    Raises:
        ValueError: fewer than two identities, or none with two images.
    """
    labels = integers(labels, "labels").cpu()
    num_trials = check_count(num_trials, "num_trials", minimum=2, maximum=MOST_TRIALS)
    generator = torch.Generator("cpu").manual_seed(check_integer(seed, "seed"))
    identities, sizes = labels.unique(return_counts=True)
    several = identities[sizes > 1]
    if len(identities) < 2 or len(several) == 0:
        raise ValueError(
            f"labels: expected two identities or more, one of them with two images, got "
            f"{len(identities)} and {len(several)}"
        )
    starts = sizes.cumsum(0) - sizes
    trials = []
    for _ in range(num_trials):
        chosen = several[shuffled(len(several), generator)]
        chosen = chosen[: max(1, len(chosen) // 2)]
        order = shuffled(len(labels), generator)
        by_identity = order[labels[order].argsort(stable=True)]
        first = by_identity[starts[torch.searchsorted(identities, chosen)]]
        others = torch.ones_like(labels, dtype=torch.bool)
        others[first] = False
        everything = torch.arange(len(labels), device="cpu")
        trials.append(Trial(everything, first.sort().values, everything[others]))
    return trials
