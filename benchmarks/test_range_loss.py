"""Times every case; `python -m benchmarks.run` makes a table of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import SHAPES, THREADS, Shape, forms_of, runner

CASES = [
    pytest.param(shape, form, id=f"{shape.name} | {form}")
    for shape in SHAPES
    for form in forms_of(shape)
]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_forward_and_backward(benchmark, device: str, shape: Shape, form: str) -> None:
    torch.set_num_threads(THREADS)
    torch.compiler.reset()
    run = runner(shape, form, device)
    expected = runner(shape, "ours", device)()
    for _ in range(3):
        gradient = run()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2)
    benchmark(run)
    benchmark.extra_info.update(shape=shape.name, form=form)
