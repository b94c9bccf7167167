from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from facelt_ext._autocast import autocast_off


def wanted_gradients(ctx: torch.autograd.function.FunctionCtx, count: int) -> list[bool]:
    """Of which of the first `count` inputs, all tensors or None, the engine takes the gradient.

    `needs_input_grad` is True for every parameter, also where only the features' gradient was asked
    for by `torch.autograd.grad` or `backward(inputs=...)`.
    """
    wanted = list(ctx.needs_input_grad[:count])
    if torch.compiler.is_compiling():
        return wanted
    edges = [edge[0] for edge in ctx.next_functions[:count]]
    return [each and _is_executed(edge) for each, edge in zip(wanted, edges, strict=True)]


def _is_executed(node: object) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A parameter itself under torch.autograd.grad, or an engine that does not tell.
        return True


def gradients_through_reference(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """The gradients of function(*inputs), themselves differentiable, for a backward under
    create_graph; None for inputs that want none."""
    with torch.enable_grad(), autocast_off(grad_output.device.type):
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
