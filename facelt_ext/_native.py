"""The native module, and the choice of its backend for a tensor."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from facelt_ext._missing_module import explain
from facelt_ext._version import VERSION

try:
    _C = importlib.import_module("facelt_ext._C")
except ImportError as error:
    _C = None
    _missing = explain(error)
    warnings.warn(
        f"facelt_ext works without its native module, slowly, in plain PyTorch. {_missing}",
        stacklevel=2,
    )

_NOTHING = torch.empty(0, dtype=torch.uint8)
# Bytes from which on page faults matter.
LARGE = 4 << 20
REBUILD = "FACELT_CUDA=on pip install --force-reinstall --no-deps ."


def available() -> bool:
    return _C is not None


def build_info() -> dict[str, object]:
    """What the native module was built with.

    Returns a dict: `version`, `backends` (a list out of "cpu", "cuda", "emulated"), `compiler`,
    `cuda_version` and `cuda_archs` (None without CUDA kernels), `cuda_missing` (why there are none,
    else None), `native_missing` (why the native module could not be imported, else None).
    """
    if _C is not None:
        return {**_C.build_info(), "native_missing": None}
    nothing = dict.fromkeys(("compiler", "cuda_version", "cuda_archs", "cuda_missing"))
    return {"version": VERSION, "backends": [], **nothing, "native_missing": _missing}


def run(backend: str, like: Tensor, function: str, *args: object) -> None:
    """Calls a native function where `like` lies: on its current CUDA stream, or on CPU threads."""
    if like.is_cuda:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(_kernels(backend, "cuda"), function)(*args, stream)
    else:
        getattr(_kernels(backend, _device_type(like)), function)(*args, torch.get_num_threads())


def call(backend: str, like: Tensor, function: str, *args: int) -> int:
    """What a function says that runs no kernel."""
    return getattr(_kernels(backend, _device_type(like)), function)(*args)


def _device_type(like: Tensor) -> str:
    # The name of a device is a new string each time, which small losses notice.
    return "cpu" if like.is_cpu else like.device.type


def workspace(backend: str, like: Tensor, function: str, *args: int) -> Tensor:
    """Uninitialised memory of the size that the native function asks for."""
    size = call(backend, like, function + "_workspace", *args)
    if size == 0 and like.is_cpu:
        return _NOTHING
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def large_output(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [count] where `like` lies; on the CPU that which a step before freed."""
    if _C is None or not like.is_cpu or count * dtype.itemsize < LARGE:
        return torch.empty(count, dtype=dtype, device=like.device)
    return torch.frombuffer(_C.LargeMemory(count * dtype.itemsize), dtype=dtype, count=count)


@functools.cache
def _kernels(backend: str, device_type: str) -> ModuleType:
    if _C is None:
        raise RuntimeError(f"backend {backend!r}: there is no native module. {_missing}")
    if backend == "emulated":
        if device_type != "cpu":
            raise RuntimeError(f"backend 'emulated': wants tensors on cpu, got {device_type}")
        if not hasattr(_C, "emulated"):
            raise RuntimeError("backend 'emulated': build with FACELT_EMULATION=on to have it")
        return _C.emulated
    if backend != "native":
        raise RuntimeError(f"backend {backend!r} has no native kernels")
    if device_type == "cpu":
        return _C.cpu
    if device_type != "cuda":
        raise RuntimeError(
            f"no native kernels for {device_type} tensors: "
            "facelt_ext.use_backend('reference') takes any device"
        )
    if not hasattr(_C, "cuda"):
        raise RuntimeError(
            f"this build of facelt_ext has no CUDA kernels: {_C.build_info()['cuda_missing']}. "
            f"`{REBUILD}` in the folder of its sources builds them."
        )
    _C.cuda.require_driver()
    return _C.cuda
