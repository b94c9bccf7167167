"""Evaluation takes NumPy's arrays of any layout and byte order, and names those that it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from public_calls import content, made, names_of
from torch import Tensor

from facelt_ext import evaluation


def arrays(value: object, change: Callable[[np.ndarray], object]) -> object:
    """Those of tensors, also within lists, trials and dicts."""
    if isinstance(value, Tensor):
        return change(value.numpy())
    if isinstance(value, evaluation.Trial):
        return type(value)(*(arrays(each, change) for each in value))
    if isinstance(value, list):
        return [arrays(each, change) for each in value]
    if isinstance(value, dict):
        return {key: arrays(each, change) for key, each in value.items()}
    return value


def has_tensors(name: str) -> bool:
    found = []
    arrays(made(name)[1], found.append)
    return bool(found) and name != "embed"


NAMES = [name for name in names_of("evaluation") if has_tensors(name)]


def read_only(value: np.ndarray) -> np.ndarray:
    value.flags.writeable = False
    return value


def mapped(value: np.ndarray) -> np.ndarray:
    """In memory of a file that cannot be written to, in another place than its beginning."""
    both = np.concatenate([value, value])
    buffer = np.frombuffer(both.tobytes(), both.dtype).reshape(both.shape)
    return buffer[len(value) :]


def of_integers(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda value: value.astype(dtype) if value.dtype.kind in "iu" else value


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "array": lambda value: value,
    "columns first": np.asfortranarray,
    "backwards": lambda value: value[::-1].copy()[::-1],
    "every other": lambda value: np.repeat(value, 2, axis=0)[::2],
    "read-only": read_only,
    "mapped": mapped,
    "bytes swapped": lambda value: value.astype(value.dtype.newbyteorder()),
    **{dtype: of_integers(dtype) for dtype in ("int16", "uint8", "uint16", "uint32", "uint64")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_as_tensors(name, kind):
    function, arguments = made(name)
    expected = content(function(**arguments))
    assert content(function(**arrays(arguments, KINDS[kind]))) == expected


REFUSED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "objects": lambda value: value.astype(object),
    "texts": lambda value: value.astype(str),
    "complex": lambda value: value.astype(np.complex64),
    "long doubles": lambda value: value.astype(np.longdouble),
    "dates": lambda value: np.zeros(value.shape, "datetime64[s]"),
    "records": lambda value: np.zeros(value.shape, [("x", "i4")]),
    "masked": np.ma.masked_array,
    "beyond 64 bits": lambda value: np.full(value.shape, 2**63, np.uint64),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", NAMES)
def test_other_arrays_are_named(name, kind):
    for changed, value in made(name)[1].items():
        function, arguments = made(name)
        arguments[changed] = arrays(value, REFUSED[kind])
        if arguments[changed] is value or content(arguments[changed]) == content(value):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{changed}\b"):
            function(**arguments)


RATES = [0.1, 0.25]


@pytest.mark.parametrize(
    "far",
    [
        tuple(RATES),
        np.array(RATES),
        np.array(RATES, ">f8"),
        [np.float64(RATES[0]), np.float32(RATES[1])],
    ],
)
@pytest.mark.parametrize("name", ["tar_at_far", "all_pairs_tar_at_far", "open_set_identification"])
def test_rates_of_other_kinds(name, far):
    function, arguments = made(name)
    expected = content(function(**{**arguments, "far": RATES}))
    assert content(function(**{**arguments, "far": far})) == expected
    one = function(**{**arguments, "far": np.float64(RATES[1])})
    assert content(one) == content(function(**{**arguments, "far": [RATES[1]]}))


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_arrays_that_run_backwards(rows: int) -> None:
    features = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.arange(7)
    for some in (slice(None, rows), slice(rows, None, -1), slice(rows, rows + 1)):
        found = evaluation.all_pairs(features[some][::-1, ::-1], labels[some][::-1])
        expected = evaluation.all_pairs(
            features[some][::-1, ::-1].copy(), labels[some][::-1].copy()
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
