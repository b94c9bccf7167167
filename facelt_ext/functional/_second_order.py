from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_through_reference(
    function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor
) -> Tensor:
    """The gradient of function(x), itself differentiable: for a backward under create_graph."""
    with torch.enable_grad():
        output = function(x)
        return torch.autograd.grad(output, x, grad_output, create_graph=True)[0]
