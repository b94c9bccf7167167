"""What surrounds a call changes nothing: default device and dtype, autocast, gradient modes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from public_calls import CALLS, content, made, names_of
from torch import Tensor, nn

from facelt_ext.aggregation import class_means
from facelt_ext.clusters import ClusterIndex
from facelt_ext.evaluation import embed

ALL = list(CALLS)
NAMES = names_of("evaluation", "clustering", "clusters", "aggregation", "classification")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "with torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic algorithms": deterministic,
}


def run(
    name: str,
    surroundings: contextlib.AbstractContextManager,
    change: Callable[[object], object] = lambda value: value,
) -> object:
    """What a call gives, and what the object holds then whose method it is."""
    function, arguments = made(name)
    arguments = {key: change(value) for key, value in arguments.items()}
    with surroundings:
        result = function(**arguments)
    return content([result, getattr(function, "__self__", None)])


@functools.cache
def expected(name: str) -> object:
    return run(name, contextlib.nullcontext())


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", NAMES)
def test_as_outside(name, surroundings):
    assert run(name, SURROUNDINGS[surroundings]()) == expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_features_with_gradients_are_as_without(name):
    def leaf(value: object) -> object:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.requires_grad_() if floating else value

    assert run(name, contextlib.nullcontext(), leaf) == expected(name)


class Recorder(nn.Linear):
    """A model that knows whether it ran under autocast and with gradients."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        return super().forward(inputs)


PASSES = {
    "embed": lambda model, loader, labels: embed(model, loader, progress=False)[0],
    "class_means": lambda model, loader, labels: class_means(model, loader, 4, progress=False)[0],
    "refresh_from": lambda model, loader, labels: refreshed(model, loader, labels).centroids,
}


def refreshed(model: nn.Module, loader: list, labels: Tensor) -> ClusterIndex:
    index = ClusterIndex(labels, cluster_size=4)
    index.refresh_from(model, loader, progress=False)
    return index


@pytest.mark.parametrize("name", PASSES)
def test_the_model_itself_runs_under_the_callers_autocast(name):
    torch.manual_seed(0)
    model, x, labels = Recorder(8, 6), torch.randn(40, 8), torch.arange(40) // 10
    batches = list(zip(x.split(8), labels.split(8), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        found = PASSES[name](model, batches, labels)
        assert model.seen == (True, False)
        made_before = [(model(inputs).detach(), names) for inputs, names in batches]
    assert made_before[0][0].dtype == torch.bfloat16
    assert torch.equal(found, PASSES[name](lambda rows: rows, made_before, labels))


def of_numpy(value: object) -> object:
    """Numbers, also within tuples and lists."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int | float):
        return np.int64(value) if isinstance(value, int) else np.float64(value)
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(map(of_numpy, value))
    return value


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_numpy_are_as_pythons(name):
    assert run(name, contextlib.nullcontext(), of_numpy) == expected(name)
