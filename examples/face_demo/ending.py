"""How a script ends: what a user can cause or mend is said in a line, without a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from .errors import DataError

# Errors of PyTorch without a class of their own, by how they can be told.
_MENDABLE = {
    "DataLoader worker": "give fewer --workers if memory was short",
    "can't allocate memory": "give smaller batches, images or networks",
}


class Terminated(BaseException):
    """By SIGTERM."""


@contextmanager
def named_errors(speaks: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ends the process with ``error: …`` and exit code 1 after an error that is the user's.

    Interrupted it ends with exit code 130, and with 143 after SIGTERM.

    Args:
        speaks: whether this process says what happened. Where another has, any error ends it
            silently.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Terminated:
        code, message = 143, "ended by SIGTERM"
    except Exception as error:
        code, message = 1, _message(error)
        if message is None:
            if speaks():
                raise
            raise SystemExit(1) from None
    # Only now, without the error, are bars of progress closed.
    if not speaks():
        raise SystemExit(code)
    if code == 1:
        raise SystemExit(f"error: {message}")
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as an error does, so that it ends its workers first."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message(error: Exception) -> str | None:
    """What to say of an error that a user can cause or mend; None of others."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: give smaller batches, images or networks ({_line(error)})"
    advice = next((each for text, each in _MENDABLE.items() if text in str(error)), None)
    return f"{_line(error)}; {advice}" if advice and isinstance(error, RuntimeError) else None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").strip(" .")
