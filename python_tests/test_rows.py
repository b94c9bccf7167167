"""The CPU's vector loops for every instruction set, of which a test run would use only the best."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CASES = Path(__file__).with_name("rows_cases.cpp")


def test_every_instruction_set_agrees_with_plain_loops(tmp_path):
    program = tmp_path / "rows"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-Wno-psabi"]
    subprocess.run([*compiler, str(CASES), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[0] == "baseline"
