"""Files of results: written beside and renamed, so that none is ever half there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from .errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path``, which takes its place once it is written.

    Raises:
        DataError: it cannot be written; ``path`` is then what it was before.
    """
    beside = path.with_suffix(".new")
    try:
        yield beside
        with beside.open("rb+") as file:
            # Some file systems say only now that they are full.
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a text file in UTF-8.

    Raises:
        DataError: it cannot be written.
    """
    with replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8", "backslashreplace"))


def save(figure: Figure, path: Path) -> None:
    """Writes or replaces a picture, a PNG file.

    Raises:
        DataError: it cannot be written.
    """
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def make_folder(path: Path) -> None:
    """Makes the folder of the results, and tries that files can be written into it.

    Raises:
        DataError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        reason = "a file is there" if isinstance(error, FileExistsError) else error.strerror
        raise DataError(f"--output {path}: {reason}") from error
