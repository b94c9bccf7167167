"""Registration of the native functions as PyTorch operators `torch.ops.facelt_ext.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from facelt_ext._checks import check_tensor, is_exporting

_library = torch.library.Library("facelt_ext", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


class Operator:
    """An operator as the autograd.Functions call it, which have dealt with its gradient.

    PyTorch's dispatcher costs a seventh of the time of a small loss, and has nothing to add where
    nobody is tracing: the implementation is then called at once.
    """

    def __init__(
        self,
        default: Callable[..., Any],
        compiled: Callable[..., Any],
        implementation: Callable[..., Any],
    ) -> None:
        self._default, self._compiled = default, compiled
        self._implementation = implementation

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._default(*args) if is_exporting() else self._compiled(*args)
        if torch._C._len_torch_dispatch_stack():
            return self._default(*args)
        try:
            return self._implementation(*args)
        except (RuntimeError, TypeError):
            self._blame(args)
            raise

    def _blame(self, args: tuple[Any, ...]) -> None:
        """Raises for a tensor that no kernel can read, such as a gradient that came from outside,
        or what a hook made of a saved tensor."""
        for argument, value in zip(self._default._schema.arguments, args, strict=True):
            if isinstance(value, Tensor):
                check_tensor(value, argument.name)


def operator(
    schema: str,
    fake: Callable[..., Any],
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Registers the decorated function for CPU and CUDA tensors; `fake` gives its outputs' shapes.

    Derivatives are with the autograd.Functions around operators. Called directly on tensors that
    require a gradient, `torch.ops.facelt_ext.*` raises, instead of losing the gradient; but for
    those that torch.export leaves in a program, which have a `gradient`: setup_context(ctx, inputs,
    output) and backward(ctx, *grads), as `torch.library.register_autograd` takes them.

    `flops` gives the operations of its matrix products, from its arguments, for
    `torch.utils.flop_counter.FlopCounterMode`.
    """

    def register(implementation: Callable[..., Any]) -> Operator:
        default = compiled = _define(schema, fake, implementation, gradient)
        if "float " in schema:
            compiled = _define_for_numbers_that_change(schema, fake, implementation, default)
        if flops is not None:
            # A later overload makes another packet.
            packet = getattr(torch.ops.facelt_ext, schema.split("(", 1)[0])
            register_flop_formula(packet, get_raw=True)(lambda *args, out_val: flops(*args))
        return Operator(default, compiled, implementation)

    return register


def _define_for_numbers_that_change(
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any],
    default: Callable[..., Any],
) -> Callable[..., Any]:
    """The overload that torch.compile is given, which would compile anew for each value of a number
    unless a tensor holds it. Numbers that do not change stay numbers, which CUDA graphs need."""
    arguments = enumerate(default._schema.arguments)
    numbers = [i for i, each in arguments if str(each.type) == "float"]

    def read_numbers(*args: Any) -> Any:
        return implementation(*_replaced(args, numbers, torch.Tensor.item))

    by_tensors = _define(_overload_of(schema, "tensors", "Tensor"), fake, read_numbers)

    def choose(*args: Any) -> Any:
        if not any(isinstance(args[i], torch.SymFloat) for i in numbers):
            return default(*args)
        return by_tensors(*_replaced(args, numbers, _in_tensor))

    scalars = _overload_of(schema, "scalars", "Scalar")
    _library.define(scalars, tags=_TAGS)
    _library.impl(scalars.split("(", 1)[0], choose, "CompositeImplicitAutograd")
    return _found(scalars)


def _overload_of(schema: str, overload: str, number: str) -> str:
    name, rest = schema.split("(", 1)
    return f"{name}.{overload}({rest.replace('float ', number + ' ')}"


def _in_tensor(number: float) -> Tensor:
    # Of all ways to make a tensor of a symbolic number, a product does not fix its value.
    return torch.full((), 1.0, dtype=torch.float64, device="cpu") * number


def _replaced(args: tuple[Any, ...], places: list[int], change: Callable[[Any], Any]) -> list[Any]:
    changed = list(args)
    for i in places:
        changed[i] = change(args[i])
    return changed


def _define(
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any],
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"facelt_ext::{name}", fake, lib=_library)
    overload = _found(schema)
    if gradient is not None:
        setup_context, backward = gradient
        torch.library.register_autograd(
            f"facelt_ext::{name}", backward, setup_context=setup_context, lib=_library
        )
        return overload
    _library.impl(name, _refusing_gradients(name, overload), "Autograd")
    return overload


def _found(schema: str) -> Callable[..., Any]:
    name, _, overload = schema.split("(", 1)[0].partition(".")
    return getattr(getattr(torch.ops.facelt_ext, name), overload or "default")


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
