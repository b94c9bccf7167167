"""Native functions called with tensors that do not fit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from facelt_ext import _C

MODULES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("emulated", id="emulated", marks=pytest.mark.emulation),
]
# By name, in the order of the arguments; names of what is no tensor are blank.
Arguments = Mapping[str, object]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def call(module: str, function: str, arguments: Arguments, **changed: Tensor) -> None:
    getattr(getattr(_C, module), function)(*{**arguments, **changed}.values(), 1)


def assert_refused_if_wrong(
    module: str, function: str, arguments: Arguments, name: str, free: bool, optional: bool = False
) -> None:
    """free: of any size; optional: may also be empty."""
    call(module, function, arguments)
    right = arguments[name]
    assert isinstance(right, Tensor)
    if not free:
        for size in (right.numel() - 1, right.numel() + 1):
            if size == 0 and optional:
                continue
            wrong = torch.zeros(size, dtype=right.dtype)
            with pytest.raises(ValueError, match=f"{name}: expected {right.numel()} "):
                call(module, function, arguments, **{name: wrong})
    with pytest.raises(ValueError, match=f"{name}: expected .* got uint8"):
        call(module, function, arguments, **{name: right.to(torch.uint8)})
    sliced = torch.stack([right, right], -1)[..., 0]
    if right.numel() > 1:
        with pytest.raises(ValueError, match=f"{name}: expected .*not contiguous"):
            call(module, function, arguments, **{name: sliced})
