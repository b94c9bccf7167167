"""Reads MXNet's RecordIO files, in which insightface's data sets come, without MXNet."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from face_demo.errors import DataError
from face_demo.folders import say

_MAGIC = 0xCED7230A
_WHOLE, _FIRST, _LAST = 0, 1, 3


class Record(NamedTuple):
    """One record: its labels, float32, and what follows them."""

    labels: np.ndarray
    content: bytes


class RecordFile:
    """Random access to a .rec file with its .idx file.

    The file is mapped and not read into memory; workers of a data loader may share it. A damaged
    line of the index damages the record of its number alone.

    Args:
        path: of the .rec file; the .idx file lies beside it.

    Attributes:
        offsets: where each record begins, by its number; -1 where the index does not say.
        version: the time of the last change.

    Raises:
        DataError: one of the files is missing, empty or not of this kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path.with_suffix(".idx")
        for each in (path, index):
            if not each.is_file() or each.stat().st_size == 0:
                raise DataError(f"{each} is missing or empty; a RecordIO set has a .rec and a .idx")
        try:
            self.offsets = _offsets(index)
            self._bytes = np.memmap(path, np.uint8, "r")
            self.version = max(each.stat().st_mtime_ns for each in (path, index))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_bytes": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._bytes = np.memmap(self.path, np.uint8, "r")

    def read(self, number: int) -> Record:
        """The record of a number in the index.

        Raises:
            DataError: the file has no such record there.
        """
        if number not in self.offsets:
            raise DataError(f"{self.path}: no record {number} in the index")
        content = self._content(number)
        try:
            flag, label, _, _ = struct.unpack_from("<IfQQ", content)
            start = struct.calcsize("<IfQQ")
            if flag == 0:
                return Record(np.array([label], np.float32), content[start:])
            labels = np.frombuffer(content, "<f4", flag, start)
        except (struct.error, ValueError) as error:
            raise DataError(f"{self.path}: record {number} is cut short: {error}") from None
        return Record(labels, content[start + 4 * flag :])

    def _content(self, number: int) -> bytes:
        """A record may be cut where its content held the magic number, which is then left out."""
        position, parts = self.offsets[number], []
        if not 0 <= position < len(self._bytes):
            raise DataError(f"{self.path}: the index has no offset in the file for record {number}")
        while True:
            header = self._bytes[position : position + 8].tobytes()
            magic, length = struct.unpack("<II", header) if len(header) == 8 else (0, 0)
            kind, length = length >> 29, length & (1 << 29) - 1
            part = self._bytes[position + 8 : position + 8 + length].tobytes()
            wanted = (_WHOLE, _FIRST) if not parts else (_FIRST + 1, _LAST)
            if magic != _MAGIC or kind not in wanted or len(part) < length:
                raise DataError(f"{self.path}: no record {number} at byte {position}")
            parts.append(part)
            if kind in (_WHOLE, _LAST):
                return struct.pack("<I", _MAGIC).join(parts)
            position += 8 + -(-length // 4) * 4


def _offsets(index: Path) -> dict[int, int]:
    """Of an index, by the records' numbers; lines without a number are named and left out."""
    offsets, wrong = {}, []
    with index.open("rb") as file:
        for line in file:
            number, *rest = line.split() or [b""]
            try:
                offsets[int(number)] = _offset(rest)
            except ValueError:
                if line.strip():
                    wrong.append(line.decode("utf-8", "backslashreplace").strip())
    if not any(offset >= 0 for offset in offsets.values()):
        raise DataError(
            f"{index}: expected lines 'number<TAB>offset', got {wrong[0] if wrong else 'none'!r}"
        )
    if wrong:
        say(f"{index}: {len(wrong)} line(s) have no number, the first is {wrong[0]!r}")
    return offsets


def _offset(fields: list[bytes]) -> int:
    try:
        return int(fields[0]) if len(fields) == 1 else -1
    except ValueError:
        return -1


def image_numbers(file: RecordFile) -> list[int]:
    """The numbers of the records that are images.

    Where record 0 has two labels they are, as insightface writes them, one more than the number of
    the last image, and than that of the last record, which say what images an identity has.
    Otherwise all records are images. Where record 0 is damaged, or the index has another number of
    images, all but those that are like an identity's are.
    """
    numbers = sorted(file.offsets)
    if 0 not in file.offsets:
        return numbers
    try:
        header = file.read(0)
        if len(header.labels) != 2 or header.content:
            return numbers
        end = float(header.labels[0])
        images = [number for number in numbers if 1 <= number < end]
        if len(images) == end - 1:
            return images
        say(f"{file.path}: record 0 tells of {end - 1:.0f} images, the index has {len(images)}")
    except DataError:
        pass
    return [number for number in numbers if not _is_of_identity(file, number)]


def _is_of_identity(file: RecordFile, number: int) -> bool:
    try:
        record = file.read(number)
    except DataError:
        return False
    return len(record.labels) == 2 and not record.content
