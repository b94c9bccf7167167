"""Drives CMake, which alone knows how the native module is built (CMakeLists.txt)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_VARIABLES = ("FACELT_CUDA", "FACELT_CUDA_ARCHS", "FACELT_EMULATION", "FACELT_SANITIZE")


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        # One folder for a Python version, kept between builds: a second build is incremental.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_cmake()
        definitions = {
            "FACELT_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            **{name: os.environ[name] for name in BUILD_VARIABLES if name in os.environ},
        }
        if ninja := find_ninja():
            definitions["CMAKE_MAKE_PROGRAM"] = ninja
        # What an earlier build was told, or found in a build environment that is gone by now.
        forgotten = [*BUILD_VARIABLES, "FACELT_NVCC", "pybind11_DIR"]
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-U{name}" for name in forgotten]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)
        built = build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        output.parent.mkdir(parents=True, exist_ok=True)
        # A file that is replaced, not written over: the old one may be mapped by a running process.
        output.unlink(missing_ok=True)
        shutil.copy2(built, output)


def find_cmake() -> str:
    """The cmake package of the build environment, or the one on PATH."""
    try:
        import cmake
    except ImportError:
        return "cmake"
    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")


setup(
    ext_modules=[Extension("facelt_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
