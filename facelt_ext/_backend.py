"""Which implementation runs, and whether costly checks are made."""

from __future__ import annotations

import contextlib
import os

from facelt_ext import _native

BACKENDS = ("native", "reference", "emulated")


def _checked(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _default() -> str:
    fallback = "native" if _native.available() else "reference"
    return _checked(os.environ.get("FACELT_BACKEND", fallback), "FACELT_BACKEND")


_backend = _default()
_debug = False


def current() -> str:
    return _backend


def debugging() -> bool:
    return _debug


class use_backend(contextlib.ContextDecorator):  # noqa: N801 - it is called like a function
    """Runs what is inside with another implementation, as a context manager or a decorator.

    Args:
        name: "native" (C++ on CPU tensors, CUDA on CUDA tensors), "reference" (plain PyTorch) or
            "emulated" (the CUDA kernels on the CPU; test builds only).

    A backward pass runs where its forward ran. The environment variable FACELT_BACKEND sets the
    default, which is "native". The setting is the process's, not the thread's.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "name")
        self._previous: list[str] = []

    def __enter__(self) -> None:
        global _backend
        self._previous.append(_backend)
        _backend = self._name

    def __exit__(self, *exception: object) -> None:
        global _backend
        _backend = self._previous.pop()


def debug_checks(enabled: bool) -> None:
    """Turns on checks that cost a host synchronisation on CUDA.

    With them a label, or a number of classes, that is out of range on a CUDA tensor raises
    ValueError as on the CPU; without them the result is NaN.
    """
    global _debug
    _debug = bool(enabled)
