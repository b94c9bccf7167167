"""A right call of each public function, class and method, for tests over all that is public.

A call is a function and its arguments by name. `CALLS[name]()` makes it anew, from torch's global
generator: `ClusterIndex.refresh` is a method of an index of its own each time. Names are those of
`__all__`, and `Class.method`. Classes are called as users go on with what they make: a loss is run,
a sampler draws a batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import calls_of_evaluation
import calls_of_losses
import torch
from calls import Call
from torch import Tensor

import facelt_ext
from facelt_ext import (
    aggregation,
    classification,
    clustering,
    clusters,
    evaluation,
    functional,
    samplers,
)
from facelt_ext.aggregation import SuperClasses
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex

MODULES: Mapping[str, ModuleType] = {
    "facelt_ext": facelt_ext,
    "functional": functional,
    "evaluation": evaluation,
    "clustering": clustering,
    "clusters": clusters,
    "aggregation": aggregation,
    "classification": classification,
    "samplers": samplers,
}

CALLS: dict[str, Callable[[], Call]] = {**calls_of_losses.CALLS, **calls_of_evaluation.CALLS}

# Names that are public and have no call, and why.
NO_CALLS = {"read_blufr": "takes a file of MATLAB, which scipy writes: it has a test of its own"}


def public() -> dict[str, tuple[str, Callable[..., object]]]:
    """By name the module, a key of MODULES, and the object of all that takes arguments."""
    found = {}
    for module, content in MODULES.items():
        for name in content.__all__:
            value = getattr(content, name)
            # Results are made by functions, not by users.
            if inspect.ismodule(value) or (inspect.isclass(value) and issubclass(value, tuple)):
                continue
            found.setdefault(name, (module, value))
            if inspect.isclass(value):
                for method, function in _methods(value):
                    found.setdefault(f"{name}.{method}", (module, function))
    return {name: each for name, each in found.items() if parameters(each[1])}


def parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Those that have a name of their own, without the instance of a method.

    Where a class hands options on to the class that it is made of, these are among them.
    """
    if inspect.isclass(function):
        own = [base.__init__ for base in function.__mro__ if _is_ours(base)]
    else:
        own = [function]
    found: dict[str, inspect.Parameter] = {}
    for place, each in enumerate(own):
        signature = inspect.signature(each).parameters.values()
        for parameter in signature:
            if parameter.kind is parameter.KEYWORD_ONLY or (
                place == 0
                and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                and parameter.name != "self"
            ):
                found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature):
            break
    return found


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("facelt_ext")


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., object]]]:
    torch_module = torch.nn.Module if issubclass(cls, torch.nn.Module) else object
    for name in dict.fromkeys(
        name for base in cls.__mro__ if _is_ours(base) for name in vars(base)
    ):
        function = getattr(cls, name)
        of_torch = hasattr(torch_module, name) and name != "forward"
        if not name.startswith("_") and not of_torch and callable(function):
            yield name, function


def names_of(*modules: str) -> list[str]:
    """Names of those modules that have a call."""
    return [name for name, (module, _) in public().items() if module in modules and name in CALLS]


def made(name: str, seed: int = 0) -> Call:
    """The same call each time."""
    torch.manual_seed(seed)
    return CALLS[name]()


def content(value: object) -> object:
    """Of a result or of an object all that it holds, in what can be compared by ==."""
    if isinstance(value, Tensor):
        assert value.is_cpu
        numbers = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        bits = numbers.view(torch.uint8) if len(numbers) else numbers
        return value.dtype, value.shape, bits.tolist()
    if isinstance(value, tuple | list):
        return [content(each) for each in value]
    if isinstance(value, ClusterIndex):
        return {name: content(each) for name, each in value.state_dict().items()}
    if isinstance(value, SuperClasses):
        return [content(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, NearestClusterClassifier):
        return content([value.classes, value.cluster_class, value.centroids])
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, int | str | range | None) else None
