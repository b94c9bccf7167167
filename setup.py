"""Drives CMake, which alone knows how the native module is built (CMakeLists.txt)."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.build import build
except ImportError:  # setuptools < 62.4
    from distutils.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))

import build_folder  # noqa: E402
import run_cmake  # noqa: E402

SETUPTOOLS = int(setuptools.__version__.partition(".")[0])
if SETUPTOOLS < 61:
    run_cmake.fail(
        "setuptools 61 or newer is needed, which reads pyproject.toml, not "
        f"{setuptools.__version__}: pip install 'setuptools>=61'"
    )


class Build(build):
    def run(self) -> None:
        build_folder.lock()
        # Modules that were deleted since the last build, and what an interrupted one left.
        for leftover in (self.build_lib, Path(self.build_base) / f"bdist.{self.plat_name}"):
            shutil.rmtree(leftover, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        build_folder.lock()
        self.development = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, extension: Extension) -> None:
        folder = (
            build_folder.development_folder() if self.development else build_folder.clean_folder()
        )
        definitions = {
            "FACELT_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
        }
        names = [name for name in build_folder.FACELT_VARIABLES if name in os.environ]
        definitions.update((name, os.environ[name]) for name in names)
        run_cmake.configure(ROOT, folder, definitions)
        if self.development:
            build_folder.remember(folder)
        run_cmake.build(folder, "_C")
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A file that is replaced, not written over: the old one may be mapped by a running process.
        output.unlink(missing_ok=True)
        shutil.copy2(folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", output)


setup(
    # setuptools < 77 knows no license expressions, newer ones no other form in pyproject.toml.
    **{"license_expression" if SETUPTOOLS >= 77 else "license": "Apache-2.0"},
    ext_modules=[Extension("facelt_ext._C", sources=[])],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
)
