"""Faces on disk: folders of identities' folders, and RecordIO sets."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from face_demo.data import ORL_CREDIT, read_orl, split_long_tail
from face_demo.errors import DataError
from face_demo.folders import identities, printable, say
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .lost import LostImages
from .recordio import RecordFile, image_numbers
from .scans import readable
from .sources import UNREADABLE, FileImages, Images, MemoryImages, RecordImages, decode, why

__all__ = ["UNREADABLE", "Faces", "decode", "load_faces", "load_orl", "readable"]

# A label that every loss leaves out.
IGNORED = -100
_GRAY = 127


class Faces(Dataset):
    """Faces with labels.

    Item i is the image, uint8 ``[3, size, size]``, its label and i.

    Args:
        images: the encoded images.
        labels: int64 ``[N]`` in ``[0, C)``; each of the C has an image.
        names: of the C identities.
        size: height and width in pixels; others are cut to a square and scaled.

    Attributes:
        left_out: names of images that were left out when they were listed.
    """

    def __init__(self, images: Images, labels: Tensor, names: Sequence[str], size: int) -> None:
        self.images, self.labels, self.names, self.size = images, labels, list(names), size
        self.rows = torch.arange(len(images))
        self.left_out: list[str] = []
        self._lost: LostImages | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        row = int(self.rows[item])
        try:
            image = decode(self.images.data(row), self.size)
            if self._lost is not None:
                self._lost.find(row)
        except UNREADABLE as error:
            image = self._in_place(item, row, error)
        return image, int(self.labels[item]), item

    def _in_place(self, item: int, row: int, error: Exception) -> Tensor:
        """What stands for an image that cannot be read any more."""
        message = printable(f"{self.images.name(row)} cannot be read any more: {why(error)}")
        if self._lost is None:
            raise DataError(
                f"{message}; put it back, or go on without it with --resume --skip-unreadable"
            ) from error
        other = self._another(item) if self._lost.replace else None
        self._lost.lose(row, message, replaced=other is not None)
        if other is not None:
            return other
        return torch.full((3, self.size, self.size), _GRAY, dtype=torch.uint8)

    def skip_unreadable(self, replace: bool) -> None:
        """From now on, an image that cannot be read any more is no error.

        It is named once. With ``replace`` another image of the same identity takes its place. Where
        there is none, and without ``replace``, a gray image does, and `known` tells.
        """
        self._lost = LostImages(self.images, len(self), replace)

    def known(self, labels: Tensor, items: Tensor) -> Tensor:
        """Labels of items that were read, -100 where nothing could be read: losses leave it out."""
        if self._lost is None:
            return labels
        return labels.masked_fill(self._lost.missing(self.rows[items]), IGNORED)

    def missing(self) -> Tensor:
        """bool [N], the items of which nothing could be read."""
        return self.known(self.labels, torch.arange(len(self))) == IGNORED

    def lost(self) -> list[str]:
        """Names of the images that `skip_unreadable` has skipped."""
        return [] if self._lost is None else self._lost.names()

    def _another(self, item: int) -> Tensor | None:
        """The next image of the same identity that can be read, or None."""
        own = (self.labels == self.labels[item]).nonzero()[:, 0]
        for other in own.roll(-int((own <= item).sum()))[:-1].tolist():
            try:
                return decode(self.images.data(int(self.rows[other])), self.size)
            except UNREADABLE:
                continue
        return None

    def fingerprint(self) -> str:
        """Of the images' names within the data folder, their labels and sizes in bytes.

        Another one means that images were added, removed, changed or moved to other identities; a
        data folder that is moved keeps it.
        """
        digest = hashlib.sha256()
        for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True):
            name, size, _ = self.images.stamp(row)
            digest.update(f"{name}\0{size}\0{label}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def keep(self, items: Tensor) -> Faces:
        """Some of the faces; identities without any are left out, and the others numbered anew."""
        labels, numbers = self.labels[items].unique(return_inverse=True)
        names = [self.names[label] for label in labels.tolist()]
        kept = Faces(self.images, numbers, names, self.size)
        kept.rows = self.rows[items]
        kept._lost = self._lost
        return kept

    def counts(self) -> Tensor:
        """int64 ``[C]``, images of each identity."""
        return self.labels.bincount(minlength=len(self.names))


def load_faces(path: Path, size: int, allow_empty: bool = False) -> Faces:
    """The faces of a folder of identities' folders, or of an insightface RecordIO set.

    Args:
        path: a folder with one sub-folder for each identity; or a .rec file, or the folder that
            holds train.rec.
        allow_empty: whether an identity's folder may be empty, as where its images are lost.

    Raises:
        DataError: there are no such images; an identity's folder is empty.
    """
    try:
        if path.suffix == ".rec":
            return _load_records(path, size)
        if (path / "train.rec").is_file():
            return _load_records(path / "train.rec", size)
        if not path.is_dir():
            raise DataError(f"{path} is neither a folder nor a .rec file")
        return _load_folder(path, size, allow_empty)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _load_folder(path: Path, size: int, allow_empty: bool) -> Faces:
    files, labels, names = [], [], []
    for person, own in identities(path):
        if not own and allow_empty:
            say(f"the folder {person} is empty")
            continue
        if not own:
            raise DataError(_empty(person))
        labels += [len(names)] * len(own)
        names.append(printable(person.name))
        files += own
    if not files:
        raise DataError(f"{path} has no sub-folders of images; it needs one for each identity")
    return Faces(FileImages(path, files), torch.tensor(labels), names, size)


def _empty(person: Path) -> str:
    inner = [each.name for each in person.iterdir() if each.is_dir()]
    if inner:
        return (
            f"the folder {person} has no images, but {len(inner)} folder(s) as {min(inner)}; put "
            f"the images of an identity right into its folder"
        )
    return f"the folder {person} is empty; remove it, or put images into it"


def load_orl(size: int) -> tuple[Faces, Faces]:
    """The ORL faces with a long tail cut into the first 25 identities; the 15 others whole."""
    split = split_long_tail(read_orl(), seed=0)
    return (
        _from_pixels(split.train_images, split.train_labels, size),
        _from_pixels(split.unseen_images, split.unseen_labels, size),
    )


def _from_pixels(pixels: Tensor, labels: Tensor, size: int) -> Faces:
    contents = []
    for image in pixels.numpy():
        file = io.BytesIO()
        # A format without compression, so that every version of Pillow writes the same.
        Image.fromarray(image).save(file, "ppm")
        contents.append(file.getvalue())
    names = [f"identity {label}" for label in range(int(labels.max()) + 1)]
    return Faces(MemoryImages(ORL_CREDIT, contents), labels, names, size)


def _load_records(path: Path, size: int) -> Faces:
    file = RecordFile(path)
    numbers, found, sizes, left_out = [], [], [], []
    bar = tqdm(image_numbers(file), desc="labels", unit="image", leave=False)
    for number in bar:
        try:
            record = file.read(number)
            identity = _identity(record.labels[0])
        except DataError as error:
            say(f"cannot read {path}, record {number}: {error}")
            left_out.append(printable(f"{path}, record {number}"))
            continue
        numbers.append(number)
        found.append(identity)
        sizes.append(len(record.content))
    if not numbers:
        raise DataError(f"{path} has no images")
    kinds, labels = torch.tensor(found).unique(return_inverse=True)
    names = list(map(str, kinds.tolist()))
    faces = Faces(RecordImages(file, numbers, sizes), labels, names, size)
    faces.left_out = left_out
    return faces


def _identity(label: float) -> int:
    if not math.isfinite(label):
        raise DataError(f"its label is {label}")
    return int(label)
