"""What the losses' constructors and calls have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from facelt_ext._checks import FLOATING, check_count, check_size, is_exporting


def new_weight(
    num_classes: int,
    embedding_size: int,
    rows: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Uninitialised rows of classes, whose sizes were counted before."""
    check_size("num_classes, embedding_size", num_classes, embedding_size)
    return nn.Parameter(torch.empty(rows, embedding_size, **checked_kind(device, dtype)))


def checked_sizes(num_classes: int, embedding_size: int) -> tuple[int, int]:
    return check_count(num_classes, "num_classes"), check_count(embedding_size, "embedding_size")


def checked_kind(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, torch.device | torch.dtype | None]:
    """`device` and `dtype` of parameters."""
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(
            f"dtype: expected float64, float32, bfloat16, float16 or None, got {dtype!r}"
        )
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: expected a device of torch, got {device!r}") from error
    return {"device": device, "dtype": dtype}


def shown_sizes(weight: Tensor) -> str:
    """For a head's repr; FullyShardedDataParallel flattens its weight."""
    if weight.ndim != 2:
        return "sharded"
    return f"num_classes={weight.shape[0]}, embedding_size={weight.shape[1]}"


def check_indices_tuple(indices_tuple: object) -> None:
    """The third argument of pytorch-metric-learning's losses, None where nothing was mined."""
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple: expected None, as this loss takes no mined pairs or triplets, got "
            f"{type(indices_tuple).__name__}"
        )


def whole_weight(head: nn.Module, method: str) -> Tensor:
    """The weight for a method other than forward, where fully_shard leaves it sharded."""
    weight = head.weight
    if torch.compiler.is_compiling() or type(weight) in (nn.Parameter, Tensor):
        return weight
    if callable(getattr(weight, "full_tensor", None)):
        raise TypeError(
            f"weight: expected a tensor with all rows, got {type(weight).__name__}; expected "
            f"weight.full_tensor(), or a call of head.unshard() before {method}, or once of "
            f"torch.distributed.fsdp.register_fsdp_forward_method(head, {method!r})"
        )
    return weight


def is_step() -> bool:
    """Whether what this call moves on may move. Not under torch.export and torch.func, which allow
    no change, and not in a backward, where activation checkpointing makes the call again."""
    if torch.compiler.is_compiling():
        return not is_exporting()
    return torch._C._current_graph_task_id() == -1 and not in_transform()


def in_transform() -> bool:
    """Whether a transform of torch.func surrounds this call."""
    return torch._C._are_functorch_transforms_active()
