"""Looks into a user's wheel: what is in it, what is not, and that it runs without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

IMPORT = """
import facelt_ext, torch
info = facelt_ext.build_info()
print(f"imported under torch {torch.__version__}:", info)
assert info["native_missing"] is None and "emulated" not in info["backends"]
loss = facelt_ext.RangeLoss(alpha=1.0)(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([5, 5]))
assert loss.item() == 25.0
"""


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        for needed in ("facelt_ext/py.typed", "facelt_ext/_C.pyi", "facelt_ext/samplers.py"):
            assert needed in names, f"{wheel} lacks {needed}"
        assert any(n.endswith("licenses/LICENSE") for n in names), f"{wheel} lacks its license"
        strangers = [n for n in names if not n.startswith(("facelt_ext/", "facelt_ext-"))]
        assert not strangers, f"{wheel} has files of no package: {strangers}"
        code = IMPORT
        if shutil.which("nvcc"):
            code += 'assert "cuda" in info["backends"], info["cuda_missing"]\n'
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            check=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
