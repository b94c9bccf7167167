"""Rows divided by their norms, where some samples take no part."""

from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _backend, _native
from facelt_ext._operators import operator
from facelt_ext.functional._second_order import gradient_through_reference
from facelt_ext.reference.margin_softmax import unit_rows as reference_unit_rows


def unit_rows(x: Tensor, taking_part: Tensor) -> Tensor:
    """x [B, D] in float32 or float64, each row divided by its norm. Rows of zeros stay, with
    gradient 0.

    taking_part: [B] booleans. The other rows have gradient 0, even where they are not finite, and
    their results have no meaning.
    """
    backend = _backend.of_call("normalizing the features", x, traceable=True)
    if backend == "reference":
        return _reference(x, taking_part)
    return UnitRowsFunction.apply(x, taking_part, backend)


def _reference(x: Tensor, taking_part: Tensor) -> Tensor:
    return reference_unit_rows(torch.where(taking_part[:, None], x, 0))[0]


class UnitRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taking_part, backend):
        units, inverse_norms = _forward(x, backend)
        ctx.save_for_backward(x, taking_part, inverse_norms)
        ctx.backend = backend
        return units

    @staticmethod
    def backward(ctx, grad_units):
        x, taking_part, inverse_norms = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(y: Tensor) -> Tensor:
                return _reference(y, taking_part)

            grad = gradient_through_reference(again, x, grad_units)
        else:
            grad = _backward(grad_units, x, inverse_norms, taking_part, ctx.backend)
        return grad, None, None


def _forward_fake(x, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0])


@operator("unit_rows_forward(Tensor x, str backend) -> (Tensor, Tensor)", _forward_fake)
def _forward(x, backend):
    """x / |x| and 1 / |x|."""
    outputs = units, inverse_norms = _forward_fake(x, backend)
    _native.run(backend, x, "normalize_rows", x.contiguous(), inverse_norms, units)
    return outputs


def _backward_fake(grad_units, x, inverse_norms, taking_part, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "unit_rows_backward(Tensor grad_units, Tensor x, Tensor inverse_norms, Tensor taking_part,"
    " str backend) -> Tensor",
    _backward_fake,
)
def _backward(grad_units, x, inverse_norms, taking_part, backend):
    grad_x = _backward_fake(grad_units, x, inverse_norms, taking_part, backend)
    gain = taking_part.to(x.dtype)
    _native.run(
        backend, x, "project_rows", grad_units.contiguous(), x.contiguous(), inverse_norms, gain,
        False, grad_x,
    )  # fmt: skip
    return grad_x
