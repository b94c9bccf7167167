from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext import _native
from facelt_ext.functional._products import HALF


class WeightGradient:
    """The gradient [N, D] of a weight, written chunk by chunk.

    Args:
        weight: [N, D].
        operand: [B, D], what the weight's rows were multiplied with, in the products' dtype.
        gain: [1], a factor of all.
        size: the largest chunk, in rows.
        backend: of the kernels.
        inverse_norms: [N], 1 / norms of the rows if they were normalised, else None.
        grad: [N, D], where to write; None makes it.
    """

    def __init__(
        self,
        weight: Tensor,
        operand: Tensor,
        gain: Tensor,
        size: int,
        backend: str,
        inverse_norms: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> None:
        # Float types, unlike half ones, have room for the gain beforehand: one pass less.
        self._scaled_before = inverse_norms is None and operand.dtype not in HALF
        if self._scaled_before:
            operand = operand * gain
        self.weight, self.operand, self.gain = weight, operand, gain
        self.backend, self.inverse_norms = backend, inverse_norms
        if grad is None:
            grad = _native.large_output(weight, weight.numel(), weight.dtype).view(weight.shape)
        self.grad = grad
        converted = 0 if weight.dtype == operand.dtype else min(size, weight.shape[0])
        self._raw = operand.new_empty(converted, weight.shape[1])

    def write(self, first: int, gradient: Tensor, scales: Tensor) -> None:
        """From the gradient by a chunk's products [B, C], `scales` being those of its columns."""
        chunk = slice(first, first + gradient.shape[1])
        grad = self.grad[chunk]
        raw = self._raw[: grad.shape[0]] if self._raw.shape[0] else grad
        torch.mm(gradient.t(), self.operand, out=raw)
        if self.inverse_norms is None:
            if not self._scaled_before:
                torch.mul(raw, self.gain, out=grad)
            return
        _native.run(
            self.backend, raw, "project_rows", raw, self.weight[chunk], self.inverse_norms[chunk],
            self.gain, scales.shape[0] > 0, grad,
        )  # fmt: skip
