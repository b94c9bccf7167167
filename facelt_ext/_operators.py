"""Registration of the native functions as PyTorch operators `torch.ops.facelt_ext.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facelt_ext._checks import check_tensor

_library = torch.library.Library("facelt_ext", "DEF")


class Operator:
    """An operator as the autograd.Functions call it, which have dealt with its gradient.

    PyTorch's dispatcher costs a seventh of the time of a small loss, and has nothing to add where
    nobody is tracing: the implementation is then called at once.
    """

    def __init__(self, overload: Callable[..., Any], implementation: Callable[..., Any]) -> None:
        self._overload = overload
        self._implementation = implementation

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self._overload(*args)
        try:
            return self._implementation(*args)
        except (RuntimeError, TypeError):
            self._blame(args)
            raise

    def _blame(self, args: tuple[Any, ...]) -> None:
        """Raises for a tensor that no kernel can read, such as a gradient that came from outside,
        or what a hook made of a saved tensor."""
        for argument, value in zip(self._overload._schema.arguments, args, strict=True):
            if isinstance(value, Tensor):
                check_tensor(value, argument.name)


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Registers the decorated function for CPU and CUDA tensors; `fake` gives its outputs' shapes.

    An operator has no formula for its derivative: those are with the autograd.Functions around it.
    Called directly on tensors that require a gradient, `torch.ops.facelt_ext.*` raises, instead of
    losing the gradient.
    """
    name = schema.split("(", 1)[0]

    def register(implementation: Callable[..., Any]) -> Operator:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f"facelt_ext::{name}", fake, lib=_library)
        overload = getattr(torch.ops.facelt_ext, name).default
        _library.impl(name, _refusing_gradients(name, overload), "Autograd")
        return Operator(overload, implementation)

    return register


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
