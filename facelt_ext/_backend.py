"""Which implementation runs, and whether costly checks are made."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from facelt_ext import _native
from facelt_ext._checks import check_choice, check_flag, is_exporting

BACKENDS = ("native", "reference", "emulated")


def _default() -> str:
    fallback = "native" if _native.available() else "reference"
    return check_choice(os.environ.get("FACELT_BACKEND", fallback), "FACELT_BACKEND", BACKENDS)


_backend = _default()
_debug = False


def current() -> str:
    return _backend


def of_call(function: str, *inputs: Tensor, traceable: bool = False) -> str:
    """The backend of a call with these inputs.

    What torch.export makes is plain PyTorch where that is `traceable`: it runs without this
    package.

    Args:
        function: its name, for the errors.
        traceable: whether the steps of its reference are the same for all values.

    Raises:
        RuntimeError: kernels run under a transform of torch.func or forward-mode AD, which have to
            see each step; the reference runs under torch.func.vmap and is not `traceable`.
    """
    if torch.compiler.is_compiling():
        return "reference" if traceable and is_exporting() else _backend
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and (forward_ad._current_level < 0 or not any(map(_has_tangent, inputs))):
        return _backend
    if _backend != "reference":
        raise RuntimeError(
            f"{function} has no kernels for the transforms of torch.func or for forward-mode AD; "
            "call it under facelt_ext.use_backend('reference'), or take torch.autograd.grad"
        )
    if transformed and not traceable and _under_vmap():
        raise RuntimeError(
            f"{function} does not work under torch.func.vmap, as its steps depend on the labels; "
            "call it once for each batch"
        )
    return _backend


def _under_vmap() -> bool:
    vmap = torch._C._functorch.TransformType.Vmap
    return any(each.key() == vmap for each in torch._C._functorch.get_interpreter_stack())


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None


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
        self._name = check_choice(name, "name", BACKENDS)
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
    _debug = check_flag(enabled, "enabled")
