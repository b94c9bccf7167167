"""Metadata is in pyproject.toml; native_build.py builds the native module."""

from __future__ import annotations

import sys
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.build import build
except ImportError:  # setuptools before 62.4
    from distutils.command.build import build

if int(setuptools.__version__.split(".")[0]) < 61:
    sys.exit(
        f"error: setuptools 61 or newer is needed, this is {setuptools.__version__}: "
        "`pip install -U setuptools` gets a new one"
    )

# Build frontends run this file without its folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_build  # noqa: E402


class Licensed(Distribution):
    """No form of `license` in pyproject.toml is read by setuptools before and from 77 on."""

    def parse_config_files(self, *args: object, **options: object) -> None:
        super().parse_config_files(*args, **options)
        self.metadata.license = self.metadata.license_expression = "Apache-2.0"


class CleanBuild(build):
    def run(self) -> None:
        native_build.remove_earlier_builds()
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        # Here, as setuptools clears `inplace` while it builds.
        self.development = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, extension: Extension) -> None:
        native_build.build(
            Path(self.get_ext_fullpath(extension.name)).resolve(),
            self.distribution.get_version(),
            self.development,
        )


with native_build.one_build_at_a_time():
    setup(
        distclass=Licensed,
        ext_modules=[Extension("facelt_ext._C", sources=[])],
        cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    )
