from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import facelt_ext
from facelt_ext import _C

hypothesis.settings.register_profile(
    "facelt", deadline=None, derandomize=True, print_blob=True, max_examples=60
)
hypothesis.settings.load_profile("facelt")


@dataclass(frozen=True)
class Place:
    """Where a test runs the kernels: a device and the backend for it."""

    device: str
    backend: str

    def run(self) -> facelt_ext.use_backend:
        return facelt_ext.use_backend(self.backend)


CPU = Place("cpu", "native")
EMULATED = Place("cpu", "emulated")
CUDA = Place("cuda", "native")
REFERENCE = Place("cpu", "reference")


def pytest_report_header() -> str:
    info = facelt_ext.build_info()
    return f"facelt_ext {info['version']} with {', '.join(info['backends'])}: {_C.__file__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    backends = facelt_ext.build_info()["backends"]
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    no_cuda = None if "cuda" in backends else "built without CUDA kernels"
    no_emulation = None if "emulated" in backends else "built without FACELT_EMULATION=on"
    for item in items:
        if item.get_closest_marker("gpu") and (reason := no_gpu or no_cuda):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("emulation") and no_emulation:
            item.add_marker(pytest.mark.skip(reason=no_emulation))


KERNEL_PLACES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(EMULATED, id="emulated", marks=pytest.mark.emulation),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=KERNEL_PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every way to run the kernels."""
    return request.param


@pytest.fixture(scope="module", params=[pytest.param(REFERENCE, id="reference"), *KERNEL_PLACES])
def any_place(request: pytest.FixtureRequest) -> Place:
    """Every way to run the functions."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test is not another's."""
    yield
    torch._dynamo.reset()
