"""One pass of a model over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from facelt_ext._checks import check_data, check_device, check_flag, check_integers, check_matrix


def chosen_device(
    model: Callable[[Tensor], Tensor], device: torch.device | str | None
) -> torch.device:
    """`device`, or where the model is."""
    if not callable(model):
        raise TypeError(f"model: expected a module or a function, got {type(model).__name__}")
    if device is not None:
        return check_device(device, "device")
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if modules:
            model.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def batches_of(
    loader: Iterable[Sequence[Tensor]], progress: bool, name: str
) -> Iterable[Sequence[Tensor]]:
    """Those of the loader, with a bar if there is to be progress."""
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, Tensor | np.ndarray | np.generic):
        raise TypeError(f"loader: expected an iterable of batches, got {type(loader).__name__}")
    if not check_flag(progress, "progress"):
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: the bar needs tqdm; pip install 'facelt_ext[aggregation]', or progress=False"
        ) from error
    return tqdm(loader, desc=name, unit="batch")


class Rows:
    """Copies of what comes batch by batch, in one memory that grows.

    A tensor for each batch would lie between the layers that the model makes and frees, whose
    memory could then not be used again.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor, name: str) -> None:
        if self._memory is None:
            self._memory = torch.empty_like(rows[:0])
        if rows.shape[1:] != self._memory.shape[1:]:
            raise ValueError(
                f"{name}: expected {self._memory.shape[1]} dimensions, as in batch 0, "
                f"got {rows.shape[1]}"
            )
        end = self._count + len(rows)
        if end > len(self._memory):
            larger = self._memory.new_empty(max(2 * self._count, end), *rows.shape[1:])
            larger[: self._count] = self._memory[: self._count]
            self._memory = larger
        self._memory[self._count : end] = rows
        self._count = end

    def all(self) -> Tensor | None:
        """[rows, ...], a view of more memory; None if there was no batch."""
        return None if self._memory is None else self._memory[: self._count]


def checked_features(
    model: Callable[[Tensor], Tensor],
    batch: Sequence[Tensor],
    device: torch.device,
    number: int,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Features [B, D] and labels int64 [B] of a batch, checked, on the CPU.

    They may be views of all that the model made of its inputs, or lie where the next batch's will.
    Features of the label `ignore_index` may be anything.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"loader: batch {number}: expected a tuple or list that begins with inputs and labels, "
            f"got {type(batch).__name__}{length}"
        )
    inputs, labels = batch[:2]
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"loader: inputs of batch {number}: expected a tensor, got {type(inputs).__name__}"
        )
    features = model(inputs.to(device, non_blocking=True))
    name = f"model: features of batch {number}"
    features = check_matrix(check_data(features, name), name).cpu()
    name_of_labels = f"loader: labels of batch {number}"
    labels = check_data(labels, name_of_labels).cpu()
    labels = check_integers(labels, name_of_labels, features, "its features")
    finite = features.isfinite().all(dim=1)
    if ignore_index is not None:
        finite |= labels == ignore_index
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: expected finite numbers, got others in row {row}")
    return features, labels
