"""Reads MXNet's RecordIO files, in which insightface's data sets come, without MXNet."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from face_demo.data import DataError

_MAGIC = 0xCED7230A
_WHOLE, _FIRST, _LAST = 0, 1, 3


class Record(NamedTuple):
    """One record: its labels, float32, and what follows them."""

    labels: np.ndarray
    content: bytes


class RecordFile:
    """Random access to a .rec file with its .idx file.

    The file is mapped and not read into memory; workers of a data loader may share it.

    Args:
        path: of the .rec file; the .idx file lies beside it.

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
            lines = np.loadtxt(index, dtype=np.int64, delimiter="\t", ndmin=2)
            self.offsets = dict(zip(*lines.T.tolist(), strict=True))
        except (ValueError, TypeError) as error:
            raise DataError(f"{index}: expected lines 'number<TAB>offset': {error}") from None
        self._bytes = np.memmap(path, np.uint8, "r")

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


def image_numbers(file: RecordFile) -> list[int]:
    """The numbers of the records that are images.

    Where record 0 has two labels they are, as insightface writes them, one more than the number of
    the last image, and than that of the last record, which say what images an identity has.
    Otherwise all records are images.
    """
    if 0 in file.offsets:
        header = file.read(0)
        if len(header.labels) == 2 and not header.content:
            return [number for number in range(1, int(header.labels[0])) if number in file.offsets]
    return sorted(file.offsets)
