"""What a build does without compiling: files, tools, folders, the last line of one that fails."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("native_build", ROOT / "native_build.py")
native_build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(native_build)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_source_distribution_has_what_a_build_reads(tmp_path: Path) -> None:
    code = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    copy = tmp_path / "src"
    for name in filter(None, names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).symlink_to(ROOT / name)
    (copy / "csrc" / "left.so").touch()
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    listed = subprocess.check_output(["tar", "tzf", *tmp_path.glob("*.tar.gz")], text=True).split()
    files = {name.partition("/")[2] for name in listed}
    folders = ("csrc/", "cmake/", "facelt_ext/")
    wanted = {name for name in names if name.startswith(folders)}
    wanted |= {"CMakeLists.txt", "setup.py", "native_build.py", "pyproject.toml"}
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md"}
    assert wanted - files == set()
    assert [name for name in files if name.endswith((".so", ".pyc"))] == []


VARIABLES = (
    *("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CMAKE_PREFIX_PATH", "CMAKE_TOOLCHAIN_FILE"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH", "NVCC_APPEND_FLAGS"),
    *native_build.OPTIONS,
)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_of_the_build_starts_a_development_folder_anew(
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "build"
    monkeypatch.delenv(variable, raising=False)
    native_build.keep_if_same(folder, native_build.configuration(None))
    (folder / "object.o").touch()
    native_build.keep_if_same(folder, native_build.configuration(None))
    assert (folder / "object.o").exists()
    monkeypatch.setenv(variable, "something")
    native_build.keep_if_same(folder, native_build.configuration(None))
    assert not (folder / "object.o").exists()
    assert f"{variable} was None, is 'something'" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL", "CMAKE_GENERATOR"])
def test_what_a_build_makes_does_not_depend_on_how_it_runs(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = native_build.configuration(None)
    monkeypatch.setenv(variable, "1")
    assert native_build.configuration(None) == before


def test_another_version_of_compiler_or_nvcc_is_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tool"
    monkeypatch.setenv("CXX", str(tool))
    seen = set()
    for version in ("1.0", "2.0"):
        program(tool, f"echo tool {version}")
        found = native_build.configuration(str(tool))
        seen |= {found["compiler"], found["nvcc"]}
    assert len(seen) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sources": "/moved"}'])
def test_a_damaged_or_foreign_record_starts_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "configuration.json").write_text(text)
    (tmp_path / "object.o").touch()
    wanted = native_build.configuration(None)
    native_build.keep_if_same(tmp_path, wanted)
    assert not (tmp_path / "object.o").exists()
    assert json.loads((tmp_path / "configuration.json").read_text()) == wanted


def test_nvcc_is_found_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(packages))
    places = {
        "CUDACXX": (tmp_path / "own" / "nvcc", tmp_path / "own" / "nvcc"),
        "CUDA_HOME": (tmp_path / "home", tmp_path / "home" / "bin" / "nvcc"),
        "CUDA_PATH": (tmp_path / "path", tmp_path / "path" / "bin" / "nvcc"),
        "PATH": (tmp_path / "bin", tmp_path / "bin" / "nvcc"),
    }
    for variable, (value, nvcc) in places.items():
        monkeypatch.setenv(variable, str(value))
        program(nvcc, "exit 0")
    for _, nvcc in places.values():
        assert native_build.find_nvcc() == str(nvcc)
        nvcc.unlink()
    pip = program(packages / "nvidia" / "cu13" / "bin" / "nvcc", "exit 0")
    assert native_build.find_nvcc() in ("/usr/local/cuda/bin/nvcc", str(pip))


# What CMake or a compiler prints, and what the last line has to name.
CONFIGURE = {
    "a compiler in CXX that is not there": (
        "CMake Error at /c/CMakeDetermineCXXCompiler.cmake:47 (message):\n"
        "  Could not find compiler set in environment variable CXX:\n\n  /no/c++.\n",
        "no C++ compiler",
    ),
    "no compiler": (
        "CMake Error at CMakeLists.txt:2 (project):\n  No CMAKE_CXX_COMPILER could be found.\n",
        "no C++ compiler",
    ),
    "a compiler that does not link": (
        'CMake Error at x.cmake:60 (message):\n  The C++ compiler\n\n    "/usr/bin/c++"\n\n'
        "  is not able to compile a simple test program.\n\n  with CMAKE_CXX_COMPILER\n",
        "CXXFLAGS",
    ),
    "another error": (
        "-- ok\nCMake Error at a.cmake:1 (message):\n  A sentence\n  in two lines\n\n-- end\n",
        "A sentence in two lines",
    ),
    "nothing": ("", "see above"),
}


@pytest.mark.parametrize("case", CONFIGURE)
def test_the_last_line_says_why_a_build_was_not_configured(case: str, tmp_path: Path) -> None:
    text, wanted = CONFIGURE[case]
    reason = native_build.why_not_configured(tmp_path, text)
    assert wanted in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ok\na.cpp:1:2: error: expected ';'\nb.cpp:1:2: error: other\n", "expected ';'"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", "MAX_JOBS=1"),
        ("", "see above"),
    ],
)
def test_the_last_line_says_why_a_build_does_not_compile(text: str, wanted: str) -> None:
    reason = native_build.why_not_compiled(text)
    assert wanted in reason and "\n" not in reason


def configure(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a build up to its configuration; the step that compiles fails at once."""
    cmake = native_build.find_cmake()
    program(
        tmp_path / "tools" / "cmake" / "data" / "cmake",
        f'[ "$1" = --build ] && exit 7\nexec {cmake} "$@"',
    )
    (tmp_path / "tools" / "cmake" / "__init__.py").write_text(
        f"CMAKE_BIN_DIR = {str(tmp_path / 'tools' / 'cmake' / 'data')!r}\n"
    )
    for name in ("csrc", "cmake", "CMakeLists.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    # No link, as the module takes its own folder for the root of the sources.
    shutil.copy(ROOT / "native_build.py", tmp_path)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from pathlib import Path; import native_build; "
        "native_build.build(Path('out/_C.so'), '0', False)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tools"), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "FACELT_EMULATION": "off", "FACELT_CUDA": "off", **variables},
        capture_output=True,
        text=True,
    )


