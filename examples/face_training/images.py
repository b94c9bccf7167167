"""Faces on disk: folders, RecordIO sets, lists of files; what cannot be read is left out."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from face_demo.data import ORL_CREDIT, DataError, natural_order, read_orl, split_long_tail
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from .recordio import RecordFile, image_numbers

UNREADABLE = (OSError, ValueError, SyntaxError, DataError, Image.DecompressionBombError)


class Images(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What a message calls it."""

    def data(self, number: int) -> bytes:
        """The content of an image file."""


class FileImages:
    """Images in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def data(self, number: int) -> bytes:
        return self.paths[number].read_bytes()


class RecordImages:
    """Images in a RecordIO file."""

    def __init__(self, file: RecordFile, numbers: Sequence[int]) -> None:
        self.file, self.numbers = file, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"{self.file.path}, record {self.numbers[number]}"

    def data(self, number: int) -> bytes:
        return self.file.read(self.numbers[number]).content


class MemoryImages:
    """Images whose files' contents are in memory."""

    def __init__(self, source: str, contents: Sequence[bytes]) -> None:
        self.source, self.contents = source, list(contents)

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, number: int) -> str:
        return f"{self.source}, image {number}"

    def data(self, number: int) -> bytes:
        return self.contents[number]


class Faces(Dataset):
    """Faces with labels.

    Item i is the image, uint8 ``[3, size, size]``, its label and i.

    Args:
        images: the encoded images.
        labels: int64 ``[N]`` in ``[0, C)``; each of the C has an image.
        names: of the C identities.
        size: height and width in pixels; others are cut to a square and scaled.
    """

    def __init__(self, images: Images, labels: Tensor, names: Sequence[str], size: int) -> None:
        self.images, self.labels, self.names, self.size = images, labels, list(names), size
        self.rows = torch.arange(len(images))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        row = int(self.rows[item])
        try:
            image = decode(self.images.data(row), self.size)
        except UNREADABLE as error:
            raise DataError(f"{self.images.name(row)} cannot be read any more: {error}") from error
        return image, int(self.labels[item]), item

    def fingerprint(self) -> str:
        """Of the images' names within the data folder, their labels and sizes in bytes."""
        digest = hashlib.sha256()
        for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True):
            name = "/".join(Path(self.images.name(row)).parts[-2:])
            digest.update(f"{name}\0{len(self.images.data(row))}\0{label}\n".encode())
        return digest.hexdigest()

    def keep(self, items: Tensor) -> Faces:
        """Some of the faces; identities without any are left out, and the others numbered anew."""
        labels, numbers = self.labels[items].unique(return_inverse=True)
        names = [self.names[label] for label in labels.tolist()]
        kept = Faces(self.images, numbers, names, self.size)
        kept.rows = self.rows[items]
        return kept

    def counts(self) -> Tensor:
        """int64 ``[C]``, images of each identity."""
        return self.labels.bincount(minlength=len(self.names))


def decode(data: bytes, size: int) -> Tensor:
    """The content of an image file as uint8 ``[3, size, size]``, red first."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size))
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def load_faces(path: Path, size: int) -> Faces:
    """The faces of a folder of identities' folders, or of an insightface RecordIO set.

    Args:
        path: a folder with one sub-folder for each identity; or a .rec file, or the folder that
            holds train.rec.

    Raises:
        DataError: there are no such images; an identity's folder is empty.
    """
    if path.suffix == ".rec":
        return _load_records(path, size)
    if (path / "train.rec").is_file():
        return _load_records(path / "train.rec", size)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a .rec file")
    people = [each for each in sorted(path.iterdir(), key=natural_order) if each.is_dir()]
    people = [each for each in people if not each.name.startswith(".")]
    if not people:
        raise DataError(f"{path} has no sub-folders; it needs one for each identity")
    files, labels = [], []
    for label, person in enumerate(people):
        own = [each for each in person.iterdir() if each.is_file() and each.name[0] != "."]
        if not own:
            raise DataError(f"the folder {person} is empty; remove it, or put images into it")
        files += sorted(own, key=natural_order)
        labels += [label] * len(own)
    names = [person.name for person in people]
    return Faces(FileImages(files), torch.tensor(labels), names, size)


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
        Image.fromarray(image).save(file, "png")
        contents.append(file.getvalue())
    names = [f"identity {label}" for label in range(int(labels.max()) + 1)]
    return Faces(MemoryImages(ORL_CREDIT, contents), labels, names, size)


def _load_records(path: Path, size: int) -> Faces:
    file = RecordFile(path)
    numbers = image_numbers(file)
    if not numbers:
        raise DataError(f"{path} has no images")
    bar = tqdm(numbers, desc="labels", unit="image", leave=False)
    found = torch.tensor([int(file.read(number).labels[0]) for number in bar])
    identities, labels = found.unique(return_inverse=True)
    return Faces(RecordImages(file, numbers), labels, list(map(str, identities.tolist())), size)


def readable(images: Images, size: int, cache: Path, threads: int) -> tuple[Tensor, list[str]]:
    """The numbers of the images that can be decoded, and the names of those that cannot.

    Every image is decoded once, and what was found is kept in ``cache`` for the next start with
    images of the same names.
    """
    every_name = "\n".join(images.name(number) for number in range(len(images)))
    digest = hashlib.sha256(every_name.encode()).hexdigest()
    if cache.is_file():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["images"] == digest:
            return _without(len(images), kept["unreadable"]), kept["names"]

    def problem(number: int) -> str | None:
        try:
            decode(images.data(number), size)
        except UNREADABLE as error:
            return f"{images.name(number)}: {error}"
        return None

    found = thread_map(
        problem,
        range(len(images)),
        max_workers=threads,
        chunksize=64,
        desc="checking images",
        unit="image",
        leave=False,
    )
    wrong = [number for number, each in enumerate(found) if each is not None]
    for number in wrong:
        tqdm.write(f"cannot read {found[number]}")
    names = [images.name(number) for number in wrong]
    cache.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": digest, "unreadable": wrong, "names": names}
    cache.write_text(json.dumps(content), encoding="utf-8")
    return _without(len(images), wrong), names


def _without(count: int, left_out: Sequence[int]) -> Tensor:
    kept = torch.ones(count, dtype=torch.bool)
    kept[torch.tensor(left_out, dtype=torch.int64)] = False
    return kept.nonzero()[:, 0]
