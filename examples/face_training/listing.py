"""The images that a run began with, so that it can go on when some of them are lost."""

from __future__ import annotations

from pathlib import Path

import torch
from face_demo.errors import DataError
from face_demo.folders import printable, say

from .images import Faces
from .scans import read_json, write_json
from .sources import FileImages, RecordImages, Stamp, why


def write_listing(faces: Faces, path: Path) -> None:
    """Keeps what `restored` needs.

    Raises:
        DataError: ``path`` cannot be written.
    """
    stamps = [faces.images.stamp(row) for row in faces.rows.tolist()]
    names, sizes, _ = zip(*stamps, strict=True)
    content = {"names": names, "sizes": sizes, "labels": faces.labels.tolist()}
    write_json(path, content | {"identities": faces.names})


def restored(faces: Faces, path: Path, skip_unreadable: bool) -> Faces:
    """The faces as they were listed, among them images that cannot be read any more.

    Where images were added or changed, or there is no such list, the faces are returned as they
    are.

    Raises:
        DataError: images cannot be read any more, without ``skip_unreadable``.
    """
    try:
        listed = read_json(path)
        labels = torch.tensor(listed["labels"], dtype=torch.int64)
        stamps = [
            Stamp(str(name), int(size), 0)
            for name, size in zip(listed["names"], listed["sizes"], strict=True)
        ]
        identities = [listed["identities"][label] for label in labels.tolist()]
    except Exception as error:
        say(f"{path} does not tell what images the run began with: {why(error)}")
        return faces
    before = dict(zip(((each.name, each.size) for each in stamps), identities, strict=True))
    for row, label in zip(faces.rows.tolist(), faces.labels.tolist(), strict=True):
        name, size, _ = faces.images.stamp(row)
        if before.pop((name, size), None) != faces.names[label]:
            return faces
    if not before:
        return faces
    if not skip_unreadable:
        raise DataError(
            f"{len(before)} image(s) that the run began with cannot be read any more, the first is "
            f"{printable(next(iter(before))[0])}; put them back, or give --skip-unreadable"
        )
    return Faces(_as_listed(faces, stamps), labels, listed["identities"], faces.size)


def _as_listed(faces: Faces, stamps: list[Stamp]) -> FileImages | RecordImages:
    images = faces.images
    if isinstance(images, RecordImages):
        numbers = [int(each.name) for each in stamps]
        return RecordImages(images.file, numbers, [each.size for each in stamps])
    paths = [images.folder / each.name for each in stamps]
    return FileImages(images.folder, paths, stamps)
