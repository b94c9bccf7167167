"""TensorBoard's files."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from face_demo.errors import DataError
from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes curves over the steps into a folder, until a ``with`` block ends.

    Steps from ``step`` on that a run before has written are hidden. All methods raise a DataError
    where a file cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self._hook = folder, threading.excepthook
        # The writer's thread ends with an error that its methods raise again: once is enough.
        threading.excepthook = self._not_the_writer
        with self._named():
            self._writer = SummaryWriter(folder, purge_step=step)

    def add(self, values: Mapping[str, float], step: int) -> None:
        with self._named():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        with self._named():
            self._writer.flush()

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What went wrong first is what a user has to know.
        ignored = DataError if kind is not None else ()
        try:
            with suppress(ignored), self._named():
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _not_the_writer(self, error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):
            self._hook(error)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.folder}, TensorBoard's file: {error.strerror}") from error
