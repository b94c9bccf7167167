"""Values that arguments are replaced by: each from the right value to an odd one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from calls import B, D, N, S
from torch import Tensor

BIG = 2**62


class Plain(Tensor):
    """A subclass that holds what it is."""


class Wrapper(Tensor):
    """One that holds another tensor. The pointer that it gives is neither 0 nor right."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=4096,
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value: object) -> object:
            return value.inner if isinstance(value, cls) else value

        return function(*map(unwrap, args), **(kwargs or {}))


def like(change: Callable[[Tensor], object]) -> Callable[[object], object]:
    """Of a tensor, or of the first in a list or dict; other values stay."""

    def changed(value: object) -> object:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict) and value:
            key = next(iter(value))
            return {**value, key: changed(value[key])}
        if isinstance(value, list) and value:
            return [changed(value[0]), *value[1:]]
        return value

    return changed


def floating(change: Callable[[Tensor], Tensor]) -> Callable[[object], object]:
    return like(lambda value: change(value) if value.is_floating_point() else value)


def array(change: Callable[[np.ndarray], object]) -> Callable[[object], object]:
    return like(lambda value: change(value.numpy(force=True)))


def beyond_offset(value: Tensor) -> Tensor:
    """A wrapper of what does not begin where its memory does."""
    return Wrapper(torch.cat([value.flatten(), value.flatten()])[value.numel() :].view(value.shape))


def read_only(value: np.ndarray) -> np.ndarray:
    value.flags.writeable = False
    return value


def filled(value: float) -> Callable[[object], Tensor]:
    return lambda _: torch.full((B, D), value)


NUMBERS = {
    "none": None,
    "text": "abc",
    "no text": "",
    "bytes": b"abc",
    "-1": -1,
    "0": 0,
    "1": 1,
    "1000": 1000,
    "2^31": 2**31,
    "2^40": 2**40,
    "2^62": BIG,
    "-2^62": -BIG,
    "2^63": 2**63,
    "2^70": 2**70,
    "-2^70": -(2**70),
    "10^400": 10**400,
    "0.5": 0.5,
    "-0.0": -0.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "1e308": 1e308,
    "1e-320": 1e-320,
    "1j": 1j,
    "true": True,
    "false": False,
    "np true": np.bool_(True),
    "np float32": np.float32(0.5),
    "np float64": np.float64(1e308),
    "np nan": np.float64("nan"),
    "np float16": np.float16(2),
    "np longdouble": np.longdouble(1),
    "np int64": np.int64(3),
    "np uint64": np.uint64(2**63 + 1),
    "np complex": np.complex64(1),
    "np date": np.datetime64("2020-01-01"),
    "list": [],
    "tuple": (),
    "dict": {},
    "set": {1},
    "ints": [1, 2, 3],
    "descending": (3, 2, 1),
    "floats": (1e400, 2, 3),
    "texts": ["a", "b"],
    "nones": [None, None],
    "nested": [[1, 2], [3]],
    "dict of ints": {"a": 1},
    "object": object(),
    "range": range(3),
    "path": Path("abc"),
    "ellipsis": ...,
    "dtype": torch.float32,
    "device": torch.device("meta"),
}

