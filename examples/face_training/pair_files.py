"""The files of evaluation sets of pairs: insightface's .bin, and the images that lists name."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from face_demo.errors import DataError
from face_demo.folders import natural_order
from PIL import Image
from torch import Tensor

from .sources import why

# Of NumPy's types, those that images and booleans are kept in.
_TYPES = {"b1", "i1", "u1", "i2", "i4", "i8", "f4", "f8"}


class _Type:
    """Stands for a NumPy dtype; the real one's state could be made to corrupt memory."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] in (">", b">") else "<"

    def read(self, data: bytes) -> np.ndarray:
        if self.name not in _TYPES:
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.name}")
        return np.frombuffer(data, self.order + self.name)


class _Array:
    """Stands for a NumPy array; of objects it holds a list."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray | list = []

    def __setstate__(self, state: tuple) -> None:
        *_, dtype, _, data = state
        self.values = data if isinstance(data, list) else dtype.read(data)


def _from_buffer(data: bytes, dtype: _Type, *_: object) -> _Array:
    array = _Array()
    array.values = dtype.read(data)
    return array


# What pickles of bytes, numbers and arrays call, of Python 2 and 3, and of NumPy 1 and 2.
_CALLED = {
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
}
for _name, _type in {"bytes": bytes, "bytearray": bytearray}.items():
    _CALLED |= {("builtins", _name): _type, ("__builtin__", _name): _type}
for _core in ("numpy.core", "numpy._core"):
    _CALLED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _CALLED[f"{_core}.multiarray", "scalar"] = lambda dtype, data: dtype.read(data)[0]
    _CALLED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _PlainData(pickle.Unpickler):
    """Unpickles lists, bytes, numbers and arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _CALLED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return _CALLED[module, name]


def read_bin(path: Path) -> tuple[list[bytes], Tensor]:
    """The encoded images of one of insightface's .bin files, and which pairs are of one identity.

    Images that are no bytes are empty.

    Returns:
        2 P images, those of a pair one after the other, and bool ``[P]``.

    Raises:
        DataError: the file is not of this kind.
    """
    try:
        with path.open("rb") as file:
            found = _PlainData(file, encoding="bytes").load()
    except Exception as error:  # An unpickler raises what it likes.
        raise DataError(f"{path} is not one of insightface's .bin files: {why(error)}") from None
    parts = [_as_list(each) for each in _as_list(found) or ()]
    if len(parts) != 2 or None in parts:
        raise DataError(
            f"{path} is not one of insightface's .bin files: expected a list of images and one of "
            f"booleans, got {_kind(found)}"
        )
    contents, same = parts
    if len(contents) != 2 * len(same):
        raise DataError(f"{path}: expected two images a pair, got {len(contents)} for {len(same)}")
    for number, each in enumerate(same):
        if not isinstance(each, bool | int | float | np.generic) or each not in (0, 1):
            raise DataError(f"{path}: pair {number}: expected True or False, got {each!r:.40}")
    return [_content(each) for each in contents], torch.tensor([bool(each) for each in same])


def _as_list(value: object) -> list | None:
    if isinstance(value, _Array):
        value = value.values.tolist() if isinstance(value.values, np.ndarray) else value.values
    return list(value) if isinstance(value, list | tuple) else None


def _kind(value: object) -> str:
    if not isinstance(value, list | tuple):
        return type(value).__name__
    return f"{type(value).__name__} of {', '.join(type(each).__name__ for each in value[:5])}"


def _content(value: object) -> bytes:
    if isinstance(value, _Array) and isinstance(value.values, np.ndarray):
        return value.values.tobytes() if value.values.itemsize == 1 else b""
    return bytes(value) if isinstance(value, bytes | bytearray) else b""


def find_images(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of images that a list names.

    Where there is no file of a name, one is taken that has another extension of images, or one
    where the name has none, as ``.png`` in place of ``.jpg``. Of several it is the first by name.

    Raises:
        DataError: ``folder`` is no folder, or has none of the images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images")
    extensions = set(Image.registered_extensions())
    listed: dict[Path, dict[str, Path]] = {}
    paths = [_find(folder / name, extensions, listed) for name in names]
    if not any(os.path.isfile(path) for path in paths):
        raise DataError(
            f"{folder} has none of the {len(names)} images of the list, such as {names[0]}, with "
            f"this or another extension of images; give their folder as LIST=FOLDER"
        )
    return paths


def _find(path: Path, extensions: set[str], listed: dict[Path, dict[str, Path]]) -> Path:
    if os.path.isfile(path):
        return path
    if path.parent not in listed:
        listed[path.parent] = _by_stem(path.parent, extensions)
    return listed[path.parent].get(_stem(path.name, extensions), path)


def _by_stem(folder: Path, extensions: set[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    if os.path.isdir(folder):
        for path in sorted(folder.iterdir(), key=natural_order):
            if path.suffix.lower() in extensions:
                found.setdefault(_stem(path.name, extensions), path)
    return found


def _stem(name: str, extensions: set[str]) -> str:
    stem, dot, extension = name.rpartition(".")
    return stem if dot and f".{extension.lower()}" in extensions else name
