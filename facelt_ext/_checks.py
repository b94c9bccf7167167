"""Checks of arguments.

Each raises an error that names the argument, what came and what was wanted, or returns the value,
converted where that is its job.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Tuples: torch.compile of torch 2.6 does not trace unions of types.
WHOLE = (int, torch.SymInt)
NUMBER = (int, float, torch.SymFloat)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float64, torch.float32)}
LARGEST_INTEGER = 2**63 - 1
# Numbers of a tensor that no machine has the memory for: 2 ** 47 bytes are its addresses.
LARGEST_SIZE = 2**45

# torch 2.6 does not tell.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

# Types of tensors that kernels can read. Others are looked into once.
_readable = {Tensor, nn.Parameter, nn.Buffer}


def check_tensor(value: Tensor, name: str) -> Tensor:
    """A tensor whose memory can be read: dense, and of no type that holds other tensors."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return value
    if type(value) not in _readable:
        check_readable(value, name)
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    return value.resolve_neg() if value.is_neg() else value


def check_readable(value: Tensor, name: str) -> None:
    """Raises for types of tensors that have no memory of their own, or none yet."""
    kind = type(value)
    if issubclass(kind, UninitializedTensorMixin):
        raise TypeError(f"{name}: expected a tensor with a shape, got {kind.__name__}")
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        _readable.add(kind)
        return
    if _is_fake(value) and torch._C._len_torch_dispatch_stack():
        return
    way_out = ""
    if callable(getattr(value, "full_tensor", None)):
        way_out = f"; expected {name}.full_tensor()"
    raise TypeError(
        f"{name}: expected a tensor with memory of its own, got {kind.__name__}, which has a "
        f"__torch_dispatch__{way_out}"
    )


def _is_fake(value: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, (FakeTensor, FunctionalTensor))


def check_matrix(value: Tensor, name: str) -> Tensor:
    value = check_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected dtype float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.ndim != 2 or value.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [rows, dimensions >= 1], got {list(value.shape)}")
    return value


def check_values(value: Tensor, name: str) -> None:
    """Raises for a tensor on the meta device, where no other argument says which is wanted."""
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected values, got a tensor on meta")


