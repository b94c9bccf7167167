from __future__ import annotations

import pytest

from benchmarks.cases import FAMILIES, cases_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", default=FAMILIES[0], choices=FAMILIES)
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    parser.addoption("--select", default="", help="only cases whose name holds this")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = cases_of(*(metafunc.config.getoption(o) for o in ("family", "device", "select")))
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--family")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