ODD: dict[str, Callable[[object], object]] = {
    **{name: lambda _, number=number: number for name, number in NUMBERS.items()},
    "generator": lambda _: iter([1, 2]),
    "array": lambda _: np.ones((B, D)),
    "array []": lambda _: np.array(3),
    "array of floats": lambda _: np.array([0.5, 0.1], np.float32),
    "array of objects": lambda _: np.array([object()] * B),
    "array of texts": lambda _: np.array(["a"] * B),
    "array of records": lambda _: np.zeros(B, dtype=[("a", "i4")]),
    "array of dates": lambda _: np.zeros(B, dtype="datetime64[s]"),
    "array of long doubles": lambda _: np.zeros((B, D), dtype=np.longdouble),
    "masked array": lambda _: np.ma.masked_array(np.ones((B, D)), mask=np.eye(B, D)),
    "[0]": lambda _: torch.empty(0),
    "[0, D]": lambda _: torch.empty(0, D),
    "[B, 0]": lambda _: torch.empty(B, 0),
    "[] int": lambda _: torch.tensor(3),
    "[] float": lambda _: torch.tensor(3.0),
    "[B, D, 2]": lambda _: torch.randn(B, D, 2),
    "[B + 1, D]": lambda _: torch.randn(B + 1, D),
    "[B, D + 1]": lambda _: torch.randn(B, D + 1),
    "[N]": lambda _: torch.ones(N),
    "[B, 1]": lambda _: torch.ones(B, 1),
    "[S]": lambda _: torch.arange(S),
    "double": lambda _: torch.randn(B, D, dtype=torch.float64),
    "half": lambda _: torch.randn(B, D).half(),
    "bfloat16": lambda _: torch.randn(B, D).bfloat16(),
    "complex": lambda _: torch.randn(B, D).to(torch.complex64),
    "float8": lambda _: torch.randn(B, D).to(torch.float8_e4m3fn),
    "quantized": lambda _: torch.quantize_per_tensor(torch.randn(B, D), 0.1, 0, torch.qint8),
    "int8": lambda _: torch.zeros(B, dtype=torch.int8),
    "uint8": lambda _: torch.zeros(B, dtype=torch.uint8),
    "uint16": lambda _: torch.zeros(B, dtype=torch.uint16),
    "uint64": lambda _: torch.zeros(B, dtype=torch.uint64),
    "bool": lambda _: torch.ones(B, dtype=torch.bool),
    "floats [B]": lambda _: torch.ones(B),
    "ints [B, D]": lambda _: torch.randint(0, 3, (B, D)),
    "2^62s": lambda _: torch.full((B,), BIG),
    "-2^62s": lambda _: torch.full((B,), -BIG),
    "Ns": lambda _: torch.full((B,), N),
    "-1s": lambda _: torch.full((B,), -1),
    "-100s": lambda _: torch.full((B,), -100),
    "nans": filled(float("nan")),
    "infs": filled(float("inf")),
    "3e38": filled(3e38),
    "1e-44": filled(1e-44),
    "zeros": filled(0.0),
    "1e300": lambda _: torch.full((B, D), 1e300, dtype=torch.float64),
    "meta": lambda _: torch.randn(B, D, device="meta"),
    "sparse": lambda _: torch.randn(B, D).to_sparse(),
    "csr": lambda _: torch.randn(B, D).to_sparse_csr(),
    "nested tensor": lambda _: torch.nested.nested_tensor([torch.ones(2, D), torch.ones(3, D)]),
    "jagged": lambda _: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    "uninitialized": lambda _: torch.nn.UninitializedParameter(),
    "transposed": lambda _: torch.randn(D, B).t(),
    "expanded": lambda _: torch.randn(1, D).expand(B, D),
    "strided": lambda _: torch.randn(B, 2 * D)[:, ::2],
    "parameter": lambda _: torch.nn.Parameter(torch.randn(B, D)),
    "negative": lambda _: torch._neg_view(torch.randn(B, D)),
    "wrapper": lambda _: Wrapper(torch.randn(B, D)),
    "offset wrapper": lambda _: beyond_offset(torch.randn(B, D)),
    # Of what was there: other kinds of the same numbers.
    "its zeros": like(torch.zeros_like),
    "its first again": like(lambda value: value[:1].expand(value.shape) if value.ndim else value),
    "none of it": like(lambda value: value[:0] if value.ndim else value),
    "twice": like(lambda value: torch.cat([value, value]) if value.ndim else value),
    "its array": array(lambda value: value),
    "its list": like(Tensor.tolist),
    "its read-only array": array(read_only),
    "its swapped array": array(lambda value: value.astype(value.dtype.newbyteorder())),
    "its array of objects": array(lambda value: value.astype(object)),
    "its meta": like(lambda value: value.to("meta")),
    "its wrapper": like(Wrapper),
    "its offset wrapper": like(beyond_offset),
    "its subclass": like(lambda value: value.detach().as_subclass(Plain)),
    "its parameter": like(lambda value: torch.nn.Parameter(value.detach(), requires_grad=False)),
    "its sparse": like(lambda value: value.to_sparse()),
    "its half": floating(Tensor.half),
    "its double": floating(Tensor.double),
    "its nans": floating(lambda value: torch.full_like(value, torch.nan)),
    "with a nan": floating(lambda value: value.index_fill(0, torch.tensor([0]), torch.nan)),
    "its leaf": floating(lambda value: value.detach().requires_grad_()),
}
