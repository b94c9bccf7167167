"""Choosing a backend, what a build says of itself, and life without the native module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import facelt_ext
from facelt_ext import _native, functional
from facelt_ext._backend import current

X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_use_backend_nests_and_restores():
    before = current()
    choose = facelt_ext.use_backend("reference")
    with choose, choose, facelt_ext.use_backend("native"):
        assert current() == "native"
    assert current() == before

    @facelt_ext.use_backend("reference")
    def inside() -> str:
        return current()

    assert inside() == "reference" and current() == before
    with pytest.raises(ZeroDivisionError), choose:
        1 / 0  # noqa: B018
    assert current() == before


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="name: expected one of native, reference, .* got 'cuda'"):
        facelt_ext.use_backend("cuda")
    result = python("import facelt_ext", FACELT_BACKEND="fast")
    assert (
        "FACELT_BACKEND: expected one of native, reference, emulated, got 'fast'" in result.stderr
    )


def test_the_environment_sets_the_default():
    code = "from facelt_ext._backend import current; print(current())"
    assert python(code, FACELT_BACKEND="reference").stdout.strip() == "reference"


def test_build_info():
    info = facelt_ext.build_info()
    assert info["version"] == facelt_ext.__version__
    assert info["backends"][0] == "cpu"
    assert ("cuda" in info["backends"]) == (info["cuda_missing"] is None)
    assert info["native_missing"] is None and "." in info["compiler"]


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch):
    class WithoutCuda:
        @staticmethod
        def build_info():
            return {"cuda_missing": "no nvcc was found"}

    monkeypatch.setattr(_native, "_C", WithoutCuda)
    _native._kernels.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"no CUDA kernels: no nvcc was found\..*FACELT_CUDA=on pip"
    ):
        _native._kernels("native", "cuda")
    with pytest.raises(RuntimeError, match="no native kernels for xpu tensors"):
        _native._kernels("native", "xpu")
    with pytest.raises(RuntimeError, match="build with FACELT_EMULATION=on"):
        _native._kernels("emulated", "cpu")
    _native._kernels.cache_clear()


def test_without_the_native_module_the_reference_runs_and_warns_once():
    code = """
import sys, warnings
sys.modules["facelt_ext._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import facelt_ext, torch
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    loss = facelt_ext.RangeLoss(alpha=1.0)(x, torch.tensor([5, 5]))
    loss.backward()
print(loss.item(), x.grad.tolist(), facelt_ext.build_info()["backends"], len(caught))
print(caught[0].message)
try:
    with facelt_ext.use_backend("native"):
        facelt_ext.RangeLoss()(x, torch.tensor([5, 5]))
except RuntimeError as error:
    print(error)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    first, warning, error = result.stdout.splitlines()
    assert first == "25.0 [[-6.0, -8.0], [6.0, 8.0]] [] 1"
    assert "in plain PyTorch" in warning and "pip install" in warning
    assert error.startswith("backend 'native': there is no native module. ")


def test_importing_needs_torch_and_numpy_only():
    code = """
import sys
import torch, numpy
before = {name.split(".")[0] for name in sys.modules}
import facelt_ext, facelt_ext.samplers
after = {name.split(".")[0] for name in sys.modules}
print(sorted(n for n in after - before - set(sys.stdlib_module_names) if n != "facelt_ext"))
"""
    assert python(code).stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
def test_labels_on_another_device_are_named():
    with pytest.raises(ValueError, match="labels: expected device cuda:0"):
        functional.range_loss(X.cuda(), Y)


def test_the_emulated_backend_wants_cpu_tensors():
    with pytest.raises(RuntimeError, match="backend 'emulated': wants tensors on cpu, got meta"):
        _native._kernels("emulated", "meta")


def test_the_stub_lists_what_the_module_has():
    from facelt_ext import _C

    stub = Path(facelt_ext.__file__).with_name("_C.pyi").read_text()
    for name in [n for n in dir(_C.cpu) if not n.startswith("_")]:
        assert f"def {name}(" in stub
    for name in [n for n in dir(_C) if not n.startswith("_")]:
        assert name in stub
