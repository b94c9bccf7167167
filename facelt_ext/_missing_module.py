"""Why the native module cannot be imported, and what to do."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BUILD = "`pip install --force-reinstall --no-deps .` in the folder of its sources builds it"
# Packages of the system that have a library, in apt's words and dnf's.
PACKAGES = {
    "libgomp": ("libgomp1", "libgomp"),
    "libomp": ("libomp5", "libomp"),
    "libstdc++": ("libstdc++6", "libstdc++"),
}


def explain(error: ImportError) -> str:
    """The cause and the cure, in sentences."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if (PACKAGE / f"_C{suffix}").exists():
        return _not_loaded(str(error))
    elsewhere = _installed_elsewhere(suffix)
    if elsewhere is not None:
        return (
            f"Python imports {PACKAGE}, which has no native module, instead of {elsewhere}, which "
            f"has one. Start Python in another folder than {PACKAGE.parent}, take that off "
            f"PYTHONPATH, or build the module there: `pip install -e .`."
        )
    others = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return f"{others[0]} is for another Python, which this one does not load. {BUILD}."
    return f"It is not in {PACKAGE}. {BUILD}."


def _not_loaded(message: str) -> str:
    """Of a module that is there."""
    library = re.match(r"(\S+): cannot open shared object file", message)
    if library is None:
        return f"It cannot be loaded: {message}. {BUILD}."
    missing = f"It needs the library {library[1]}, which is missing."
    stem = re.split(r"\.so|-", library[1])[0]
    if stem not in PACKAGES:
        return f"{missing} Install the package of your system that has it."
    apt, dnf = PACKAGES[stem]
    return f"{missing} `apt-get install {apt}` or `dnf install {dnf}` installs it."


def _installed_elsewhere(suffix: str) -> Path | None:
    """Another copy of the package on the path that has a module for this Python."""
    for entry in sys.path:
        try:
            package = Path(entry or ".").resolve() / PACKAGE.name
            if package != PACKAGE and (package / f"_C{suffix}").exists():
                return package
        except OSError:
            # Not to be searched, or relative to a folder that is gone. Python passes over it, too.
            continue
    return None
