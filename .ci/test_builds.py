"""Builds of the package as users configure them. Each takes a minute or so: `make builds`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from facelt_ext._version import VERSION

ROOT = Path(__file__).resolve().parent.parent
PIP_WHEEL = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
WHEEL = [*PIP_WHEEL, "--wheel-dir", "wheels", "./src"]
DEVELOPMENT = ["setup.py", "build_ext", "--inplace"]
# Nothing is measured here, and compilers are quicker so.
QUICK = {"FACELT_CUDA": "off", "CMAKE_BUILD_TYPE": "Debug"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the files that git knows, as a user's checkout has them."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        target = tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return tmp_path / "src"


def start(command: list[str], cwd: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **QUICK, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command: list[str], cwd: Path, **variables: str) -> str:
    process = start(command, cwd, **variables)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def packed(folder: Path) -> list[str]:
    with zipfile.ZipFile(only(folder, "wheels/*.whl")) as wheel:
        return wheel.namelist()


def commands(sources: Path) -> str:
    return only(sources, "build/cmake-*/compile_commands.json").read_text()


@pytest.mark.parametrize("command", [WHEEL, DEVELOPMENT], ids=["wheel", "development"])
def test_a_moved_checkout_builds(sources: Path, command: list[str]) -> None:
    run(command, sources.parent if command is WHEEL else sources)
    moved = sources.parent / "elsewhere" / "src"
    moved.parent.mkdir()
    sources.rename(moved)
    run(command, moved.parent if command is WHEEL else moved)
    assert str(moved) in commands(moved)


def test_a_wheel_has_nothing_of_the_build_before(sources: Path) -> None:
    (sources / "facelt_ext" / "once.py").write_text("")
    run(WHEEL, sources.parent, CXXFLAGS="-DFIRST")
    assert "facelt_ext/once.py" in packed(sources.parent)
    shutil.rmtree(sources.parent / "wheels")
    (sources / "facelt_ext" / "once.py").unlink()
    run(WHEEL, sources.parent, CXXFLAGS="-DSECOND", MAX_JOBS="1", CMAKE_ARGS="-DNOTHING='a b'")
    assert "facelt_ext/once.py" not in packed(sources.parent)
    assert "-DSECOND" in commands(sources) and "-DFIRST" not in commands(sources)


def test_a_development_build_is_incremental_until_it_is_configured_otherwise(
    sources: Path,
) -> None:
    run(DEVELOPMENT, sources)
    assert "Building CXX" not in run(DEVELOPMENT, sources)
    output = run(DEVELOPMENT, sources, CXXFLAGS="-DOTHER")
    assert "starts anew: CXXFLAGS was None, is '-DOTHER'" in output
    assert "-DOTHER" in commands(sources)


def test_two_builds_at_once(sources: Path) -> None:
    builds = [
        start([*PIP_WHEEL, "--wheel-dir", f"w{i}", "./src"], sources.parent) for i in range(2)
    ]
    for build in builds:
        output, _ = build.communicate()
        assert build.returncode == 0, output
    wheels = [zipfile.ZipFile(only(sources.parent, f"w{i}/*.whl")).namelist() for i in range(2)]
    assert sorted(wheels[0]) == sorted(wheels[1])


@pytest.mark.parametrize("version", ["61.0.0", "68.2.2", "77.0.3"])
def test_setuptools_from_61_on(sources: Path, version: str) -> None:
    target = str(sources.parent / "old")
    old = [f"setuptools=={version}", "wheel<0.46"]
    run(["-m", "pip", "install", "--quiet", "--target", target, *old], sources)
    run(WHEEL, sources.parent, PYTHONPATH=target)
    (metadata,) = [name for name in packed(sources.parent) if name.endswith("/METADATA")]
    assert metadata == f"facelt_ext-{VERSION}.dist-info/METADATA"


def test_the_source_distribution_builds(sources: Path) -> None:
    run(["-m", "build", "--no-isolation", "--outdir", "../wheels"], sources)
    assert any(n.startswith("facelt_ext/_C.") for n in packed(sources.parent))


COMPILERS = ["g++-11", "g++-12", "g++-13", "g++-14", "clang++"]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_compiler_of_the_second_build_is_taken(sources: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    run(DEVELOPMENT, sources)
    run(DEVELOPMENT, sources, CXX=compiler)
    assert shutil.which(compiler) in commands(sources)
