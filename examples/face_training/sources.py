"""Encoded images by number: in files, in records, in memory; and what decodes them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from face_demo.decoding import cut, upright_rgb
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .recordio import RecordFile

# Decoders raise what they like: struct.error, TypeError, RuntimeError, MemoryError and more.
UNREADABLE = Exception
_GONE = -1


class Stamp(NamedTuple):
    """What tells an image from others, and shows that it has changed.

    Attributes:
        name: within the data, so that it stays when a folder is moved.
        size: in bytes, -1 where the file is gone.
        version: changes when the content does, as the time of the last change.
    """

    name: str
    size: int
    version: int


class Images(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What a message calls it."""

    def stamp(self, number: int) -> Stamp:
        """As it was when the first one was asked for."""

    def data(self, number: int) -> bytes:
        """The content of an image file."""


class FileImages:
    """Images in files.

    Args:
        folder: that holds the data.
        paths: of the files, beneath it.
        stamps: theirs, from an earlier time; by default as they are now.
    """

    def __init__(
        self, folder: Path, paths: Sequence[Path], stamps: Sequence[Stamp] | None = None
    ) -> None:
        self.folder, self.paths = folder, list(paths)
        if stamps is not None:
            self._sizes_and_times = np.array([each[1:] for each in stamps], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def stamp(self, number: int) -> Stamp:
        name = str(self.paths[number]).removeprefix(f"{self.folder}{os.sep}")
        return Stamp(name.replace(os.sep, "/"), *self._sizes_and_times[number].tolist())

    def data(self, number: int) -> bytes:
        return self.paths[number].read_bytes()

    @cached_property
    def _sizes_and_times(self) -> np.ndarray:
        return np.array([_size_and_time(path) for path in self.paths], np.int64).reshape(-1, 2)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return _GONE, _GONE
    return found.st_size, found.st_mtime_ns


class RecordImages:
    """Images in a RecordIO file.

    Args:
        numbers: of the records.
        sizes: of the images in them, in bytes.
    """

    def __init__(self, file: RecordFile, numbers: Sequence[int], sizes: Sequence[int]) -> None:
        self.file, self.numbers, self.sizes = file, list(numbers), list(sizes)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"{self.file.path}, record {self.numbers[number]}"

    def stamp(self, number: int) -> Stamp:
        return Stamp(str(self.numbers[number]), self.sizes[number], self.file.version)

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

    def stamp(self, number: int) -> Stamp:
        content = self.contents[number]
        digest = hashlib.blake2b(content, digest_size=7).digest()
        return Stamp(str(number), len(content), int.from_bytes(digest, "big"))

    def data(self, number: int) -> bytes:
        return self.contents[number]


def decode(data: bytes, size: int) -> Tensor:
    """The content of an image file as uint8 ``[3, size, size]``, red first.

    Raises:
        Exception: of any type; decoders differ in what they raise.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = cut(upright_rgb(image), size, size)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def why(error: Exception) -> str:
    """An error in a message; some have no text of their own."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that Pillow knows"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