BROKEN_NVCC = 'echo "warming up"; echo "nvcc fatal   : no \\"host\\" compiler" >&2; exit 1'
FAILURES = {
    "no compiler": ({"CXX": "/nonexistent/c++"}, "no C++ compiler"),
    "a flag that the compiler refuses": ({"CXXFLAGS": "-fno-such-flag"}, "CXXFLAGS"),
    "an unknown FACELT_CUDA": ({"FACELT_CUDA": "maybe"}, "auto, on or off, got maybe"),
    "an unusable nvcc": ({"FACELT_CUDA": "on", "CUDACXX": "{nvcc}"}, 'no "host" compiler'),
    "quotes in CMAKE_ARGS": ({"CMAKE_ARGS": "-DX='"}, "CMAKE_ARGS: No closing quotation"),
    "an unreadable MAX_JOBS": ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a positive integer"),
    "no jobs": ({"MAX_JOBS": "0"}, "MAX_JOBS: expected a positive integer"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_build_ends_in_one_line_without_a_traceback(case: str, tmp_path: Path) -> None:
    variables, wanted = FAILURES[case]
    nvcc = program(tmp_path / "broken" / "nvcc", BROKEN_NVCC)
    result = configure(tmp_path, **{k: v.format(nvcc=nvcc) for k, v in variables.items()})
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and wanted in last, result
    assert "Traceback" not in result.stderr


def test_auto_goes_on_without_an_nvcc_that_cannot_compile(tmp_path: Path) -> None:
    nvcc = program(tmp_path / "broken" / "nvcc", BROKEN_NVCC)
    arguments = "-DCMAKE_CXX_FLAGS=-DFROM_CMAKE_ARGS -DWITH='a blank'"
    configure(tmp_path, FACELT_CUDA="auto", CUDACXX=str(nvcc), CMAKE_ARGS=arguments)
    (folder,) = (tmp_path / "build").glob("cmake-*")
    reason = f'"{nvcc} cannot compile: nvcc fatal   : no \\"host\\" compiler";'
    assert reason in (folder / "build_config.h").read_text()
    assert "-DFROM_CMAKE_ARGS" in (folder / "compile_commands.json").read_text()
    assert "WITH:UNINITIALIZED=a blank" in (folder / "CMakeCache.txt").read_text()
