"""What a network is judged by while it is trained: folders, lists of pairs, and .bin files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from face_demo.errors import DataError
from face_demo.folders import printable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from facelt_ext import evaluation
from facelt_ext.evaluation.verification import consecutive_folds

from .images import Faces, load_faces, readable
from .pair_files import find_images, read_bin
from .sources import FileImages, Images, MemoryImages

FARS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class EvaluationSet:
    """Images, and pairs of them to verify.

    Attributes:
        name: in the report.
        faces: the images; labels say whose they are, unless the set is a list of pairs.
        pairs: that are verified.
        identities: the labels are identities, so that they can be searched for.
        skipped: how many images cannot be read; pairs with them are left out.
    """

    name: str
    faces: Faces
    pairs: evaluation.IndexPairs
    identities: bool
    skipped: int


@dataclass(frozen=True)
class Judgement:
    """Figures by name, in [0, 1], and the ROC curve of the pairs."""

    figures: dict[str, float]
    roc: evaluation.ROC


def read_sets(
    arguments: Sequence[str], size: int, scans: Path, threads: int
) -> list[EvaluationSet]:
    """Evaluation sets, as `read_set` does, whose names differ unless their paths are the same."""
    paths = [_paths(each)[0].resolve().parts for each in arguments]
    sets = []
    for argument, own in zip(arguments, paths, strict=True):
        depth = next(
            (d for d in range(1, len(own)) if [each[-d:] for each in paths].count(own[-d:]) == 1), 1
        )
        read = read_set(argument, size, scans, threads, own[-depth:-1])
        sets.append(read)
    return sets


def read_set(
    argument: str, size: int, scans: Path, threads: int, folders: Sequence[str] = ()
) -> EvaluationSet:
    """An evaluation set.

    Args:
        argument: a folder with one sub-folder for each identity; a RecordIO set; a list of pairs
            (see `facelt_ext.evaluation.read_pairs`) whose images lie beside it, or
            ``LIST=FOLDER``; or insightface's .bin file. What there is decides which of the equals
            signs, if any, stands between two paths.
        scans: the folder where what was found of the images is kept.
        folders: that its name begins with.

    Raises:
        DataError: there is no such set; fewer than two pairs of a kind remain.
    """
    source, folder = _paths(argument)
    own = source.resolve().name if source.is_dir() else source.stem
    name = printable("/".join((*folders, own)))
    scan = scans / f"evaluation-{name.replace('/', '-')}.json"
    if source.suffix == ".bin" and source.is_file():
        contents, same = read_bin(source)
        images = MemoryImages(str(source), contents)
        first, second = torch.arange(len(images)).view(-1, 2).unbind(1)
        pairs = evaluation.IndexPairs(first, second, same, consecutive_folds(len(same), 10))
        return _pair_set(name, images, pairs, size, scan, threads)
    if source.is_file() and source.suffix != ".rec":
        images, pairs = _listed(source, folder)
        return _pair_set(name, images, pairs, size, scan, threads)
    faces = load_faces(source, size)
    kept, skipped = readable(faces.images, size, scan, threads)
    return identity_set(name, faces.keep(kept), len(faces.left_out) + len(skipped))


def _paths(argument: str) -> tuple[Path, Path]:
    """The set, and where the images of a list are; paths that are too long are not there."""
    whole = Path(argument)
    if os.path.exists(whole):
        return whole, whole.parent
    parts = argument.split("=")
    splits = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
    lists = [(Path(left), right) for left, right in splits if os.path.isfile(left)]
    for path, folder in lists:
        if os.path.isdir(Path(folder)):
            return path, Path(folder)
    if lists:
        raise DataError(f"--eval {argument}: {lists[0][1]} is not a folder")
    raise DataError(
        f"--eval {argument} is neither a folder nor a .rec file, a .bin file or a list of pairs"
        f"{', nor is what is before an equals sign' if splits else ''}"
    )


def identity_set(name: str, faces: Faces, skipped: int = 0) -> EvaluationSet:
    """Faces of identities that are not trained on.

    Raises:
        DataError: they are too few for folds.
    """
    try:
        pairs = evaluation.draw_pairs(faces.labels)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
    return EvaluationSet(name, faces, pairs, True, skipped)


def _listed(path: Path, folder: Path) -> tuple[Images, evaluation.IndexPairs]:
    try:
        pairs = evaluation.read_pairs(path)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from None
    names = sorted({*pairs.first, *pairs.second})
    number = {name: position for position, name in enumerate(names)}
    first, second = (
        torch.tensor([number[name] for name in side]) for side in (pairs.first, pairs.second)
    )
    folds = consecutive_folds(len(pairs.same), 10) if pairs.folds is None else pairs.folds
    images = FileImages(folder, find_images(folder, names))
    return images, evaluation.IndexPairs(first, second, pairs.same, folds)


def _pair_set(
    name: str,
    images: Images,
    pairs: evaluation.IndexPairs,
    size: int,
    scan: Path,
    threads: int,
) -> EvaluationSet:
    kept, skipped = readable(images, size, scan, threads)
    faces = Faces(images, torch.zeros(len(images), dtype=torch.int64), [name], size).keep(kept)
    number = torch.full((len(images),), -1)
    number[kept] = torch.arange(len(kept))
    pairs = pairs._replace(first=number[pairs.first], second=number[pairs.second])
    pairs = _some(pairs, (pairs.first >= 0) & (pairs.second >= 0))
    if min(int(pairs.same.sum()), int((~pairs.same).sum())) < 2:
        raise DataError(
            f"{name}: fewer than two pairs of the same or of different identities remain; "
            f"{len(skipped)} image(s) cannot be read, the first is "
            f"{skipped[0] if skipped else 'none'}"
        )
    return EvaluationSet(name, faces, pairs, False, len(skipped))


def _some(pairs: evaluation.IndexPairs, chosen: Tensor) -> evaluation.IndexPairs:
    return evaluation.IndexPairs(*(part[chosen] for part in pairs))


def judgeable(chosen: EvaluationSet) -> EvaluationSet:
    """The set in a form that `judge` can take: pairs of one fold come into ten, as without folds.

    Raises:
        DataError: it cannot be judged.
    """
    pairs = chosen.pairs
    if len(pairs.folds.unique()) < 2:
        pairs = pairs._replace(folds=consecutive_folds(len(pairs.same), 10))
    try:
        _pair_figures(torch.rand(len(pairs.same), generator=torch.Generator()), pairs)
        if chosen.identities:
            evaluation.random_trials(chosen.faces.labels)
    except ValueError as error:
        raise DataError(f"evaluation set {chosen.name}: {error}") from error
    return replace(chosen, pairs=pairs)


def judge(model: nn.Module, chosen: EvaluationSet, batch_size: int, workers: int) -> Judgement:
    """Embeds the images, mirror images added, and verifies and identifies them.

    For sets of identities: the verification rate over all pairs, and the mean rank-1 rate and DIR
    of ten random galleries of half of the identities. Rates at false accept rates that fewer than
    one impostor reaches are left out.

    Raises:
        DataError: features are not finite.
    """
    loader = DataLoader(chosen.faces, batch_size, num_workers=workers)
    try:
        features, labels = evaluation.embed(model, loader, flip=True, progress=False)
    except ValueError as error:
        raise DataError(f"evaluation set {chosen.name}: {error}") from error
    seen = ~chosen.faces.missing()
    pairs = _some(chosen.pairs, seen[chosen.pairs.first] & seen[chosen.pairs.second])
    scores = evaluation.pair_scores(features, pairs.first, pairs.second)
    figures, curve = _pair_figures(scores, pairs)
    if chosen.identities:
        features, labels = features[seen], labels[seen]
        sizes = labels.bincount()
        impostors = (len(labels) ** 2 - int((sizes**2).sum())) // 2
        fars = _reached(impostors)
        points = evaluation.all_pairs_tar_at_far(features, labels, fars)
        figures |= _rates("TAR", fars, points.tar)
        figures |= _search(features, labels)
    else:
        fars = _reached(int((~pairs.same).sum()))
        figures |= _rates("TAR", fars, evaluation.tar_at_far(scores, pairs.same, fars).tar)
    return Judgement(figures, curve)


def _pair_figures(
    scores: Tensor, pairs: evaluation.IndexPairs
) -> tuple[dict[str, float], evaluation.ROC]:
    folds = evaluation.fold_accuracy(scores, pairs.same, pairs.folds)
    curve = evaluation.roc(scores, pairs.same)
    figures = {
        "accuracy": folds.mean,
        "accuracy std": folds.std,
        "equal error rate": curve.equal_error_rate,
        "AUC": curve.auc,
    }
    return figures, curve


def _search(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Where all unknown probes may be accepted, DIR is the rank-1 rate of the known ones."""
    rates = [
        evaluation.open_set_identification(
            features[trial.gallery],
            labels[trial.gallery],
            features[trial.probes],
            labels[trial.probes],
            far=[1.0, 0.01],
        ).dir
        for trial in evaluation.random_trials(labels)
    ]
    rank1, detected = torch.stack(rates).mean(0).tolist()
    return {"rank-1": rank1, "DIR at FAR 0.01": detected}


def _reached(impostors: int) -> list[float]:
    return [far for far in FARS if far * impostors >= 1] or [FARS[0]]


def _rates(name: str, fars: Sequence[float], values: Tensor) -> dict[str, float]:
    return {
        f"{name} at FAR {far:g}": value for far, value in zip(fars, values.tolist(), strict=True)
    }