def check_integers(
    value: Tensor, name: str, like: Tensor | None = None, like_name: str | None = None
) -> Tensor:
    """`value` as int64; with `like`, one for each row of it and on its device."""
    value = check_tensor(value, name)
    if value.dtype not in INTEGER:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if like is not None:
        if value.ndim != 1 or value.shape[0] != like.shape[0]:
            raise ValueError(
                f"{name}: expected shape [{like.shape[0]}], one for each row of {like_name}, "
                f"got {list(value.shape)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name}: expected device {like.device}, where {like_name} is, got {value.device}"
            )
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def check_integer(value: int, name: str) -> int:
    """An integer of at most 64 bits, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, WHOLE):
        if not isinstance(value, np.integer):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        value = int(value)
    if not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return value


def check_count(value: int, name: str, minimum: int = 1, maximum: int | None = None) -> int:
    value = check_integer(value, name)
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected at most {maximum}, got {value}")
    return value


def check_size(name: str, *sizes: int) -> None:
    """Sizes of a tensor for which there can be memory; `name` tells them in this order."""
    numbers = 1
    for size in sizes:
        numbers *= size
    if numbers > LARGEST_SIZE:
        raise ValueError(
            f"{name}: expected sizes of a tensor that fits into memory, got "
            f"{' x '.join(map(str, sizes))}"
        )


def check_flag(value: bool, name: str) -> bool:
    """A bool, of Python or NumPy."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def check_number(value: float, name: str, dtype: torch.dtype) -> float:
    """A number, of Python or NumPy, that is finite in `dtype` too, in which it is computed with."""
    if isinstance(value, bool) or not isinstance(value, NUMBER):
        if not isinstance(value, (np.integer, np.floating)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = value.item()
    elif isinstance(value, np.float64):  # which is a float
        value = value.item()
    largest = LARGEST[dtype]
    if not -largest <= value <= largest:
        raise ValueError(f"{name}: expected a number that is finite in {dtype}, got {value}")
    # torch takes integers of 64 bits.
    return float(value) if isinstance(value, int) and abs(value) > LARGEST_INTEGER else value


def check_positive(value: float, name: str, dtype: torch.dtype) -> float:
    value = check_number(value, name, dtype)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return value


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_weight(weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """A row for each class, to be multiplied with features."""
    features = check_matrix(features, "features")
    weight = check_matrix(weight, "weight")
    if weight.shape[0] < 1 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight: expected shape [classes >= 1, {features.shape[1]}], the features' dimensions,"
            f" got {list(weight.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(
            f"weight: expected device {features.device}, where features is, got {weight.device}"
        )
    return weight, features


def check_angle(value: float, name: str) -> float:
    """A number of radians in [0, pi]."""
    value = check_number(value, name, torch.float32)
    if not 0 <= value <= math.pi:
        raise ValueError(
            f"{name}: expected radians in [0, pi], got {value}; math.radians turns degrees into "
            "radians"
        )
    return value


def check_margin(
    value: float | Tensor, name: str, features: Tensor, weight: Tensor, angle: bool = False
) -> float | Tensor:
    """A number, of radians if it is an angle, or one per class [N] or per sample [B, 1]."""
    if not isinstance(value, Tensor):
        return check_angle(value, name) if angle else check_number(value, name, torch.float32)
    value = check_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    per_class, per_sample = [weight.shape[0]], [features.shape[0], 1]
    if list(value.shape) not in (per_class, per_sample):
        raise ValueError(
            f"{name}: expected a number, or shape {per_class}, one per class, or {per_sample}, "
            f"one per sample, got {list(value.shape)}"
        )
    if value.device != features.device:
        raise ValueError(
            f"{name}: expected device {features.device}, where features is, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: no gradient goes to margins; expected {name}.detach()")
    return value


def check_class_range(index: Tensor, name: str, classes: int, ignore_index: int | None) -> None:
    """Waits for the device. Nothing can be looked at under torch.export and torch.func.vmap."""
    if torch.compiler.is_compiling():
        if is_exporting():
            return
    elif torch._C._functorch.is_batchedtensor(index):
        return
    wrong = (index < 0) | (index >= classes)
    if ignore_index is not None:
        wrong &= index != ignore_index
    if wrong.any():
        position = int(wrong.nonzero()[0])
        allowed = "" if ignore_index is None else f" or {ignore_index}"
        raise ValueError(
            f"{name}: expected numbers in [0, {classes}){allowed}, got {int(index[position])} "
            f"at position {position}"
        )


def check_data(value: Tensor, name: str) -> Tensor:
    """A plain tensor without a gradient, whose numbers are there: for what is no loss."""
    value = check_tensor(value, name)
    if value.is_meta or (type(value) not in _readable and _is_fake(value)):
        raise TypeError(f"{name}: expected a tensor with data, got one on the meta device")
    if torch._C._functorch.is_batchedtensor(value):
        raise TypeError(f"{name}: expected a tensor with data, got one of torch.func.vmap")
    return value.detach().as_subclass(Tensor)


def check_counts(values: Sequence[int], name: str, minimum: int = 1) -> list[int]:
    """Integers of at least `minimum`, in a tuple, a list or a NumPy array [n]."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = list(values)
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple or list of ints, got {type(values).__name__}")
    return [check_count(value, f"{name}[{i}]", minimum) for i, value in enumerate(values)]


def check_device(value: torch.device | str | int, name: str) -> torch.device:
    """A device that is there."""
    if isinstance(value, bool) or not isinstance(value, (torch.device, str, int)):
        raise TypeError(f"{name}: expected a torch.device or a str, got {type(value).__name__}")
    try:
        return torch.empty(0, device=value).device
    except Exception as error:  # Each backend has its own kinds.
        raise ValueError(f"{name}: expected a device that is there, got {value!r}") from error


def check_path(value: str | os.PathLike[str], name: str) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a str or a path, got {type(value).__name__}")
    value = os.fsdecode(value)
    if not value or "\0" in value:
        raise ValueError(f"{name}: expected a path, got {value!r}")
    return value


def zeros_of_size(name: str, *sizes: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU; sizes for which there is no memory are an error, as of `check_size`."""
    check_size(name, *sizes)
    try:
        return torch.zeros(sizes, dtype=dtype, device="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected sizes of a tensor that fits into memory, got "
            f"{' x '.join(map(str, sizes))}"
        ) from error


def check_ignore_index(value: int | None) -> int | None:
    """A label whose samples take no part; None: there is none."""
    return None if value is None else check_integer(value, "ignore_index")
