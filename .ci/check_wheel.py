"""Looks into a user's wheel: what is in it, what is not, and that it installs and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

IMPORT = """
import facelt_ext, torch
assert facelt_ext.__file__.startswith(sys.prefix), facelt_ext.__file__
info = facelt_ext.build_info()
print(f"imported under torch {torch.__version__}:", info)
assert info["native_missing"] is None and "emulated" not in info["backends"]
loss = facelt_ext.RangeLoss(alpha=1.0)(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([5, 5]))
assert loss.item() == 25.0
"""


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in ("facelt_ext/py.typed", "facelt_ext/_C.pyi", "facelt_ext/samplers.py"):
        assert needed in names, f"{wheel} lacks {needed}"
    assert any(n.endswith("licenses/LICENSE") for n in names), f"{wheel} lacks its license"
    strangers = [n for n in names if not n.startswith(("facelt_ext/", "facelt_ext-"))]
    assert not strangers, f"{wheel} has files of no package: {strangers}"
    code = "import sys" + IMPORT
    if shutil.which("nvcc"):
        code += 'assert "cuda" in info["backends"], info["cuda_missing"]\n'
    with tempfile.TemporaryDirectory() as folder:
        python = empty_environment(folder)
        # Torch and numpy are those of this environment, to spare a download of gigabytes.
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command in (install, ["-c", code]):
            subprocess.run([python, *command], cwd=folder, env=clean, check=True)


def empty_environment(folder: str) -> str:
    """A new environment that sees the packages of this one behind its own; returns its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    paths = {"base": folder, "platbase": folder}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    (own / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(Path(folder) / "bin" / "python")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
