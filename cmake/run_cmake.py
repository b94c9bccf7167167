"""Finds and runs CMake; says in one line what ended a build."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

# What a message is about, and what a user can do.
CURES = (
    (
        r"[Kk]illed|out of memory|cannot allocate|std::bad_alloc",
        "memory ran out: set MAX_JOBS=1 to compile one file at a time",
    ),
    (
        r"OpenMP|[^\w]omp\.h|-fopenmp|lomp\b|lgomp\b",
        "the C++ compiler has no OpenMP: take g++, or install clang's (apt-get install libomp-dev)",
    ),
    (
        r"pybind11",
        "pybind11 2.13 or newer is needed: pip install 'pybind11>=2.13'",
    ),
    (
        r"CMake \d\S* or higher|cmake_minimum_required",
        "cmake 3.24 or newer is needed: pip install 'cmake>=3.24'",
    ),
    (
        r"Python_INCLUDE_DIRS|Development\.Module|\bPython\.h\b",
        "the headers of Python are needed: apt-get install python3-dev",
    ),
    (
        r"build program corresponding to|CMAKE_MAKE_PROGRAM",
        "ninja is needed: pip install ninja",
    ),
    (
        r"CMAKE_CXX_COMPILER|CXX: |C\+\+ compiler|CXX compiler|cc1plus",
        "a C++17 compiler is needed: apt-get install g++, or name one in CXX",
    ),
)


def fail(message: str) -> NoReturn:
    """Ends the build; this line is the last."""
    sys.stdout.flush()
    raise SystemExit(f"error: facelt_ext: {message}")


def configure(source: Path, folder: Path, definitions: dict[str, str]) -> None:
    arguments = ["-S", str(source), "-B", str(folder)]
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    generator_chosen = os.environ.get("CMAKE_GENERATOR") or any(a.startswith("-G") for a in extra)
    if not generator_chosen:
        arguments += ["-G", "Ninja"]
    if not generator_chosen and (ninja := _find_ninja()):
        definitions = {**definitions, "CMAKE_MAKE_PROGRAM": ninja}
    # What was found in a build environment that is gone by now.
    arguments += ["-UFACELT_NVCC", "-Upybind11_DIR"]
    arguments += [f"-D{name}={value}" for name, value in definitions.items()]
    _run([_find_cmake(), *arguments, *extra])


def build(folder: Path, target: str) -> None:
    command = [_find_cmake(), "--build", str(folder), "--target", target, "--config", "Release"]
    if jobs := _jobs():
        command += ["--parallel", jobs]
    _run(command)


def _jobs() -> str:
    given = os.environ.get("MAX_JOBS")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        fail(f"MAX_JOBS: expected a number of compilers at once, 1 or more, got {given!r}")
    if given is None and "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ:
        return ""
    return given or str(os.cpu_count() or 1)


def _run(command: list[str]) -> None:
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        fail(f"cmake 3.24 or newer is needed: pip install 'cmake>=3.24' ({error})")
    output = []
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line.rstrip())
    if process.returncode:
        fail(diagnosis(output))


def diagnosis(output: list[str]) -> str:
    """One line on what ended CMake or a compiler, from what they said."""
    reason = _cmake_error(output) or _compiler_error(output) or "CMake failed; see above"
    for pattern, cure in CURES:
        if re.search(pattern, reason):
            return f"{cure} ({reason})"
    return reason


def _cmake_error(output: list[str]) -> str:
    """The text of CMake's first error; it begins behind its place and is indented."""
    for number, line in enumerate(output):
        if not line.startswith("CMake Error"):
            continue
        text = [] if line.endswith(":") else [line.partition(": ")[2]]
        for following in output[number + 1 :]:
            if following and not following.startswith(" "):
                break
            if text and any(text) and not following:
                break
            text.append(following.strip())
        return " ".join(filter(None, text))
    return ""


def _compiler_error(output: list[str]) -> str:
    errors = [line for line in output if re.search(r"\b(error|fatal|undefined reference)\b", line)]
    return errors[0].strip() if errors else ""


def _find_cmake() -> str:
    """The cmake package of the build environment, or the one on PATH."""
    try:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except (ImportError, AttributeError):  # A folder named cmake on sys.path has no such attribute.
        return "cmake"


def _find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")
