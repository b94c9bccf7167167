"""Builds the native module with CMake: which tools, which folder, and what to say when it fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
OPTIONS = ("FACELT_CUDA", "FACELT_CUDA_ARCHS", "FACELT_EMULATION", "FACELT_SANITIZE")
OLDEST_CMAKE = (3, 24)
RECORD = "configuration.json"

# What compilers and CMake read from the environment when a folder is configured.
READ = re.compile(
    r"FACELT_(CUDA|CUDA_ARCHS|EMULATION|SANITIZE)|CXX|CXXFLAGS|LDFLAGS|CPATH|CPLUS_INCLUDE_PATH"
    r"|LIBRARY_PATH|COMPILER_PATH|GCC_EXEC_PREFIX|SDKROOT|MACOSX_DEPLOYMENT_TARGET"
    r"|CUDA_HOME|CUDA_PATH|CUDACXX|CUDAHOSTCXX|CUDAFLAGS|CUDAARCHS|NVCC_\w+|CMAKE_\w+"
)
# These choose how the build runs, not what it makes.
NOT_READ = {"CMAKE_BUILD_PARALLEL_LEVEL", "CMAKE_GENERATOR", "CMAKE_COLOR_DIAGNOSTICS"}


def fail(reason: str) -> NoReturn:
    # SystemExit, as every other exception gets a traceback below what the user has to read.
    raise SystemExit(f"error: {reason}")


@contextlib.contextmanager
def one_build_at_a_time() -> Iterator[None]:
    """Waits for another build of these sources: both write to build/ and the .egg-info folder."""
    try:
        (ROOT / "build").mkdir(exist_ok=True)
        lock = open(ROOT / "build" / ".lock", "w")  # noqa: SIM115
    except OSError:  # Sources that cannot be written to; setuptools says more of it.
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"facelt_ext: waiting for another build of {ROOT}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # A file system without locks.
            pass
        yield


def remove_earlier_builds() -> None:
    """Removes what setuptools copied for an earlier wheel, which it would pack again."""
    for pattern in ("lib*", "bdist.*"):
        for folder in (ROOT / "build").glob(pattern):
            shutil.rmtree(folder)


def build(output: Path, version: str, development: bool) -> None:
    """Builds the native module and puts it at `output`.

    A development build is incremental, where an earlier one had the same configuration. Any other
    build starts from nothing.
    """
    cmake, ninja, arguments = find_cmake(), find_ninja(), cmake_arguments()
    jobs, nvcc = parallel_jobs(), find_nvcc()
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    if development:
        keep_if_same(folder, configuration(nvcc))
    else:
        folder = folder.with_name(f"{folder.name}-wheel")
        shutil.rmtree(folder, ignore_errors=True)
    definitions = {
        "FACELT_VERSION": version,
        "FACELT_NVCC": nvcc or "",
        "Python_EXECUTABLE": sys.executable,
        **{name: os.environ[name] for name in OPTIONS if name in os.environ},
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(folder)]
    # An earlier build may have found it in a build environment that is gone by now.
    configure.append("-Upybind11_DIR")
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    if not any(argument.startswith("-G") for argument in arguments):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    (folder / "failure.txt").unlink(missing_ok=True)
    code, text = run([*configure, *arguments])
    if code:
        # The next build starts anew, as what was missing may be there then.
        (folder / RECORD).unlink(missing_ok=True)
        fail(why_not_configured(folder, text))
    code, text = run([cmake, "--build", str(folder), "--target", "_C", *jobs])
    if code:
        fail(why_not_compiled(text))
    output.parent.mkdir(parents=True, exist_ok=True)
    # A file that is replaced, not written over: the old one may be mapped by a running process.
    output.unlink(missing_ok=True)
    shutil.copy2(folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", output)


def keep_if_same(folder: Path, wanted: dict[str, str]) -> None:
    """Removes `folder` if it was configured otherwise, and says what differs."""
    record = folder / RECORD
    try:
        before = dict(json.loads(record.read_text()))
    except (OSError, TypeError, ValueError):
        before = None
    if before != wanted:
        if before:
            names = sorted(n for n in {*before, *wanted} if before.get(n) != wanted.get(n))
            changes = ", ".join(f"{n} was {before.get(n)!r}, is {wanted.get(n)!r}" for n in names)
            print(f"facelt_ext: {folder} was configured otherwise and starts anew: {changes}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(json.dumps(wanted, indent=1))


def configuration(nvcc: str | None) -> dict[str, str]:
    """All that decides what a build makes, but for the sources."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [find_program("c++", "g++", "clang++")]
    return {
        "sources": str(ROOT),
        "Python": f"{sys.version} in {sys.base_prefix}",
        "compiler": version_of(compiler),
        "nvcc": version_of([nvcc]),
        **{n: v for n, v in os.environ.items() if READ.fullmatch(n) and n not in NOT_READ},
    }


