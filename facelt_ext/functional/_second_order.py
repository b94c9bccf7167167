from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_through_reference(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """The gradients of function(*inputs), themselves differentiable, for a backward under
    create_graph; None for inputs that want none."""
    with torch.enable_grad():
        output = function(*inputs)
        chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(output, chosen, grad_output, create_graph=True))
    return [next(grads) if want else None for want in wanted]


def gradient_through_reference(
    function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor
) -> Tensor:
    """The same, of a function of one tensor."""
    (grad,) = gradients_through_reference(function, (x,), (True,), grad_output)
    return grad
