"""Where a build happens, and what has to be gone before it starts."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACELT_VARIABLES = ("FACELT_CUDA", "FACELT_CUDA_ARCHS", "FACELT_EMULATION", "FACELT_SANITIZE")
# What CMake, compilers and nvcc read when a folder is configured, and never again.
CONFIGURING = (
    *FACELT_VARIABLES,
    *("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "OpenMP_ROOT", "pybind11_DIR"),
    *("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
)
_locks = []


def lock() -> None:
    """Waits for other builds of this checkout; held until the process ends."""
    if _locks:
        return
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    file = (folder / ".lock").open("w")
    _locks.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("facelt_ext: another build of these sources is running, waiting for it", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # Some network file systems have no locks.


def clean_folder() -> Path:
    """An empty folder for a build whose objects nobody uses again."""
    folder = ROOT / "build" / f"cmake-{_abi()}"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def development_folder() -> Path:
    """The folder that is kept for the next build, started anew if it was configured otherwise."""
    folder = ROOT / "build" / f"cmake-{_abi()}-development"
    if folder.exists():
        try:
            before = json.loads(_record(folder).read_text())
        except (OSError, ValueError):
            before = {}
        now = _configuration()
        changed = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        if changed:
            print(f"facelt_ext: {', '.join(changed)} changed: {folder} starts anew", flush=True)
            shutil.rmtree(folder)
    return folder


def remember(folder: Path) -> None:
    """Notes what a development folder was configured with."""
    _record(folder).write_text(json.dumps(_configuration(), indent=1))


def _record(folder: Path) -> Path:
    return folder / "facelt_configuration.json"


def _abi() -> str:
    return sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag


def _configuration() -> dict[str, str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name in CONFIGURING or name.startswith("CMAKE_")
    }
    return {
        **variables,
        "source folder": str(ROOT),
        "Python": sys.executable,
        "compiler": _identity(os.environ.get("CXX") or "c++"),
        "nvcc": ", ".join(_nvccs()),
    }


def _identity(compiler: str) -> str:
    """The first line that a compiler says of itself."""
    command = compiler.split()
    path = shutil.which(command[0])
    if path is None:
        return f"{compiler} (missing)"
    said = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True)
    return f"{path}: {said.stdout.partition(chr(10))[0]}"


def _nvccs() -> list[str]:
    """Each nvcc that cmake/cuda.cmake might take, with the time of its file."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [f"{folder}/bin/nvcc" for folder in folders if folder]
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    paths = [os.path.realpath(path) for path in candidates if path and os.path.exists(path)]
    return [f"{path} ({os.stat(path).st_mtime_ns})" for path in paths]
