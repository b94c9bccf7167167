"""Whether a training goes astray: numbers that are not finite."""

from __future__ import annotations

import torch
from face_demo.errors import DataError
from torch import Tensor, nn

ADVICE = (
    "nothing of this epoch was saved, and the checkpoint before, if there is one, is good; try a "
    "lower --rate, a smaller --clip-norm or another --amp, in another --output"
)
# GradScaler begins with 2 ** 16 and halves it in a step that it skips.
_SMALLEST_SCALE = 2.0**-20


def check_losses(losses: Tensor, first_step: int, scaler: torch.amp.GradScaler) -> None:
    """Of some steps, of which ``first_step`` is the first.

    A loss scaler skips a step whose gradients are not finite, and with them a loss that is not; so
    with one only what goes on is an error.

    Raises:
        DataError: training cannot go on.
    """
    wrong = (~losses.isfinite()).nonzero()[:, 0]
    if scaler.is_enabled():
        if scaler.get_scale() < _SMALLEST_SCALE:
            raise DataError(
                f"step {first_step + len(losses) - 1}: the gradients have not been finite for many "
                f"steps, so that float16 skips all; {ADVICE}"
            )
        return
    if len(wrong):
        step, loss = first_step + int(wrong[0]), float(losses[wrong[0]])
        raise DataError(f"step {step}: the loss is {loss}; {ADVICE}")


def mean_loss(losses: Tensor, last_step: int) -> Tensor:
    """Of an epoch's steps, float64, without those that a loss scaler has skipped.

    Raises:
        DataError: there is no other.
    """
    finite = losses[losses.isfinite()].double()
    if len(finite) == 0:
        raise DataError(f"step {last_step}: no loss of the epoch is finite; {ADVICE}")
    return finite.mean()


def check_weights(
    network: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, when: str
) -> None:
    """Weights of both, buffers of the network, and what the optimizer keeps.

    Buffers of losses may hold NaN, where there is no value yet.

    Raises:
        DataError: a number is not finite.
    """
    kept = ((name, each) for state in optimizer.state.values() for name, each in state.items())
    for name, tensor in (
        *network.state_dict().items(),
        *criterion.named_parameters(prefix="loss"),
        *((name, each) for name, each in kept if isinstance(each, Tensor)),
    ):
        if not _finite(tensor):
            raise DataError(f"{when}: {name} is not finite; {ADVICE}")


def _finite(tensor: Tensor) -> bool:
    """Without a copy of the size of the tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(each.isfinite()) for each in torch.aminmax(tensor.detach()))
