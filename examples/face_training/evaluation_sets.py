"""What a network is judged by while it is trained: folders, lists of pairs, and .bin files."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from face_demo.data import DataError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from facelt_ext import evaluation
from facelt_ext.evaluation.verification import consecutive_folds

from .images import Faces, FileImages, MemoryImages, load_faces, readable

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


def read_set(argument: str, size: int, scans: Path, threads: int) -> EvaluationSet:
    """An evaluation set.

    Args:
        argument: a folder with one sub-folder for each identity; a RecordIO set; a list of pairs
            (see `facelt_ext.evaluation.read_pairs`) whose images lie beside it, or
            ``LIST=FOLDER``; or insightface's .bin file.
        scans: the folder where the names of unreadable images are kept.

    Raises:
        DataError: there is no such set; fewer than two pairs of a kind remain.
    """
    path, _, folder = argument.partition("=")
    source = Path(path)
    if source.suffix == ".bin":
        return _bin_set(source, size, scans, threads)
    if source.is_file() and source.suffix != ".rec":
        return _list_set(source, Path(folder) if folder else source.parent, size, scans, threads)
    faces = load_faces(source, size)
    kept, skipped = readable(faces.images, size, scans / f"{source.name}.json", threads)
    return identity_set(source.name, faces.keep(kept), len(skipped))


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


def _list_set(path: Path, folder: Path, size: int, scans: Path, threads: int) -> EvaluationSet:
    try:
        pairs = evaluation.read_pairs(path)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from None
    names = sorted({*pairs.first, *pairs.second})
    number = {name: position for position, name in enumerate(names)}
    first, second = (
        torch.tensor([number[name] for name in side]) for side in (pairs.first, pairs.second)
    )
    images = FileImages([folder / name for name in names])
    faces = Faces(images, torch.zeros(len(names), dtype=torch.int64), [path.stem], size)
    return _pair_set(path.stem, faces, first, second, pairs.same, pairs.folds, scans, threads)


def _bin_set(path: Path, size: int, scans: Path, threads: int) -> EvaluationSet:
    try:
        with path.open("rb") as file:
            contents, same = _PlainData(file, encoding="bytes").load()
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is not one of insightface's .bin files: {error}") from None
    same = torch.tensor([bool(each) for each in same])
    if len(contents) != 2 * len(same):
        raise DataError(f"{path}: expected two images a pair, got {len(contents)} for {len(same)}")
    images = MemoryImages(str(path), [bytes(each) for each in contents])
    faces = Faces(images, torch.zeros(len(images), dtype=torch.int64), [path.stem], size)
    first, second = torch.arange(len(images)).view(-1, 2).unbind(1)
    return _pair_set(path.stem, faces, first, second, same, None, scans, threads)


class _PlainData(pickle.Unpickler):
    """Unpickles lists, bytes and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _pair_set(
    name: str,
    faces: Faces,
    first: Tensor,
    second: Tensor,
    same: Tensor,
    folds: Tensor | None,
    scans: Path,
    threads: int,
) -> EvaluationSet:
    kept, skipped = readable(faces.images, faces.size, scans / f"{name}.json", threads)
    new_number = torch.full((len(faces),), -1)
    new_number[kept] = torch.arange(len(kept))
    first, second = new_number[first], new_number[second]
    if folds is None:
        folds = consecutive_folds(len(same), 10)
    whole = (first >= 0) & (second >= 0)
    pairs = evaluation.IndexPairs(*(part[whole] for part in (first, second, same, folds)))
    if min(int(pairs.same.sum()), int((~pairs.same).sum())) < 2:
        raise DataError(
            f"{name}: fewer than two pairs of the same or of different identities remain; "
            f"{len(skipped)} image(s) cannot be read, the first is "
            f"{skipped[0] if skipped else 'none'}"
        )
    return EvaluationSet(name, faces.keep(kept), pairs, False, len(skipped))


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
    scores = evaluation.pair_scores(features, chosen.pairs.first, chosen.pairs.second)
    figures, curve = _pair_figures(scores, chosen.pairs)
    if chosen.identities:
        sizes = labels.bincount()
        impostors = (len(labels) ** 2 - int((sizes**2).sum())) // 2
        fars = _reached(impostors)
        points = evaluation.all_pairs_tar_at_far(features, labels, fars)
        figures |= _rates("TAR", fars, points.tar)
        figures |= _search(features, labels)
    else:
        fars = _reached(int((~chosen.pairs.same).sum()))
        figures |= _rates("TAR", fars, evaluation.tar_at_far(scores, chosen.pairs.same, fars).tar)
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
