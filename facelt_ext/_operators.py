"""Registration of the native functions as PyTorch operators `torch.ops.facelt_ext.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("facelt_ext", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated function for CPU and CUDA tensors; `fake` gives its outputs' shapes.

    An operator has no formula for its derivative: those are with the autograd.Functions around it.
    Called directly on tensors that require a gradient it raises, instead of losing the gradient.
    """
    name = schema.split("(", 1)[0]

    def register(implementation: Callable[..., Any]) -> Any:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f"facelt_ext::{name}", fake, lib=_library)
        overload = getattr(torch.ops.facelt_ext, name).default
        _library.impl(name, _refusing_gradients(name, overload), "Autograd")
        return overload

    return register


def call(overload: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator from inside an autograd.Function, which has dealt with its gradient.

    Going below autograd at once saves a tenth of the time of a small loss. Compiled code goes the
    long way: torch.compile cannot trace the guard.
    """
    if torch.compiler.is_compiling():
        return overload(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def _refusing_gradients(name: str, overload: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"torch.ops.facelt_ext.{name} has no derivative; "
                "call the function in facelt_ext.functional, or use torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return refuse
