"""What is said where the native module cannot be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import facelt_ext
from facelt_ext import _missing_module

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SOURCES = Path(facelt_ext.__file__).parent
NOT_BUILT = "pip install --force-reinstall --no-deps ."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package without a module, alone on the path."""
    folder = tmp_path / "sources" / "facelt_ext"
    folder.mkdir(parents=True)
    monkeypatch.setattr(_missing_module, "PACKAGE", folder)
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    return folder


@pytest.mark.parametrize(
    ("files", "message", "said", "unsaid"),
    [
        ([], "No module named 'facelt_ext._C'", ["It is not in ", NOT_BUILT], ["circular"]),
        (
            ["_C.cpython-27-x86_64-linux-gnu.so"],
            "No module named 'facelt_ext._C'",
            ["_C.cpython-27-x86_64-linux-gnu.so is for another Python", NOT_BUILT],
            ["It is not in"],
        ),
        (
            [f"_C{SUFFIX}"],
            "libgomp.so.1: cannot open shared object file: No such file or directory",
            ["needs the library libgomp.so.1", "apt-get install libgomp1", "dnf install libgomp"],
            ["pip install"],
        ),
        (
            [f"_C{SUFFIX}"],
            "libgomp-a34b3233.so.1: cannot open shared object file: No such file or directory",
            ["needs the library libgomp-a34b3233.so.1", "apt-get install libgomp1"],
            ["pip install"],
        ),
        (
            [f"_C{SUFFIX}"],
            "libomp.so.5: cannot open shared object file: No such file or directory",
            ["needs the library libomp.so.5", "apt-get install libomp5"],
            ["pip install"],
        ),
        (
            [f"_C{SUFFIX}"],
            "libother.so: cannot open shared object file: No such file or directory",
            ["needs the library libother.so", "the package of your system"],
            ["pip install"],
        ),
        (
            [f"_C{SUFFIX}"],
            "/x/_C.so: undefined symbol: _ZN3foo",
            ["undefined symbol: _ZN3foo", NOT_BUILT],
            ["is missing"],
        ),
    ],
)
def test_each_cause_names_its_cure(
    package: Path, files: list[str], message: str, said: list[str], unsaid: list[str]
) -> None:
    for name in files:
        (package / name).touch()
    text = _missing_module.explain(ImportError(message))
    assert all(each in text for each in said), text
    assert not any(each in text for each in unsaid), text


def test_sources_that_hide_an_installed_module(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed" / "facelt_ext"
    installed.mkdir(parents=True)
    (installed / f"_C{SUFFIX}").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed.parent)])
    text = _missing_module.explain(ImportError("No module named 'facelt_ext._C'"))
    assert f"imports {package}" in text and f"instead of {installed}" in text
    assert NOT_BUILT not in text


def test_a_path_that_cannot_be_searched_is_passed_over(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path])
    assert "It is not in" in _missing_module.explain(ImportError("No module"))


def test_a_folder_without_permission_is_passed_over(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sys, "path", ["/closed"])
    real = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: refuse(path) if path.parts[1] == "closed" else real(path)
    )
    assert "It is not in" in _missing_module.explain(ImportError("No module"))


@pytest.mark.parametrize("content", [None, b"", b"no module"])
def test_sources_alone(tmp_path: Path, content: bytes | None) -> None:
    """No metadata, no module or one that is damaged: plain PyTorch, and one warning."""
    shutil.copytree(SOURCES, tmp_path / "facelt_ext", ignore=shutil.ignore_patterns("*.so"))
    if content is not None:
        (tmp_path / "facelt_ext" / f"_C{SUFFIX}").write_bytes(content)
    # An installation for development finds its own module for every copy of the package.
    code = """
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in str(each).lower()]
import facelt_ext
print(facelt_ext.__version__, facelt_ext.build_info()["version"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [facelt_ext.__version__] * 2
    assert result.stderr.count("Warning: facelt_ext works without its native module") == 1
    assert ("It is not in" if content is None else "It cannot be loaded") in result.stderr
