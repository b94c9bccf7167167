"""One pass of a model over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from facelt_ext._checks import check_integers, check_matrix


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


def device_of(model: Callable[[Tensor], Tensor]) -> torch.device:
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def with_bar(loader: Iterable[Sequence[Tensor]], name: str) -> Iterable[Sequence[Tensor]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: the bar needs tqdm; pip install 'facelt_ext[aggregation]', or progress=False"
        ) from error
    return tqdm(loader, desc=name, unit="batch")


def checked_features(
    model: Callable[[Tensor], Tensor], batch: Sequence[Tensor], device: torch.device, number: int
) -> tuple[Tensor, Tensor]:
    """Features [B, D] and labels int64 [B] of a batch, checked, on the CPU."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"batch {number}: expected a tuple or list that begins with inputs and labels, "
            f"got {type(batch).__name__}{length}"
        )
    inputs, labels = batch[:2]
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs of batch {number}: expected a tensor, got {type(inputs).__name__}")
    features = model(inputs.to(device, non_blocking=True))
    name = f"features of batch {number}"
    features = check_matrix(features, name)
    features = features.cpu()
    labels = labels.cpu() if isinstance(labels, Tensor) else labels
    labels = check_integers(labels, f"labels of batch {number}", features, name)
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: expected finite numbers, got others in row {row}")
    return features, labels