def version_of(command: list[str | None]) -> str:
    program = shutil.which(command[0] or "")
    if program is None:
        return "none"
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        return f"{program}: {error}"
    return f"{Path(program).resolve()}: {' '.join(result.stdout.split())}"


def cmake_arguments() -> list[str]:
    try:
        return shlex.split(os.environ.get("CMAKE_ARGS", ""))
    except ValueError as error:
        fail(f"CMAKE_ARGS: {error}, in {os.environ['CMAKE_ARGS']!r}")


def parallel_jobs() -> list[str]:
    """Arguments of `cmake --build`; without MAX_JOBS its own default holds, as many as cores."""
    jobs = os.environ.get("MAX_JOBS", "").strip()
    if not jobs:
        return []
    if not jobs.isdecimal() or int(jobs) == 0:
        fail(f"MAX_JOBS: expected a positive integer, got {jobs!r}")
    return ["--parallel", jobs]


def find_program(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def find_cmake() -> str:
    """The cmake package of the build environment, or the one on PATH."""
    cure = "`pip install cmake` gets a new one"
    try:
        from cmake import CMAKE_BIN_DIR

        program = str(Path(CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        program = find_program("cmake", "cmake3")
    oldest = ".".join(map(str, OLDEST_CMAKE))
    if program is None:
        fail(f"cmake {oldest} or newer is needed, and none was found: {cure}")
    text = version_of([program])
    found = re.search(r"cmake\d? version (\d+)\.(\d+)", text)
    if found is None:
        fail(f"cmake {oldest} or newer is needed, and {program} does not run: {cure}")
    if tuple(map(int, found.groups())) < OLDEST_CMAKE:
        fail(f"cmake {oldest} or newer is needed, {program} is {'.'.join(found.groups())}: {cure}")
    return program


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR

        program = find_program(str(Path(BIN_DIR) / "ninja"))
    except ImportError:
        program = None
    program = program or find_program("ninja", "ninja-build")
    if program is None:
        fail("ninja is needed, and none was found: `pip install ninja` gets it")
    return program


def find_nvcc() -> str | None:
    """nvcc where a user would expect it; pip's is found from pip's isolated build, too."""
    variables = ("CUDA_HOME", "CUDA_PATH")
    named = [Path(os.environ[name]) / "bin" / "nvcc" for name in variables if os.environ.get(name)]
    # In pip's isolated build sys.path has not the folders of the environment that pip installs to.
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    packages += [*sys.path, site.getusersitepackages()]
    from_pip = [p for folder in packages if folder for p in Path(folder).glob("nvidia/*/bin/nvcc")]
    own = os.environ.get("CUDACXX")
    candidates = [own, *named, "nvcc", "/usr/local/cuda/bin/nvcc", *sorted(from_pip)]
    return find_program(*[str(candidate) for candidate in candidates if candidate])


def run(command: list[str]) -> tuple[int, str]:
    """Runs a command, shows what it prints, and returns its exit code and that text."""
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def why_not_configured(folder: Path, text: str) -> str:
    with contextlib.suppress(OSError):  # CMakeLists.txt writes it where it knows the reason.
        return (folder / "failure.txt").read_text().strip()
    own = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "CXX may name one"
    if "simple test program" in text and "CXX" in text:
        return (
            "the C++ compiler cannot compile a simple program, as said above: see CXX, CXXFLAGS, "
            f"LDFLAGS and whether its C library's headers are installed ({own})"
        )
    if re.search(r"CMAKE_CXX_COMPILER|environment\s+variable\s+CXX", text):
        return f"no C++ compiler was found: `apt-get install g++` gets one ({own})"
    error = re.search(r"CMake Error[^\n]*\n(.*?\S.*?)(\n\s*\n|\Z)", text, re.DOTALL)
    reason = " ".join(error.group(1).split()) if error else "see above"
    return f"CMake could not configure the build: {reason}"


def why_not_compiled(text: str) -> str:
    if re.search(r"Killed|signal 9|out of memory|cannot allocate memory|bad_alloc", text, re.I):
        return "a compiler ran out of memory: MAX_JOBS=1 runs one at a time"
    error = re.search(r"^.*\b(error|fatal)\b.*$", text, re.M | re.I)
    return f"the native module does not compile: {error.group().strip() if error else 'see above'}"
